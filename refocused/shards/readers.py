"""The documents of text files, read as streams: .txt and JSON lines, as they are or as .gz or .zst."""

import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from refocused.entry import here
from refocused.shards.shard import DataError

PIECE = 1 << 20  # bytes of a .txt that are handled at once
GONE = ("[deleted]", "[removed]")  # what Reddit's dumps put in place of a text
END_OF_TEXT = b"<|endoftext|>"  # as GPT-2's own datasets spell it
PACKED = (".gz", ".zst")
# Where a tokenizer cuts in any case: before a space between words, or at least before white space and not inside it
BETWEEN = (re.compile(rb"(?<=[A-Za-z]) (?=[A-Za-z])"), re.compile(rb"(?<=\S)[ \n](?=\S)"))


class BadRecord(ValueError):
    """A line of JSON that has no text."""


@dataclass
class Piece:
    text: str
    end: int  # the byte of the (inflated) file where the next piece begins
    line: int  # lines read by then; in a .txt 1 where that is inside a document, else 0
    complete: bool = True  # whether a document ends here
    skipped: int = 0


@dataclass
class Rules:
    """How documents are taken out of files; and what was met and passed over, for a word at the end."""

    fields: list[str]
    split: str = ""  # what separates the documents of a .txt; without it, a file is one
    skip_errors: bool = False
    marks: int = field(default=0, compare=False)  # END_OF_TEXT that stayed text
    said: int = field(default=0, compare=False)


def kind(path: str) -> str:
    """ "txt", "lines" or "" for a file of another kind. Reddit's dumps are RC_2020-01.zst without another suffix."""
    name = Path(path.lower())
    inner = name.with_suffix("") if name.suffix in PACKED else name
    if inner.suffix == ".txt":
        return "txt"
    return "lines" if inner.suffix in (".jsonl", ".ndjson") or (name != inner and not inner.suffix) else ""


class Inflating(io.RawIOBase):
    """A .zst as a stream that does not take a file cut short for a whole one. Raises DataError."""

    def __init__(self, file: IO[bytes], path: Path):
        try:
            import zstandard  # optional: only Reddit's dumps need it
        except ImportError as error:
            way = here("pip install zstandard")
            raise DataError(f"{path}: `{way}` makes it readable, or unpack it first: `zstd -d {path}`") from error
        self.file, self.path, self.error = file, path, zstandard.ZstdError
        self.new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self.frame: Any = self.new()
        self.left = self.rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            if not (block := self.rest or self.file.read(1 << 16)):
                if self.frame is not None:
                    raise DataError(f"{self.path} ends early")
                return 0
            self.frame = self.frame or self.new()
            try:
                self.left, self.rest = self.frame.decompress(block), b""
            except self.error as error:
                raise DataError(f"{self.path} is damaged: {error}") from error
            if self.frame.eof:
                self.frame, self.rest = None, self.frame.unused_data
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count


@contextmanager
def opened(path: Path, start: int) -> Iterator[IO[bytes]]:
    """The file's (inflated) bytes from `start` on. Raises DataError."""
    try:
        with open(path, "rb") as file:
            stream: Any = file
            if path.suffix.lower() == ".gz":
                stream = gzip.open(file)
            elif path.suffix.lower() == ".zst":
                stream = io.BufferedReader(Inflating(file, path), PIECE)
            if stream is file:
                file.seek(start)
            while stream is not file and start:
                start -= len(stream.read(min(start, PIECE)))
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def documents(path: Path, rules: Rules, start: int = 0, line: int = 0) -> Iterator[Piece]:
    """The documents of a file from a piece's end and line on. Raises DataError."""
    with opened(path, start) as stream:
        yield from (text_pieces if kind(path.name) == "txt" else json_lines)(stream, path, rules, start, line)


