"""One shard: an .npz whose token array is stored, not deflated, so that it is mapped as it is and a sample is a slice."""

import contextlib
import errno
import io
import json
import mmap
import os
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from refocused import files
from refocused.entry import here

TOKEN_ARRAYS = ("input_ids", "tokens")
PADDING_ARRAYS = ("attention_mask", "sequence_lengths")
DTYPES = ("<u2", "<u4", "<i4")  # that are mapped
INTEGERS = ("|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", ">i2", ">u2", ">i4", ">u4", ">i8", ">u8")
MAX_MEMBERS = 16
PREPARE = "python data.py prepare SRC DST"  # what makes shards of other files
BLOCK = 1 << 22  # bytes handled at once
MOMENTARY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # what a network's disk may say once and not again
PAUSES = (1.0, 3.0)  # seconds before asking it again
CHECKING = threading.Lock()
T = TypeVar("T")


class DataError(ValueError):
    """Data that cannot be trained on: missing, damaged, of the wrong kind, or changed since it was opened."""

    exit_code = 66


class PackedShard(DataError):
    """A shard that is sound as far as one can see but compressed or padded, so it cannot be mapped as it is."""


class WriteError(DataError):
    """The disk did not take what was written; more of the same will not help."""


def zip_members(file: IO[bytes], path: Path) -> dict[str, zipfile.ZipInfo]:
    """{array name: its directory entry}, from the zip directory alone. Raises DataError."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise DataError(f"{path} is not an .npz file or ends early: {error}") from error
    if len(entries) > MAX_MEMBERS:
        raise DataError(f"{path} has {len(entries)} members; a shard has at most {MAX_MEMBERS}")
    members = {entry.filename.removesuffix(".npy"): entry for entry in entries}
    if len(members) < len(entries):
        raise DataError(f"{path} names a member twice: {', '.join(sorted(e.filename for e in entries))}")
    if encrypted := [entry.filename for entry in entries if entry.flag_bits & 1]:
        raise DataError(f"{path} has encrypted members: {', '.join(encrypted)}")
    return members


def zip_note(file: IO[bytes]) -> dict[str, Any]:
    """What write_shard noted in a zip, in its comment; {} for any other."""
    try:
        note = json.loads(zipfile.ZipFile(file).comment)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def made_with(note: dict[str, Any]) -> tuple[str, str] | None:
    """(identity, name) of the tokenizer of which a shard's note says that it made it; None where it does not say."""
    identity = note.get("tokenizer")
    return (identity, str(note.get("tokenizer_name", identity))) if isinstance(identity, str) else None


def token_member(members: dict[str, zipfile.ZipInfo], path: Path) -> zipfile.ZipInfo:
    # np.savez(file, tokens) without a name makes arr_0 of it
    found = [members[name] for name in (TOKEN_ARRAYS if {*members} != {"arr_0"} else members) if name in members]
    if len(found) != 1:
        names = ", ".join(sorted(members)) or "nothing"
        rule = f"a shard holds exactly one of {' and '.join(TOKEN_ARRAYS)}"
        raise DataError(f"{path} holds {names}; {rule}; save it as np.savez(file, input_ids=tokens)")
    return found[0]


