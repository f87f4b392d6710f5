"""What a checkpoint is on disk: its name, its files, and the manifest that makes it exist. Nothing about tensors.

A directory without a valid MANIFEST.json does not exist as far as anyone is concerned. It comes into being by one
rename once everything in it is durable, and it goes by one rename too.
"""

import base64
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from configs import ConfigError
from refocused.checkpoint.crc32c import Checksum

FORMAT = 1  # of the directory; raise it when an older version could not read what this one writes
MANIFEST = "MANIFEST.json"
STATE = "state.json"
TEMPORARY, ASIDE = ".tmp-", ".old-"  # prefixes of directories that a save is writing, or will put back if it dies


class CheckpointError(ValueError):
    """No checkpoint, a damaged one, or one that does not fit; the message names the first difference."""

    exit_code = 66
    same_on_all_ranks = True  # so one of them says it


class Name(NamedTuple):
    epoch: int
    step: int
    files: int

    def __str__(self) -> str:
        return f"checkpoint-epoch{self.epoch}-step{self.step}-files{self.files}"


def name(epoch: int, step: int, files: int) -> str:
    """checkpoint-epoch{E}-step{S}-files{F}; F counts the files' worth of data consumed in this epoch."""
    return str(Name(epoch, step, files))


def parse(text: str) -> Name | None:
    """The numbers in a checkpoint's name, or None if it is no such name."""
    match = re.fullmatch(r"checkpoint-epoch(\d+)-step(\d+)-files(\d+)", text, re.ASCII)
    return Name(*map(int, match.groups())) if match else None


def names(output_dir: str | os.PathLike) -> list[str]:
    """Names of the checkpoint directories, the highest step first, complete or not."""
    try:
        found = [n for n in os.listdir(output_dir) if parse(n)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read output_dir={output_dir}: {error.strerror}") from error
    return sorted(found, key=lambda n: (parse(n).step, parse(n)), reverse=True)


def digest(path: str | os.PathLike) -> dict[str, Any]:
    """{size, crc32c, sha256} of a file; CRC-32C in base64, as Cloud Storage shows it."""
    size, crc, sha = 0, Checksum(), hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):  # stays in the cache; hashing releases the GIL
            size += len(chunk)
            crc.update(chunk)
            sha.update(chunk)
    return {"size": size, "crc32c": base64.b64encode(crc.digest()).decode(), "sha256": sha.hexdigest()}


def write_file(path: str | os.PathLike, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_dir(path: str | os.PathLike) -> None:
    """Make the names in a directory durable; fsync of a file does not do that."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """The one form in which a manifest is written, with its own SHA-256, so that no byte of it can change unseen."""
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({"manifest": manifest, "sha256": own}, indent=1, sort_keys=True).encode()


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, itself checked but not yet compared with the files.

    {format, name, save_id, step, time (Unix seconds), files: {file name: {size, crc32c, sha256}}}
    """
    path = Path(path)
    try:
        with open(path / MANIFEST, "rb") as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"has no {MANIFEST}: not a complete checkpoint" if path.is_dir() else "is no directory"
        raise CheckpointError(f"{path} {what}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path / MANIFEST}: {error.strerror}") from error
    return decode(content, path / MANIFEST)


def decode(content: bytes, where: str | os.PathLike) -> dict[str, Any]:
    """The manifest that these bytes are. Raises CheckpointError, which calls them `where`."""
    try:
        manifest = json.loads(content)["manifest"]
        newer = manifest["format"] > FORMAT
        intact = newer or encode_manifest(manifest) == content
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: not a manifest") from error
    if newer:
        raise CheckpointError(
            f"{where} has format {manifest['format']}, this code reads up to {FORMAT}; update the code to load it"
        )
    if not intact:
        raise CheckpointError(f"{where} is damaged: its own SHA-256 differs")
    return manifest


def verify(path: str | os.PathLike, hashes: bool = True) -> dict[str, Any]:
    """Compare a checkpoint's files with its manifest, and return the manifest.

    Raises CheckpointError that names the first file that differs and how. Without `hashes`, only names, sizes and
    state.json are compared, which reads no tensors.
    """
    path = Path(os.path.realpath(path))
    manifest = read_manifest(path)
    if manifest["name"] != path.name:
        raise CheckpointError(f"{path} holds the manifest of {manifest['name']}: renamed, or mixed up")
    files = manifest["files"]
    try:
        here = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(path) if entry.name != MANIFEST}
        for file in sorted(files.keys() | here.keys()):
            if file not in here:
                raise CheckpointError(f"{path / file} is missing")
            if file not in files:
                raise CheckpointError(f"{path / file} is an extra file that {MANIFEST} does not know")
            if not stat.S_ISREG(here[file].st_mode):
                raise CheckpointError(f"{path / file} is not a plain file")
            if here[file].st_size != files[file]["size"]:
                raise CheckpointError(
                    f"{path / file} has {here[file].st_size:,} bytes instead of {files[file]['size']:,}"
                )
        chosen = sorted(files) if hashes else [STATE]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for file, found in zip(chosen, pool.map(lambda f: digest(path / f), chosen), strict=True):
                if found != files[file]:
                    raise CheckpointError(f"{path / file} is damaged: its SHA-256 differs")
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror}") from error
    return manifest


