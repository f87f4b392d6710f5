"""Foreign shards -> shards that are mapped as they are; and what the commands that make shards have in common."""

import argparse
import contextlib
import fnmatch
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

import configs
from configs import Config
from refocused import arguments, files, locks
from refocused.entry import here, near
from refocused.shards import shard
from refocused.shards.find import find_files, find_sources, local_path
from refocused.shards.formats import BIN_DTYPES, KINDS, ROW_RULE, TokenFile, zip_identity
from refocused.shards.notes import shares
from refocused.shards.shard import BLOCK, DataError, Shard, WriteError
from refocused.shards.tokenizers import HELP, find

ALIGNMENT = 64  # of the first token in a file that is written here
IN_MEMORY = 1 << 27  # bytes of tokens; a larger shard waits in a temporary file for its number of tokens
FINE_TUNING = "1e-4"  # the rate in commands that train an imported model; the demo's is for models as small as that
TOTALS = ("files", "kept", "tokens", "documents", "padding", "largest_id", "skipped")
CSV = "import sys, pandas; pandas.read_csv(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)"
WAYS = {  # what others keep text in, and one line that makes of it, in the same folder, what is read
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"), "tar xf {0} -C {1}"),
    ".zip": "unzip {0} -d {1}", ".csv": f'python -c "{CSV}" {{0}} {{0}}.jsonl',
}  # fmt: skip


# ---- a shard


