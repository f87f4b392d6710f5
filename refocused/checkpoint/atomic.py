"""How checkpoints come to be on a disk and go from it, and whose the folder is that they are in.

One comes into being by one rename once everything in it is durable, and it goes by one rename too. Only what is known to
be this program's own goes: a checkpoint whose manifest can be read, with no file in it that the manifest does not name,
and what has the name of a save that was not completed, in a folder that this process has locked.
"""

import contextlib
import errno
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from configs import ConfigError
from refocused import files, locks
from refocused.checkpoint import selection
from refocused.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    CheckpointError,
    decode,
    decode_state,
    encode_manifest,
    parse,
    read_manifest,
    read_manifests,
    step_of,
    verify,
)
from refocused.files import create, digest, sync_folder, too_small, why

TEMPORARY, ASIDE = ".tmp-", ".old-"  # prefixes of directories that a save is writing, or will put back if it dies
UNFINISHED = re.compile(r"\.(?:tmp|old)-[0-9a-f]{8,64}-(.+)")

deleted: deque[str] = deque()  # names, until somebody takes them for a log


def commit(
    temporary: Path,
    final: Path,
    save_id: str,
    listed: dict[str, dict[str, Any]],
    more: Mapping[str, bytes],
    generation: int,
) -> None:
    """Complete the temporary directory, whose `listed` files are durable, by `more`: that is the checkpoint `final`."""
    for name, content in more.items():
        create(temporary / name, content)
    manifest = {
        "format": FORMAT,
        "name": final.name,
        "save_id": save_id,
        "step": step_of(final.name),
        "generation": generation,
        "time": int(time.time()),
        "files": {**listed, **{name: digest(temporary / name) for name in more}},
    }
    decode_state(more[STATE], final / STATE)  # nothing is committed that could not be read again
    put(temporary, final, save_id, encode_manifest(manifest))


def put(temporary: Path, final: Path, save_id: str, manifest: bytes) -> None:
    """The manifest, last, then one rename. On a node without rank 0's disk: rank 0's manifest beside its own files."""
    decode(manifest, final / MANIFEST)
    create(temporary / MANIFEST, manifest)
    sync_folder(temporary)
    take_place(temporary, final, save_id)


def take_place(folder: Path, final: Path, save_id: str) -> None:
    """Give a complete folder its final name. An older save of that name goes once it is replaced; what is not known to be
    one gets another name and stays."""
    aside = None
    if final.is_dir() or final.is_symlink():  # a directory that is not empty cannot be replaced by a rename
        aside = final.with_name(f"{ASIDE}{save_id}-{final.name}")
        if reason := not_ours(final):
            aside = final.with_name(f"{final.name}.before-{save_id}")
            files.name_once(aside, f"{final} was there already and {reason}: it is {aside.name} now")
        os.rename(final, aside)
    os.rename(folder, final)
    sync_folder(final.parent)
    if aside and aside.name.startswith(ASIDE):
        delete(aside)


def not_ours(path: Path) -> str:
    """Why a checkpoint's folder is not known to be one that this program made, whole and alone; "" if it is."""
    try:
        listed = read_manifest(path)["files"]
        others = sorted({entry for entry in os.listdir(path) if entry != MANIFEST} - listed.keys())
    except CheckpointError as error:
        return f"is not known to be this program's ({error})"
    except OSError as error:
        return f"cannot be read ({why(error)})"
    return f"has {others[0]} in it, which no save wrote" if others else ""


def delete(path: Path) -> bool:
    """Remove a checkpoint: out of sight by one rename, then manifest first, so that no half of it is ever mistaken.

    Of one that is linked to, only the link. What is not known to be ours is named and stays.
    """
    if reason := not_ours(path):
        files.name_once(path, f"{path} stays: it {reason}")
        return False
    trash = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{path.name}")
    os.rename(path, trash)
    if not trash.is_symlink():
        (trash / MANIFEST).unlink(missing_ok=True)
    files.remove(trash)  # what resists is removed by the next start
    return True


