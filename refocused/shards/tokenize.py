"""Text files -> shards, through a tokenizer."""

import hashlib
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from refocused import locks
from refocused.files import remove_stale
from refocused.shards import prepare, readers
from refocused.shards.find import find_sources
from refocused.shards.notes import listed
from refocused.shards.readers import PACKED, Rules, documents, kind
from refocused.shards.shard import DataError
from refocused.shards.spelling import byte_letters
from refocused.shards.tokenizers import Encoding, File, Tokenizer, find

DEFAULT_FIELDS = ["text"]
BATCH = 1 << 20  # bytes of text that a thread encodes at once; shards end where a batch ends
Place = tuple[int, int, int]  # file, byte and line where a batch begins
A = TypeVar("A")
B = TypeVar("B")


@dataclass
class Batch:
    next: Place  # where the following batch begins
    texts: list[tuple[str, bool]] = field(default_factory=list)  # and whether a document ends with it
    size: int = 0
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class Sources:
    """Files of text in their order."""

    name: str  # where they are
    paths: list[str]
    contents: list[str]  # for each a hash, by which another content is noticed
    sizes: list[int]
    file: Callable[[int], Path]  # the i-th, to be read now; called for one after the other
    done: Callable[[], Any] = lambda: None  # once all are shards


def batches(sources: Sources, rules: Rules, start: Place, size: int) -> Iterator[Batch]:
    """The documents from a place on, `size` bytes of the sources at once; from any batch's end, the same rest."""
    for i in range(start[0], len(sources.paths)):
        place = start if i == start[0] else (i, 0, 0)
        batch = Batch(place)
        for piece in documents(sources.file(i), rules, *place[1:]):
            batch.size += piece.end - batch.next[1]
            batch.next = (i, piece.end, piece.line)
            batch.counts.update(piece.counts)
            if piece.text or piece.complete:
                batch.texts.append((piece.text, piece.complete))
            if batch.size >= size:
                yield batch
                batch = Batch(batch.next)
        batch.next = (i + 1, 0, 0)
        yield batch