def npy_header(
    stream: IO[bytes], path: Path, array: str, dtypes: tuple[str, ...] = INTEGERS
) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of the .npy that starts here, leaving the stream at its first item. Never unpickles."""
    begin = stream.tell()
    head = io.BytesIO(stream.read(1 << 14))  # a header may claim to be 4 GB long
    try:
        version = np.lib.format.read_magic(head)
        if version not in ((1, 0), (2, 0), (3, 0)):  # 3.0 differs in the letters that a field's name may have
            raise ValueError(f"unknown .npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
    except Exception as error:  # numpy's header is a Python literal, and its parser's errors are of many kinds
        raise DataError(f"{path}: {array} has no readable .npy header: {error}") from error
    if dtype.str not in dtypes:
        kind = "pickled objects" if dtype.hasobject else f"dtype {dtype.str}"
        raise DataError(f"{path}: {array} holds {kind}; it may hold integers of any width")
    if len(shape) not in (1, 2) or (fortran and len(shape) == 2):
        order, way = ("Fortran", "np.ascontiguousarray(a)") if fortran else ("C", "a.reshape(-1, a.shape[-1])")
        raise DataError(
            f"{path}: {array} has shape {shape} in {order} order; a shard is a 1-D stream or 2-D rows in C order: save "
            f"{way if shape else 'an array'} instead"
        )
    stream.seek(begin + head.tell())
    return shape, dtype


def persistently(call: Callable[..., T], *args: Any) -> T:
    """call(*args), asked again where the disk failed for a moment. Raises OSError."""
    for pause in PAUSES:
        try:
            return call(*args)
        except OSError as error:
            if error.errno not in MOMENTARY:
                raise
            time.sleep(pause)
    return call(*args)


def open_file(file: Path) -> IO[bytes]:
    """A file whose two ends, where all headers are, could be read. Raises OSError."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(file, "rb"))
        for begin in (0, max(0, os.fstat(stream.fileno()).st_size - 4096)):
            os.pread(stream.fileno(), 4096, begin)
        stack.pop_all()
        return stream


@dataclass
class Unmapped:
    """The tokens of a file on a disk that cannot map it: each slice is read, anew each time."""

    file: Path
    dtype: np.dtype
    count: int
    offset: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, _ = wanted.indices(self.count)
        found = np.fromfile(self.file, self.dtype, stop - start, offset=self.offset + start * self.dtype.itemsize)
        if len(found) != stop - start:
            raise DataError(f"{self.file} ends early: {stop - start - len(found)} tokens are missing")
        return found


@dataclass(eq=False)
class Shard:
    """One file with tokens stored back to back, mapped. Holds the map's file descriptor until it is garbage."""

    path: str  # relative to the set's folder, with forward slashes
    file: Path
    shape: tuple[int, ...]  # (tokens,) or (rows, width)
    crc32: int  # of the member, from the zip directory
    note: dict[str, Any]  # what write_shard noted, {} in a foreign file
    begin: int  # of the member's content, a .npy, in bytes
    offset: int  # of the first token
    size: int  # of the file, with its time of change: a file that differs from what was opened is not read
    mtime_ns: int
    stream: np.ndarray | Unmapped  # all tokens, read-only and 1-D

    @classmethod
    def open(cls, folder: str | Path, path: str) -> "Shard":
        """Opens folder/path by reading headers only. Raises PackedShard, or DataError where it is no shard at all."""
        file = Path(folder, path)
        try:
            stream = persistently(open_file, file)
        except OSError as error:
            few = "; `ulimit -n` is the limit: raise it, or make fewer and larger shards"
            hint = few if error.errno in (errno.EMFILE, errno.ENFILE) else ""
            raise DataError(f"cannot read {file}: {error.strerror}{hint}") from error
        try:
            with stream:  # the map has a descriptor of its own
                status = os.fstat(stream.fileno())
                shape, dtype, begin, offset, crc32 = find_tokens(stream, file, status.st_size)
                note = zip_note(stream)
                tokens = map_tokens(stream.fileno(), file, int(np.prod(shape)), dtype, offset)
        except OSError as error:  # such as a header that would lie before the file's first byte
            raise DataError(f"{file} is damaged or ends early: {error}") from error
        return cls(path, file, shape, crc32, note, begin, offset, status.st_size, status.st_mtime_ns, tokens)

    @property
    def tokenizer(self) -> tuple[str, str] | None:
        """(identity, name) of the one that made it, if the file says so."""
        return made_with(self.note)

    @property
    def num_tokens(self) -> int:
        return len(self.stream)

    def rows(self, most: int) -> np.ndarray:
        """The first rows of a 2-D array."""
        return self.stream[: most * self.shape[1]].reshape(-1, self.shape[1])

    def check_unchanged(self) -> None:
        """Raises DataError unless the file is what was opened.

        Called before the map is touched it keeps a shortened file from ending the process, and after it, it vouches for
        what was read. A file that only has another time is read once in full and compared with its checksum.
        """
        try:
            now = persistently(os.stat, self.file)
            if (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns):
                return
            with CHECKING:
                if now.st_size == self.size and (now.st_mtime_ns == self.mtime_ns or self.has_its_checksum()):
                    self.mtime_ns = now.st_mtime_ns
                    return
        except OSError as error:
            raise DataError(f"{self.file} was there when it was opened: {error.strerror}") from error
        later = (now.st_mtime_ns - self.mtime_ns) / 1e9
        raise DataError(
            f"{self.file} changed since it was opened: {self.size} bytes then, {now.st_size} now, its modification time "
            f"{later:+.3f} s; put the old file back, or start a new run on the new data"
        )

    def has_its_checksum(self) -> bool:
        """Whether the whole content is what the zip directory says. Raises OSError."""
        crc, left = 0, self.offset - self.begin + self.num_tokens * self.stream.dtype.itemsize
        with open(self.file, "rb") as file:  # and not the map: the name may lead to another file by now
            file.seek(self.begin)
            while left and (block := file.read(min(left, BLOCK))):
                crc, left = zlib.crc32(block, crc), left - len(block)
        return not left and crc == self.crc32

    def describe(self) -> dict[str, Any]:
        """What identifies its content, without reading it. The path is the same in every locale."""
        path = os.fsencode(self.path).decode("utf-8", "surrogateescape")
        return {"path": path, "tokens": self.num_tokens, "dtype": self.stream.dtype.name, "crc32": f"{self.crc32:08x}"}