def write_shard(path: Path, dtype: np.dtype, chunks: Iterable[np.ndarray], note: dict[str, Any]) -> None:
    """Writes tokens as a stored and aligned `input_ids`; the same bytes for the same tokens.

    The note becomes the zip's comment (JSON); it is read after the last chunk, so the chunks' producer may fill it in.
    Atomic: whoever finds the name finds the whole file, also after a crash. Raises WriteError, leaving nothing behind.
    """

    def write(file: IO[bytes]) -> None:
        with (
            tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(path.parent)) as tokens,
            zipfile.ZipFile(file, "w") as archive,
        ):
            for chunk in chunks:
                tokens.write(np.ascontiguousarray(chunk, dtype).data)
            size = tokens.tell()
            header = io.BytesIO()  # numpy pads it to a multiple of 64 bytes
            shape = {"descr": dtype.str, "fortran_order": False, "shape": (size // dtype.itemsize,)}
            np.lib.format.write_array_header_1_0(header, shape)
            entry = zipfile.ZipInfo("input_ids.npy", (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            large = size >= 1 << 31
            pad = -(30 + len(entry.filename) + (20 if large else 0) + 4) % ALIGNMENT
            entry.extra = b"\x35\xd9" + pad.to_bytes(2, "little") + bytes(pad)  # the field that zipalign uses
            with archive.open(entry, "w", force_zip64=large) as member:
                member.write(header.getvalue())
                tokens.seek(0)
                shutil.copyfileobj(tokens, member, BLOCK)
            archive.comment = json.dumps(note, sort_keys=True).encode()

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, write)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {files.why(error)}; nothing is left of it") from error


def read_note(path: Path) -> dict[str, Any]:
    """The note of a shard that write_shard made, {} for any other file and for none."""
    with contextlib.suppress(OSError):
        if path.is_file():  # a FIFO would wait for a writer
            with open(path, "rb") as file:
                return shard.zip_note(file)
    return {}


def is_intact(folder: Path, path: str) -> bool:
    """Whether this is a mapped shard whose content has the checksum that its zip directory names. Reads all of it."""
    with contextlib.suppress(DataError, OSError):
        return Shard.open(folder, path).has_its_checksum()
    return False


# ---- foreign shards


def prepare(source: Path, target: Path, vocab_size: int, end_of_text: int | None, workers=0, **options) -> Counter:
    """Converts .npz, .npy and .bin files, source or all below it, to mapped shards of the same relative name in target.

    What is there already, from the same source and intact, is kept. A bad file does not stop the others; the DataError
    at the end names all of them. options: convert's. Returns totals of TOTALS and notes.ROWS.
    """
    if end_of_text is not None and not 0 <= end_of_text < vocab_size:
        rule = f"is no id below vocab_size={vocab_size}; name one with --end_of_text"
        raise DataError(f"end_of_text={end_of_text} {rule}")
    named = source
    source, everything = find_sources(source, but=(target,))
    paths = [path for path in everything if path.lower().endswith(KINDS)]
    if not paths:
        raise DataError(absent(named, ".npz, .npy or .bin file", everything))
    if target.resolve() == source.resolve():
        raise DataError(f"{target} is the source; mapped shards need a folder of their own")
    made: dict[str, str] = {}
    for path in paths:
        if (twin := made.setdefault(mapped_name(path), path)) != path:
            raise DataError(f"{path} and {twin} would become one shard; rename one of them")
    with locks.filling(target):
        for name in made:
            if os.path.lexists(target / name) and "source" not in read_note(target / name):  # tokenize's have "sources"
                raise DataError(f"{target / name} was not made by this command, and stays; name another folder")
        return convert_all(source, target, made, workers, vocab_size=vocab_size, end_of_text=end_of_text, **options)


def others(folder: Path, paths: list[str]) -> str:
    """For a message that something is missing: which files are in a folder instead, and the command that reads them."""
    for kinds, command in ((KINDS, "prepare"), ((".txt", ".jsonl", ".parquet"), "tokenize")):
        if found := [path for path in paths if path.lower().endswith(kinds)]:
            way = here(f"python data.py {command} SRC DST")
            return f"; `{way}` makes shards of its {len(found)} such as {found[0]}"
    for suffix, way in WAYS.items():
        if found := [path for path in paths if path.lower().endswith(suffix)]:
            file = folder / found[0]
            return f"; `{here(way.format(near(file), near(file.parent)))}` makes text of {found[0]}"
    return f", but {len(paths)} others such as {paths[0]}" if paths else ""


def absent(source: Path, kinds: str, paths: list[str]) -> str:
    """The message that a command cannot read a file, or finds nothing to read in a folder with these files."""
    way = others(source.parent if source.is_file() else source, paths)
    if source.is_file():
        return f"{source} is no {kinds}{way if way.startswith(';') else ''}"
    return f"{source} and its subfolders have no {kinds}{way}"


def convert_all(source: Path, target: Path, paths: dict[str, str], workers: int, **settings: Any) -> Counter:
    """convert for {path in target: path in source} by several threads, target being locked; the summed reports."""
    files.remove_stale(target)
    totals, errors, what = Counter(dict.fromkeys(TOTALS, 0)), [], f"preparing {target}"
    # inflating, checksums and numpy release the GIL
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool, tqdm(total=len(paths), desc=what, unit="file") as bar:
        try:
            jobs = [pool.submit(convert, source / path, target, name, settings) for name, path in paths.items()]
            for job in as_completed(jobs):
                try:
                    add(totals, job.result())
                except WriteError:  # the disk is full or read-only: the others would fail alike
                    raise
                except DataError as error:
                    errors.append(str(error))
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if errors:
        raise DataError("\n".join([f"{what}: {len(errors)} of {len(paths)} files failed", *sorted(errors)]))
    return totals


def convert(file: Path, target: Path, path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Makes target/path from file, which it may be itself; returns the report, with kept=1 if it is there.

    settings: TokenFile's arguments; and maker, (identity, name) of the tokenizer that the shard notes, else the file's.
    """
    maker = settings.get("maker") or shard.made_with(read_note(file))
    source = TokenFile(file, **{key: value for key, value in settings.items() if key != "maker"})
    note = source.note
    if maker:
        note |= {"tokenizer": maker[0], "tokenizer_name": maker[1]}
    old = read_note(target / path)
    if note.items() <= old.items() and is_intact(target, path):
        return {**old["report"], "kept": 1}
    report: dict[str, Any] = {}
    write_shard(target / path, source.out_dtype, source.chunks(report), {**note, "report": report})
    return report


def mapped_name(path: str) -> str:
    return path[:-4] + ".npz"  # each of KINDS has four letters; "*.npz" does not find an .NPZ


def add(totals: Counter, report: dict[str, int]) -> None:
    """One more file's report."""
    largest = max(totals["largest_id"], report.get("largest_id", 0))
    totals.update({"files": 1, **report})
    totals["largest_id"] = largest


def unpack(source: Path, cache: Path, paths: list[str], vocab_size: int, end_of_text: int | None) -> None:
    """Makes the shards of a cache that it lacks, or that were made from other sources. Raises DataError, WriteError."""
    if all(is_unpacked(source / path, cache / path) for path in paths):  # nothing is written, not even the lock
        return
    with locks.filling(cache):
        todo = [path for path in paths if not is_unpacked(source / path, cache / path)]
        if not todo:  # another process was faster
            return
        origins = (TokenFile(source / path, vocab_size, end_of_text) for path in todo)
        needed = sum(origin.most * origin.out_dtype.itemsize for origin in origins)
        if lack := files.too_small(cache, needed):
            what = f"{len(todo)} shards of {source} unpack to {needed / 1e9:.2f} GB"
            raise WriteError(f"{what}, {lack}; point cache_dir at a larger disk or lower max_files")
        print(f"unpacking {len(todo)} shards, {needed / 1e9:.2f} GB, into {cache}, once", file=sys.stderr, flush=True)
        same = dict(zip(todo, todo, strict=True))
        if text := shares(convert_all(source, cache, same, 0, vocab_size=vocab_size, end_of_text=end_of_text)):
            print(text, file=sys.stderr, flush=True)


def is_unpacked(source: Path, target: Path) -> bool:
    """Whether target was made from this source as it is now, by today's rule; by the zip directories alone."""
    note = read_note(target)
    if note.get("rule") != ROW_RULE:
        return False
    try:
        with open(source, "rb") as file:
            return note["source"] == zip_identity(shard.zip_members(file, source))
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}") from error


# ---- command line


def announce(totals: Counter, folder: Path, tokenizer: str, vocab_size: int | None, begin: float) -> None:
    """Print what was made since `begin`, and how to train on it."""
    print(
        f"{totals['files']} shards ({totals['kept']} were there), {totals['tokens']:,} tokens, {totals['padding']:,} "
        f"padding dropped, {totals['documents']:,} documents, {totals['skipped']:,} empty or bad ones skipped, largest "
        f"id {totals['largest_id']}, {time.perf_counter() - begin:.1f} s"
    )
    if text := shares(totals):
        print(text)
    print(f"train on it: {training_command(folder, tokenizer, vocab_size)}")


def training_command(folder: Path, tokenizer: str, vocab_size: int | None) -> str:
    """A whole command that trains on a set, in folders of its own: an imported model with its tokenizer, or the demo's."""
    name = folder.absolute().name
    keys = {"data_dir": folder, "output_dir": f"out/{name}", "logging_dir": f"logs/{name}", "tokenizer": tokenizer}
    if model := imported_model(tokenizer):
        demo, _ = configs.load([str(configs.DEMO)])
        keys |= {"init_from": tokenizer, **{key: value for key, value in model.items() if value != getattr(demo, key)}}
        keys["learning_rate"] = FINE_TUNING
    else:
        keys["vocab_size"] = vocab_size or find(tokenizer).size
    if any(not fnmatch.fnmatch(Path(path).name, Config.tokenized_file_pattern) for path in find_files(folder, "*.npz")):
        keys["tokenized_file_pattern"] = "*.npz"
    return here(f"python train.py configs/demo.py {shlex.join(f'{key}={value}' for key, value in keys.items())}")


def imported_model(tokenizer: str) -> dict[str, Any]:
    """The keys of the model that `ckpt.py import` put beside a tokenizer; {} where it did not."""
    keys = [*(key for key, _ in configs.describe()[0][1]), "sequence_length"]
    for state in sorted(Path(tokenizer).glob("checkpoint-*/state.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            content = json.loads(state.read_bytes())
            if content["imported_from"]:
                return {key: content["config"][key] for key in keys}
    return {}


def common_arguments(**folders: Callable[[str], Any]) -> argparse.ArgumentParser:
    """What the commands about shards have in common: a parent for their parsers."""
    parser = argparse.ArgumentParser(add_help=False)
    for folder, kind in folders.items():
        parser.add_argument(folder, type=kind)
    parser.add_argument("--tokenizer", metavar="NAME", help=f"{HELP} (default: {Config.tokenizer})")
    parser.add_argument("--vocab_size", type=arguments.positive, help="number of token ids (default: the tokenizer's)")
    parser.add_argument(
        "--workers", type=arguments.positive, default=os.cpu_count(), help="threads (default: one for each core)"
    )
    return parser


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="data.py prepare", description="Compressed or padded .npz, .npy and .bin -> shards that are mapped.",
        parents=[common_arguments(SRC=local_path, DST=local_path)],
    )  # fmt: skip
    parser.add_argument(
        "--bin_dtype", choices=BIN_DTYPES, help="type of the ids in .bin files (default: what their content shows)"
    )
    parser.add_argument("--end_of_text", type=int, help="id between documents (default: the tokenizer's)")
    parser.add_argument("--overlap", type=int, help="tokens of the row before that a row repeats (default: as found)")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    tokenizer = args.tokenizer or str(Config.tokenizer)
    known = find(tokenizer)
    vocab_size, end_of_text = args.vocab_size or known.size, known.end if args.end_of_text is None else args.end_of_text
    named = args.tokenizer and args.end_of_text is None  # what nobody named is not known
    totals = prepare(
        args.SRC, args.DST, vocab_size, end_of_text, args.workers, bin_dtype=args.bin_dtype, overlap=args.overlap,
        maker=(known.identity, known.name) if named else None,
    )  # fmt: skip
    if not args.tokenizer and (args.vocab_size or args.end_of_text is not None):
        tokenizer = "none"  # its ids are not those of the default
    announce(totals, args.DST, tokenizer, vocab_size, begin)
    return 0
