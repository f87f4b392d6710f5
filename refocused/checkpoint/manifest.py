"""What a checkpoint is on disk: its name, its files, and the manifest that makes it exist. Nothing about tensors.

A directory without a valid MANIFEST.json is no checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from refocused.files import digest, why

FORMAT = 1  # of the directory; raise it when an older version could not read what this one writes
MANIFEST = "MANIFEST.json"
STATE = "state.json"
SHARD = ".safetensors"
LOADABLE = re.compile(r"\.(safetensors|json|distcp|metadata|bin|pt|pth)$")  # a reader might load it; else it is a note


class CheckpointError(ValueError):
    """No checkpoint, a damaged one, or one that does not fit; the message names the first difference."""

    exit_code = 66
    same_on_all_ranks = True  # so one of them says it


def name(epoch: int, step: int, files: int) -> str:
    """F counts the files' worth of data consumed in this epoch."""
    return f"checkpoint-epoch{epoch}-step{step}-files{files}"


parse = re.compile(r"checkpoint-epoch\d+-step(\d+)-files\d+", re.ASCII).fullmatch  # None if it is no such name


def step_of(text: str) -> int:
    found = parse(text)
    assert found is not None, text
    return int(found[1])


def read_manifests(output_dir: str | os.PathLike) -> tuple[list[dict[str, Any]], list[str]]:
    """(manifests, none compared with its files, and names of directories without a readable one, highest step first)."""
    try:
        there = [n for n in os.listdir(output_dir) if parse(n)]
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise CheckpointError(f"cannot read output_dir={output_dir}: {why(error)}") from error
    readable: list[dict[str, Any]] = []
    broken: list[str] = []
    for entry in there:
        try:
            manifest = read_manifest(Path(output_dir, entry))
            readable.append(manifest) if manifest["name"] == entry else broken.append(entry)  # a renamed one
        except CheckpointError:
            broken.append(entry)
    return readable, sorted(broken, key=lambda n: (step_of(n), n), reverse=True)


def generation(output_dir: str | os.PathLike) -> int:
    """The highest generation of any save here; 0 if there is none."""
    return max((m["generation"] for m in read_manifests(output_dir)[0]), default=0)


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """The one form in which a manifest is written, with its own SHA-256, so that no byte of it can change unseen."""
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({"manifest": manifest, "sha256": own}, indent=1, sort_keys=True).encode()


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, itself checked but not yet compared with the files.

    {format, name, save_id, step, generation, time (Unix seconds), files: {file name: {size, crc32c, sha256}}}
    """
    path = Path(path)
    try:
        content = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"has no {MANIFEST}: not a complete checkpoint, or another program's"
        raise CheckpointError(f"{path} {what if path.is_dir() else 'is no directory'}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path / MANIFEST}: {why(error)}") from error
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
    if wrong := _wrong(manifest):
        raise CheckpointError(f"{where} cannot be used: it has {wrong}")
    return manifest


def _wrong(manifest: Any) -> str:
    """What another program's manifest lacks, or has in a form that could lead out of its folder; "" of a good one."""
    try:
        for file, entry in manifest["files"].items():
            if file in ("", ".", "..") or not file.isprintable() or set(file) & {"/", "\\"}:
                return f"the file name {file[:80]!r}"
            if not (whole(entry["size"]) and isinstance(entry["crc32c"], str) and isinstance(entry["sha256"], str)):
                return f"the entry of {file}"
        numbers = [manifest[key] for key in ("step", "generation", "time")]
        if not all(map(whole, numbers)) or not re.fullmatch(r"[0-9a-f]{8,64}", manifest["save_id"]):
            return f"save_id={manifest['save_id']!s:.80} and step, generation and time {numbers!s:.80}"
        found = parse(manifest["name"])
        if STATE not in manifest["files"] or not found or int(found[1]) != manifest["step"]:
            return f"name={manifest['name'][:80]}, step={manifest['step']} and files {[*manifest['files']]!s:.80}"
    except (LookupError, TypeError, AttributeError) as error:
        return f"no {error}"
    return ""


def whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 1 << 53  # beyond it JSON's numbers are not exact everywhere


def verify(path: str | os.PathLike, hashes: bool = True) -> dict[str, Any]:
    """Compare a checkpoint's files with its manifest, and return the manifest.

    Raises CheckpointError with the first difference. Without `hashes` no tensors are read: only names, sizes and
    state.json are compared.
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
                if LOADABLE.search(file):
                    raise CheckpointError(f"{path / file} is an extra file that {MANIFEST} does not know")
            elif not stat.S_ISREG(here[file].st_mode):
                raise CheckpointError(f"{path / file} is not a plain file")
            elif here[file].st_size != (size := files[file]["size"]):
                raise CheckpointError(f"{path / file} has {here[file].st_size:,} bytes instead of {size:,}")
        chosen = sorted(files) if hashes else [STATE]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for file, found in zip(chosen, pool.map(lambda f: digest(path / f), chosen), strict=True):
                if found != {key: files[file][key] for key in found}:
                    raise CheckpointError(f"{path / file} is damaged: its SHA-256 differs")
        if hashes:
            _verified[path] = {file: _identity(here[file]) for file in files}
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {why(error)}") from error
    return manifest


_verified: dict[Path, dict[str, tuple]] = {}  # of each checkpoint whose bytes were compared: its files' identities


def _identity(status: os.stat_result) -> tuple:
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns  # nobody can set a ctime back


def check_unchanged(path: str | os.PathLike) -> None:
    """Raise CheckpointError unless the files that a load has read are those that this process verified before."""
    path = Path(os.path.realpath(path))
    for file, identity in _verified.get(path, {}).items():
        try:
            same = _identity(os.lstat(path / file)) == identity
        except OSError:
            same = False
        if not same:
            raise CheckpointError(f"{path / file} was changed while it was being loaded; start again")


def is_whole(path: Path, manifest: dict[str, Any]) -> bool:
    """Whether each file of the manifest that is here has its size; a node without a shared disk has only its own."""
    for file, entry in manifest["files"].items():
        with contextlib.suppress(OSError):
            if os.lstat(path / file).st_size != entry["size"]:
                return False
    return True


def read(path: Path, hashes: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """(manifest, state) of a checkpoint, which is verified."""
    manifest = verify(path, hashes)
    content = (path / STATE).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][STATE]["sha256"]:
        raise CheckpointError(f"{path / STATE} was changed while it was being read; start again")
    return manifest, decode_state(content, path / STATE)


def decode_state(content: bytes, where: str | os.PathLike) -> dict[str, Any]:
    """The state that these bytes are. Raises CheckpointError, which calls them `where`."""
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{where} cannot be used: it has no object")
    if "data" in state and (lacks := {"step", "samples_seen", "tokens", "config", "run"} - state.keys()):
        raise CheckpointError(f"{where} cannot be used: it has no {min(lacks)}")
    return state