def json_lines(stream: IO[bytes], path: Path, rules: Rules, start: int, line: int) -> Iterator[Piece]:
    for content in stream:
        start, line, text, skipped = start + len(content), line + 1, "", 0
        try:
            text, missing = record_text(content, rules.fields) if content.strip() else ("", "")
            if missing:  # holes are usual; a line that cannot be read, or has none of the fields, is a mistake
                skipped = 1
                complain(rules, f"{path} line {line}: {missing}")
        except (BadRecord, UnicodeDecodeError, RecursionError) as error:
            what = "nested too deep" if isinstance(error, RecursionError) else str(error)
            if not rules.skip_errors:
                raise DataError(f"{path} line {line}: {what}; --on_error skip passes such lines over") from error
            skipped = 1
            complain(rules, f"{path} line {line}: {what}")
        yield Piece(text, start, line, bool(text), skipped)


def record_text(content: bytes, fields: list[str]) -> tuple[str, str]:
    """(text of a line's fields, '' or why it has none). Raises BadRecord, UnicodeDecodeError, RecursionError."""
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise BadRecord(f"no JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadRecord("JSON, but not an object")
    there = [name for name in fields if name in record]
    if not there:
        raise BadRecord(f"no field {', '.join(fields)} (--fields) but {', '.join(record)}")
    texts = [record[name] for name in there if isinstance(record[name], str)]
    if not texts:
        kinds = ", ".join(f"{name} is {json.dumps(record[name])[:20]}" for name in there)
        return "", f"no text, {kinds}"
    parts = [text.strip() for text in texts]
    return whole("\n\n".join(part for part in parts if part and part not in GONE)), ""


def whole(text: str) -> str:
    """The text with U+FFFD for each half of an emoji whose other half is missing, as no UTF-8 can hold it."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def complain(rules: Rules, what: str) -> None:
    rules.said += 1
    if rules.said <= 5:
        print(f"skipped {what}" + ", and so on" * (rules.said == 5), file=sys.stderr)


def text_pieces(stream: IO[bytes], path: Path, rules: Rules, start: int, inside: int) -> Iterator[Piece]:
    """A .txt in pieces of about PIECE bytes, cut where that changes no token; a document's last one is `complete`.

    From any piece's end the pieces are the same: a cut depends on the two PIECEs after the one before it.
    """
    split, more = rules.split.encode(), True
    buffer = stream.read(PIECE)
    if not start and buffer.startswith(b"\xef\xbb\xbf"):  # a byte order mark is no text
        buffer, start = buffer[3:], 3
    while buffer or more:
        while more and len(buffer) < 2 * PIECE:  # so that what splits is not cut in two
            block = stream.read(PIECE)
            buffer, more = buffer + block, bool(block)
        last = len(buffer) <= PIECE
        found = buffer.find(split, 0, PIECE + len(split)) if split else -1
        if found >= 0:
            content, taken = buffer[:found].rstrip(), found + len(split)
            margin = buffer[taken : taken + (1 << 16)]
            taken += len(margin) - len(margin.lstrip())
        else:
            taken = len(buffer) if last else cut(buffer[:PIECE])
            content = buffer[:taken]
        try:
            text, skipped = content.decode(), 0
        except UnicodeDecodeError as error:
            what = f"{path} byte {start + error.start}: not UTF-8 text ({error.reason})"
            if not rules.skip_errors:
                raise DataError(f"{what}; --on_error skip puts U+FFFD there") from error
            text, skipped = content.decode(errors="replace"), 1
            complain(rules, what)
        rules.marks += content.count(END_OF_TEXT)
        buffer, start = buffer[taken:], start + taken
        there, ends = bool(inside or text), found >= 0 or last
        inside = int(there and not ends)
        yield Piece(text, start, inside, there and ends, skipped)


def cut(content: bytes) -> int:
    """Up to where this much of a text can be taken; not 0."""
    tail = max(0, len(content) - (1 << 16))
    for place in BETWEEN:
        if found := [match.start() for match in place.finditer(content, tail) if match.start()]:
            return found[-1]
    end = len(content)
    while end > 1 and content[end - 1] & 0xC0 == 0x80:  # between two characters of UTF-8
        end -= 1
    return end - 1 if end > 1 else len(content)