def map_tokens(fd: int, file: Path, count: int, dtype: np.dtype, offset: int) -> np.ndarray | Unmapped:
    try:
        mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # or the kernel reads 128 KiB for every window of 2
    except OSError as error:
        if error.errno in files.NO_MAP:
            slow = "shards are read instead, which takes longer"
            files.lack(file.parent, f"cannot map files ({files.why(error)}): {slow}")
            return Unmapped(file, dtype, count, offset)
        limits = "; `ulimit -n`, `ulimit -v` and the kernel's vm.max_map_count bound how many shards are open"
        raise DataError(f"cannot map {file}: {error.strerror}{limits}") from error
    return np.ndarray(count, dtype, mapped, offset)


def find_tokens(stream: IO[bytes], file: Path, size: int) -> tuple[tuple[int, ...], np.dtype, int, int, int]:
    """(shape, dtype, where the .npy begins, where its tokens begin, CRC-32 of the .npy) of an .npz of `size` bytes."""
    if file.suffix.lower() in (".bin", ".npy"):
        raise DataError(f"{file} is no .npz; `{here(PREPARE)}` makes shards of .bin and .npy files")
    members, way = zip_members(stream, file), f"`{here(PREPARE)}` makes shards to be read in place"
    member = token_member(members, file)
    padding = [name for name in PADDING_ARRAYS if name in members]
    if member.compress_type != zipfile.ZIP_STORED or padding:
        why = f"padded (it has {' and '.join(padding)})" if padding else "compressed"
        raise PackedShard(f"{file} is {why}; {way}")
    stream.seek(member.header_offset)
    local = stream.read(30)  # the directory's own name and extra lengths may differ from the local ones
    if len(local) < 30 or local[:4] != b"PK\3\4":
        raise DataError(f"{file} is damaged: no local header for {member.filename}")
    begin = member.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    stream.seek(begin)
    shape, dtype = npy_header(stream, file, member.filename)
    offset, length = stream.tell(), int(np.prod(shape, dtype=object)) * dtype.itemsize
    if offset - begin + length != member.file_size or offset + length > size:
        raise DataError(
            f"{file} is damaged or ends early: {member.filename} of shape {shape} and {dtype} needs {length} bytes at "
            f"{offset}, the member has {member.file_size} bytes and the file {size}"
        )
    if dtype.str not in DTYPES:
        raise PackedShard(f"{file} holds {dtype.name} ({dtype.str}); {way}")
    return shape, dtype, begin, offset, member.CRC
