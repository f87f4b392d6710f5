"""How every command finds files of data: each folder is searched once, hidden files and other files are left out."""

import argparse
import fnmatch
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from refocused import entry
from refocused.shards.shard import DataError


def find_files(folder: str | Path, pattern: str = "*", but: Iterable[str | Path] = ()) -> list[str]:
    """Sorted relative paths, with forward slashes, of the files below a folder whose name matches, but not below `but`.

    A folder that several links lead to is searched once, under its own name if that is here too. Hidden names and lost+found
    are skipped. Files that are not regular, and unreadable folders of other users, are skipped with a warning.
    Raises DataError for a folder of one's own that cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder} is no folder")
    seen = {identity(path) for path in but if os.path.isdir(path)} - {identity(root)}
    found: list[str] = []
    tops = [root]  # and after it the folders that links lead to
    for top in tops:
        for parent, folders, names in os.walk(top, onerror=refuse):
            if (here := identity(parent)) in seen:
                folders.clear()
                continue
            seen.add(here)
            folders[:] = sorted(name for name in folders if name[0] != "." and name != "lost+found")
            tops += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            for path in (Path(parent, name) for name in fnmatch.filter(names, pattern) if name[0] != "."):
                if path.exists() and not path.is_file():  # reading a FIFO would wait for ever
                    print(f"left out {path}: no regular file", file=sys.stderr)
                else:
                    found.append(path.relative_to(root).as_posix())
    return sorted(found)


def identity(path: str | Path) -> tuple[int, int]:
    return (status := os.stat(path)).st_dev, status.st_ino


def refuse(error: OSError) -> None:
    if not isinstance(error, PermissionError) or os.stat(error.filename).st_uid == os.geteuid():
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error
    print(f"left out {error.filename}, another user's: {error.strerror}", file=sys.stderr)


def local_path(text: str) -> Path:
    """An argument's type: a file or folder on a disk."""
    if text.startswith("gs:/"):
        ways = f"`{entry.here('python data.py download')} gs://BUCKET/PREFIX DEST` brings shards, and `gcloud storage cp -r"
        why = f"{text} is in a bucket, and this reads from a disk; {ways} gs://BUCKET/PREFIX DEST` other files"
        raise argparse.ArgumentTypeError(why)
    return Path(text)


def find_sources(source: Path, but: Iterable[str | Path] = ()) -> tuple[Path, list[str]]:
    """(folder, sorted relative paths) of every file below a folder, or of a single file."""
    if source.is_file():
        return source.parent, [source.name]
    if not source.is_dir():
        raise DataError(f"{source} is no {'regular ' * source.exists()}file and no folder")
    return source, find_files(source, but=but)
