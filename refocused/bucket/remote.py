"""Checkpoints below one prefix of a bucket: listing, publishing, fetching, deleting. Nothing is remembered in between.

    gs://BUCKET/PREFIX/<checkpoint>/<save id>/<file>    data; no two saves share an object
    gs://BUCKET/PREFIX/<checkpoint>/MANIFEST.json       the local manifest, byte for byte; names the save id and files

Data goes up first, then a LIST is compared with the manifest, then the manifest is created: it is the commit. Deleting
goes the other way round. So whatever is killed when, a checkpoint whose manifest is there is complete.
"""

import contextlib
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from configs import Config
from refocused import files, locks
from refocused.bucket import gcs
from refocused.checkpoint import atomic, selection
from refocused.checkpoint import manifest as local
from refocused.checkpoint.manifest import MANIFEST, CheckpointError

STREAMS = 4  # files at once; two to four streams of 16 MiB chunks do not disturb a training loop
ORPHAN_SECONDS = 86400  # unfinished uploads older than this are nobody's
# what a save puts below its random id: without a manifest that names it, only this is known to be ours
UPLOADED = re.compile(r"([0-9a-f]{16})/(shard-\d+-\d+\.safetensors|state\.json|tokenizer(_config)?\.json)")
STRANGE = "no save of this trainer wrote it"


class Remote(NamedTuple):
    """A checkpoint in the bucket: its manifest is there."""

    name: str
    manifest: dict[str, Any]  # {} where it cannot be used
    content: bytes
    generation: int  # of the manifest
    problem: str  # why it is not complete; "" if it is


class Place:
    """Checkpoints below one prefix of a bucket."""

    def __init__(self, bucket: gcs.Bucket, prefix: str):
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.seen: dict[int, bytes] = {}  # manifests by their generation, which never change

    @classmethod
    def of(cls, cfg: Config, patience: float = 300.0) -> "Place":
        assert cfg.bucket_name and cfg.checkpoint_bucket_path
        return cls(gcs.Bucket(cfg.bucket_name, patience), cfg.checkpoint_bucket_path)

    def __str__(self) -> str:
        return self.bucket.url(self.prefix).rstrip("/")

    def name(self, *parts: str) -> str:
        return "/".join(part for part in (self.prefix, *parts) if part)

    def objects(self, *parts: str) -> dict[str, gcs.Object]:
        """{name below the prefix: object}, by one LIST."""
        base = f"{self.prefix}/" if self.prefix else ""
        below = "".join(f"{part}/" for part in parts)
        return {obj.name.removeprefix(base): obj for obj in self.bucket.list(base + below)}

    def checkpoints(self, objects: dict[str, gcs.Object]) -> list[Remote]:
        """Every checkpoint whose manifest is listed, complete or with the problem, in the order of selection.names.

        One that was deleted or replaced since it was listed is left out.
        """
        found = {}
        for path, obj in objects.items():
            name, _, file = path.partition("/")
            if file == MANIFEST and local.parse(name):
                with contextlib.suppress(gcs.Gone):
                    found[name] = self._remote(name, obj, objects)
        broken = [r for r in found.values() if not r.manifest]
        whole = selection.newest_first(r.manifest for r in found.values() if r.manifest)
        return sorted(broken, key=lambda r: (local.step_of(r.name), r.name), reverse=True) + [
            found[m["name"]] for m in whole
        ]

    def _remote(self, name: str, obj: gcs.Object, objects: dict[str, gcs.Object]) -> Remote:
        if obj.generation not in self.seen:
            self.seen[obj.generation] = self.bucket.content(obj)
        content = self.seen[obj.generation]
        try:
            manifest = decode(content, name, f"{self}/{name}/{MANIFEST}")
        except CheckpointError as error:
            return Remote(name, {}, content, obj.generation, str(error))
        problem = difference(manifest, objects)
        return Remote(name, manifest, content, obj.generation, problem and f"{self}/{name}: {problem}")

    def strangers(self, objects: dict[str, gcs.Object], remotes: list[Remote]) -> dict[str, str]:
        """{checkpoint: object} of what lies where checkpoints would and no save of ours wrote, one for each name."""
        ours = {obj.name for r in remotes if r.manifest for obj in listed(r.manifest, objects).values()}
        found: dict[str, str] = {}
        for path, obj in objects.items():
            name, _, rest = path.partition("/")
            own = rest in (MANIFEST, "") or UPLOADED.fullmatch(rest) or obj.name in ours
            if local.parse(name) and not own:
                found.setdefault(name, f"{self}/{path}")
        return found


def decode(content: bytes, name: str, where: str) -> dict[str, Any]:
    """A manifest from a bucket, checked down to its file names; those become local paths."""
    manifest = local.decode(content, where)
    if manifest["name"] != name or MANIFEST in manifest["files"]:
        raise CheckpointError(f"{where} is no manifest of {name}")
    return manifest


