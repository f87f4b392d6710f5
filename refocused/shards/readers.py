"""The documents of files, read as streams: .txt and JSON lines, as they are or compressed, and tables."""

import contextlib
import importlib
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from refocused.entry import here, near
from refocused.shards.shard import DataError

TEXT_RULE = 4  # by which files become texts: an interrupted run by an older one is not gone on with
PIECE = 1 << 20  # bytes of a .txt that are handled at once
GONE = ("[deleted]", "[removed]")  # what Reddit's dumps put in place of a text
FIELD = "with field {}"  # what a field's lines are counted by
END_OF_TEXT = "<|endoftext|>"  # as GPT-2's own datasets spell it
PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "backports.zstd"}  # {suffix: module}
LINES, TABLES = (".jsonl", ".ndjson"), (".parquet", ".arrow", ".feather")
READ = ".txt, .jsonl, .json (lines or one array; also as .gz, .bz2, .xz or .zst), .parquet, .arrow or .feather file"
# Where a tokenizer cuts in any case: before a space between words, or at least before white space and not inside it
BETWEEN = (re.compile(rb"(?<=[A-Za-z]) (?=[A-Za-z])"), re.compile(rb"(?<=\S)[ \n](?=\S)"))


class BadRecord(ValueError):
    """A line of JSON, or a table, that has no text."""


@dataclass
class Piece:
    text: str
    end: int  # where the next piece begins: a byte of the (inflated) file; of an array or a table letters of text
    line: int  # lines or rows read by then; in a .txt 1 where that is inside a document, else 0
    complete: bool = True  # whether a document ends here
    counts: dict[str, int] = field(default_factory=dict)  # what was met here, for words at the end


@dataclass
class Rules:
    """How documents are taken out of files."""

    fields: list[str]
    split: str = ""  # what separates the documents of a .txt; without it, a file is one
    skip_errors: bool = False
    said: int = field(default=0, compare=False)


def named(path: str) -> str:
    """ "txt", "table", "lines", "json" (which may be lines or an array) or "", by a file's name.

    Reddit's dumps are RC_2020-01.zst without another suffix.
    """
    name = Path(path.lower())
    inner = name.with_suffix("") if name.suffix in PACKED else name
    if inner.suffix in (".txt", ".json"):
        return inner.suffix[1:]
    if name.suffix in TABLES:
        return "table"
    return "lines" if inner.suffix in LINES or (name != inner and not inner.suffix) else ""


def kind(file: Path, fields: list[str]) -> str:
    """The same; a .json is "lines", "array" or "" (no texts), by its beginning. Raises DataError."""
    if (found := named(file.name)) == "json":
        with opened(file, 0) as stream, contextlib.suppress(ValueError, RecursionError):
            line = b"\n"
            while line and not line.strip():
                line = stream.readline(PIECE).removeprefix(b"\xef\xbb\xbf")
            if line.lstrip().startswith(b"["):
                return "array"
            first = parsed(line if line.endswith(b"\n") else line + stream.readline(1 << 28))
            # one object without a text is a file of settings, blank lines behind it or not
            if isinstance(first, dict) and (found_in(first, fields) or any(map(bytes.strip, stream))):
                return "lines"
        return ""
    return found


@contextmanager
def opened(path: Path, start: int) -> Iterator[Any]:
    """The file's (inflated) bytes from `start` on. Raises DataError."""
    suffix = path.suffix.lower()
    errors: list[type[Exception]] = [OSError, EOFError, zlib.error]
    stream: Any = None
    try:
        with open(path, "rb") as file:
            if suffix not in PACKED:
                file.seek(start)
                yield file
                return
            module = importlib.import_module(PACKED[suffix])
            errors += [getattr(module, name) for name in ("LZMAError", "ZstdError") if hasattr(module, name)]
            # long windows, as in Reddit's dumps, are refused unless allowed
            options = {"options": {module.DecompressionParameter.window_log_max: 31}} if suffix == ".zst" else {}
            stream = module.open(file, **options)
            while start:
                start -= len(stream.read(min(start, PIECE)))
            yield stream
    except ImportError as error:
        way = f"`{here('pip install backports.zstd')}` makes it readable, or " if suffix == ".zst" else ""
        raise DataError(f"{path}: this Python does not read {suffix}; {way}unpack it first") from error
    except tuple(errors) as error:
        why = getattr(error, "strerror", None) or error
        if suffix == ".gz" and stream and "Not a gzipped file" in str(error) and stream.tell():
            why = f"behind its {stream.tell():,} bytes of text something follows that is no gzip; cut it off, or unpack it"
        raise DataError(f"cannot read {path}: {why}") from error


