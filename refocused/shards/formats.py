"""A file of tokens in any foreign format, opened by its headers, streamed block by block.

Nothing here trusts a file: sizes are compared with shapes before a byte is inflated, and nothing is ever unpickled.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from refocused.entry import here
from refocused.shards import shard
from refocused.shards.notes import LEAST_OVERLAP, PAIRS, ROWS, overlap_of
from refocused.shards.shard import BLOCK, INTEGERS, DataError, npy_header

MASKS = ("|b1", *INTEGERS)
ROW_RULE = 2  # by which rows become a stream: what was made by an older one is made again
FLAT = (".bin", ".npy")
KINDS = (".npz", *FLAT)
BIN_DTYPES = ("uint16", "uint32", "int32", "int64")
HEADER = 1024  # bytes: 256 int32, of which magic, version, number of tokens
HEADERS = {20240520: "<u2", 20240801: "<u4"}  # llm.c's and modded-nanogpt's magic numbers: GPT-2, Llama 3
MEGATRON_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FEW = 32  # tokens; fewer do not show what they are


@contextmanager
def open_member(file: IO[bytes], member: zipfile.ZipInfo, path: Path) -> Iterator[IO[bytes]]:
    """A member as a stream that ends at its declared size and checks its CRC-32 there. Raises DataError."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
            yield stream
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise DataError(f"{path} is damaged or ends early: {member.filename}: {error}") from error


