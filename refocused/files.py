"""How this program writes to a disk: durable, whole or not at all.

Where a disk has no mode bits, no fsync of folders, or does not remove a file, that is named once and the work goes on.
All else raises OSError.
"""

import base64
import contextlib
import errno
import hashlib
import math
import mmap
import os
import re
import secrets
import shutil
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from google_crc32c import Checksum

OWN = re.compile(r"\.tmp-[0-9a-f]{16}-.+", re.DOTALL)  # names that beside() gives
UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # a call that this disk does not have
NO_MAP = (*UNKNOWN, errno.ENODEV, errno.EACCES, errno.EPERM)


class DiskError(ValueError):
    """A folder that cannot be written."""

    exit_code = 66
    same_on_all_ranks = True


_named: set[Any] = set()
notes: deque[str] = deque()  # what was named, saved and deleted, until somebody takes it for a log


def why(error: OSError) -> str:
    """The reason alone; an OSError that Python itself made has no strerror."""
    return error.strerror or str(error)


def name_once(key: Any, text: str) -> None:
    """Say on stderr what a disk lacks or what was left alone, the first time in this process."""
    if key not in _named:
        _named.add(key)
        notes.append(text)
        with contextlib.suppress(OSError):
            print(f"note: {text}", file=sys.stderr, flush=True)


def lack(folder: str | os.PathLike, what: str) -> None:
    """Name what a folder's disk does not have."""
    folder = Path(folder).parent if OWN.fullmatch(Path(folder).name) else folder
    with contextlib.suppress(OSError):
        name_once((what.split(" (")[0], os.stat(folder).st_dev), f"the disk of {folder} {what}")


def beside(path: Path) -> Path:
    """A new name beside a path, for what will take its place. A long name is cut: some disks take 143 bytes."""
    short = os.fsencode(path.name)[:100].decode(errors="ignore")
    return path.with_name(f".tmp-{secrets.token_hex(8)}-{short}")


def sync(path: Path) -> None:
    """Make a file's bytes durable. Raises OSError where they may be lost."""
    with open(path, "rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
            lack(path.parent, f"has no fsync ({why(error)}): a power cut may lose what was just written")


def sync_folder(folder: str | os.PathLike) -> None:
    """Make the names in a folder durable, where the disk can."""
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        lost = "a power cut may lose the newest file, never an older one"
        lack(folder, f"has no fsync of folders ({why(error)}): {lost}")


def widen(path: Path) -> None:
    """Give a file that a library made readable by its owner alone the readers that its folder has."""
    try:
        os.chmod(path, path.parent.stat().st_mode & 0o666)
    except OSError as error:
        lack(path.parent, f"lets nobody change modes ({why(error)}): files keep the ones that it gives them")


def create(path: Path, content: bytes) -> None:
    """A new file, durable when this returns. Raises OSError, FileExistsError too."""
    with open(path, "xb") as file:
        file.write(content)
    sync(path)


def write(path: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """A whole file, in the place of one that has the name; durable when this returns.

    content: the bytes, or a function that writes them. Raises OSError; then nothing is left of it.
    """
    temporary = beside(path)
    try:
        with open(temporary, "xb") as file:
            content(file) if callable(content) else file.write(content)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    sync_folder(path.parent)


def remove(path: Path) -> bool:
    """Remove a file, a folder, or a link and not its target; only for what is known to be ours. What resists stays."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)  # as much as goes
        if os.path.lexists(path):
            name_once(("rubbish", path.parent), f"{path} cannot be removed ({why(error)}); nothing needs it")
            return False
    return True


def remove_stale(folder: Path) -> None:
    """Remove what killed writers left below a folder; only for who holds its lock."""
    for path in [path for path in folder.rglob(".tmp-*") if OWN.fullmatch(path.name)]:
        remove(path)


def free(folder: str | os.PathLike) -> float:
    """Bytes that are free; infinite where the disk does not say."""
    with contextlib.suppress(OSError):
        if (usage := shutil.disk_usage(folder)).total:
            return usage.free
    return math.inf


def too_small(folder: str | os.PathLike, need: float) -> str:
    """What a folder's disk has free, in words, where it lacks room for `need` bytes and a little more; else ""."""
    have = free(folder)
    return f"{folder} has {have / 1e9:.3g} GB free" if need * 1.01 + (1 << 20) > have else ""


def digest(path: str | os.PathLike) -> dict[str, Any]:
    """{size, crc32c, sha256} of a file; CRC-32C in base64, as Cloud Storage shows it."""
    size, crc, sha = 0, Checksum(), hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):  # stays in the cache; hashing releases the GIL
            size += len(chunk)
            crc.update(chunk)
            sha.update(chunk)
    return {"size": size, "crc32c": base64.b64encode(crc.digest()).decode(), "sha256": sha.hexdigest()}


def probe(folder: str | os.PathLike, maps: bool = False) -> None:
    """Try in a folder what a run does there, with a small file; maps: also to map it. Raises OSError."""
    trial = beside(Path(folder, "probe"))
    try:
        trial.mkdir()
        path = trial / "file"
        for content in (b"1", b"22"):  # the second takes the place of the first
            write(path, content)
        widen(path)
        if maps:
            with open(path, "rb") as file:
                try:
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).close()
                except OSError as error:
                    lack(folder, f"cannot map files ({why(error)}): shards there are read instead, which takes longer")
        moved = beside(Path(folder, "probe"))
        os.rename(trial, moved)
        trial = moved
        if path.exists() or (trial / "file").read_bytes() != b"22":
            raise OSError(errno.EIO, "what is written there does not come back")
    except OSError as error:  # calls that a disk can do without are named above, and raise nothing
        if error.errno in UNKNOWN:
            raise OSError(error.errno, f"its disk does not rename files and folders ({why(error)})") from error
        raise
    finally:
        remove(trial)