def documents(path: Path, rules: Rules, start: int = 0, line: int = 0) -> Iterator[Piece]:
    """The documents of a file from a piece's end and line on. Raises DataError."""
    what = kind(path, rules.fields)
    with opened(path, start if what in ("txt", "lines") else 0) as stream:
        if not start and stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16; `iconv -f UTF-16 -t UTF-8 {near(path)} > NEW` makes UTF-8 of it")
        if what == "txt":
            yield from text_pieces(stream, path, rules, start, line)
        elif what in ("array", "table"):
            table = what == "table"
            records = table_rows(path, rules.fields, line) if table else whole_array(stream, path)[line:]
            try:
                for row, record in enumerate(records, line + 1):
                    piece = document(record, rules, f"{path} {'row' if table else 'element'} {row}", start, row)
                    start = piece.end = start + len(piece.text) + 1
                    yield piece
            except BadRecord as error:
                if not rules.skip_errors:
                    raise DataError(f"{path}: {error}; --on_error skip passes such files over") from error
                complain(rules, f"{path}: {error}")
        elif what == "lines":
            for content in stream:
                start, line = start + len(content), line + 1
                if content.strip():
                    yield document(content, rules, f"{path} line {line}", start, line)
                else:
                    yield Piece("", start, line, False)
        else:
            complain(rules, f"{path}: no JSON lines and no array")


def table_rows(path: Path, fields: list[str], begin: int) -> Iterator[dict[str, Any]]:
    try:
        from refocused.shards import tables
    except ImportError as error:
        raise DataError(f"{path}: `{here('pip install pyarrow')}` makes it readable") from error
    return tables.rows(path, fields, begin)


def whole_array(stream: IO[bytes], path: Path) -> list[Any]:
    """The elements of a .json that is one array, all in memory."""
    try:
        return parsed(stream.read())
    except (BadRecord, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not one whole array: {error}") from error


def document(record: Any, rules: Rules, place: str, end: int, line: int) -> Piece:
    """One record, or the line that it is, as a document. Raises DataError for a mistake, unless these are skipped."""
    try:
        text, missing, counts = record_text(parsed(record) if isinstance(record, bytes) else record, rules.fields)
        if missing:  # holes are usual; a line that cannot be read, or has none of the fields, is a mistake
            complain(rules, f"{place}: {missing}")
    except (BadRecord, UnicodeDecodeError, RecursionError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else str(error)
        if not rules.skip_errors:
            raise DataError(f"{place}: {what}; --on_error skip passes such lines over") from error
        text, counts = "", {"records": 1}
        complain(rules, f"{place}: {what}")
    counts |= {"skipped": int(not text), "blank": int(text.isspace()), "marks": text.count(END_OF_TEXT)}
    return Piece(text, end, line, bool(text), counts)


def parsed(content: bytes) -> Any:
    """JSON. Numbers are never text, and as floats they may have any number of digits."""
    try:
        return json.loads(content, parse_int=float)
    except json.JSONDecodeError as error:
        raise BadRecord(f"no JSON: {error}") from error


def record_text(record: Any, fields: list[str]) -> tuple[str, str, dict[str, int]]:
    """(text of a record's fields as it is, "" or why it has none, counts). Raises BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord("JSON, but not an object")
    there = found_in(record, fields)
    if not there:
        raise BadRecord(f"no field {', '.join(fields)} (--fields) but {', '.join(record)}")
    counts = {"records": 1, **dict.fromkeys(map(FIELD.format, there), 1)}
    texts = [text for text in there.values() if isinstance(text, str)]
    if not texts:
        kinds = ", ".join(f"{name} is {json.dumps(value)[:20]}" for name, value in there.items())
        return "", f"no text, {kinds}", counts
    return whole("\n\n".join(text for text in texts if text and text.strip() not in GONE)), "", counts


def found_in(record: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    """{field: its value} of those that are there: by the whole name, else where the dots lead into objects."""
    found = {}
    for name in fields:
        value, keys = record, [name] if name in record else name.split(".")
        while keys and isinstance(value, dict) and keys[0] in value:
            value = value[keys.pop(0)]
        if not keys or value is None:  # null in place of an object is a hole, as in a table
            found[name] = value
    return found


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
    split, mark, more = rules.split.encode(), END_OF_TEXT.encode(), True
    buffer = stream.read(PIECE)
    if not start and buffer.startswith(b"\xef\xbb\xbf"):  # a byte order mark is no text
        buffer, start = buffer[3:], 3
    while buffer or more:
        while more and len(buffer) < 2 * PIECE:  # so that what splits is not cut in two
            block = stream.read(PIECE)
            buffer, more = buffer + block, bool(block)
        last = len(buffer) <= PIECE
        found = buffer.find(split, 0, PIECE + len(split)) if split else -1
        taken = len(buffer) if last else cut(buffer[:PIECE])
        content = buffer[:taken]
        if found >= 0:
            content, taken = buffer[:found].rstrip(b"\r\n"), found + len(split)
            margin = buffer[taken : taken + (1 << 16)]
            taken += len(margin) - len(margin.lstrip(b"\r\n"))
        try:
            text, counts = content.decode(), {}
        except UnicodeDecodeError as error:
            what = f"{path} byte {start + error.start}: not UTF-8 text ({error.reason})"
            if not rules.skip_errors:
                raise DataError(f"{what}; --on_error skip puts U+FFFD there") from error
            text, counts = content.decode(errors="replace"), {"skipped": 1}
            complain(rules, what)
        counts |= {"marks": content.count(mark), "splits": int(found >= 0)}
        buffer, start = buffer[taken:], start + taken
        there, ends = bool(inside or text), found >= 0 or last
        inside = int(there and not ends)
        yield Piece(text, start, inside, there and ends, counts)


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