def read_blocks(stream: IO[bytes], dtype: np.dtype, count: int, path: Path, multiple: int = 1) -> Iterator[np.ndarray]:
    """`count` items as 1-D arrays of about BLOCK bytes; each but the last has a multiple of `multiple` items."""
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

    The trainer before this one wrote `input_ids` [rows, width] padded on the right, with `sequence_lengths` [rows] or
    `attention_mask` [rows, width] or both. docs/data.md has the rules by which rows become a stream. Raises DataError.

    end_of_text: None where no tokenizer is known; then nothing may be padded. overlap: how many tokens a row repeats of
    the row before; None: as found.
    """

    def __init__(
        self,
        file: Path,
        vocab_size: int,
        end_of_text: int | None,
        bin_dtype: str | None = None,
        overlap: int | None = None,
    ):
        self.file, self.vocab_size, self.end_of_text, self.overlap = file, vocab_size, end_of_text, overlap
        self.out_dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.members: dict[str, zipfile.ZipInfo] = {}  # of an .npz
        self.member: zipfile.ZipInfo | None = None  # the one of the tokens
        self.padding: list[str] = []  # the arrays that say what is padding
        try:
            self.size = file.stat().st_size
            with open(file, "rb") as stream:
                if file.suffix.lower() in FLAT:
                    self._look_at_flat(stream, bin_dtype)
                else:
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
        self.padding = [name for name in shard.PADDING_ARRAYS if name in self.members]
        if self.padding and len(self.shape) == 1:
            raise DataError(f"{self.file}: {member.filename} has one dimension, which {self.padding[0]} does not fit")
        for name in self.padding:
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
            claim = f"{member.filename} claims {member.file_size} bytes"
            raise DataError(f"{self.file}: {claim}; its shape {shape} and {dtype} make {length}")
        return shape, dtype

    def _look_at_flat(self, stream: IO[bytes], bin_dtype: str | None) -> None:
        """A .bin is uint16 (nanoGPT's), unless bin_dtype, an .idx beside it (Megatron's), a header (llm.c's) or its own
        content says otherwise."""
        file, offset, shape = self.file, 0, None
        index = next((i for i in (file.with_suffix(".idx"), file.with_suffix(".IDX")) if i.is_file()), None)
        head = stream.read(BLOCK)
        magic, begin, count = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
        # litdata: a number of items, then where each begins and the last one ends; lit-gpt before it: its name
        chunk = begin == 4 * magic + 8 and int.from_bytes(head[begin - 4 : begin], "little") == self.size
        if file.suffix.lower() == ".npy":
            stream.seek(0)
            shape, dtype = npy_header(stream, file, "it")
            offset = stream.tell()
        elif index and not bin_dtype:
            dtype, count = megatron_index(index)
        elif chunk or head.startswith(b"LITPKDS"):
            way = here("python data.py tokenize SRC DST")
            raise DataError(
                f"{file} is a chunk as litgpt's PackedDataset or litdata writes it, which is not read; `{way}` "
                "makes shards of the texts"
            )
        elif magic in HEADERS and self.size > HEADER:
            dtype, offset = np.dtype(HEADERS[magic]), HEADER
        elif self.size % 2 or not self.size:
            raise DataError(f"{file} has {self.size} bytes; a .bin file is tokens of 2 or 4 bytes and nothing else")
        else:
            dtype = np.dtype(bin_dtype).newbyteorder("<") if bin_dtype else self._guess(head)
            count = self.size // dtype.itemsize
        self.shape, self.dtype, self.offset = shape or (count,), dtype, offset
        needed = offset + int(np.prod(self.shape)) * dtype.itemsize
        if self.size != needed:
            what = f"{int(np.prod(self.shape))} tokens of {dtype.name} from byte {offset} on make {needed}"
            raise DataError(f"{file} has {self.size} bytes; {what}")
        crc = 0
        stream.seek(0)
        while block := stream.read(BLOCK):
            crc = zlib.crc32(block, crc)
        self.identity = {file.name: f"{crc:08x}"}
        if (dtype.str, offset) != ("<u2", 0):
            self.identity["read as"] = f"{dtype.str} from byte {offset}"

    def _guess(self, head: bytes) -> np.dtype:
        """The widest integers that all are ids, if the beginning of a plain .bin shows that they are.

        Of ids of 32 bits, read as 16, every second one is zero; no text in uint16 is like that.
        """
        pairs = np.frombuffer(head[: len(head) // 4 * 4], "<u2").reshape(-1, 2)
        half, zeros, tops = len(pairs), (pairs == 0).sum(0).tolist(), pairs.max(0, initial=0).tolist()
        fitting = [n for n in (4, 8) if self.size % n == 0 and np.frombuffer(head, f"<u{n}").max() < self.vocab_size]
        width = max(fitting, default=2)
        lopsided = abs(zeros[1] - zeros[0]) > half / 2 or 64 * min(tops) < max(tops)
        if (width == 2 and lopsided and half >= FEW) or (width > 2 and 2 * half - sum(zeros) < FEW):
            raise DataError(
                f"{self.file}: of its first {2 * half} 16-bit items {sum(zeros)} are zero, {zeros[1]} of them at odd "
                f"places, and the largest is {max(tops)}: it is unclear how wide its ids are. Name it with --bin_dtype "
                f"{'|'.join(BIN_DTYPES)}; vocab_size={self.vocab_size} allows 0 to vocab_size-1"
            )
        return np.dtype(f"<u{width}")

    def _blocks(self, member: zipfile.ZipInfo | None, multiple: int) -> Iterator[np.ndarray]:
        """All items of a member, or of a file that is no zip, with padding, as read_blocks yields them."""
        try:
            with open(self.file, "rb") as file:
                if member is None:
                    file.seek(self.offset)
                    yield from read_blocks(file, self.dtype, int(np.prod(self.shape)), self.file, multiple)
                    return
                with open_member(file, member, self.file) as stream:
                    shape, dtype = npy_header(stream, self.file, member.filename, MASKS)
                    yield from read_blocks(stream, dtype, int(np.prod(shape)), self.file, multiple)
        except OSError as error:  # the file went away, or its disk fails
            raise DataError(f"cannot read {self.file}: {error.strerror or error}") from error

    def _masks(self) -> Iterator[np.ndarray]:
        for block in self._blocks(self.members["attention_mask"], self.width):
            yield block.reshape(-1, self.width) != 0

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per row of a 2-D array without padding, int64 [rows]."""
        if "sequence_lengths" in self.padding:
            lengths = np.concatenate(list(self._blocks(self.members["sequence_lengths"], 1))).astype(np.int64)
        elif self.padding:
            lengths = np.concatenate([mask.sum(1) for mask in self._masks()])
        else:
            lengths = np.full(self.shape[0], self.width)
        if (bad := np.flatnonzero((lengths < 0) | (lengths > self.width))).size:
            rule = f"a row has 0 to {self.width} tokens"
            raise DataError(f"{self.file}: row {bad[0]} has length {lengths[bad[0]]}; {rule}")
        if not lengths.any():
            raise DataError(f"{self.file}: all of its {len(lengths)} rows are empty")
        return lengths

    def _check_mask(self) -> None:
        """The mask is ones for each row's length, then zeros."""
        row = 0
        for mask in self._masks():
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

    @property
    def note(self) -> dict[str, Any]:
        """What a shard made from this is recognised by."""
        named = {} if self.overlap is None else {"overlap": self.overlap}
        made = {"source": self.identity, "vocab_size": self.vocab_size, "end_of_text": self.end_of_text}
        return made | {"rule": ROW_RULE} | named

    def read(self, report: dict[str, Any]) -> Iterator[np.ndarray]:
        """All items, with padding, in blocks of whole rows. Raises DataError for a token that is no id."""
        report["largest_id"] = seen = 0
        if "attention_mask" in self.padding:
            self._check_mask()
        for block in self._blocks(self.member, self.width):
            real: Any = True
            if self.padding:
                lengths = self.lengths[seen // self.width : (seen + len(block)) // self.width]
                real = (np.arange(self.width) < lengths[:, None]).ravel()
            tokens = block[real] if self.padding else block
            low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
            if low < 0 or high >= self.vocab_size:
                i = int((((block < 0) | (block >= self.vocab_size)) & real).argmax())
                at = "row {}, column {}".format(*divmod(seen + i, self.width)) if self.padding else f"token {seen + i}"
                allowed = f"vocab_size={self.vocab_size} allows 0 to vocab_size-1"
                raise DataError(f"{self.file} has id {block[i]} at {at}; {allowed}")
            report["largest_id"] = max(report["largest_id"], high)
            seen += len(block)
            yield block

    def chunks(self, report: dict[str, Any]) -> Iterator[np.ndarray]:
        """The tokens that come out, in blocks; fills in the report: prepare.TOTALS and, of a 2-D array, ROWS."""
        report |= dict.fromkeys(("tokens", "documents", "padding", "largest_id", "skipped"), 0)
        for tokens in self._rows(report) if len(self.shape) == 2 else self.read(report):
            report["tokens"] += len(tokens)
            if not self.padding:
                report["documents"] += int(np.count_nonzero(tokens == self.end_of_text))
            yield tokens

    def _rows(self, report: dict[str, Any]) -> Iterator[np.ndarray]:
        """Each row without what it repeats, and an end-of-text after a row that ends a document."""
        width, overlap = self.width, self._find_overlap() if self.overlap is None else self.overlap
        inner = bool(overlap) and self._has_inner_windows(width - overlap)
        report |= dict.fromkeys(ROWS, 0)
        column, before, at = np.arange(width + 1), np.zeros((0, width), self.dtype), 0
        for block in self.read(report):
            rows = block.reshape(-1, width)
            lengths = self.lengths[at : at + len(rows)]
            begins, follows_short = np.zeros_like(lengths), np.concatenate(([False], lengths[:-1] < width))
            if len(before):
                follows_short[0] = self.lengths[at - 1] < width
            if overlap:
                counted = self.lengths[at - len(before) : at + len(rows)]
                begins[1 - len(before) :] = repeated(np.concatenate((before, rows)), counted, width - overlap, inner)
            ended = (lengths > 0) & (rows[np.arange(len(rows)), lengths - 1] == self.end_of_text)
            # a window that lies inside a shorter one adds nothing: the end is marked behind that one
            marked = (0 < lengths) & (lengths < width) & ~ended & ~((begins == lengths) & follows_short)
            filled, repeats = int(np.count_nonzero(lengths)), int(np.count_nonzero(begins))
            counts = (filled, int(ended.sum()), repeats, int(begins.sum()))
            for key, count in zip(ROWS, counts, strict=True):
                report[key] += count
            report["skipped"] += len(rows) - filled
            report["padding"] += block.size - int(lengths.sum())
            report["documents"] += (filled - repeats) * bool(self.padding)
            if not overlap and not self.padding:
                yield block
            else:
                wide = np.empty((len(rows), width + 1), self.out_dtype)  # with a column for an end-of-text
                wide[:, :width] = rows  # what wraps is padding
                if marked.any():
                    wide[marked, lengths[marked]] = self.end_of_text
                    report["largest_id"] = max(report["largest_id"], self.end_of_text)
                yield wide[(begins[:, None] <= column) & (column < (lengths + marked)[:, None])]
            before, at = rows[-1:], at + len(rows)

    def _find_overlap(self) -> int:
        full, after = self.lengths[:-1] == self.width, self.lengths[1:]
        # where no row can show an overlap, nothing has to be read
        return overlap_of(self._pairs(full & (after > 0))) if (full & (after >= LEAST_OVERLAP)).any() else 0

    def _has_inner_windows(self, step: int) -> bool:
        """Whether a text's windows go on to its end, so that the last ones lie inside the one before."""
        short = (self.lengths[:-1] > step) & (self.lengths[:-1] < self.width)
        inside = [np.array_equal(before[step:], after) for before, after in self._pairs(short)] if short.any() else []
        return 2 * sum(inside) > len(inside)

    def _pairs(self, which: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """PAIRS of these rows, spread evenly, each with the row behind it, without their padding."""
        wanted, at = np.flatnonzero(which), 0
        wanted = wanted[np.unique(np.linspace(0, len(wanted) - 1, min(PAIRS, len(wanted)), dtype=int))]
        for block in self._blocks(self.member, self.width):
            rows = block.reshape(-1, self.width)
            for i in wanted[(wanted >= at) & (wanted < at + len(rows) - 1)] - at:
                yield rows[i, : self.lengths[at + i]], rows[i + 1, : self.lengths[at + i + 1]]
            at += len(rows)
            if at > wanted[-1]:
                return


def repeated(rows: np.ndarray, lengths: np.ndarray, step: int, inner: bool) -> np.ndarray:
    """Of each row but the first, how many tokens it begins with that end the row before, windows being `step` apart."""
    before, after = rows[:-1], rows[1:]
    counts = lengths[:-1] - step  # that would be repeated
    # a window of full length is followed by one at least as long as what they share; any other by the rest of itself
    long_enough = np.where(lengths[:-1] == rows.shape[1], lengths[1:] >= counts, inner & (lengths[1:] == counts))
    column = np.arange(rows.shape[1] - step)
    same = ((before[:, step:] == after[:, : rows.shape[1] - step]) | (column >= counts[:, None])).all(1)
    return np.where((counts > 0) & long_enough & same, counts, 0)


def zip_identity(members: dict[str, zipfile.ZipInfo]) -> dict[str, str]:
    return {name: f"{member.CRC:08x}" for name, member in sorted(members.items())}


def megatron_index(file: Path) -> tuple[np.dtype, int]:
    """(dtype, number of tokens) by the index of a .bin, whose sequences have to lie one behind the other."""
    content = file.read_bytes()
    if not content.startswith(b"MMIDIDX\0\0") or len(content) < 34:
        raise DataError(f"{file} is no Megatron index (MMIDIDX), so it is unclear what the .bin beside it holds")
    version, code, sequences, documents = struct.unpack("<QBQQ", content[9:34])
    if version != 1 or code not in MEGATRON_DTYPES or len(content) < 34 + 12 * sequences + 8 * documents:
        raise DataError(
            f"{file} is of version {version}, with dtype {code} and {len(content)} bytes: it is not readable"
        )
    dtype = np.dtype(MEGATRON_DTYPES[code])
    lengths = np.frombuffer(content, "<i4", sequences, 34).astype(np.int64)
    begins = np.frombuffer(content, "<i8", sequences, 34 + 4 * sequences)
    if (begins != (np.cumsum(lengths) - lengths) * dtype.itemsize).any():
        raise DataError(f"{file}: its sequences do not lie one behind the other; only such files can be read")
    return dtype, int(lengths.sum())
