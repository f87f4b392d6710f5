"""logging_dir: its owner, and the writer of all its files. No failure of a file ends a run."""

import contextlib
import errno
import io
import os
import shutil
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from configs import Config, ConfigError
from refocused import files, locks
from refocused.checkpoint import selection
from refocused.run.messages import fitted

LOG, TRACE, OWNER = "train.log", "trace.jsonl", ".output_dir"
# a link that somebody has planted under one of our names is not followed to what it points at
PLAIN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
FULL = (errno.ENOSPC, errno.EDQUOT)

_held: list[locks.Lock] = []  # on the logging_dir of this process


def check_folder(logging_dir: str, output_dir: str) -> None:
    """Make logging_dir this process's own until it ends, and prove that it can be written.

    Raises ConfigError where it cannot, and where it is another run's: one that is alive, or one that has checkpoints.
    """
    folder, mine = Path(os.path.realpath(logging_dir)), os.fsencode(os.path.realpath(output_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = os.open(folder / OWNER, PLAIN, 0o666)
        try:
            other = os.pread(owner, 1 << 16, 0)
            if other.strip(b"\0") and (not other.startswith(b"/") or b"\n" in other):
                raise FileExistsError(errno.EEXIST, f"{folder / OWNER} is not of this program; move it away")
            instead = f"the run in {os.fsdecode(other) or 'another folder'}; give this run a folder of its own"
            if os.fsencode(folder) != mine:  # else it is locked already
                _held.append(locks.Lock(folder / ".lock"))
            theirs: list[str] = []
            with contextlib.suppress(ValueError):  # what a power cut left of the note, or what nobody can read
                theirs = selection.names(os.fsdecode(other)) if other != mine else []
            if theirs:
                release()
                raise ConfigError(f"logging_dir={logging_dir} has the logs of {instead}")
            if other != mine:  # one that never came to a checkpoint has no claim once it is gone
                os.ftruncate(owner, 0)
                os.pwrite(owner, mine, 0)
        finally:
            os.close(owner)
        for name in (LOG, TRACE):
            os.close(os.open(folder / name, PLAIN, 0o666))
        files.probe(folder)
    except locks.Taken:
        raise ConfigError(f"logging_dir={logging_dir} is in use by {instead}") from None
    except OSError as error:
        link = ", a symbolic link" * (error.errno == errno.ELOOP)
        why = f"cannot be written: {error}{link}"
        raise ConfigError(f"logging_dir={logging_dir} {why}; choose another folder") from error


def release() -> None:
    while _held:
        _held.pop().release()


def stamped(text: str) -> bytes:
    """The lines of a text with the time of day, as they stand in train.log."""
    now = time.strftime("%Y-%m-%d %H:%M:%S ")
    return "".join(f"{now}{line}\n" for line in text.splitlines()).encode("utf-8", "backslashreplace")


def log_error(text: str, cfg: Config | None = None) -> None:
    """By any rank, at any time: to stderr, and with a config into the train.log of its run, if there is one."""
    with console():
        print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        if cfg and Path(cfg.logging_dir, OWNER).read_bytes() == os.fsencode(os.path.realpath(cfg.output_dir)):
            log = os.open(Path(cfg.logging_dir, LOG), PLAIN | os.O_APPEND, 0o666)
            os.write(log, stamped(text))
            os.close(log)


@contextlib.contextmanager
def console() -> Iterator[None]:
    """A closed terminal, or a pipe that nobody reads, ends that output and not the run.

    A stream into a file on a full disk loses only what does not fit.
    """
    try:
        yield
    except OSError:
        mute(but=FULL)


def mute(but: tuple[int, ...] = ()) -> None:
    """Redirect streams that cannot be written, and what they still hold, to the null device."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno not in but:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


class Logs:
    """What a run prints, and the files of its logging_dir; on rank 0 alone.

    A failed write is reported once, its data is dropped, and retry() tries the file again.
    """

    def __init__(self, logging_dir: str, output_dir: str, main: bool = True):
        """On rank 0 (main) check_folder has been called."""
        self.folder, self.output_dir, self.main = Path(os.path.realpath(logging_dir)), output_dir, main
        self.files: list[File] = []
        self.failed = False  # it was said that something cannot be written
        self.lost = False  # the folder was this run's and may be another's
        self.train_log = self.file(LOG)

    def log(self, text: str | None, file: TextIO | None = None, screen: bool = True, more: str | None = None) -> None:
        """Lines on rank 0's screen and in train.log, there as `more` if given; nothing for an empty text."""
        if not self.main or not text:
            return
        self.train_log.write(stamped(more or text))  # first: what was seen is in the file, whenever the machine goes
        if not screen:
            return
        file = file or sys.stdout
        shown = fitted(text, shutil.get_terminal_size().columns) if file.isatty() else text
        with console():
            tqdm.write(shown, file=file)
            file.flush()

    def file(self, name: str) -> "File":
        self.files.append(File(self, self.folder / name))
        return self.files[-1]

    def retry(self) -> None:
        """At every log line: try again what failed, and make anew what was removed or moved away meanwhile."""
        if not self.main:
            return
        if self.failed and not any(file.shut for file in self.files):
            log_error(f"{self.folder} can be written again; what was written meanwhile is missing")
            self.failed = False
        for file in self.files:
            file.retry()
        if self.lost or not (self.folder / OWNER).exists() or not all(lock.intact() for lock in _held):
            release()
            self.lost = True
            try:
                check_folder(str(self.folder), self.output_dir)
                self.lost = False
            except ConfigError as error:
                self.fail(error)
                for file in self.files:
                    file.shut = True

    def fail(self, error: Exception) -> None:
        if not self.failed:
            self.failed = True
            log_error(f"logs are not written: {error}; training goes on, and they are tried again at every log line")

    def close(self) -> None:
        for file in self.files:
            file.close()


class File:
    """A file that grows by whole writes, each of which reaches the kernel at once: a SIGKILL loses none."""

    def __init__(self, logs: Logs, path: Path):
        self.logs, self.path = logs, path
        self.fd, self.shut = -1, False  # shut: it failed and was not tried again yet

    def write(self, data: bytes) -> None:
        """Append all of it or nothing. The first failure is reported."""
        if self.shut:
            return
        try:
            if self.fd < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.fd = os.open(self.path, PLAIN | os.O_APPEND, 0o666)
            end = os.fstat(self.fd).st_size
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(self.fd, left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.fd, end)  # no half lines
                raise
        except OSError as error:
            self.close()
            self.shut = True
            self.logs.fail(error if error.filename else OSError(error.errno, error.strerror, str(self.path)))

    def retry(self) -> None:
        self.shut, same = False, False
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                same = os.path.samestat(os.fstat(self.fd), os.lstat(self.path))
            if not same:
                self.close()

    def sync(self) -> None:
        """Make what was written durable, behind training: while a checkpoint is written it takes the disk's time."""

        def sync(fd: int) -> None:
            with contextlib.suppress(OSError):  # the next write reports it
                os.fsync(fd)
            os.close(fd)

        if self.fd >= 0:
            threading.Thread(target=sync, args=(os.dup(self.fd),), daemon=True, name="log sync").start()

    def close(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
        self.fd = -1


class TensorBoard:
    """Event files in logging_dir, written by the thread that calls.

    The thread of tensorboard's own writer dies if a disk is full. It names its files by the clock, and TensorBoard reads
    them in the order of their names: after a clock that went back, new curves would be hidden.
    """

    def __init__(self, logs: Logs, step: int):
        """step: the last one that stands; what earlier files show beyond it is hidden."""
        # slow to import, and rank 0 alone needs it
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        from torch.utils.tensorboard import summary

        self.Event, self.SessionLog, self.RecordWriter, self.summary = Event, SessionLog, RecordWriter, summary
        self.logs, self.step = logs, step
        self.file = logs.file("events")  # named when it is opened

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        self.write(step, [self.summary.scalar(name, value) for name, value in values.items() if value is not None])

    def text(self, step: int, name: str, text: str) -> None:
        """Lines in a fixed pitch."""
        block = textwrap.indent(text, "    ", lambda line: True)
        self.write(step, [self.summary.text(name, block.encode("utf-8", "backslashreplace").decode())])

    def write(self, step: int, summaries: list[Any]) -> None:
        now = time.time()
        events = [self.Event(wall_time=now, step=step, summary=one) for one in summaries]
        if self.file.fd < 0:  # new, or failed or removed meanwhile
            names = self.logs.folder.glob(f"events.out.tfevents.{'[0-9]' * 10}.*")
            stamp = max(int(now), *(int(path.name[20:30]) + 1 for path in names), 0)
            name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
            self.file.path = self.logs.folder / name  # which sorts behind all that are there
            status = self.SessionLog(status=self.SessionLog.START)
            first = self.Event(wall_time=now, file_version="brain.Event:2")
            events = [first, self.Event(wall_time=now, step=self.step + 1, session_log=status), *events]
        self.step = max(self.step, step)
        buffer = io.BytesIO()
        for event in events:
            self.RecordWriter(buffer).write(event.SerializeToString())
        self.file.write(buffer.getvalue())
