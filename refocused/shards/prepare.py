"""Foreign shards -> shards that are read in place; and what the commands that make shards have in common."""

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

import configs
from configs import Config
from refocused import entry, files, locks
from refocused.entry import here
from refocused.shards import shard, write
from refocused.shards.find import find_files, find_sources, local_path
from refocused.shards.formats import BIN_DTYPES, FLAT, KINDS, MAX_RATIO, RULE, TokenFile, zip_identity
from refocused.shards.shard import DataError, Shard, WriteError
from refocused.shards.tokenizers import HELP, find

TOTALS = ("files", "kept", "tokens", "documents", "padding", "largest_id", "skipped")


def is_intact(folder: Path, path: str) -> bool:
    """Whether this is a mapped shard whose content has the checksum that its zip directory names. Reads all of it."""
    try:
        Shard.open(folder, path)
        for _ in TokenFile(Path(folder, path), 1 << 32, None).read({}):
            pass
        return True
    except DataError:
        return False


def prepare(
    source: Path, target: Path, vocab_size: int, end_of_text: int | None, workers: int = 0, **options
) -> Counter:
    """Converts .npz, .npy and .bin files, source or all below it, to mapped shards of the same relative name in target.

    What is there already, from the same source and intact, is kept. A bad file does not stop the others; the DataError
    at the end names all of them. options: convert's. Returns totals of TOTALS and shard.ROWS.
    """
    if end_of_text is not None and not 0 <= end_of_text < vocab_size:
        raise DataError(
            f"end_of_text={end_of_text} is no id below vocab_size={vocab_size}; name one with --end_of_text"
        )
    named = source
    source, everything = find_sources(source, but=(target,))
    paths = [path for path in everything if path.lower().endswith(KINDS)]
    if not paths:
        raise DataError(absent(named, ".npz, .npy or .bin file", everything))
    if Path(target).resolve() == Path(source).resolve():
        raise DataError(f"{target} is the source; mapped shards need a folder of their own")
    made: dict[str, str] = {}
    for path in paths:
        if (twin := made.setdefault(mapped_name(path), path)) != path:
            raise DataError(f"{path} and {twin} would become one shard; rename one of them")
    with locks.filling(target):
        return convert_all(source, target, paths, vocab_size, end_of_text, workers, **options)


WAYS = {  # what others keep text in, and one line that turns it into what is read
    ".parquet": "python -c \"import pandas; pandas.read_parquet('{0}').to_json('{0}.jsonl', orient='records', lines=True)\"",
    ".csv": "python -c \"import pandas; pandas.read_csv('{0}').to_json('{0}.jsonl', orient='records', lines=True)\"",
    ".tar": "tar xf {0}", ".tar.gz": "tar xf {0}", ".tgz": "tar xf {0}", ".zip": "unzip {0}",
}  # fmt: skip


def others(paths: list[str]) -> str:
    """What lies there instead, and what reads it, behind a message that something is missing."""
    for kinds, command in ((KINDS, "prepare"), ((".txt", ".jsonl"), "tokenize")):
        if fitting := [path for path in paths if path.lower().endswith(kinds)]:
            way = here(f"python data.py {command} SRC DST")
            return f"; `{way}` makes shards of its {len(fitting)} such as {fitting[0]}"
    for suffix, way in WAYS.items():
        if fitting := [path for path in paths if path.lower().endswith(suffix)]:
            return f"; `{here(way.format(fitting[0]))}` makes text of {fitting[0]}"
    return f", but {len(paths)} others such as {paths[0]}" if paths else ""


def absent(source: Path, kinds: str, paths: list[str]) -> str:
    """The message that a file, or a folder in which these were found, is nothing that a command reads."""
    if source.is_file():
        return f"{source} is no {kinds}{others(paths) if others(paths)[:1] == ';' else ''}"
    return f"{source} and its subfolders have no {kinds}{others(paths)}"


