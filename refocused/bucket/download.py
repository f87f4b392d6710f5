"""Shards from a bucket to a folder, where they are ready to be read in place.

    python data.py download [CONFIG.py] [gs://BUCKET/PREFIX[/FILE.npz]] [DEST] [--list] [key=value ...]

Without a place it is bucket_name, without DEST it is data_dir; tokenized_file_pattern (or the place's last part, as
gs://BUCKET/PREFIX/*.npz) and max_files choose the files. `--list` only says what is there.
It can be killed at any moment and started again. Files come to .download below DEST and get their names once they are
ready and noted in the index; a file in DEST that the index does not describe is somebody's own and stays as it is.
"""

import contextlib
import fnmatch
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import configs
from refocused import files, locks
from refocused.bucket import gcs
from refocused.entry import here
from refocused.shards import notes, prepare, shard
from refocused.shards.tokenizers import find

STREAMS = 8  # files at once; the client's connection pool holds 10
COMING = ".download"  # a folder below DEST, for what is not ready yet
INDEX = ".download.jsonl"  # a line per file that is ready, the last one of a file counts

Shards = dict[str, gcs.Object]  # {path below the folder: object}


def main(argv: list[str]) -> int:
    """The command line; returns the exit code. Raises ConfigError and BucketError for the caller to print."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    settings = [a for a in argv if "=" in a or a.endswith(".py")]
    places = [a for a in argv if a.startswith("gs://")]
    folders = [a for a in argv if a not in [*settings, *places, "--list"]]
    if len(places) > 1 or len(folders) > 1 or any(folder.startswith("--") for folder in folders):
        raise configs.ConfigError(f"cannot make sense of {' '.join(argv)!r}\n{__doc__}")
    cfg, origins = configs.load(settings)
    if not places and not cfg.bucket_name:
        raise configs.ConfigError("no bucket: name one, gs://BUCKET/PREFIX, or set bucket_name")
    name, prefix = gcs.split(places[0] if places else f"gs://{cfg.bucket_name}")
    bucket, pattern = gcs.Bucket(name), cfg.tokenized_file_pattern
    parent, _, last = prefix.rpartition("/")
    if set(last) & set("*?[") or last.endswith(".npz"):
        prefix, pattern = parent, last
    shards, refused = choose(bucket, prefix, pattern, cfg.max_files)
    for reason in refused:
        print(reason, file=sys.stderr)
    if not shards:
        raise gcs.BucketError(
            f"gs://{name}/{prefix} has no object like {pattern}; `gs://{name}/{prefix or 'PREFIX'}/*.npz` takes all, "
            "also from below it"
        )
    if "--list" in argv:
        for path, obj in shards.items():
            print(f"{obj.size:>16,}  {path}")
        print(f"{len(shards):,} files, {sum(obj.size for obj in shards.values()):,} bytes")
    else:
        if not folders and origins.get("data_dir", "configs/demo.py") == "configs/demo.py":
            raise configs.ConfigError("no folder for the shards: name one, or a config file or data_dir=... that does")
        download(bucket, shards, Path(folders[0] if folders else cfg.data_dir), cfg)
    return gcs.BucketError.exit_code if refused else 0


def choose(bucket: gcs.Bucket, prefix: str, pattern: str, max_files: int = -1) -> tuple[Shards, list[str]]:
    """The first max_files (-1: all) objects below prefix whose file name matches, and why others were refused.

    Paths are relative to prefix, in sorted order, as data.py will find them.
    """
    base = f"{prefix}/" if prefix else ""
    shards, refused = {}, []
    for obj in bucket.list(base):
        path = obj.name.removeprefix(base)
        if fnmatch.fnmatchcase(path.rpartition("/")[2], pattern):
            try:
                gcs.safe_name(path)
            except gcs.BucketError as error:
                refused.append(str(error))
                continue
            if obj.encoded:
                refused.append(f"{bucket.url(obj.name)} is stored gzip-encoded; store the file itself")
            else:
                shards[path] = obj
    chosen = sorted(shards)[: max_files if max_files >= 0 else None]
    return {path: shards[path] for path in chosen}, refused


def download(bucket: gcs.Bucket, shards: Shards, folder: Path, cfg: configs.Config) -> None:
    """Bring every shard into folder, verified and prepared; what is there and intact is not fetched again.

    Raises BucketError, before anything is fetched, where a file that this command did not write is in the way.
    """
    paths = {path: gcs.local_path(folder, path) for path in shards}
    coming = {path: gcs.local_path(folder / COMING, path) for path in shards}
    with locks.filling(folder, wait=False):
        index = Index(folder)
        todo = [path for path in shards if not index.knows(path, paths[path], shards[path])]
        if theirs := [path for path in todo if index.blocked(path, paths[path])]:
            raise gcs.BucketError(
                f"{folder} has {len(theirs)} of the {len(shards)} files already, such as {theirs[0]}, and not as this "
                "command wrote them; they stay. Choose another folder, or remove them to have them fetched; "
                f"`{here('python data.py prepare SRC DST')}` makes packed shards of padded ones"
            )
        missing = [path for path in todo if not has_size(coming[path], shards[path].size)]
        gcs.check_space(folder, {coming[path]: shards[path] for path in missing})
        reports: list[dict[str, Any]] = []

        def bring(path: str, progress: gcs.Progress) -> None:
            obj, file = shards[path], coming[path]
            if is_object(file, obj):
                progress(obj.size)
            else:
                bucket.download(obj, file, progress)
            reports.append(prepare_in_place(folder / COMING, path, cfg))
            index.add(path, file, obj)
            paths[path].parent.mkdir(parents=True, exist_ok=True)
            if index.blocked(path, paths[path]):
                raise gcs.BucketError(f"{paths[path]} was put there while it was fetched, and stays")
            os.replace(file, paths[path])
            files.sync_folder(paths[path].parent)

        gcs.in_parallel(bring, todo, STREAMS, sum(shards[path].size for path in todo))
        remove_empty(folder / COMING)  # what another call has left there may still be of use
    print(f"{folder}: {len(shards):,} files ready, {len(todo):,} of them new")
    if text := notes.shares({key: sum(report.get(key, 0) for report in reports) for key in notes.ROWS}):
        print(text)


def prepare_in_place(folder: Path, path: str, cfg: configs.Config) -> dict[str, Any]:
    """Make a compressed or padded shard one that can be mapped; one that can be stays as it is. Raises DataError.

    Returns the report of what was made, {} where nothing was.
    """
    try:
        shard.Shard.open(folder, path)
    except shard.PackedShard:
        end = find(cfg.tokenizer).end if cfg.tokenizer else None
        return prepare.convert(folder / path, folder, path, {"vocab_size": cfg.vocab_size, "end_of_text": end})
    return {}


def remove_empty(folder: Path) -> None:
    """Remove a folder and those below it. A folder in which anything is left stays."""
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(parent)


def has_size(file: Path, size: int | None) -> bool:
    return file.is_file() and file.stat().st_size == size


def is_object(file: Path, obj: gcs.Object) -> bool:
    """Whether the file has the object's bytes."""
    return has_size(file, obj.size) and files.digest(file)["crc32c"] == obj.crc32c