def listed(manifest: dict[str, Any], objects: dict[str, gcs.Object]) -> dict[str, gcs.Object]:
    """{file: object} of what is in the bucket of that save."""
    paths = {file: f"{manifest['name']}/{manifest['save_id']}/{file}" for file in manifest["files"]}
    return {file: objects[path] for file, path in paths.items() if path in objects}


def present(manifest: dict[str, Any], output_dir: str | os.PathLike) -> set[str]:
    """The files of that save that are on this disk."""
    return {file for file in manifest["files"] if Path(output_dir, manifest["name"], file).exists()}


def difference(manifest: dict[str, Any], objects: dict[str, gcs.Object]) -> str:
    """What keeps the listed objects from being the manifest's files; "" if nothing does."""
    there = listed(manifest, objects)
    for file, entry in sorted(manifest["files"].items()):
        if file not in there:
            return f"{file} is missing"
        if not same(there[file], entry):
            return f"{file} has {there[file].size:,} bytes of CRC-32C {there[file].crc32c}, not as in its manifest"
    return ""


def same(obj: gcs.Object | None, entry: dict[str, Any]) -> bool:
    return obj is not None and (obj.size, obj.crc32c) == (entry["size"], entry["crc32c"])


def delete(place: Place, remote: Remote, objects: dict[str, gcs.Object], replaced: bool = False) -> None:
    """Remove a checkpoint from the bucket: manifest first, so that no half of it is ever taken for one.

    Of the objects those go that the manifest names, in the generation that was listed. replaced: the data alone.
    """
    assert remote.manifest, f"{remote.name} is not known to be ours"
    if not replaced:
        place.bucket.delete(place.name(remote.name, MANIFEST), remote.generation)
    for obj in listed(remote.manifest, objects).values():
        place.bucket.delete(obj.name, obj.generation)


def publish(place: Place, folder: Path, commit: bool = True, replace: bool = False) -> bool:
    """Make the checkpoint in folder exist in the bucket; False while files of other nodes are still to come.

    Only what is not there yet is sent. Each node sends the files that it has; the one with commit=True writes the
    manifest once a LIST shows all of them with the manifest's sizes and checksums. Another complete save of the same
    name is a Conflict, or with replace=True gives way in the moment in which the manifest is replaced.
    """
    content = (folder / MANIFEST).read_bytes()
    manifest = decode(content, folder.name, str(folder / MANIFEST))
    entries, objects = manifest["files"], place.objects(folder.name)
    old = next(iter(place.checkpoints(objects)), None)
    if old and old.content == content and not old.problem:
        return True
    if old and (not old.manifest or not old.problem and not replace):
        why = old.problem or f"{place}/{folder.name} is there already, from another save"
        raise gcs.Conflict(f"{why}; it was left as it is, and {folder} stays out of the bucket")

    def send(file: str, progress: gcs.Progress) -> None:
        name = place.name(folder.name, manifest["save_id"], file)
        place.bucket.upload(name, folder / file, entries[file]["size"], entries[file]["crc32c"])

    there = listed(manifest, objects)
    todo = [file for file in present(manifest, folder.parent) if not same(there.get(file), entries[file])]
    gcs.in_parallel(send, sorted(todo, key=lambda file: -entries[file]["size"]), STREAMS)
    objects = place.objects(folder.name)
    if difference(manifest, objects):
        return False
    if not commit:
        return any(remote.content == content for remote in place.checkpoints(objects))
    if not old or old.content != content:
        place.bucket.create(place.name(folder.name, MANIFEST), content, old.generation if old else 0)
    if old and old.manifest["save_id"] != manifest["save_id"]:
        with contextlib.suppress(gcs.BucketError):  # nobody's data now, which `ckpt.py prune` finds
            delete(place, old, objects, replaced=True)
    return True


