"""A file of tokens in any foreign format, opened by its headers, streamed block by block.

Nothing here trusts a file: sizes are compared with shapes before a byte is inflated, and nothing is ever unpickled.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from refocused.entry import here
from refocused.shards import shard
from refocused.shards.shard import BLOCK, INTEGERS, DataError, npy_header

MAX_RATIO = 200  # of inflated to deflated size of the token array
MASKS = ("|b1", *INTEGERS)
RULE = 2  # by which rows become a stream: what was made by an older one is made again
FLAT = (".bin", ".npy")
KINDS = (".npz", *FLAT)


@contextmanager
def open_member(file: IO[bytes], member: zipfile.ZipInfo, path: Path) -> Iterator[IO[bytes]]:
    """A member as a stream that ends at its declared size and checks its CRC-32 there. Raises DataError."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
            yield stream
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{path} is damaged or ends early: {member.filename}: {error}") from error


def read_blocks(stream: IO[bytes], dtype: np.dtype, count: int, path: Path, multiple: int = 1) -> Iterator[np.ndarray]:
    """`count` items as 1-D arrays of about BLOCK bytes, each (but the last) a multiple of so many items."""
    per_block = max(1, BLOCK // (dtype.itemsize * multiple)) * multiple
    while count:
        wanted = min(count, per_block)
        raw = stream.read(wanted * dtype.itemsize)
        if len(raw) != wanted * dtype.itemsize:
            raise DataError(f"{path} ends early: {count * dtype.itemsize - len(raw)} bytes are missing")
        count -= wanted
        yield np.frombuffer(raw, dtype)


class TokenFile:
    """A file of tokens in any of the formats, opened by its headers; its tokens are streamed block by block.

    The bucket's own format is `input_ids` [rows, width] padded on the right, with `sequence_lengths` [rows] or
    `attention_mask` [rows, width] or both. Its padding is dropped. A row shorter than the width is followed by one
    end-of-text unless it ends with it; an empty row is skipped. What a row of any 2-D array repeats of the row before is
    dropped: see Rows. Anything else (1-D, .npy, .bin) is a stream as it is. Integers of any width and byte order are
    narrowed once all are ids. Raises DataError.

    end_of_text: None where no tokenizer is known; then nothing may be padded. overlap: see Rows.
    """

    def __init__(
        self,
        file: Path,
        vocab_size: int,
        end_of_text: int | None,
        max_ratio: float = MAX_RATIO,
        bin_dtype: str | None = None,
        overlap: int | None = None,
    ):
        if end_of_text is not None and not 0 <= end_of_text < vocab_size:
            raise DataError(f"end_of_text={end_of_text} is no id below vocab_size={vocab_size}")
        self.file, self.vocab_size, self.end_of_text, self.max_ratio = file, vocab_size, end_of_text, max_ratio
        self.overlap = overlap
        self.out_dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.members: dict[str, zipfile.ZipInfo] = {}  # of an .npz
        self.member: zipfile.ZipInfo | None = None  # the one of the tokens
        self.padding: list[str] = []  # the arrays that say what is padding
        try:
            self.size = file.stat().st_size
            if file.suffix.lower() in FLAT:
                found = look(file, self.size, vocab_size, bin_dtype)
                self.shape, self.dtype, self.offset = found.shape, found.dtype, found.offset
                self.identity = {file.name: f"{found.crc32:08x}"}
                if (found.dtype.str, found.offset) != ("<u2", 0):
                    self.identity["read as"] = f"{found.dtype.str} from byte {found.offset}"
            else:
                with open(file, "rb") as stream:
                    self._look_at_npz(stream)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}") from error
        if 0 in self.shape:
            raise DataError(f"{file}: its tokens of shape {self.shape} have rows of length zero or none")
        if self.padding and end_of_text is None:
            raise DataError(
                f"{file} is padded (it has {' and '.join(self.padding)}): the id of end-of-text belongs between its rows, "
                "and tokenizer=none does not say it; name the tokenizer"
            )
        self.width = self.shape[1] if len(self.shape) == 2 else 1
        if overlap is not None and not 0 <= overlap < max(self.width, 2):
            raise DataError(f"overlap={overlap} is not below the width of {file}'s rows, {self.width}")

    def _look_at_npz(self, stream: IO[bytes]) -> None:
        self.members = shard.zip_members(stream, self.file)
        self.identity = zip_identity(self.members)
        member = self.member = shard.token_member(self.members, self.file)
        self.shape, self.dtype = self._header(stream, member, INTEGERS)
        packed = max(1, min(member.compress_size, self.size))
        if member.file_size > self.max_ratio * packed:
            raise DataError(
                f"{self.file}: {member.filename} claims {member.file_size} bytes out of {packed}, a ratio "
                f"over {self.max_ratio:g}; if that is honest padding, with a larger --max_ratio: "
                f"`{here(f'python data.py prepare SRC DST --max_ratio {2 * member.file_size // packed}')}`"
            )
        self.padding = [name for name in shard.PADDING_ARRAYS if name in self.members]
        if self.padding and len(self.shape) == 1:
            raise DataError(f"{self.file}: {member.filename} has one dimension, which {self.padding[0]} does not fit")
        for name in self.padding:  # bounded by the token array's shape, so their own ratio does not matter
            shape, _ = self._header(stream, self.members[name], MASKS)
            if shape != (self.shape if name == "attention_mask" else self.shape[:1]):
                raise DataError(f"{self.file}: {name} has shape {shape} beside tokens of shape {self.shape}")

    def _header(self, file: IO[bytes], member: zipfile.ZipInfo, dtypes: tuple[str, ...]) -> tuple[tuple, np.dtype]:
        """Shape and dtype, once they agree with the declared size: nothing larger than that is ever inflated."""
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{self.file}: {member.filename} is packed by method {member.compress_type}, not deflate")
        with open_member(file, member, self.file) as stream:
            shape, dtype = npy_header(stream, self.file, member.filename, dtypes)
            length = stream.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
        if length != member.file_size:
            raise DataError(
                f"{self.file}: {member.filename} claims {member.file_size} bytes; its shape {shape} and {dtype} make "
                f"{length}"
            )
        return shape, dtype

    def _blocks(self, name: str, multiple: int) -> Iterator[np.ndarray]:
        member = self.members[name]
        with open(self.file, "rb") as file, open_member(file, member, self.file) as stream:
            shape, dtype = npy_header(stream, self.file, name, MASKS)
            yield from read_blocks(stream, dtype, int(np.prod(shape)), self.file, multiple)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per row of a 2-D array without padding, int64 [rows]."""
        if "sequence_lengths" in self.padding:
            lengths = np.concatenate(list(self._blocks("sequence_lengths", 1))).astype(np.int64)
        elif self.padding:
            masks = self._blocks("attention_mask", self.width)
            lengths = np.concatenate([(block.reshape(-1, self.width) != 0).sum(1) for block in masks])
        else:
            lengths = np.full(self.shape[0], self.width)
        if (bad := np.flatnonzero((lengths < 0) | (lengths > self.width))).size:
            raise DataError(
                f"{self.file}: row {bad[0]} has length {lengths[bad[0]]}; a row has 0 to {self.width} tokens"
            )
        if not lengths.any():
            raise DataError(f"{self.file}: all of its {len(lengths)} rows are empty")
        return lengths

    def _check_mask(self) -> None:
        """The mask is ones for each row's length, then zeros."""
        row = 0
        for block in self._blocks("attention_mask", self.width):
            mask = block.reshape(-1, self.width) != 0
            lengths = self.lengths[row : row + len(mask)]
            wrong = (mask != (np.arange(self.width) < lengths[:, None])).any(1)
            if wrong.any():
                i = int(wrong.argmax())
                raise DataError(
                    f"{self.file}: row {row + i} has length {lengths[i]} and {mask[i].sum()} ones in attention_mask, "
                    f"the last at {np.flatnonzero(mask[i])[-1:]}; rows are padded on the right, and the two agree"
                )
            row += len(mask)

    @property
    def held(self) -> int:
        """Tokens in the file that are no padding."""
        return int(self.lengths.sum()) if self.padding else int(np.prod(self.shape))

    @property
    def most(self) -> int:
        """No fewer tokens than come out; known without reading them."""
        return self.held + (self.shape[0] if self.padding else 0)

    @cached_property
    def rows(self) -> "Rows | None":
        """What is taken of each row of a 2-D array, for which all of it is read once."""
        return Rows.of(self) if len(self.shape) == 2 else None

    @property
    def count(self) -> int:
        """Tokens that come out."""
        return self.rows.count if self.rows else self.held

    @property
    def note(self) -> dict[str, Any]:
        """What a shard made from this is recognised by."""
        named = {} if self.overlap is None else {"overlap": self.overlap}
        made = {"source": self.identity, "vocab_size": self.vocab_size, "end_of_text": self.end_of_text, "rule": RULE}
        return made | named

    def read(self, report: dict[str, Any]) -> Iterator[np.ndarray]:
        """All items as they are, padding too, in blocks of whole rows, once the tokens among them are known to be ids."""
        report |= {"largest_id": 0, "documents": 0}
        if "attention_mask" in self.padding:
            self._check_mask()
        seen = 0
        for block in self._items():
            tokens = block
            if self.padding:
                lengths = self.lengths[seen // self.width : (seen + len(block)) // self.width]
                tokens = block[(np.arange(self.width) < lengths[:, None]).ravel()]
            low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
            if low < 0 or high >= self.vocab_size:
                self._refuse(block, seen)
            report["largest_id"] = max(report["largest_id"], high)
            report["documents"] += int((tokens == self.end_of_text).sum())
            seen += len(block)
            yield block

    def _items(self) -> Iterator[np.ndarray]:
        if self.member is not None:
            yield from self._blocks(self.member.filename.removesuffix(".npy"), self.width)
        else:
            with open(self.file, "rb") as stream:
                stream.seek(self.offset)
                yield from read_blocks(stream, self.dtype, int(np.prod(self.shape)), self.file, self.width)

    def chunks(self, report: dict[str, Any]) -> Iterator[np.ndarray]:
        """The tokens that come out, in blocks; fills in the report, whose keys are prepare.TOTALS. Raises DataError."""
        report |= dict.fromkeys(("documents", "padding", "largest_id", "skipped"), 0) | {"tokens": self.count}
        if not self.rows:
            yield from self.read(report)
            return
        report |= self.rows.report
        at = 0
        for block in self._items():
            count = len(block) // self.width
            yield self.rows.take(block.reshape(count, self.width), at)
            at += count

    def _refuse(self, block: np.ndarray, seen: int) -> None:
        wrong = (block < 0) | (block >= self.vocab_size)
        if self.padding:  # where anything may stand
            lengths = self.lengths[seen // self.width : (seen + len(block)) // self.width]
            wrong &= (np.arange(self.width) < lengths[:, None]).ravel()
        i = int(wrong.argmax())
        place = "row {}, column {}".format(*divmod(seen + i, self.width)) if self.padding else f"token {seen + i}"
        raise DataError(
            f"{self.file} has id {block[i]} at {place}; vocab_size={self.vocab_size} allows 0 to vocab_size-1"
        )


@dataclass
class Rows:
    """What is taken of each row of a 2-D array.

    Tokenizers cut a long text into windows that overlap: each row begins with the last `overlap` tokens of the row before.
    That much is dropped where it is equal to the end of the row before. `overlap` is named (0: nothing is dropped), or is
    what shard.overlap_of finds. A text's last window may lie inside the one before; then all of it is dropped.
    """

    begins: np.ndarray  # int64 [rows], the first token that is taken
    ends: np.ndarray  # int64 [rows], behind the last one
    marked: np.ndarray  # bool [rows], whether an end-of-text follows
    end_of_text: int | None
    report: dict[str, int]

    @classmethod
    def of(cls, file: TokenFile) -> "Rows":
        lengths, width = file.lengths, file.width
        report: dict[str, int] = {}
        overlap = file.overlap
        if overlap is None:
            overlap = shard.overlap_of(cls._pairs(file))
        begins, ended = np.zeros_like(lengths), np.zeros(len(lengths), bool)
        before, at = np.zeros((0, width), file.dtype), 0
        for block in file.read(report):
            rows = np.concatenate((before, block.reshape(-1, width)))  # with the last row of the block before
            first = at - len(before)
            long = lengths[first : first + len(rows)]
            if file.end_of_text is not None:
                ended[first : first + len(rows)] = (long > 0) & (
                    rows[np.arange(len(rows)), np.maximum(long, 1) - 1] == file.end_of_text
                )
            if overlap:
                begins[first + 1 : first + len(rows)] = repeated(rows, long, width - overlap)
            before, at = rows[-1:], first + len(rows)
        empty = begins == lengths
        # of a window that lies in a shorter one, the end is marked there
        inside = empty & np.concatenate(([False], lengths[:-1] < width))
        marked = (0 < lengths) & (lengths < width) & ~ended & ~inside
        if not file.padding:
            marked[:] = False
        filled, repeats = int(np.count_nonzero(lengths)), int(np.count_nonzero(begins))
        if file.padding:
            report |= {"documents": filled - repeats}
            report["largest_id"] = max(report["largest_id"], (file.end_of_text or 0) * bool(marked.any()))
        report |= {
            "skipped": len(lengths) - filled, "padding": int(np.prod(file.shape) - lengths.sum()),
            "rows": filled, "ended": int(ended.sum()), "repeats": repeats, "repeated": int(begins.sum()),
        }  # fmt: skip
        return cls(begins, lengths, marked, file.end_of_text, report)

    @staticmethod
    def _pairs(file: TokenFile) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Full rows and what follows each, without its padding."""
        full = (file.lengths[:-1] == file.width) & (file.lengths[1:] > 0)
        if not (full & (file.lengths[1:] >= shard.LEAST_OVERLAP)).any():
            return  # nothing has to be read
        at = 0
        for block in file._items():
            rows = block.reshape(-1, file.width)
            for i in np.flatnonzero(full[at : at + len(rows) - 1]):
                yield rows[i], rows[i + 1, : file.lengths[at + i + 1]]
            at += len(rows)

    @property
    def count(self) -> int:
        return int((self.ends - self.begins + self.marked).sum())

    def take(self, rows: np.ndarray, at: int) -> np.ndarray:
        """The tokens of these rows, of which the first is row `at`."""
        part, width = slice(at, at + len(rows)), rows.shape[1]
        begins, ends, marked = self.begins[part, None], self.ends[part, None], self.marked[part]
        # wide enough for the marker; the last column is where a full row's would go. What wraps is no token
        wide = np.empty((len(rows), width + 1), np.int32 if rows.dtype == np.int32 else np.int64)
        wide[:, :width] = rows
        if self.end_of_text is not None:
            wide[np.arange(len(rows)), ends[:, 0]] = self.end_of_text
        column = np.arange(width + 1)
        return wide[(begins <= column) & (column < ends + marked[:, None])]


def repeated(rows: np.ndarray, lengths: np.ndarray, step: int) -> np.ndarray:
    """Of each row but the first, how many tokens it begins with that end the row before, windows being `step` apart."""
    before, after = rows[:-1], rows[1:]
    counts = lengths[:-1] - step  # that would be repeated
    full = lengths[:-1] == rows.shape[1]
    # a window of full length is followed by one at least as long as what they share; any other by the rest of itself
    may = (counts > 0) & np.where(full, lengths[1:] >= counts, lengths[1:] == counts)
    column = np.arange(rows.shape[1] - step)
    same = ((before[:, step:] == after[:, : rows.shape[1] - step]) | (column >= counts[:, None])).all(1)
    return np.where(may & same, counts, 0)


def zip_identity(members: dict[str, zipfile.ZipInfo]) -> dict[str, str]:
    return {name: f"{member.CRC:08x}" for name, member in sorted(members.items())}


# ---- .npy and .bin: which integers they hold, where the tokens begin, and whether that can be told

BIN_DTYPES = ("uint16", "uint32", "int32", "int64")
HEADER = 1024  # bytes: 256 int32, of which magic, version, number of tokens
HEADERS = {20240520: "<u2", 20240801: "<u4"}  # llm.c's and modded-nanogpt's magic numbers: GPT-2, Llama 3
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FEW = 32  # tokens; fewer do not show what they are


@dataclass
class Flat:
    """How a file is read: its shape and dtype, from which byte on, and the CRC-32 of all of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    crc32: int


def look(file: Path, size: int, vocab_size: int, bin_dtype: str | None) -> Flat:
    """Reads a .npy or .bin file once. Raises DataError where it is unclear what it holds, and OSError.

    A .bin is uint16 (nanoGPT's), unless bin_dtype, an .idx beside it (Megatron's), a header (llm.c's) or its own content
    says otherwise: of ids of 32 bits, read as 16, every second one is zero.
    """
    with open(file, "rb") as stream:
        if file.suffix.lower() == ".npy":
            shape, dtype = npy_header(stream, file, "it", INTEGERS)
            return exactly(file, size, stream.tell(), dtype, int(np.prod(shape)), crc_of(stream), shape)
        index = next((i for i in (file.with_suffix(".idx"), file.with_suffix(".IDX")) if i.is_file()), None)
        if index and not bin_dtype:
            dtype, count = megatron_index(index)
            return exactly(file, size, 0, dtype, count, crc_of(stream))
        magic, _, count = struct.unpack("<3i", stream.read(12).ljust(12, b"\0"))
        if magic in HEADERS and size > HEADER:
            return exactly(file, size, HEADER, np.dtype(HEADERS[magic]), count, crc_of(stream))
        if size % 2 or not size:
            raise DataError(f"{file} has {size} bytes; a .bin file is tokens of 2 or 4 bytes and nothing else")
        if bin_dtype:
            dtype = np.dtype(bin_dtype).newbyteorder("<")
            return exactly(file, size, 0, dtype, size // dtype.itemsize, crc_of(stream))
        dtype, crc = guess(stream, file, size, vocab_size)
        return Flat((size // dtype.itemsize,), dtype, 0, crc)


def exactly(
    file: Path, size: int, offset: int, dtype: np.dtype, count: int, crc: int, shape: tuple[int, ...] | None = None
) -> Flat:
    if size != offset + count * dtype.itemsize:
        raise DataError(
            f"{file} has {size} bytes; {count} tokens of {dtype.name} from byte {offset} on are {size - offset}"
        )
    return Flat(shape or (count,), dtype, offset, crc)


def crc_of(stream: IO[bytes]) -> int:
    crc = 0
    stream.seek(0)
    while block := stream.read(BLOCK):
        crc = zlib.crc32(block, crc)
    return crc


def megatron_index(file: Path) -> tuple[np.dtype, int]:
    """(dtype, number of tokens) by the index of a .bin, whose sequences have to lie one behind the other."""
    content = file.read_bytes()
    if not content.startswith(MEGATRON) or len(content) < 34:
        raise DataError(f"{file} is no Megatron index (MMIDIDX), so it is unclear what the .bin beside it holds")
    version, code, sequences, documents = struct.unpack("<QBQQ", content[9:34])
    if version != 1 or code not in MEGATRON_DTYPES or len(content) < 34 + 12 * sequences + 8 * documents:
        raise DataError(
            f"{file} is of version {version}, with dtype {code} and {len(content)} bytes; it cannot be read"
        )
    dtype = np.dtype(MEGATRON_DTYPES[code])
    lengths = np.frombuffer(content, "<i4", sequences, 34).astype(np.int64)
    begins = np.frombuffer(content, "<i8", sequences, 34 + 4 * sequences)
    if (begins != (np.cumsum(lengths) - lengths) * dtype.itemsize).any():
        raise DataError(f"{file}: its sequences do not lie one behind the other; only such files can be read")
    return dtype, int(lengths.sum())


def guess(stream: IO[bytes], file: Path, size: int, vocab_size: int) -> tuple[np.dtype, int]:
    """(dtype, CRC-32) of a plain .bin: the widest integers that all are ids, if the content shows that they are."""
    widths = [width for width in (2, 4, 8) if size % width == 0]
    largest, zeros, tops, crc = dict.fromkeys(widths, 0), [0, 0], [0, 0], 0
    stream.seek(0)
    while block := stream.read(BLOCK):
        crc = zlib.crc32(block, crc)
        for width in widths:
            largest[width] = max(largest[width], int(np.frombuffer(block, f"<u{width}").max()))
        pairs = np.frombuffer(block, "<u2")
        for i in (0, 1):
            zeros[i] += int(np.count_nonzero(pairs[i::2] == 0))
            tops[i] = max(tops[i], int(pairs[i::2].max(initial=0)))
    width = max((width for width in widths if largest[width] < vocab_size), default=2)
    half = size // 4
    # as no text in uint16 is: the even places are much larger, or much seldomer zero, than the odd ones
    lopsided = abs(zeros[1] - zeros[0]) > half / 2 or 64 * min(tops) < max(tops)
    if (width == 2 and lopsided and half >= FEW) or (width > 2 and 2 * half - sum(zeros) < FEW):
        raise DataError(
            f"{file}: of its 16-bit items {sum(zeros)} of {2 * half} are zero, {zeros[1]} of them at odd places, and the "
            f"largest is {largest[2]}: it is unclear how wide its ids are. Name it with --bin_dtype "
            f"{'|'.join(BIN_DTYPES)}; vocab_size={vocab_size} allows 0 to vocab_size-1"
        )
    return np.dtype(f"<u{width}"), crc