class Index:
    """Which files are ready: the object they were made from, and what they look like."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.Lock()
        self.entries: dict[Any, list[dict[str, Any]]] = {}  # by path
        with contextlib.suppress(FileNotFoundError):
            for line in (folder / INDEX).read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, RecursionError):  # a killed run's is torn
                    entry = {**json.loads(line)}
                    self.entries.setdefault(entry.get("path"), []).append(entry)

    def entry(self, path: str, file: Path) -> dict[str, Any]:
        """The line that describes the file as it is; {} if none does. Before a file is replaced both have one."""
        for entry in reversed(self.entries.get(path, [])):
            if has_size(file, entry.get("size")) and not file.is_symlink():
                unchanged = file.stat().st_mtime_ns == entry.get("mtime_ns")
                if unchanged or files.digest(file)["crc32c"] == entry.get("crc32c"):
                    return entry
        return {}

    def blocked(self, path: str, file: Path) -> bool:
        """Whether something is in the file's place that this command did not write."""
        return os.path.lexists(file) and not self.entry(path, file)

    def knows(self, path: str, file: Path, obj: gcs.Object) -> bool:
        """Whether the file is what the object becomes; one that somebody else brought, and that needs no packing, is."""
        if entry := self.entry(path, file):
            return entry.get("object") == obj.crc32c
        if not is_object(file, obj):
            return False
        try:
            shard.Shard.open(self.folder, path)
        except shard.DataError:
            return False
        return True

    def add(self, path: str, file: Path, obj: gcs.Object) -> None:
        size, crc32c, mtime = file.stat().st_size, files.digest(file)["crc32c"], file.stat().st_mtime_ns
        entry = {"path": path, "object": obj.crc32c, "size": size, "crc32c": crc32c, "mtime_ns": mtime}
        with self.lock, open(self.folder / INDEX, "a") as out:
            out.write(f"\n{json.dumps(entry)}")  # a newline first, so that a torn line spoils nothing but itself