def withdraw(path: Path, save_id: str) -> None:
    """Delete a save that another node could not complete."""
    with contextlib.suppress(CheckpointError, OSError):
        if read_manifest(path)["save_id"] == save_id:
            delete(path)


def recover(output_dir: str | os.PathLike) -> None:
    """Undo what a killed save left: put back what it had moved aside, remove what it had not completed."""
    for entry in sorted(os.listdir(output_dir)):
        path, unfinished = Path(output_dir, entry), UNFINISHED.fullmatch(entry)
        if entry.startswith(ASIDE) and unfinished and parse(unfinished[1]):
            final = path.with_name(unfinished[1])
            if not os.path.lexists(final):
                os.rename(path, final)
            else:
                delete(path)
        elif unfinished and entry.startswith(TEMPORARY):
            files.remove(path)
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
    step are the first to go. What was saved after `newest`, save ids that are `waiting` for the bucket, and what cannot
    be read stay. Raises ConfigError where output_dir is no longer this run's.
    """
    check_lock(output_dir)
    if not save_total_limit:
        return
    ours, unknown = read_manifests(output_dir)
    for name in unknown:
        path = Path(output_dir, name)
        files.name_once(path, f"{path} stays: it {not_ours(path)}")
    complete = [m for m in ours if _is_complete(Path(output_dir, m["name"]))]
    keep = selection.retained(complete, save_total_limit, keep_every) | {newest}
    last = max((selection.key(m) for m in ours if m["name"] == newest), default=None)
    for old in ours:
        kept = old["name"] in keep or old["save_id"] in waiting or (keep_every and old["step"] % keep_every == 0)
        if last and not kept and selection.key(old) <= last and delete(Path(output_dir, old["name"])):
            deleted.append(old["name"])


def _is_complete(path: Path) -> bool:
    """Whether it is, as far as it can be read at the moment."""
    try:
        return bool(verify(path, hashes=False))
    except CheckpointError as error:
        return isinstance(error.__cause__, OSError)


_held: dict[str, locks.Lock] = {}  # by the output_dir that they are of, its links resolved


def lock(output_dir: str | os.PathLike, leader: str | None = None) -> str:
    """Make output_dir this process's own until it ends, prove that it can be written, clean up after killed saves.

    One process per node does this, rank 0 first; what it returns is the others' `leader`, so that they know a disk
    that they share with it. Raises ConfigError: with the owner's host and pid, or why writing fails.
    """
    path = Path(output_dir, ".lock")
    try:
        os.makedirs(output_dir, exist_ok=True)
        held = locks.Lock(path, leader)
        _held[str(held.path.parent)] = held
        files.probe(held.path.parent)
        recover(held.path.parent)
        return held.me
    except locks.Taken as taken:
        if taken.owner == leader:
            return taken.owner
        raise ConfigError(
            f"output_dir={output_dir} is in use by {taken.owner}; stop that run or choose another output_dir"
        ) from None
    except OSError as error:
        reason = f"its {path} is a link" if error.errno == errno.ELOOP else why(error)
        raise ConfigError(f"output_dir={output_dir} cannot be written: {reason}; choose another output_dir") from error


def holds(output_dir: str | os.PathLike) -> bool:
    """Whether this process has locked output_dir: the first of a node, unless the disk is shared with one before it."""
    return os.path.realpath(output_dir) in _held


def check_lock(output_dir: str | os.PathLike) -> None:
    """Raise ConfigError if this process had locked output_dir and the lock file has gone or is another one now."""
    held = _held.get(str(output_dir)) or _held.get(os.path.realpath(output_dir))
    if held and not held.intact():
        raise ConfigError(
            f"output_dir={output_dir} is no longer this run's own: its .lock was removed while it trained, so another "
            "run can write there too; nothing more is saved. See that no other run uses it, then resume"
        )


def check_space(output_dir: str | os.PathLike, need: int) -> None:
    """Raise ConfigError unless `need` bytes and a little more are free in output_dir."""
    if lack := too_small(output_dir, need):
        raise ConfigError(
            f"a checkpoint takes {need / 1e9:.3g} GB and {lack}; "
            "free some space, lower save_total_limit or choose another output_dir"
        )