def convert_all(
    source: Path, target: Path, paths: list[str], vocab_size: int, end_of_text: int | None, workers: int = 0, **options
) -> Counter:
    """prepare for these paths, the target being locked."""
    files.remove_stale(target)
    settings = {"vocab_size": vocab_size, "end_of_text": end_of_text, **options}
    jobs = [(source / path, target, path, settings) for path in paths]
    return run_jobs(convert, jobs, workers, f"preparing {target}")


def convert(file: Path, target: Path, path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Makes target/path from file, which it may be itself; returns the report, with kept=1 if it is there.

    settings: TokenFile's arguments; and maker, (identity, name) of the tokenizer for the shard to note, else what the file
    notes.
    """
    maker = settings.get("maker") or shard.made_with(write.read_note(file))
    source = TokenFile(file, **{key: value for key, value in settings.items() if key != "maker"})
    path = mapped_name(path)
    old = write.read_note(target / path)
    settled = {**source.note, **({"tokenizer": maker[0], "tokenizer_name": maker[1]} if maker else {})}
    if settled.items() <= old.items() and is_intact(target, path):
        return {**old["report"], "kept": 1}
    report: dict[str, Any] = {}
    note = {**settled, "report": report}
    write.write_shard(target / path, source.out_dtype, source.count, source.chunks(report), note)
    return report


def mapped_name(path: str) -> str:
    return path[:-4] + ".npz" if path.lower().endswith(FLAT) else path


def run_jobs(work: Callable[..., dict[str, Any]], jobs: list[tuple], workers: int, what: str) -> Counter:
    """work(*job) for each job in several processes, with a bar; the summed reports, or a DataError of all errors."""
    totals = Counter(dict.fromkeys(TOTALS, 0))
    begin, errors = time.perf_counter(), []
    with process_pool(workers, len(jobs)) as pool, tqdm(total=len(jobs), desc=what, unit="file") as bar:
        for future in as_completed([pool.submit(work, *job) for job in jobs]):
            try:
                report = future.result()
            except WriteError:  # the disk is full or read-only: the others would fail alike
                pool.shutdown(cancel_futures=True)
                raise
            except DataError as error:
                errors.append(str(error))
            else:
                add(totals, report)
            bar.set_postfix_str(f"{totals['tokens'] / (time.perf_counter() - begin) / 1e6:.1f}M tok/s", refresh=False)
            bar.update()
    if errors:
        raise DataError("\n".join([f"{what}: {len(errors)} of {len(jobs)} files failed", *sorted(errors)]))
    return totals


def add(totals: Counter, report: dict[str, int]) -> None:
    """One more file's report."""
    largest = max(totals["largest_id"], report.get("largest_id", 0))
    totals.update({"files": 1, **report})
    totals["largest_id"] = largest


def process_pool(workers: int, jobs: int) -> Executor:
    context = multiprocessing.get_context("spawn")  # a fork copies other threads' locks in whatever state they are
    try:
        return ProcessPoolExecutor(min(workers or os.cpu_count() or 1, jobs), context, die_with_parent)
    except OSError as error:  # its locks are files there
        print(f"working in one process: /dev/shm cannot be written ({error.strerror})", file=sys.stderr)
        return ThreadPoolExecutor(1)


def die_with_parent() -> None:
    """Otherwise a pool's worker outlives a parent that was killed, and writes on beside its successor.

    A Ctrl-C, which reaches both, is the parent's to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
            raise WriteError(
                f"{len(todo)} shards of {source} unpack to {needed / 1e9:.2f} GB, {lack}; point cache_dir at a larger "
                "disk or lower max_files"
            )
        print(f"unpacking {len(todo)} shards, {needed / 1e9:.2f} GB, into {cache}, once", file=sys.stderr, flush=True)
        if text := shard.shares(convert_all(source, cache, todo, vocab_size, end_of_text)):
            print(text, file=sys.stderr, flush=True)


def is_unpacked(source: Path, target: Path) -> bool:
    """Whether target was made from this source as it is now, by today's rule; by the zip directories alone."""
    note = write.read_note(target)
    if note.get("rule") != RULE:
        return False
    with open(source, "rb") as file:
        return note["source"] == zip_identity(shard.zip_members(file, source))


# ---- command line


def announce(totals: Counter, folder: Path, tokenizer: str, vocab_size: int | None, seconds: float) -> None:
    """Print what was made, and how to train on it."""
    print(
        f"{totals['files']} shards ({totals['kept']} were there), {totals['tokens']:,} tokens, {totals['padding']:,} "
        f"padding dropped, {totals['documents']:,} documents, {totals['skipped']:,} empty or bad ones skipped, largest "
        f"id {totals['largest_id']}, {seconds:.1f} s"
    )
    if text := shard.shares(totals):
        print(text)
    print(f"train on it: {training_command(folder, tokenizer, vocab_size)}")


def training_command(folder: Path, tokenizer: str, vocab_size: int | None) -> str:
    """A whole command that trains on a set, in folders of its own: an imported model with its tokenizer, or the demo's."""
    name = folder.absolute().name
    keys = {"data_dir": folder, "output_dir": f"out/{name}", "logging_dir": f"logs/{name}", "tokenizer": tokenizer}
    if model := imported_model(tokenizer):
        demo, _ = configs.load([str(configs.DEMO)])
        keys |= {"init_from": tokenizer, **{key: value for key, value in model.items() if value != getattr(demo, key)}}
    else:
        keys["vocab_size"] = vocab_size or find(tokenizer).size
    if any(not fnmatch.fnmatch(Path(path).name, Config.tokenized_file_pattern) for path in find_files(folder, "*.npz")):
        keys["tokenized_file_pattern"] = "*.npz"
    settings = shlex.join(f"{key}={value}" for key, value in keys.items())
    return here(f"python train.py configs/demo.py {settings}")


def imported_model(tokenizer: str) -> dict[str, Any]:
    """The keys of the model that `ckpt.py import` put beside a tokenizer; {} where it did not."""
    keys = [*(key for key, _ in configs.describe()[0][1]), "sequence_length"]
    for state in sorted(Path(tokenizer).glob("checkpoint-*/state.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            content = json.loads(state.read_bytes())
            if content["imported_from"]:
                return {key: content["config"][key] for key in keys}
    return {}


def common_arguments(*folders: str) -> argparse.ArgumentParser:
    """What the commands about shards have in common: a parent for their parsers."""
    parser = argparse.ArgumentParser(add_help=False)
    for folder in folders:
        parser.add_argument(folder, type=local_path)
    parser.add_argument("--tokenizer", metavar="NAME", help=f"{HELP}; {Config.tokenizer} unless said")
    parser.add_argument("--vocab_size", type=entry.positive, help="ids are below it; the tokenizer's")
    parser.add_argument("--workers", type=entry.positive, default=os.cpu_count(), help="so many at once")
    return parser


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="data.py prepare", description="Compressed or padded .npz, .npy and .bin -> shards that are mapped.",
        parents=[common_arguments("SRC", "DST")],
    )  # fmt: skip
    parser.add_argument("--bin_dtype", choices=BIN_DTYPES, help="of .bin files; by default what their content shows")
    parser.add_argument("--end_of_text", type=int, help="id between documents; the tokenizer's")
    parser.add_argument("--max_ratio", type=float, default=MAX_RATIO, help="refuse what inflates by more")
    parser.add_argument("--overlap", type=int, help="tokens that a row repeats of the row before; by default as found")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    tokenizer = args.tokenizer or str(Config.tokenizer)
    known = find(tokenizer)
    vocab_size, end_of_text = args.vocab_size or known.size, known.end if args.end_of_text is None else args.end_of_text
    named = args.tokenizer and args.end_of_text is None  # what nobody named is not known
    totals = prepare(
        args.SRC, args.DST, vocab_size, end_of_text, args.workers, max_ratio=args.max_ratio, bin_dtype=args.bin_dtype,
        overlap=args.overlap, maker=(known.identity, known.name) if named else None,
    )  # fmt: skip
    if not args.tokenizer and (args.vocab_size or args.end_of_text is not None):
        tokenizer = "none"  # its ids are not those of the default
    announce(totals, args.DST, tokenizer, vocab_size, time.perf_counter() - begin)
    return 0
