"""Documents -> shards: the demo's set, and text files through tiktoken.

python data.py demo [DST]
python data.py tokenize SRC DST [--fields body]
"""

import hashlib
import json
import os
import shutil
import sysconfig
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import shard
from data import get_tokenizer
from prepare import END_OF_TEXT, is_intact
from shard import DataError, Shard

# ---- demo

DEMO_SHARDS = 6
DEMO_HELD_OUT = 0.04  # of the text, in one more shard


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
    begin = time.perf_counter()
    documents = sorted(demo_documents(), key=lambda document: hashlib.sha256(document[0].encode()).digest())
    ends = np.cumsum([len(text) + 1 for _, text in documents])
    cuts = [int(ends[-1] * (1 - DEMO_HELD_OUT) * i / DEMO_SHARDS) for i in range(1, DEMO_SHARDS + 1)] + [int(ends[-1])]
    building = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        first, made = 0, {}
        for i, cut in enumerate(cuts):
            last = int(np.searchsorted(ends, cut, "right"))
            chunks = [np.frombuffer(text + b"\0", np.uint8).astype(np.uint16) for _, text in documents[first:last]]
            for chunk in chunks:
                chunk[-1] = END_OF_TEXT["byte"]
            part = f"text/{i:02d}" if i < DEMO_SHARDS else "validation/00"  # sorts last, so it is held out
            path = f"{part}/tokenized_cleaned_{part.replace('/', '_')}.npz"
            shard.write_shard(building / path, np.dtype("<u2"), sum(map(len, chunks)), chunks, {})
            made[path] = f"{Shard.open(building, path).crc32:08x}"
            first = last
        shard.write_atomically(building / made_file.name, lambda file: file.write(json.dumps(made, indent=1).encode()))
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(building, folder)
        shard.sync_folder(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    seconds = time.perf_counter() - begin
    print(f"{folder}: {len(documents):,} documents, {ends[-1]:,} tokens in {len(cuts)} shards, {seconds:.1f} s")


# ---- tokenize

BATCH = 1 << 20  # bytes of text that a thread encodes at once; shards end where a batch ends
GONE = ("[deleted]", "[removed]")  # what Reddit's dumps put in place of a text


@dataclass
class Batch:
    texts: list[str]
    next: tuple[int, int]  # (file, byte) where the following batch begins
    size: int = 0


def batches(files: list[Path], fields: list[str], start: tuple[int, int], size: int) -> Iterator[Batch]:
    """The documents from (file, byte) on, `size` bytes of the sources at once; from any batch's end, the same rest."""
    for i in range(start[0], len(files)):
        batch = Batch([], (i, start[1]))
        for end, text in documents(files[i], fields, start[1] if i == start[0] else 0):
            batch.size += end - batch.next[1]
            batch.next = (i, end)
            batch.texts += [text] if text else []
            if batch.size >= size:
                yield batch
                batch = Batch([], batch.next)
        yield Batch(batch.texts, (i + 1, 0), batch.size)


def documents(file: Path, fields: list[str], start: int) -> Iterator[tuple[int, str]]:
    """(byte where it ends, text) of each document of a .txt (one) or .jsonl file (one per line). Raises DataError."""
    end = start
    try:
        with open(file, "rb") as stream:
            stream.seek(start)
            if file.suffix == ".txt":
                text = stream.read().decode()
                yield stream.tell(), text
                return
            for line in stream:
                record = json.loads(line) if line.strip() else None
                if record is not None and not any(isinstance(record.get(field), str) for field in fields):
                    raise ValueError(
                        f"the record has no text in {', '.join(fields)} (--fields) but {', '.join(record)}"
                    )
                parts = [record[f].strip() for f in fields if isinstance(record.get(f), str)] if record else []
                end += len(line)
                yield end, "\n\n".join(part for part in parts if part and part not in GONE)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file}: not UTF-8 text, or not a JSON object in the line at byte {end}: {error}") from error


