"""One lock for a folder: a file in it that names its owner by host and pid.

The kernel drops the lock when its process ends. On a disk without locks only the file protects: it keeps out other
processes that this one sees. Of another machine's or container's processes it only names the last one.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from refocused import files

FILLING = ".filling"
FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # a link could have another file overwritten


class Taken(ValueError):
    """Somebody else has the lock: `owner`, as "host H, pid N"."""

    exit_code = 2
    same_on_all_ranks = True

    def __init__(self, path: Path, owner: str):
        self.path, self.owner = path, owner or "a process that is just starting"
        super().__init__(f"{path.parent} is in use by {self.owner}; wait for it, or choose another folder")

    def __reduce__(self) -> tuple:  # it is sent to the other ranks, where pickle would call it with its text alone
        return Taken, (self.path, self.owner)


class Lock:
    """Held until release() or the end of the process. Raises Taken, OSError.

    leader: an owner of the same run, from whom it is never taken, even on a disk where a node sees its own locks alone.
    """

    def __init__(self, path: Path, leader: str | None = None):
        self.path = Path(os.path.realpath(path.parent), path.name)  # once: a link on the way may be turned later
        self.me = f"{_machine()}, pid {os.getpid()}"
        self.content = f"{self.me}\n{began(os.getpid())} {secrets.token_hex(8)}\n".encode()
        self.fd = os.open(self.path, FLAGS, 0o666)
        try:
            self.kernel = self._ask_kernel()
            content = os.pread(self.fd, 1 << 12, 0)
            if content.strip(b"\0\n") and not content.startswith(b"host "):
                raise FileExistsError(errno.EEXIST, f"{self.path} is not a lock of this program; move it away")
            owner, _, rest = content.decode(errors="replace").partition("\n")
            if (leader and owner == leader) or (not self.kernel and self._lives(owner, rest)):
                raise Taken(self.path, owner)
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, self.content, 0)
            if not self.intact():  # removed, or taken by another one, in the same moment
                raise Taken(self.path, "")
        except BaseException:
            os.close(self.fd)
            raise

    def _ask_kernel(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                owner = os.pread(self.fd, 1 << 12, 0).decode(errors="replace").partition("\n")[0]
                raise Taken(self.path, owner) from None
            files.lack(
                self.path.parent,
                f"has no file locks ({files.why(error)}): two runs on one machine are kept apart, runs on two machines are "
                "not; see that no other machine uses the folder, or mount it with locks (Lustre: -o flock; NFS: with "
                "lockd, without nolock)",
            )
            return False
        return True

    def _lives(self, owner: str, rest: str) -> bool:
        """Whether the owner is another process of this machine, or container, that still runs."""
        machine, _, pid = owner.rpartition(", pid ")
        since = rest.partition(" ")[0]
        if machine and machine != _machine():
            text = f"{self.path.parent} was last used by {owner}; nothing here can tell whether it runs"
            files.name_once(self.path, text)
        return machine == _machine() and pid != str(os.getpid()) and since != "" and began(pid) == since

    def intact(self) -> bool:
        """Whether the file still says what this lock wrote; one that cannot be read at the moment does."""
        try:
            return self.path.read_bytes() == self.content
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def release(self) -> None:
        if self.intact():  # who waits for it finds that its file is gone, and makes a new one
            files.remove(self.path)
        os.close(self.fd)


def _machine() -> str:
    """The host, and where its pids count: containers can share the host's name, and each counts pids from 1."""
    known = ""
    with contextlib.suppress(OSError):
        known = os.readlink("/proc/self/ns/pid") + Path("/proc/sys/kernel/random/boot_id").read_text()
    return f"host {socket.gethostname()} ({zlib.crc32(known.encode()):08x})"


def began(pid: int | str) -> str:
    """When a process of this machine began, in the kernel's ticks; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def filling(folder: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time writes to a folder, which is made and tried. Raises DiskError and, unless it waits, Taken."""
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while lock is None:
            try:
                lock = Lock(folder / FILLING)
            except Taken as taken:
                if not wait:
                    raise
                files.name_once(("wait", folder), f"waiting for {taken.owner}, which is writing to {folder}")
                time.sleep(0.2)
        files.probe(folder, maps=True)
    except OSError as error:
        raise files.DiskError(f"{folder} cannot be written: {files.why(error)}") from error
    try:
        yield
    finally:
        lock.release()
