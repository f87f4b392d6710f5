"""How checkpoints come to be on a disk and go from it, and whose the folder is that they are in.

One comes into being by one rename once everything in it is durable, and it goes by one rename too.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from configs import ConfigError
from refocused.checkpoint import order
from refocused.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    digest,
    encode_manifest,
    names,
    parse,
    read_manifest,
    step_of,
    verify,
    why,
    write_file,
)
from refocused.shards.write import sync_folder

TEMPORARY, ASIDE = ".tmp-", ".old-"  # prefixes of directories that a save is writing, or will put back if it dies


def commit(
    temporary: Path,
    final: Path,
    save_id: str,
    files: dict[str, dict[str, Any]],
    more: Mapping[str, bytes],
    generation: int,
) -> None:
    """Complete the temporary directory, whose `files` are durable, by `more`: that is the checkpoint `final`."""
    for name, content in more.items():
        write_file(temporary / name, content)
    manifest = {
        "format": FORMAT,
        "name": final.name,
        "save_id": save_id,
        "step": step_of(final.name),
        "generation": generation,
        "time": int(time.time()),
        "files": {**files, **{name: digest(temporary / name) for name in more}},
    }
    put(temporary, final, save_id, encode_manifest(manifest))


def put(temporary: Path, final: Path, save_id: str, manifest: bytes) -> None:
    """The manifest, last, then one rename. On a node without rank 0's disk: rank 0's manifest beside its own files."""
    write_file(temporary / MANIFEST, manifest)
    sync_folder(temporary)
    take_place(temporary, final, save_id)


def take_place(folder: Path, final: Path, save_id: str) -> None:
    """Give a complete folder its final name; a checkpoint of that name is moved aside and goes once it is replaced."""
    aside = final.with_name(f"{ASIDE}{save_id}-{final.name}")
    replaces = final.is_dir() or final.is_symlink()
    if replaces:  # a directory that is not empty cannot be replaced by a rename
        os.rename(final, aside)
    os.rename(folder, final)
    sync_folder(final.parent)
    if replaces:
        delete(aside)


def delete(path: Path) -> None:
    """Remove a checkpoint: out of sight by one rename, then manifest first, so that no half of it is ever mistaken.

    Of one that is linked to, only the link.
    """
    trash = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{path.name}")
    os.rename(path, trash)
    if not trash.is_symlink():
        (trash / MANIFEST).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        remove(trash)  # what resists is removed by the next start


def withdraw(path: Path, save_id: str) -> None:
    """Delete a checkpoint if it is that save, which another node could not complete."""
    with contextlib.suppress(CheckpointError, OSError):
        if read_manifest(path)["save_id"] == save_id:
            delete(path)


def remove(path: Path) -> None:
    """Remove a directory with all that is in it, a file, or a link and not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def recover(output_dir: str | os.PathLike) -> None:
    """Undo what a killed save left: put back what it had moved aside, remove what it had not completed."""
    for entry in sorted(os.listdir(output_dir)):
        path = Path(output_dir, entry)
        aside = re.fullmatch(re.escape(ASIDE) + "[0-9a-f]+-(.+)", entry)
        if aside and parse(aside[1]) and not os.path.lexists(path.with_name(aside[1])):
            os.rename(path, path.with_name(aside[1]))
        elif aside and parse(aside[1]):
            delete(path)
        elif entry.startswith(TEMPORARY):
            remove(path)
    sync_folder(output_dir)


def prune(
    output_dir: str | os.PathLike,
    newest: str,
    save_total_limit: int,
    keep_every: int,
    waiting: Collection[str] = (),
) -> None:
    """Keep `newest`, which is complete here or in the bucket, and the save_total_limit - 1 complete ones before it; 0
    keeps all.

    Those at multiples of keep_every stay and do not count. Those that were abandoned when a run went back to an earlier
    step are the first to go. What was saved after `newest`, and save ids that are `waiting` for the bucket, stay. Raises
    ConfigError where output_dir is no longer this run's.
    """
    check_lock(output_dir)
    complete, rest = [], []
    for old in names(output_dir) if save_total_limit else []:
        try:
            complete.append(verify(Path(output_dir, old), hashes=False))
        except CheckpointError:
            rest.append(old)  # never loadable from here, and a newer one is complete
    keep = order.retained(complete, save_total_limit, keep_every) | {newest}
    last = _key(output_dir, newest)
    for old in [m["name"] for m in complete if m["name"] not in keep] + rest:
        key, save_id = _key(output_dir, old)
        if save_id not in waiting and key <= last[0]:
            delete(Path(output_dir, old))


def _key(output_dir: str | os.PathLike, name: str) -> tuple[tuple, str]:
    """(the place of a save among the others, before all of them where its manifest cannot be read; its save id)."""
    try:
        found = read_manifest(Path(output_dir, name))
    except CheckpointError:
        return (), ""
    return order.key(found), found["save_id"]


_locks: dict[str, Any] = {}  # open files by output_dir; the kernel drops a lock when its process ends, however it ends


def lock(output_dir: str | os.PathLike, leader: str | None = None) -> str:
    """Make output_dir this process's own until it ends, prove that it can be written, clean up after killed saves.

    One process per node does this, rank 0 first; what it returns is the others' `leader`, so that they know a disk
    that they share with it. Raises ConfigError: with the owner's host and pid, or why writing fails.
    """
    me = f"host {socket.gethostname()}, pid {os.getpid()}"
    path = os.path.join(os.path.realpath(output_dir), ".lock")
    try:
        os.makedirs(output_dir, exist_ok=True)
        # not through a link: whoever can put one here must not have another file overwritten
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = file.read().strip() or "a run that is just starting"
            file.close()
            if owner == leader:
                return owner
            raise ConfigError(
                f"output_dir={output_dir} is in use by {owner}; stop that run or choose another output_dir"
            ) from None
        if leader and file.read().strip() == leader:  # a shared disk whose locks each node sees alone
            file.close()
            return leader
        file.seek(0)
        file.truncate(0)
        file.write(me + "\n")
        file.flush()
        os.fsync(file.fileno())
        _locks[path] = file
        recover(output_dir)
        return me
    except OSError as error:
        reason = f"its {path} is a link" if error.errno == errno.ELOOP else why(error)
        raise ConfigError(f"output_dir={output_dir} cannot be written: {reason}; choose another output_dir") from error


def holds(output_dir: str | os.PathLike) -> bool:
    """Whether this process has locked output_dir: the first of a node, unless the disk is shared with one before it."""
    return os.path.join(os.path.realpath(output_dir), ".lock") in _locks


def check_lock(output_dir: str | os.PathLike) -> None:
    """Raise ConfigError if this process had locked output_dir and the lock file has gone or is another one now."""
    if not holds(output_dir):
        return
    path = os.path.join(os.path.realpath(output_dir), ".lock")
    mine = os.fstat(_locks[path].fileno())
    try:
        same = os.path.samestat(mine, os.lstat(path))
    except OSError:
        same = False
    if not same:
        raise ConfigError(
            f"output_dir={output_dir} is no longer this run's own: its .lock was removed while it trained, so another "
            "run can write there too; nothing more is saved. See that no other run uses it, then resume"
        )


def check_space(output_dir: str | os.PathLike, need: int) -> None:
    """Raise ConfigError unless `need` bytes and a little more are free in output_dir."""
    free = shutil.disk_usage(output_dir).free
    if free < need * 1.01 + (1 << 20):
        raise ConfigError(
            f"a checkpoint takes {need / 1e9:.3g} GB and {output_dir} has {free / 1e9:.3g} GB free; "
            "free some space, lower save_total_limit or choose another output_dir"
        )
