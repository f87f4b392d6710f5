"""Every byte of a set against its checksum, every id against the vocabulary."""

import argparse
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs import Config
from refocused.shards.find import find_files, local_path
from refocused.shards.formats import TokenFile
from refocused.shards.prepare import absent, common_arguments, read_note
from refocused.shards.shard import DTYPES, DataError, Shard, made_with
from refocused.shards.tokenizers import ENCODINGS, find


def verify(folder: Path, vocab_size: int | None, fast: bool = False, workers: int = 1) -> int:
    """Prints a table of all shards below folder with what is wrong with them; returns 66 if anything is, else 0.

    Wrong: a damaged file, an id outside the vocabulary, the content of another file once more. vocab_size: None: as each
    shard notes it, else the default's. fast: headers only.
    """
    paths = find_files(folder, "*.npz")
    if not paths:
        raise DataError(absent(folder, ".npz file", find_files(folder)))
    job = partial(examine, folder, vocab_size=vocab_size, fast=fast)
    with ThreadPoolExecutor(workers) as pool:
        rows = list(tqdm(pool.map(job, paths), total=len(paths), desc=f"verifying {folder}", unit="file"))
    first: dict[Any, str] = {}
    longest = max(len(path) for path in paths)
    print(f"{'shard':<{longest}}  {'tokens':>14}  {'dtype':<6}  {'max id':>6}  state")
    for path, row in zip(paths, rows, strict=True):
        if (twin := first.setdefault(row.get("content", path), path)) != path:
            row["wrong"] = f"{Path(folder, path)} has the same content as {twin}"
        tokens = f"{row['tokens']:,}" if "tokens" in row else "-"
        state = row.get("wrong") or ("headers ok" if fast else "ok")
        print(f"{path:<{longest}}  {tokens:>14}  {row.get('dtype', '-'):<6}  {row.get('largest_id', '-'):>6}  {state}")
    wrong = sum("wrong" in row for row in rows)
    print(f"{len(paths)} shards, {sum(row.get('tokens', 0) for row in rows):,} tokens, {wrong} wrong")
    return DataError.exit_code if wrong else 0


def noted_size(file: Path) -> int:
    """Of the vocabulary that a shard's note names; the default's where it names none."""
    note = read_note(file)
    if type(size := note.get("vocab_size")) is int:
        return size
    name, _ = made_with(note) or ("", "")
    return find(name if name in ENCODINGS else str(Config.tokenizer)).size


def examine(folder: Path, path: str, vocab_size: int | None, fast: bool) -> dict[str, Any]:
    """A row of verify: tokens, dtype, largest_id, content (equal for equal arrays) and wrong, as far as it got."""
    row: dict[str, Any] = {}
    file = Path(folder, path)
    try:
        source = TokenFile(file, vocab_size or noted_size(file), 0)
        row |= {"tokens": source.held, "dtype": source.dtype.name}
        assert source.member is not None
        row["content"] = (source.member.CRC, source.shape, source.dtype.str)
        stored = source.member.compress_type == zipfile.ZIP_STORED
        if stored and not source.padding and source.dtype.str in DTYPES:
            Shard.open(folder, path)
        for _ in () if fast else source.read(row):
            pass
    except DataError as error:
        row["wrong"] = str(error)
    return row


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="data.py verify", description="Every byte against its checksum, every id against the vocabulary: that of "
        "--tokenizer or --vocab_size, else what each shard notes, else the default.",
        parents=[common_arguments(DIR=local_path)],
    )  # fmt: skip
    parser.add_argument("--fast", action="store_true", help="read headers only")
    args = parser.parse_args(argv)
    vocab_size = args.vocab_size or (find(args.tokenizer).size if args.tokenizer else None)
    return verify(args.DIR, vocab_size, args.fast, args.workers)
