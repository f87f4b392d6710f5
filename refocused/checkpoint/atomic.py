"""How checkpoints come to be on a disk and go from it, and who owns the folder that they are in.

A save appears by one rename once everything in it is durable, and goes by one rename. Only what this program is known
to have made is deleted: a checkpoint with a readable manifest that names every file in it, and what bears the name of
an unfinished save in a folder that this process has locked.
"""

import errno
import os
import re
import secrets
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from configs import ConfigError
from refocused import files, locks
from refocused.checkpoint import manifest as manifests
from refocused.checkpoint import selection
from refocused.checkpoint.manifest import FORMAT, MANIFEST, STATE, CheckpointError, read_manifest, step_of
from refocused.files import why

TEMPORARY, ASIDE = ".tmp-", ".old-"  # prefixes of directories that a save is writing, or will put back if it dies
UNFINISHED = re.compile(r"\.(?:tmp|old)-[0-9a-f]{16,64}-(.+)")

Files = Mapping[str, bytes]  # by name


def unfinished(final: Path, save_id: str) -> Path:
    """Where a save is written until it is complete."""
    return final.with_name(f"{TEMPORARY}{save_id}-{final.name}")


def commit(folder: Path, final: Path, save_id: str, listed: dict[str, Any], more: Files, generation: int) -> bytes:
    """Make the folder, whose `listed` files are durable, the checkpoint `final`; `more` are its other files.

    Returns the manifest.
    """
    manifests.decode_state(more[STATE], final / STATE)  # nothing is committed that could not be read again
    for name, content in more.items():
        files.create(folder / name, content)
    manifest = {
        "format": FORMAT,
        "name": final.name,
        "save_id": save_id,
        "step": step_of(final.name),
        "generation": generation,
        "time": int(time.time()),
        "files": {**listed, **{name: files.digest(folder / name) for name in more}},
    }
    content = manifests.encode_manifest(manifest)
    put(folder, final, save_id, content)
    return content


def put(folder: Path, final: Path, save_id: str, manifest: bytes) -> None:
    """The manifest, last, then one rename. A node without rank 0's disk puts rank 0's manifest beside its own files.

    An older save of that name is deleted once it is replaced; what is not known to be one is renamed and stays. Raises
    ConfigError where output_dir is no longer this run's.
    """
    check_lock(final.parent)
    manifests.decode(manifest, final / MANIFEST)
    files.create(folder / MANIFEST, manifest)
    files.sync_folder(folder)
    aside = None
    if os.path.lexists(final):  # a rename replaces neither a file nor a directory that is not empty
        aside = final.with_name(f"{ASIDE}{save_id}-{final.name}")
        if reason := not_ours(final):
            aside = final.with_name(f"{final.name}.before-{save_id}")
            files.name_once(aside, f"{final} was there already and {reason}: it is {aside.name} now")
        os.rename(final, aside)
    os.rename(folder, final)
    files.sync_folder(final.parent)
    if aside and aside.name.startswith(ASIDE):
        delete(aside)


def not_ours(path: Path) -> str:
    """Why a folder is not known to be a checkpoint of this program and nothing else; "" if it is."""
    if not path.is_dir():
        return "is no directory"
    try:
        others = {entry for entry in os.listdir(path) if entry != MANIFEST} - read_manifest(path)["files"].keys()
    except CheckpointError as error:
        return f"is not known to be this program's ({str(error).removeprefix(f'{path} ')})"
    except OSError as error:
        return f"cannot be read ({why(error)})"
    return f"has {min(others)} in it, which no save wrote" if others else ""


def delete(path: Path) -> bool:
    """Remove a checkpoint, or the link to one. What is not known to be ours is named and stays.

    It is renamed first, and its manifest goes first: no half of it is ever taken for a checkpoint.
    """
    if reason := not_ours(path):
        files.name_once(path, f"{path} stays: it {reason}")
        return False
    trash = unfinished(path, secrets.token_hex(8))
    os.rename(path, trash)
    if not trash.is_symlink():
        (trash / MANIFEST).unlink(missing_ok=True)
    files.remove(trash)  # what resists is removed by the next start
    return True


def recover(output_dir: str | os.PathLike) -> None:
    """Undo what a killed save left: put back what it had moved aside, remove what it had not completed."""
    for entry in sorted(os.listdir(output_dir)):
        path, match = Path(output_dir, entry), UNFINISHED.fullmatch(entry)
        if match and entry.startswith(TEMPORARY):
            files.remove(path)
        elif match and manifests.parse(match[1]):
            final = path.with_name(match[1])
            delete(path) if os.path.lexists(final) else os.rename(path, final)
    files.sync_folder(output_dir)


def prune(
    output_dir: str | os.PathLike, newest: str, limit: int, keep_every: int, waiting: Collection[str] = ()
) -> None:
    """Keep `newest`, which is complete here or in the bucket, and the limit - 1 complete ones before it.

    A limit of 0 keeps all. Multiples of keep_every stay and do not count. Abandoned saves go first. What was saved
    after `newest`, save ids that are `waiting` for the bucket, and what cannot be read stay. Raises ConfigError where
    output_dir is no longer this run's.
    """
    check_lock(output_dir)
    if not limit:
        return
    folder = Path(output_dir)
    ours, unknown = manifests.read_manifests(folder)
    for name in unknown:
        files.name_once(folder / name, f"{folder / name} stays: it {not_ours(folder / name)}")
    complete = [m for m in ours if _may_be_complete(folder / m["name"])]
    keep = selection.retained(complete, limit, keep_every) | {newest}
    last = max((selection.key(m) for m in ours if m["name"] == newest), default=None)
    for old in ours:
        kept = old["name"] in keep or old["save_id"] in waiting or (keep_every and old["step"] % keep_every == 0)
        path = folder / old["name"]
        note = " (the link alone: what it leads to stays)" * path.is_symlink()
        if last and not kept and selection.key(old) <= last and delete(path):
            files.notes.append(f"deleted {old['name']}{note}")


def _may_be_complete(path: Path) -> bool:
    try:
        return bool(manifests.verify(path, hashes=False))
    except CheckpointError as error:
        return isinstance(error.__cause__, OSError)  # it cannot be read at the moment


_held: dict[str, locks.Lock] = {}  # by output_dir, its links resolved


def lock(output_dir: str | os.PathLike, leader: str | None = None) -> str:
    """Make output_dir this process's own until it ends, prove that it can be written, clean up after killed saves.

    One process per node does this, rank 0 first. It returns the owner, which is the `leader` for the others: so they
    know a disk that they share with rank 0. Raises ConfigError.
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
    """Whether this process has locked output_dir: the first one of each disk."""
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
    if lack := files.too_small(output_dir, need):
        raise ConfigError(
            f"a checkpoint takes {need / 1e9:.3g} GB and {lack}; free some space, lower save_total_limit or choose "
            "another output_dir"
        )
