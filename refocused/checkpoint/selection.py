"""Which save is the newest, which one a run starts from, which ones stay.

A save's generation is the highest that its run knew of, on disk and in the bucket, plus one. No clock has a say: one
machine's may be a day ahead of the next one's, and a run that went back to an earlier step still has the newest saves.
Of two saves with one generation, made by two machines at once, the higher step is the later one.
"""

import math
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs import ConfigError
from refocused import entry
from refocused.checkpoint import manifest as manifests
from refocused.checkpoint.manifest import CheckpointError, read_manifests, verify

Manifest = dict[str, Any]


def key(manifest: Manifest) -> tuple[int, int, str]:
    """Grows from save to save."""
    return manifest["generation"], manifest["step"], manifest["name"]


def abandoned(manifests: Iterable[Manifest]) -> set[str]:
    """Names of the saves that the run left behind: a later save has the same step or a lower one."""
    gone, lowest = set(), math.inf
    for manifest in sorted(manifests, key=key, reverse=True):
        if manifest["step"] >= lowest:
            gone.add(manifest["name"])
        lowest = min(lowest, manifest["step"])
    return gone


def newest_first(manifests: Iterable[Manifest]) -> list[Manifest]:
    """What was saved last, then what it came from; what was abandoned after all others."""
    manifests = list(manifests)
    gone = abandoned(manifests)
    return sorted(manifests, key=lambda m: (m["name"] not in gone, key(m)), reverse=True)


def retained(manifests: Iterable[Manifest], limit: int, keep_every: int) -> set[str]:
    """Names of those to keep: the first `limit` (0: all), and multiples of keep_every, which do not count."""
    ordered = newest_first(manifests)
    counted = [m["name"] for m in ordered if m is ordered[0] or not (keep_every and m["step"] % keep_every == 0)]
    surplus = set(counted[limit:]) if limit else set()
    return {m["name"] for m in ordered} - surplus


def names(output_dir: str | os.PathLike) -> list[str]:
    """Names of the checkpoint directories: those without a readable manifest, then the others as newest_first has them."""
    readable, broken = read_manifests(output_dir)
    return [*broken, *(m["name"] for m in newest_first(readable))]


class Choice(NamedTuple):
    path: Path | None  # None: a fresh run
    state: dict[str, Any]  # the checkpoint's state.json; {}: it is to come from the bucket
    passed_over: list[tuple[str, str]]  # newer checkpoints that cannot be loaded: (name, reason)
    save_id: str = ""

    @property
    def name(self) -> str | None:
        return self.path.name if self.path else None


def choose(output_dir: str | os.PathLike, resume: str | None, where: str = "", remotes: Sequence[Any] = ()) -> Choice:
    """Which checkpoint a run starts from; what is on the disk is verified, hash by hash.

    resume is None, "latest" (what was saved last), a checkpoint's name in output_dir or in the bucket, or a path.
    remotes: what is in the bucket's place `where`. Rank 0 chooses for all. Raises CheckpointError, or ConfigError if
    resume is None although there are checkpoints.
    """
    ours, others = read_manifests(output_dir)
    here, there = {m["name"]: m for m in ours}, {remote.name: remote for remote in remotes}
    known = sorted([r.manifest for r in remotes if r.manifest] + ours, key=key)
    latest = {m["name"]: m for m in known}  # of two saves of a name the later one
    both = [name for name in dict.fromkeys([*others, *there]) if name not in latest]  # those that cannot be read first
    both += [m["name"] for m in newest_first(latest.values())]
    places = f"{output_dir} or {where}" if where else f"{output_dir}"
    listing = f"{places} has {', '.join(both) or 'no checkpoints'}"
    path = Path(resume or "latest").absolute()
    if path.name != "latest" and path.parent.resolve() == Path(output_dir).resolve():
        resume = path.name  # as good as the path, and the bucket knows it
    elsewhere = os.sep in (resume or "")
    if resume is None and ours:
        raise ConfigError(
            f"output_dir={output_dir} already has {len(ours)} checkpoint{'s' * (len(ours) > 1)}, the last one "
            f"{newest_first(ours)[0]['name']}; continue with resume=latest or start afresh in another output_dir"
        )
    if resume is None and others:
        raise ConfigError(
            f"{listing}, which this program cannot read: damaged, or another program's. They stay as they are; choose "
            f"another output_dir. `{entry.here('python ckpt.py import FOLDER OUT')}` takes over a model's weights"
        )
    if there and not (ours or others) and (resume is None or elsewhere):
        raise ConfigError(  # what it saves would stand for the run that is there
            f"{where} already has {len(there)} checkpoint{'s' * (len(there) > 1)}, the last one {both[0]}, and this "
            "would begin another run there; continue with resume=latest or choose another checkpoint_bucket_path"
        )
    if resume is None:
        return Choice(None, {}, [])
    passed_over: list[tuple[str, str]] = []
    for name in both if resume == "latest" else {resume} & {*both}:
        mine, remote, newer = None, there.get(name), [*passed_over]
        if name in here or name in others:
            try:
                mine = read(Path(output_dir, name), passed_over)
            except CheckpointError as error:
                passed_over.append((name, str(error)))
        if remote and not remote.problem and (not mine or key(here.get(name, remote.manifest)) < key(remote.manifest)):
            return Choice(Path(output_dir, name), {}, newer, remote.manifest["save_id"])
        if mine:
            return mine
        if remote:
            passed_over.append((name, remote.problem))
    reasons = [reason for _, reason in passed_over]
    if resume == "latest":
        if reasons:
            raise CheckpointError("\n  ".join([f"resume=latest: no checkpoint in {places} can be loaded:", *reasons]))
        return Choice(None, {}, [])
    try:
        if reasons:
            raise CheckpointError("; ".join(reasons))
        path = Path(output_dir, resume)  # an absolute path stays itself
        path = path if os.path.isdir(path) else Path(resume)
        if not os.path.isdir(path):
            raise CheckpointError(f"no such directory, neither in {output_dir} nor as a path")
        if inside := names(path):
            raise CheckpointError(f"a folder of checkpoints; name one, {path / inside[0]}, or set output_dir={path}")
        return read(path, [])
    except CheckpointError as error:
        raise CheckpointError(f"resume={resume}: {error}; {listing}") from error


def bring(chosen: Choice, pull: Callable[[Choice], Any] | None = None) -> None:
    """See to it that this node, too, has every byte of what rank 0 has chosen; pull, if given, gets what it lacks.

    Raises CheckpointError if it is missing, damaged or another save here, and nothing brings it.
    """
    try:
        assert chosen.path
        found = verify(chosen.path)["save_id"]
        if found == chosen.save_id:
            return
        problem = f"{chosen.path} is save {found}"
    except CheckpointError as error:
        problem = str(error)
    if not pull:
        raise CheckpointError(
            f"host {socket.gethostname()} lacks the checkpoint that rank 0 loads, save {chosen.save_id}: {problem}; copy it "
            "there, use a disk that all nodes share, or a bucket"
        )
    pull(chosen)


def read(path: Path, passed_over: list[tuple[str, str]]) -> Choice:
    """The checkpoint at a path, verified. Raises CheckpointError."""
    manifest, state = manifests.read(path)
    return Choice(path, state, passed_over, manifest["save_id"])
