"""What every transfer needs: a bar, threads, a lock on the folder, room on the disk."""

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refocused.bucket import gcs

RESERVE = 64 << 20  # bytes of disk left free


class Bar:
    """One tqdm bar over bytes that many threads move, with the number of files behind it. Silent where no one looks."""

    def __init__(self, size: int, files: int):
        self.bar = tqdm(total=size, unit="B", unit_scale=True, smoothing=0.1, disable=None)
        self.files, self.done, self.lock = files, 0, threading.Lock()

    def add(self, size: int) -> None:
        with self.lock:
            self.bar.update(size)

    def count(self) -> None:
        with self.lock:
            self.done += 1
            self.bar.set_postfix_str(f"{self.done}/{self.files} files")

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any], streams: int) -> None:
    """function(item) for every item, in daemon threads; the first exception stops the rest and is raised.

    Not a ThreadPoolExecutor, because the interpreter waits for its threads at exit, however long a transfer takes.
    """
    queue, lock = iter(list(items)), threading.Lock()
    problems: list[BaseException] = []

    def work() -> None:
        while not problems:
            with lock:
                item = next(queue, queue)
            if item is queue:
                return
            try:
                function(item)
            except BaseException as error:
                problems.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


@contextlib.contextmanager
def exclusive(folder: Path, wait: bool = False) -> Iterator[None]:
    """Only one process at a time brings files into a folder; the lock dies with its process.

    Another one is waited for, or BucketError is raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".download.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise gcs.BucketError(
                f"{folder} is being filled by {file.read().strip() or 'another process'}; wait for it"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()}\n")
        file.flush()
        yield


def check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free - RESERVE
    if need > free:
        raise gcs.BucketError(
            f"{need / 1e9:,.2f} GB are still to come and {folder} has room for {max(0, free) / 1e9:,.2f} GB, "
            f"with {RESERVE >> 20} MiB left free; "
            "free some space, or choose another folder or fewer files"
        )


def has_size(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except OSError:
        return False


def part_size(file: Path, obj: gcs.Object) -> int:
    part = gcs.part_of(file, obj)
    return part.stat().st_size if part.exists() else 0
