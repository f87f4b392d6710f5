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
    `attention_mask` [rows, width] or both. Its padding is dropped, and a row shorter than the width is followed by one
    end-of-text; an empty row is skipped. Anything else (1-D, rows without padding arrays, .npy, .bin) is a stream as it
    is. Integers of any width and byte order are narrowed once all are ids. Raises DataError.
    """

    def __init__(
        self,
        file: Path,
        vocab_size: int,
        end_of_text: int,
        max_ratio: float = MAX_RATIO,
        bin_dtype: str | None = None,
    ):
        if not 0 <= end_of_text < vocab_size:
            raise DataError(f"end_of_text={end_of_text} is no id below vocab_size={vocab_size}")
        self.file, self.vocab_size, self.end_of_text, self.max_ratio = file, vocab_size, end_of_text, max_ratio
        self.out_dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.members: dict[str, zipfile.ZipInfo] = {}  # of an .npz
        self.member: zipfile.ZipInfo | None = None  # the one of the tokens
        self.padded = False
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
        padding = [name for name in shard.PADDING_ARRAYS if name in self.members]
        self.padded = bool(padding)
        if padding and len(self.shape) == 1:
            raise DataError(f"{self.file}: {member.filename} has one dimension, which {padding[0]} does not fit")
        for name in padding:  # bounded by the token array's shape, so their own ratio does not matter
            shape, _ = self._header(stream, self.members[name], MASKS)
            if shape != (self.shape if name == "attention_mask" else self.shape[:1]):
                raise DataError(f"{self.file}: {name} has shape {shape} beside tokens of shape {self.shape}")

    def _header(self, file: IO[bytes], member: zipfile.ZipInfo, dtypes: tuple[str, ...]) -> tuple[tuple, np.dtype]:
        """Shape and dtype, once they agree with the declared size: nothing larger than that is ever inflated."""
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{self.file}: {member.filename} is packed by method {member.compress_type}, not deflate")
        with open_member(file, member, self.file) as stream:
            shape, dtype = shard.npy_header(stream, self.file, member.filename, dtypes)
            length = stream.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
        if length != member.file_size:
            raise DataError(
                f"{self.file}: {member.filename} claims {member.file_size} bytes; its shape {shape} and {dtype} make "
                f"{length}"
            )
        return shape, dtype

    def _blocks(self, name: str, multiple: int, dtypes: tuple[str, ...] = MASKS) -> Iterator[np.ndarray]:
        member = self.members[name]
        with open(self.file, "rb") as file, open_member(file, member, self.file) as stream:
            shape, dtype = shard.npy_header(stream, self.file, name, dtypes)
            yield from read_blocks(stream, dtype, int(np.prod(shape)), self.file, multiple)

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """Tokens per row, int64 [rows]; None where nothing is padded."""
        if not self.padded:
            return None
        width = self.shape[1]
        if "sequence_lengths" in self.members:
            lengths = np.concatenate(list(self._blocks("sequence_lengths", 1))).astype(np.int64)
        else:
            lengths = np.concatenate(
                [(block.reshape(-1, width) != 0).sum(1) for block in self._blocks("attention_mask", width)]
            )
        if (bad := np.flatnonzero((lengths < 0) | (lengths > width))).size:
            raise DataError(f"{self.file}: row {bad[0]} has length {lengths[bad[0]]}; a row has 0 to {width} tokens")
        if not lengths.any():
            raise DataError(f"{self.file}: all of its {len(lengths)} rows are empty")
        return lengths

    def _check_mask(self) -> None:
        """The mask is ones for each row's length, then zeros."""
        width, row, all_lengths = self.shape[1], 0, self.lengths
        assert all_lengths is not None
        for block in self._blocks("attention_mask", width):
            mask = block.reshape(-1, width) != 0
            lengths = all_lengths[row : row + len(mask)]
            wrong = (mask != (np.arange(width) < lengths[:, None])).any(1)
            if wrong.any():
                i = int(wrong.argmax())
                raise DataError(
                    f"{self.file}: row {row + i} has length {lengths[i]} and {mask[i].sum()} ones in attention_mask, "
                    f"the last at {np.flatnonzero(mask[i])[-1:]}; rows are padded on the right, and the two agree"
                )
            row += len(mask)

    @cached_property
    def count(self) -> int:
        """Tokens that come out."""
        if self.lengths is None:
            return int(np.prod(self.shape))
        return int(self.lengths.sum() + self._marked(self.lengths).sum())

    def _marked(self, lengths: np.ndarray) -> np.ndarray:
        """Which rows are followed by an end-of-text."""
        return (0 < lengths) & (lengths < self.shape[1])

    @property
    def note(self) -> dict[str, Any]:
        """What a shard made from this is recognised by."""
        return {"source": self.identity, "vocab_size": self.vocab_size, "end_of_text": self.end_of_text}

    def chunks(self, report: dict[str, Any]) -> Iterator[np.ndarray]:
        """The tokens in blocks; fills in tokens, documents, padding, largest_id and skipped. Raises DataError."""
        report |= {"tokens": self.count, "documents": 0, "padding": 0, "largest_id": 0, "skipped": 0}
        if "attention_mask" in self.members:
            self._check_mask()
        if self.member is None:
            with open(self.file, "rb") as stream:
                stream.seek(self.offset)
                yield from self._checked(read_blocks(stream, self.dtype, self.count, self.file), report)
        else:
            name = self.member.filename.removesuffix(".npy")
            yield from self._checked(self._blocks(name, self.shape[1] if self.padded else 1), report)

    def _checked(self, blocks: Iterator[np.ndarray], report: dict[str, Any]) -> Iterator[np.ndarray]:
        seen = 0
        for block in blocks:
            tokens = self._unpad(block, seen // self.shape[1], report) if self.padded else block
            low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
            if low < 0 or high >= self.vocab_size:
                self._refuse(block, seen)
            report["largest_id"] = max(report["largest_id"], high)
            if not self.padded:
                report["documents"] += int((tokens == self.end_of_text).sum())
            seen += len(block)
            yield tokens

    def _unpad(self, block: np.ndarray, row: int, report: dict[str, Any]) -> np.ndarray:
        assert self.lengths is not None
        width = self.shape[1]
        block = block.reshape(-1, width)
        lengths = self.lengths[row : row + len(block)]
        # wide enough for the marker; the last column is where a full row's would go. What wraps is negative: refused
        rows = np.empty((len(block), width + 1), np.int32 if block.dtype == np.int32 else np.int64)
        rows[:, :width] = block
        rows[np.arange(len(block)), lengths] = self.end_of_text
        filled = int(np.count_nonzero(lengths))
        report["documents"] += filled
        report["skipped"] += len(lengths) - filled
        report["padding"] += int(block.size - lengths.sum())
        return rows[np.arange(width + 1) < (lengths + self._marked(lengths))[:, None]]

    def _refuse(self, block: np.ndarray, seen: int) -> None:
        wrong = (block < 0) | (block >= self.vocab_size)
        if self.padded:  # where anything may stand
            assert self.lengths is not None
            width = self.shape[1]
            lengths = self.lengths[seen // width : (seen + len(block)) // width]
            wrong &= (np.arange(width) < lengths[:, None]).ravel()
        i = int(wrong.argmax())
        place = "row {}, column {}".format(*divmod(seen + i, self.shape[1])) if self.padded else f"token {seen + i}"
        raise DataError(
            f"{self.file} has id {block[i]} at {place}; vocab_size={self.vocab_size} allows 0 to vocab_size-1"
        )


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
        index = next((i for i in (file.with_suffix(".idx"), file.with_suffix(".IDX")) if i.exists()), None)
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
