"""Files of nothing but tokens: which integers they hold, where the tokens begin, and whether that can be told."""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from refocused.shards.shard import BLOCK, INTEGERS, DataError, npy_header

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
