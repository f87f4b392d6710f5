"""Files that are whole whenever they can be found: shards, and the lock under which a folder of them is made."""

import errno
import fcntl
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from refocused.shards.shard import WriteError, zip_note

ALIGNMENT = 64  # of the first token in a file that is written here


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


def sync_folder(folder: str | os.PathLike) -> None:
    """Make the names in a folder durable; fsync of a file does not do that."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_stale(folder: Path) -> None:
    """Removes what killed writers left below a folder that is locked."""
    for temporary in folder.rglob(".*.npz.*.tmp"):
        temporary.unlink(missing_ok=True)


def read_note(path: Path) -> dict[str, Any]:
    """The note of a shard that write_shard made, {} for any other file and for none."""
    try:
        with open(path, "rb") as file:
            return zip_note(file)
    except OSError:
        return {}


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