def read_state(path: Path, hashes: bool = True) -> dict[str, Any]:
    """The state.json of a checkpoint that has just been verified."""
    verify(path, hashes)
    return decode_state((path / STATE).read_bytes(), path / STATE)


def decode_state(content: bytes, where: str | os.PathLike) -> dict[str, Any]:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON") from error


def commit(temporary: Path, final: Path, save_id: str, files: dict[str, dict[str, Any]], state: bytes) -> None:
    """Complete the temporary directory, whose `files` are durable, and make it the checkpoint `final`."""
    write_file(temporary / STATE, state)
    manifest = {
        "format": FORMAT,
        "name": final.name,
        "save_id": save_id,
        "step": parse(final.name).step,
        "time": int(time.time()),
        "files": {**files, STATE: digest(temporary / STATE)},
    }
    put(temporary, final, save_id, encode_manifest(manifest))


def put(temporary: Path, final: Path, save_id: str, manifest: bytes) -> None:
    """The manifest, last, then one rename. On a node without rank 0's disk: rank 0's manifest beside its own files."""
    write_file(temporary / MANIFEST, manifest)
    fsync_dir(temporary)
    aside = final.with_name(f"{ASIDE}{save_id}-{final.name}")
    replaces = final.exists()
    if replaces:  # a directory that is not empty cannot be replaced by a rename
        os.rename(final, aside)
    os.rename(temporary, final)
    fsync_dir(final.parent)
    if replaces:
        delete(aside)


def delete(path: Path) -> None:
    """Remove a checkpoint: out of sight by one rename, then manifest first, so that no half of it is ever mistaken."""
    trash = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{path.name}")
    os.rename(path, trash)
    (trash / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(trash, ignore_errors=True)  # what resists is removed by the next start


def recover(output_dir: str | os.PathLike) -> None:
    """Undo what a killed save left: put back what it had moved aside, remove what it had not completed."""
    for entry in sorted(os.listdir(output_dir)):
        path = Path(output_dir, entry)
        if entry.startswith(ASIDE) and not (final := path.with_name(entry.split("-", 2)[2])).exists():
            os.rename(path, final)
        elif entry.startswith(ASIDE):
            delete(path)
        elif entry.startswith(TEMPORARY):
            shutil.rmtree(path)
    fsync_dir(output_dir)


def prune(output_dir: str | os.PathLike, newest: str, save_total_limit: int, keep_every: int) -> None:
    """Keep `newest`, which must be complete, and the save_total_limit - 1 complete ones before it; 0 keeps all.

    Those at multiples of keep_every stay and do not count. Later steps, left when a run went back to an earlier
    checkpoint, are not touched.
    """
    kept = 1
    for old in names(output_dir) if save_total_limit else []:
        step = parse(old).step
        if step >= parse(newest).step or (keep_every and step % keep_every == 0):
            continue
        try:
            verify(Path(output_dir, old), hashes=False)
            kept += 1
            surplus = kept > save_total_limit
        except CheckpointError:
            surplus = True  # never loadable again, and a newer one is complete
        if surplus:
            delete(Path(output_dir, old))


_locks: list[Any] = []  # open files; the kernel drops their locks when the process ends, however it ends


def lock(output_dir: str | os.PathLike, leader: str | None = None) -> str:
    """Make output_dir this process's own until it ends, prove that it can be written, clean up after killed saves.

    One process per node does this, rank 0 first; what it returns is the others' `leader`, so that they know a disk
    that they share with it. Raises ConfigError: with the owner's host and pid, or why writing fails.
    """
    me = f"host {socket.gethostname()}, pid {os.getpid()}"
    try:
        os.makedirs(output_dir, exist_ok=True)
        file = open(Path(output_dir, ".lock"), "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "a run that is just starting"
            file.close()
            if owner == leader:
                return owner
            raise ConfigError(
                f"output_dir={output_dir} is in use by {owner}; stop that run or choose another output_dir"
            ) from None
        file.truncate(0)
        file.write(me + "\n")
        file.flush()
        os.fsync(file.fileno())
        _locks.append(file)
        recover(output_dir)
        return me
    except OSError as error:
        raise ConfigError(
            f"output_dir={output_dir} cannot be written: {error.strerror}; choose another output_dir"
        ) from error


def check_space(output_dir: str | os.PathLike, need: int) -> None:
    """Raise ConfigError unless `need` bytes and a little more are free in output_dir."""
    free = shutil.disk_usage(output_dir).free
    if free < need * 1.01 + (1 << 20):
        raise ConfigError(
            f"a checkpoint takes {need / 1e9:.3g} GB and {output_dir} has {free / 1e9:.3g} GB free; "
            "free some space, lower save_total_limit or choose another output_dir"
        )