def content_of(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def local(source: Path, target: Path, rules: Rules, workers: int) -> Sources:
    """The text files (readers.READ) that source is or has below it, but not below target. Raises DataError."""
    named = source
    source, everything = find_sources(source, but=(target,))
    paths = [path for path in everything if kind(source / path, rules.fields)]
    if not paths:
        raise DataError(prepare.absent(named, readers.READ, everything))
    if left := sorted({*everything} - {*paths}):
        print(f"left out, no {readers.READ}: {listed(left, 5)}{prepare.others(source, left)}", file=sys.stderr)
    files = [source / path for path in paths]
    try:
        with ThreadPoolExecutor(workers) as pool:
            contents = list(pool.map(content_of, files))
        return Sources(str(source), paths, contents, [file.stat().st_size for file in files], files.__getitem__)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error


def tokenize(sources: Sources, target: Path, tokenizer: str, rules: Rules, shard_tokens: int, workers: int) -> Counter:
    """Turns texts into shards of about shard_tokens. workers: threads.

    End-of-text follows each document. Shards come out in the order of the sources whatever the number of threads. Each
    notes where its successor begins, so an interrupted run goes on behind the last intact one; sources whose content
    is another by then are refused. Returns totals as prepare does. Raises DataError.
    """
    known = find(tokenizer)
    dtype, end = np.dtype("<u2" if known.size <= 1 << 16 else "<u4"), [known.end]
    names, count = [path.lower() for path in sources.paths], len(sources.paths)

    def encode(batch: Batch) -> tuple[Batch, np.ndarray]:
        parts = [np.empty(0, dtype)]
        ids = encode_documents(known, [text for text, _ in batch.texts], batch.counts)
        for tokens, (_, complete) in zip(ids, batch.texts, strict=True):
            parts += [tokens.astype(dtype), np.array(end if complete else [], dtype)]
        tokens = np.concatenate(parts)
        batch.counts.update(tokens=len(tokens), documents=sum(complete for _, complete in batch.texts))
        return batch, tokens

    with locks.filling(target), ThreadPoolExecutor(workers) as pool:
        remove_stale(target)
        listed = json.dumps([*zip(sources.paths, sources.contents, strict=True)])
        settings = {
            "sources": hashlib.sha256(listed.encode()).hexdigest(),
            "tokenizer": known.identity, "fields": rules.fields, "split": rules.split, "shard_tokens": shard_tokens,
            "on_error": "skip" if rules.skip_errors else "stop", "rule": readers.TEXT_RULE,
        }  # fmt: skip
        totals, begin = finished(target, settings)
        cut = batches(sources, rules, begin, min(BATCH, shard_tokens))
        report, parts = Counter(dict.fromkeys(prepare.TOTALS[2:], 0)), []
        inflated = any(name.endswith((*PACKED, *readers.TABLES)) for name in names)
        todo = None if inflated else sum(sources.sizes[begin[0] :]) - begin[1]
        with tqdm(total=todo, desc=f"tokenizing {sources.name}", unit="B", unit_scale=True) as bar:
            for batch, tokens in in_order(pool, encode, cut, 2 * workers):
                parts.append(tokens)
                report.update(batch.counts)
                report["largest_id"] = max(report["largest_id"], int(tokens.max(initial=0)))
                last = batch.next[0] == count
                if report["tokens"] >= shard_tokens or (last and report["tokens"]):
                    note = {**settings, "tokenizer_name": known.name, "vocab_size": known.size, "report": report}
                    note |= {"begin": begin, "next": batch.next}
                    prepare.write_shard(target / shard_name(totals["files"]), dtype, parts, note)
                    prepare.add(totals, report)
                    begin, parts, report = batch.next, [], Counter(dict.fromkeys(prepare.TOTALS[2:], 0))
                bar.update(batch.size)
        totals.update(report)  # of what came behind the last text
        sources.done()
    if not totals["tokens"]:
        raise DataError(f"the {count} files of {sources.name} hold no text: {totals['skipped']} documents were skipped")
    say_what_was_met(totals, rules, "txt" in map(readers.named, names), known.name)
    return totals


def encode_documents(known: Tokenizer, texts: list[str], counts: Counter) -> list[np.ndarray]:
    """The ids of texts, in which special tokens are ordinary text. counts: of what the tokenizer has no token for."""
    if isinstance(known, Encoding):
        return [known.known.encode_to_numpy(text, disallowed_special=()) for text in texts]
    model = known.json["model"]
    unknown = model.get("unk_id") if isinstance(model["vocab"], list) else known.vocab.get(model.get("unk_token"))
    whole = model.get("byte_fallback") or (known.byte_level and known.vocab.keys() >= {*byte_letters()})
    try:
        found = known.plain.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # such as a word that a WordLevel without unk_token does not have
        raise DataError(f"{known.file} cannot encode the text: {error}") from error
    if "merges" in model and unknown is None and not whole:
        counts["dropped"] += sum(dropped(known, text) for text in texts)
    ids = [np.array(encoding.ids, np.uint32) for encoding in found]
    if unknown is not None:
        counts["unknown"] += sum(int((tokens == unknown).sum()) for tokens in ids)
    return ids


def dropped(known: File, text: str) -> int:
    """How many letters of a text, or bytes where these are the alphabet, a BPE passes over."""
    if known.plain.normalizer:
        text = known.plain.normalizer.normalize_str(text)
    if known.plain.pre_tokenizer:
        text = "".join(piece for piece, _ in known.plain.pre_tokenizer.pre_tokenize_str(text))
    first, last = (known.json["model"].get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    return sum(
        n for letter, n in Counter(text).items() if not {letter, first + letter, letter + last} & known.vocab.keys()
    )


def say_what_was_met(totals: Counter, rules: Rules, txt: bool, tokenizer: str) -> None:
    """What the sources did not have, or had and is not as it may seem. Raises DataError where no line had a field."""
    mark, records, notes = readers.END_OF_TEXT, totals["records"], []
    unmet = [name for name in rules.fields if not totals[readers.FIELD.format(name)]]
    none = f"none of {records:,} lines has the field {', '.join(unmet)} (--fields)"
    if records and unmet == rules.fields:
        raise DataError(f"{none}; name one that they have")
    if records and unmet:
        notes.append(none)
    if not records and rules.fields != DEFAULT_FIELDS:
        notes.append("--fields changes nothing: there are no lines of JSON")
    if rules.split and not totals["splits"]:
        why = "the mark is nowhere in them" if txt else "none of the files is a .txt"
        hint = ", in which backslashes are no escapes: bash has $'\\n\\n' for two line breaks" * ("\\" in rules.split)
        notes.append(f"--split {rules.split!r} changes nothing: {why}{hint}")
    if totals["marks"] and mark not in rules.split:
        way = f"; in .txt files --split '{mark}' makes it the end of a document" if txt else ""
        notes.append(f"{totals['marks']:,} times {mark} became ordinary text{way}")
    for key, what in (
        ("blank", "documents are nothing but white space"),
        ("dropped", f"letters or bytes are lost: {tokenizer} has no token for them, and none for unknown text"),
        ("unknown", f"times the token for unknown text stands for what {tokenizer} has no token for"),
    ):
        notes += [f"{totals[key]:,} {what}"] * bool(totals[key])
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def shard_name(index: int) -> str:
    return f"tokenized_cleaned_{index:05d}.npz"


def finished(target: Path, settings: dict[str, Any]) -> tuple[Counter, Place]:
    """Totals of the intact shards that an earlier run left, and where it stopped in the sources. Raises DataError."""
    totals, start = Counter(dict.fromkeys(prepare.TOTALS, 0)), (0, 0, 0)
    while (file := target / shard_name(totals["files"])).exists():
        note = prepare.read_note(file)
        if differing := ", ".join(key for key, value in settings.items() if note.get(key) != value):
            raise DataError(f"{file} was made from other {differing}; name another folder, or empty this one")
        if tuple(note["begin"]) != start or not prepare.is_intact(target, file.name):
            break
        prepare.add(totals, {**note["report"], "kept": 1})
        start = tuple(note["next"])
    for file in sorted(target.glob("tokenized_cleaned_*")):
        if prepare.read_note(file).get("sources") != settings["sources"]:
            raise DataError(f"{file} was not made from these sources and stays; name another folder, or empty this one")
    return totals, start


def in_order(pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterator[A], ahead: int) -> Iterator[B]:
    """work(item) for each item, in their order, at most `ahead` of them begun."""
    running: deque[Future[B]] = deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) >= ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
