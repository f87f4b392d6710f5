"""The demo's set: the text that every Python ships."""

import argparse
import glob
import hashlib
import json
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configs import Config
from refocused import files, locks
from refocused.shards.prepare import is_intact, write_shard
from refocused.shards.shard import DataError, Shard
from refocused.shards.tokenizers import ENCODINGS

DEMO_SHARDS = 6
DEMO_HELD_OUT = 0.04  # of the text, in one more shard
END = np.uint16(ENCODINGS["byte"][0])


def demo_documents() -> Iterator[tuple[str, bytes]]:
    """(name, text) of pydoc's topics and of the standard library's sources: what every Python ships."""
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        yield f"topics/{topic}", text.encode()
    root = Path(sysconfig.get_path("stdlib"))
    for parent, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in ("__pycache__", "site-packages", "dist-packages", "pydoc_data")]
        for name in names:
            if name.endswith(".py"):
                yield Path(parent, name).relative_to(root).as_posix(), Path(parent, name).read_bytes()


def demo(folder: Path) -> None:
    """make() for one process at a time, and what a killed one left beside the folder goes first."""
    with locks.filling(folder.parent):
        for left in folder.parent.glob(f".tmp-*-{glob.escape(folder.name)}"):
            if files.OWN.fullmatch(left.name):
                files.remove(left)
        make(folder)


def make(folder: Path) -> None:
    """Writes the demo's set: bytes as tokens, documents in a hashed order, so that the held-out shard is like the rest.

    A folder that it made before is left alone if intact. Raises DataError for any other that is not empty.
    """
    made_file = folder / "demo.json"  # {path: checksum}
    if folder.is_dir() and any(folder.iterdir()):
        if not made_file.exists():
            raise DataError(f"{folder} is not empty and not the demo's; name another folder")
        made = json.loads(made_file.read_text())
        if all(is_intact(folder, path) and f"{Shard.open(folder, path).crc32:08x}" == made[path] for path in made):
            print(f"{folder} is there and intact")
            return
        raise DataError(f"{folder} was damaged or changed; remove it, or name another folder")
    begin, building, made = time.perf_counter(), files.beside(folder), {}
    documents = sorted(demo_documents(), key=lambda document: hashlib.sha256(document[0].encode()).digest())
    ends = np.cumsum([len(text) + 1 for _, text in documents])
    cuts = [ends[-1] * (1 - DEMO_HELD_OUT) * i // DEMO_SHARDS for i in range(1, DEMO_SHARDS + 1)]
    lasts = [0, *np.searchsorted(ends, cuts, "right").tolist(), len(documents)]
    try:
        for i, (first, last) in enumerate(zip(lasts, lasts[1:], strict=False)):
            texts = (np.frombuffer(text, np.uint8).astype("<u2") for _, text in documents[first:last])
            part = f"text/{i:02d}" if i < DEMO_SHARDS else "validation/00"  # sorts last, so it is held out
            path = f"{part}/tokenized_cleaned_{part.replace('/', '_')}.npz"
            write_shard(
                building / path, np.dtype("<u2"), (np.append(text, END) for text in texts), {"tokenizer": "byte"}
            )
            made[path] = f"{Shard.open(building, path).crc32:08x}"
        files.create(building / made_file.name, json.dumps(made, indent=1).encode())
        os.rename(building, folder)
        files.sync_folder(folder.parent)
    finally:
        files.remove(building)
    seconds = time.perf_counter() - begin
    print(f"{folder}: {len(documents):,} documents, {ends[-1]:,} tokens in {len(made)} shards, {seconds:.1f} s")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="data.py demo", description="A small set: the bytes of Python's own sources.")
    parser.add_argument(
        "DST", type=Path, nargs="?", default=Path(Config.data_dir), help="a folder (default: %(default)s)"
    )
    demo(parser.parse_args(argv).DST)
    return 0
