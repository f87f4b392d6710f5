"""Texts in a bucket, brought file after file through a folder of bounded size."""

import itertools
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from refocused import files
from refocused.bucket import gcs
from refocused.bucket.download import choose, is_object, remove_empty
from refocused.shards import readers
from refocused.shards.tokenize import Sources

COMING = ".texts"  # a folder below the target, for files that are read or will be next
AHEAD = 4  # files at once


def sources(url: str, target: Path, limit: int) -> Sources:
    """The texts at gs://BUCKET/PREFIX or in one object there. Raises BucketError.

    The file that is read, and those behind it, are fetched as long as they have `limit` bytes together. Each is verified
    when it comes, and removed once the next one is asked for; an interrupted run finds those that were there.
    """
    name, prefix = gcs.split(url)
    bucket, folder = gcs.Bucket(name), target / COMING
    found, refused = choose(bucket, prefix, "?*")  # not the empty objects by which consoles show a folder
    if not found:  # the url names an object
        parent, _, last = prefix.rpartition("/")
        found, refused = choose(bucket, parent, last)
    objects = [(path, obj) for path, obj in found.items() if readers.named(path)]
    if left := refused + [f"left out {path}, no {readers.READ}" for path in found if not readers.named(path)]:
        print("\n".join(left[:5] + [f"and {len(left) - 5} more"] * (len(left) > 5)), file=sys.stderr)
    if not objects:
        raise gcs.BucketError(f"{url} has no {readers.READ} but {len(found)} others")
    running: dict[int, Future[Path]] = {}

    def fetch(i: int) -> None:
        path, obj = objects[i]
        file = gcs.local_path(folder, path)
        try:
            if not is_object(file, obj):
                gcs.check_space(target, {file: obj})
                bucket.download(obj, file)
            running[i].set_result(file)
        except BaseException as error:
            running[i].set_exception(error)

    def drop(some: Iterable[int]) -> None:
        for path, obj in (objects[i] for i in some):
            files.remove(gcs.part_of(file := gcs.local_path(folder, path), obj))
            if is_object(file, obj):
                files.remove(file)

    def get(i: int) -> Path:
        sizes = itertools.accumulate(obj.size for _, obj in objects[i : i + AHEAD])
        wanted = {i, *(j for j, size in enumerate(sizes, i) if size <= limit)}
        gone = {*(running or range(len(objects)))} - wanted  # at the start: what an interrupted run had fetched beyond
        drop(gone)
        for j in gone:
            running.pop(j, None)
        for j in wanted - {*running}:
            running[j] = Future()
            threading.Thread(target=fetch, args=(j,), daemon=True).start()
        return running[i].result()

    def done() -> None:
        drop(range(len(objects)))
        remove_empty(folder)  # a file that this call did not bring stays

    crcs, sizes = zip(*((obj.crc32c, obj.size) for _, obj in objects), strict=True)
    return Sources(url, [path for path, _ in objects], [*crcs], [*sizes], get, done)
