"""One shard: an .npz whose token array is stored, not deflated, so that a sample is one read at a known offset."""

import errno
import fcntl
import fnmatch
import io
import json
import os
import struct
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

TOKEN_ARRAYS = ("input_ids", "tokens")
PADDING_ARRAYS = ("attention_mask", "sequence_lengths")
DTYPES = ("<u2", "<u4", "<i4")
MAX_MEMBERS = 16
ALIGNMENT = 64  # of the first token in a file that is written here


class DataError(ValueError):
    """Data that cannot be trained on: missing, damaged, of the wrong kind, or changed under our feet."""

    exit_code = 66


class PackedShard(DataError):
    """A shard that is sound as far as one can see but compressed or padded, so it cannot be mapped as it is."""


class WriteError(DataError):
    """The disk did not take what was written; more of the same will not help."""


# ---- reading


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


def token_member(members: dict[str, zipfile.ZipInfo], path: Path) -> zipfile.ZipInfo:
    found = [members[name] for name in TOKEN_ARRAYS if name in members]
    if len(found) != 1:
        names = ", ".join(sorted(members)) or "nothing"
        raise DataError(f"{path} holds {names}; a shard holds exactly one of {' and '.join(TOKEN_ARRAYS)}")
    return found[0]


def npy_header(
    stream: IO[bytes], path: Path, array: str, dtypes: tuple[str, ...] = DTYPES
) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of the .npy that starts here, leaving the stream at its first item. Never unpickles."""
    begin = stream.tell()
    head = io.BytesIO(stream.read(1 << 14))  # a header may claim to be 4 GB long
    try:
        version = np.lib.format.read_magic(head)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"unknown .npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: {array} has no readable .npy header: {error}") from error
    if dtype.str not in dtypes:
        kind = "pickled objects" if dtype.hasobject else f"dtype {dtype.str}"
        raise DataError(f"{path}: {array} holds {kind}; it may hold {', '.join(np.dtype(d).name for d in dtypes)}")
    if len(shape) not in (1, 2) or (fortran and len(shape) == 2):
        order = "Fortran" if fortran else "C"
        raise DataError(f"{path}: {array} has shape {shape} in {order} order; a 1-D stream or 2-D rows in C order")
    stream.seek(begin + head.tell())
    return shape, dtype


@dataclass(frozen=True, eq=False)
class Shard:
    """One open file with tokens stored back to back. Holds a file descriptor, no tokens."""

    path: str  # relative to the set's folder, with forward slashes
    file: Path
    shape: tuple[int, ...]  # (tokens,) or (rows, width)
    dtype: np.dtype
    crc32: int  # of the member, from the zip directory
    offset: int  # of the first token, in bytes
    size: int  # of the file, with its time of change: a file that differs from what was opened is not read
    mtime_ns: int
    fd: int

    @classmethod
    def open(cls, folder: str | Path, path: str) -> "Shard":
        """Opens folder/path by reading headers only. Raises PackedShard, or DataError where it is no shard at all."""
        file = Path(folder, path)
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from error
        try:
            status = os.fstat(fd)
            with open(fd, "rb", closefd=False) as stream:
                shape, dtype, offset, member = cls._find_tokens(stream, file, status.st_size)
            shard = cls(path, file, shape, dtype, member.CRC, offset, status.st_size, status.st_mtime_ns, fd)
        except OSError as error:  # such as a header that would lie before the file's first byte
            os.close(fd)
            raise DataError(f"{file} is damaged or ends early: {error}") from error
        except DataError:
            os.close(fd)
            raise
        weakref.finalize(shard, os.close, fd)
        return shard

    @staticmethod
    def _find_tokens(
        stream: IO[bytes], file: Path, size: int
    ) -> tuple[tuple[int, ...], np.dtype, int, zipfile.ZipInfo]:
        members = zip_members(stream, file)
        member = token_member(members, file)
        padding = [name for name in PADDING_ARRAYS if name in members]
        if member.compress_type != zipfile.ZIP_STORED or padding:
            why = f"padded (it has {' and '.join(padding)})" if padding else "compressed"
            raise PackedShard(f"{file} is {why}; `python data.py prepare SRC DST` makes shards to be read in place")
        stream.seek(member.header_offset)
        local = stream.read(30)  # the directory's own name and extra lengths may differ from the local ones
        if len(local) < 30 or local[:4] != b"PK\3\4":
            raise DataError(f"{file} is damaged: no local header for {member.filename}")
        name_length, extra_length = struct.unpack("<HH", local[26:30])
        begin = member.header_offset + 30 + name_length + extra_length
        stream.seek(begin)
        shape, dtype = npy_header(stream, file, member.filename)
        offset = stream.tell()
        length = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if offset - begin + length != member.file_size or offset + length > size:
            raise DataError(
                f"{file} is damaged or ends early: {member.filename} of shape {shape} and {dtype} needs {length} bytes "
                f"at {offset}, the member has {member.file_size} bytes and the file {size}"
            )
        return shape, dtype, offset, member

    @property
    def num_tokens(self) -> int:
        return int(np.prod(self.shape))

    @property
    def tokens(self) -> np.ndarray:
        """All tokens as a read-only memory map of the array's own shape; for tools, training reads windows."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fills `out`, of this shard's dtype, with the tokens from `start` on. Raises DataError.

        A read rather than a memory map: as fast when the page cache is warm, no resident memory that grows with every
        page met, and a file cut short is an error here where a map would end the process with SIGBUS.
        """
        try:
            got = os.preadv(self.fd, [out], self.offset + start * out.itemsize)
        except OSError as error:
            raise DataError(f"cannot read {self.file}: {error.strerror}") from error
        if got != out.nbytes:
            self.check_unchanged()
            raise DataError(f"{self.file} gave {got} of {out.nbytes} bytes at token {start}")

    def check_unchanged(self) -> None:
        """Raises DataError if the file is not what was opened. Called after a read, it vouches for what was read."""
        try:
            now = os.stat(self.file)
        except OSError as error:
            raise DataError(f"{self.file} was there when it was opened: {error.strerror}") from error
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(
                f"{self.file} changed since it was opened: {self.size} bytes then, {now.st_size} now, its modification "
                f"time {(now.st_mtime_ns - self.mtime_ns) / 1e9:+.3f} s; put the old file back, or start a new run on "
                "the new data"
            )

    def describe(self) -> dict[str, Any]:
        """What identifies its content, without reading it."""
        return {"path": self.path, "tokens": self.num_tokens, "dtype": self.dtype.name, "crc32": f"{self.crc32:08x}"}


def find_shards(folder: str | Path, pattern: str) -> list[str]:
    """Sorted relative paths of the files below folder whose name matches. An unreadable folder is an error."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    if not os.path.isdir(folder):
        raise DataError(f"{folder} is no folder")
    found = []
    for parent, _, names in os.walk(folder, followlinks=True, onerror=refuse):
        found += [Path(parent, name).relative_to(folder).as_posix() for name in fnmatch.filter(names, pattern)]
    return sorted(found)