def fetch(
    place: Place, name: str, folder: Path, save_id: str | None = None, wait: bool = False, keep: bool = False
) -> Path:
    """A checkpoint from the bucket to folder/name, complete and verified or not at all. Raises CheckpointError.

    What an interrupted call fetched is used. One of that name that is damaged or another save is replaced at the end.
    Another process that fetches into the folder is waited for, or BucketError is raised.
    """
    objects = place.objects()
    there = {remote.name: remote for remote in place.checkpoints(objects)}
    if name not in there:
        raise CheckpointError(f"{place} has no {name}; it has {', '.join(there) or 'no checkpoints'}")
    if there[name].problem:
        raise CheckpointError(there[name].problem)
    manifest, final = there[name].manifest, folder / name
    if save_id not in (None, manifest["save_id"]):
        raise CheckpointError(f"{place}/{name} was replaced by another save in the meantime; start again")
    with locks.filling(folder, wait):
        with contextlib.suppress(CheckpointError):  # not here, or damaged
            if local.verify(final)["save_id"] == manifest["save_id"]:
                return final
            if keep:
                raise gcs.Conflict(f"{final} is complete and another save; it stays: name another folder")
        coming = folder / f".pull-{manifest['save_id']}-{name}"
        for stale in folder.glob(".pull-*"):
            match = re.fullmatch(r"\.pull-[0-9a-f]{8,64}-(.+)", stale.name)
            if stale != coming and match and local.parse(match[1]):
                files.remove(stale)
        coming.mkdir(exist_ok=True)
        todo = {coming / f: obj for f, obj in listed(manifest, objects).items() if not (coming / f).exists()}
        gcs.check_space(folder, todo)
        gcs.in_parallel(
            lambda path, progress: place.bucket.download(todo[path], path, progress),
            sorted(todo, key=lambda path: -todo[path].size), 2 * STREAMS, sum(obj.size for obj in todo.values()),
        )  # fmt: skip
        (coming / MANIFEST).unlink(missing_ok=True)
        atomic.put(coming, final, manifest["save_id"], there[name].content)
    return final


def compare_bytes(place: Place, remote: Remote, objects: dict[str, gcs.Object]) -> str:
    """Read every byte of a complete checkpoint and compare it with the manifest; what differs, or ""."""
    there, problems = listed(remote.manifest, objects), []

    def read(file: str, progress: gcs.Progress) -> None:
        if place.bucket.sha256(there[file], progress) != remote.manifest["files"][file]["sha256"]:
            problems.append(f"{place.bucket.url(there[file].name)} is damaged: its SHA-256 differs")

    gcs.in_parallel(read, sorted(there), STREAMS, sum(obj.size for obj in there.values()))
    return min(problems, default="")


def prune(place: Place, keep: int, keep_every: int, damaged: bool = False) -> list[str]:
    """Delete complete checkpoints that are not retained, damaged ones that are older, and old parts of broken uploads.

    Damaged ones that may be newer than the newest complete one, and those of keep_every, go only with damaged=True.
    What is not known to be ours stays. Returns a line for each thing that was done or left.
    """
    objects = place.objects()
    remotes = place.checkpoints(objects)
    good = [remote.manifest for remote in remotes if not remote.problem]
    kept = selection.retained(good, keep, keep_every)
    newest = max(map(selection.key, good), default=None)

    def goes(remote: Remote) -> bool:
        if not remote.problem:
            return remote.name not in kept
        if not remote.manifest or newest is None:
            return False
        surplus = not (keep_every and remote.manifest["step"] % keep_every == 0)
        return damaged or selection.key(remote.manifest) < newest and surplus

    done = []
    for remote in remotes:
        if goes(remote):
            delete(place, remote, objects)
            done.append(f"deleted {place}/{remote.name}")
        elif remote.problem:
            done.append(f"left {place}/{remote.name}: {remote.problem}")
    # Data that no manifest speaks for: of an upload that was cut off, or left by a delete that was.
    saves = {remote.name: remote.manifest["save_id"] for remote in remotes if remote.manifest}
    for path, obj in objects.items():
        name, _, rest = path.partition("/")
        part = local.parse(name) and UPLOADED.fullmatch(rest)
        unread = name not in saves and f"{name}/{MANIFEST}" in objects
        if part and not unread and part[1] != saves.get(name) and time.time() - obj.updated > ORPHAN_SECONDS:
            place.bucket.delete(obj.name, obj.generation)
            done.append(f"deleted {place}/{path}, part of an upload that was never finished")
    return done + [f"left {stranger}: {STRANGE}" for stranger in place.strangers(objects, remotes).values()]


def open_url(url: str) -> tuple[Place, str]:
    """(the place, the checkpoint's name or "") of gs://BUCKET/PREFIX[/CHECKPOINT]."""
    bucket, prefix = gcs.split(url)
    parent, _, last = prefix.rpartition("/")
    name = last if local.parse(last) else ""
    return Place(gcs.Bucket(bucket), parent if name else prefix), name


def pull(url: str, folder: Path | None = None) -> Path:
    """The checkpoint that a URL names, else the newest complete one there, in folder or below out/pulled; its path."""
    place, name = open_url(url)
    if not name:
        good = [remote.name for remote in place.checkpoints(place.objects()) if not remote.problem]
        if not good:
            raise CheckpointError(f"{place} has no complete checkpoint")
        name = good[0]
    return fetch(place, name, folder or Path("out/pulled", str(place).removeprefix("gs://")), keep=folder is not None)
