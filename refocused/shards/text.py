"""Text files -> shards, through tiktoken."""

import argparse
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from configs import Config
from refocused.shards import write
from refocused.shards.prepare import TOTALS, add, announce, is_intact
from refocused.shards.shard import DataError
from refocused.shards.tokenizers import END_OF_TEXT, get_tokenizer
from refocused.shards.walk import find_sources

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
    source, paths = find_sources(source, but=(target,))
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

    with write.locked(target):
        write.remove_stale(target)
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
                    write.write_shard(target / shard_name(index), np.dtype("<u2"), report["tokens"], parts, note)
                    add(totals, report)
                    index, start, parts = index + 1, batch.next, []
                    report = dict.fromkeys(report, 0)
                bar.update(batch.size)
    return totals


def shard_name(index: int) -> str:
    return f"tokenized_cleaned_{index:05d}.npz"


def finished(target: Path, settings: dict[str, Any]) -> tuple[dict[str, int], tuple[int, int]]:
    """Totals of the intact shards that an earlier run left, and where it stopped in the sources. Raises DataError."""
    totals = dict.fromkeys(TOTALS, 0)
    start = (0, 0)
    while (file := target / shard_name(totals["files"])).exists():
        note = write.read_note(file) or {}
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


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="data.py tokenize", description="Text files (.txt, .jsonl) -> shards.")
    parser.add_argument("SRC", type=Path)
    parser.add_argument("DST", type=Path)
    parser.add_argument("--tokenizer", choices=END_OF_TEXT, default=Config.tokenizer)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads")
    parser.add_argument("--fields", default="text", help="of a JSON line, joined; Reddit: body, or title,selftext")
    parser.add_argument("--shard_tokens", type=int, default=1 << 26, help="tokens per shard, about")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    totals = tokenize(args.SRC, args.DST, args.tokenizer, args.fields.split(","), args.shard_tokens, args.workers)
    announce(totals, args.DST, args.tokenizer, None, time.perf_counter() - begin)
    return 0