def tokenize(
    source: Path, target: Path, tokenizer: str, fields: list[str], shard_tokens: int, workers: int = 0
) -> dict[str, int]:
    """Turns .txt and .jsonl files, source or those below it, into shards of about shard_tokens.

    End-of-text follows each document. Shards come out in the order of the sources whatever the number of threads. Each
    notes where its successor begins, so an interrupted run goes on behind the last intact one. Returns totals as
    prepare does. Raises DataError.
    """
    source, paths = shard.find_sources(source)
    if packed := [path for path in paths if path.endswith(".zst")]:
        raise DataError(f"{packed[0]} is compressed; Python cannot read it before 3.14: `zstd -d {source / packed[0]}`")
    paths = [path for path in paths if path.endswith((".txt", ".jsonl"))]
    if not paths:
        raise DataError(f"{source} and its subfolders have no .txt and no .jsonl file")
    encoding = get_tokenizer(tokenizer)
    files = [source / path for path in paths]
    settings = {
        "sources": hashlib.sha256(json.dumps([(p, (source / p).stat().st_size) for p in paths]).encode()).hexdigest(),
        "tokenizer": tokenizer,
        "fields": fields,
        "shard_tokens": shard_tokens,
    }

    def encode(batch: Batch) -> tuple[Batch, np.ndarray]:
        parts = []
        for text in batch.texts:  # special tokens in a text are text
            parts += [encoding.encode_to_numpy(text, disallowed_special=()), [encoding.eot_token]]
        return batch, np.concatenate(parts).astype(np.uint16) if parts else np.empty(0, np.uint16)

    with shard.locked(target):
        shard.remove_stale(target)
        totals, start = finished(target, settings)
        index, parts, report = totals["files"], [], {"tokens": 0, "documents": 0, "padding": 0, "largest_id": 0}
        threads = workers or os.cpu_count() or 1
        cut = batches(files, fields, start, min(BATCH, shard_tokens))
        todo = sum(file.stat().st_size for file in files[start[0] :]) - start[1]
        with (
            ThreadPoolExecutor(threads) as pool,
            tqdm(total=todo, desc=f"tokenizing {source}", unit="B", unit_scale=True) as bar,
        ):
            for batch, tokens in in_order(pool, encode, cut, 2 * threads):
                parts.append(tokens)
                report["tokens"] += len(tokens)
                report["documents"] += len(batch.texts)
                report["largest_id"] = max(report["largest_id"], int(tokens.max(initial=0)))
                last = batch.next[0] == len(files)
                if report["tokens"] >= shard_tokens or (last and report["tokens"]):
                    note = {**settings, "begin": start, "next": batch.next, "report": report}
                    shard.write_shard(target / shard_name(index), np.dtype("<u2"), report["tokens"], parts, note)
                    add(totals, report)
                    index, start, parts = index + 1, batch.next, []
                    report = dict.fromkeys(report, 0)
                bar.update(batch.size)
    return totals


def shard_name(index: int) -> str:
    return f"tokenized_cleaned_{index:05d}.npz"


def add(totals: dict[str, int], report: dict[str, int]) -> None:
    totals["files"] += 1
    for key, value in report.items():
        totals[key] = max(totals[key], value) if key == "largest_id" else totals[key] + value


def finished(target: Path, settings: dict[str, Any]) -> tuple[dict[str, int], tuple[int, int]]:
    """Totals of the intact shards that an earlier run left, and where it stopped in the sources. Raises DataError."""
    totals = {"files": 0, "kept": 0, "tokens": 0, "documents": 0, "padding": 0, "largest_id": 0}
    start = (0, 0)
    while (file := target / shard_name(totals["files"])).exists():
        note = shard.read_note(file) or {}
        if differing := [key for key, value in settings.items() if note.get(key) != value]:
            raise DataError(
                f"{file} was made from other {', '.join(differing)}; name another folder, or empty this one"
            )
        if tuple(note["begin"]) != start or not is_intact(target, file.name):
            break
        add(totals, {**note["report"], "kept": 1})
        start = tuple(note["next"])
    return totals, start


def in_order(pool: ThreadPoolExecutor, work: Any, items: Iterator[Any], ahead: int) -> Iterator[Any]:
    """work(item) for each item, in their order, at most `ahead` of them begun."""
    running: deque[Future] = deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) >= ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
