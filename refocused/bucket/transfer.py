"""What every transfer needs: a bar, threads, room on the disk."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refocused import files
from refocused.bucket import gcs


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


def check_space(folder: Path, need: int) -> None:
    if lack := files.too_small(folder, need):
        raise gcs.BucketError(
            f"{need / 1e9:,.2f} GB are still to come and {lack}; free some space, or choose another folder or fewer files"
        )


def has_size(file: Path, size: int | None) -> bool:
    try:
        return file.stat().st_size == size
    except OSError:
        return False


def part_size(file: Path, obj: gcs.Object) -> int:
    part = gcs.part_of(file, obj)
    return part.stat().st_size if part.exists() else 0