def find_sources(source: Path) -> tuple[Path, list[str]]:
    """(folder, sorted relative paths) of every file below a folder, or of a single file."""
    return (source.parent, [source.name]) if source.is_file() else (source, find_shards(source, "*"))


# ---- writing


def write_shard(path: Path, dtype: np.dtype, count: int, chunks: Iterable[np.ndarray], note: dict[str, Any]) -> None:
    """Writes `count` tokens, given in chunks, as a stored and aligned `input_ids`; the same bytes for the same tokens.

    The note becomes the zip's comment (JSON); it is read after the last chunk, so the chunks' producer may fill it in.
    Atomic: whoever finds the name finds the whole file, also after a crash. Raises WriteError, leaving nothing behind.
    """
    header = io.BytesIO()  # numpy pads it to a multiple of 64 bytes
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    entry = zipfile.ZipInfo("input_ids.npy", (1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    large = count * dtype.itemsize >= 1 << 31
    pad = -(30 + len(entry.filename) + (20 if large else 0) + 4) % ALIGNMENT
    entry.extra = b"\x35\xd9" + pad.to_bytes(2, "little") + bytes(pad)  # the field that zipalign uses

    def write(file: IO[bytes]) -> None:
        written = 0
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open(entry, "w", force_zip64=large) as member:
                member.write(header.getvalue())
                for chunk in chunks:
                    member.write(np.ascontiguousarray(chunk, dtype).data)
                    written += len(chunk)
            assert written == count, f"{path}: {written} tokens written, {count} announced"
            archive.comment = json.dumps(note, sort_keys=True).encode()

    write_atomically(path, write)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls write(file) on a temporary neighbour, then fsync, rename, fsync of the folder. Raises WriteError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}; nothing is left of it") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_stale(folder: Path) -> None:
    """Removes what killed writers left below a folder that is locked."""
    for temporary in folder.rglob(".*.npz.*.tmp"):
        temporary.unlink(missing_ok=True)


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a shard that write_shard made, None for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            note = json.loads(archive.comment)
        return note if isinstance(note, dict) else None
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on the folder (made if absent), waiting for whoever has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise WriteError(f"cannot use the folder {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise WriteError(f"cannot lock the folder {folder}: {error.strerror}") from error
            print(f"waiting for another process that prepares {folder}", file=sys.stderr, flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
