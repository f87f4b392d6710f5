"""What the start of a run needs from its bucket: the checkpoint to go on from, its logs, and parts that nodes have."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from configs import Config, ConfigError
from refocused.bucket import gcs, history
from refocused.bucket.remote import Place, fetch, present, publish
from refocused.checkpoint import manifest as local
from refocused.checkpoint import selection
from refocused.checkpoint.manifest import STATE, CheckpointError


class Found(NamedTuple):
    """A checkpoint that is to come down before training starts."""

    name: str
    save_id: str


def find(cfg: Config) -> Found | None:
    """What cfg.resume needs from the bucket; None if what is on disk is as good, or there is nothing anywhere.

    To be called on rank 0, before selection.choose. Raises ConfigError if a run of its own would begin among the bucket's
    checkpoints, CheckpointError if the one named is nowhere, and BucketError if the bucket cannot be read.
    """
    place = Place.of(cfg)
    objects = place.objects()
    there = {remote.name: remote for remote in place.checkpoints(objects)}
    readable, broken = local.read_manifests(cfg.output_dir)
    here = {*broken, *(m["name"] for m in readable)}
    known = [remote.manifest for remote in there.values() if remote.manifest] + readable
    latest = {m["name"]: m for m in sorted(known, key=selection.key)}  # of two saves of a name the later one
    unreadable = [name for name in dict.fromkeys([*broken, *there]) if name not in latest]
    both = unreadable + [m["name"] for m in selection.newest_first(latest.values())]
    elsewhere = os.sep in (cfg.resume or "")
    if cfg.resume is None or elsewhere:
        own = elsewhere and Path(str(cfg.resume)).absolute().parent.resolve() == Path(cfg.output_dir).resolve()
        if there and not here and not own:  # what it saves would stand for the run that is there
            raise ConfigError(
                f"{place} already has {len(there)} checkpoint{'s' * (len(there) > 1)}, the last one {both[0]}, and this "
                "would begin another run there; continue with resume=latest or choose another checkpoint_bucket_path"
            )
        return None
    if cfg.resume != "latest":
        if cfg.resume not in both:
            raise CheckpointError(
                f"resume={cfg.resume} is neither in {cfg.output_dir} nor in {place}; there are "
                f"{', '.join(both) or 'no checkpoints'}"
            )
        both = [cfg.resume]
    problems: list[str] = []
    for name in both:
        mine, remote, passed = None, there.get(name), problems.copy()
        if name in here:
            try:
                mine = local.verify(Path(cfg.output_dir, name))
            except CheckpointError as error:
                problems.append(str(error))
        if remote and remote.problem:
            problems.append(remote.problem)
        elif remote and (mine is None or selection.key(mine) < selection.key(remote.manifest)):
            if passed:
                print("passed over:", *passed, sep="\n  ", file=sys.stderr)
            return Found(name, remote.manifest["save_id"])
        if mine:
            return None  # selection.choose names what it passes over
    if problems:
        raise CheckpointError("\n  ".join([f"resume={cfg.resume}: no checkpoint can be loaded:", *problems]))
    if strangers := place.strangers(objects, []):
        raise CheckpointError(
            f"resume=latest: {place} has no checkpoint of this trainer, but another system's: {strangers[0]}"
            f"{f' and {len(strangers) - 1} more' * (len(strangers) > 1)}; take its weights with `ckpt.py import`, or begin "
            "without resume, or choose another checkpoint_bucket_path"
        )
    return None


def bring_together(cfg: Config, on_each_node: Callable[..., list[Any]]) -> str:
    """Publish the last save of which each node has a part, if it never came to the bucket: only there it is whole.

    Collective, by processes.on_each_node. Returns a line to print, or "". Raises BucketError.
    """
    saves = {save["save_id"]: save for found in on_each_node(in_parts, cfg) for save in found or ()}
    said = ""
    for save in sorted(saves.values(), key=selection.key, reverse=True):
        parts = on_each_node(part, cfg, save)
        if {file for files in parts for file in files or ()} != save["files"].keys():
            continue
        problems = [w for commit in (False, True) for w in on_each_node(send_part, cfg, save, commit) if w]
        said = f"each node has a part of {save['name']}: sent to the bucket{', in vain: ' * bool(problems)}"
        said += "; ".join(dict.fromkeys(problems))
        if not problems:
            break
    return said


def in_parts(cfg: Config) -> list[dict[str, Any]]:
    """Manifests of saves of which this disk has a part, later than all that are complete in the bucket.

    A run of several nodes that was killed before the upload leaves such. Raises BucketError.
    """
    place = Place.of(cfg)
    there = [selection.key(r.manifest) for r in place.checkpoints(place.objects()) if not r.problem]
    mine = [m for m in local.read_manifests(cfg.output_dir)[0] if cfg.resume in ("latest", m["name"])]
    return [m for m in mine if selection.key(m) > max(there, default=(-1,)) and len(part(cfg, m)) < len(m["files"])]


def part(cfg: Config, manifest: dict[str, Any]) -> set[str]:
    """The files of that save that this disk can give; none of another save, or of one that was to go to another place."""
    folder = Path(cfg.output_dir, manifest["name"])
    try:
        if local.read_manifest(folder) != manifest or not local.is_whole(folder, manifest):
            return set()
        here = present(manifest, folder.parent)
        state = local.decode_state((folder / STATE).read_bytes(), folder / STATE) if STATE in here else {}
    except (CheckpointError, OSError):
        return set()
    mine, saved = vars(cfg), state.get("config", {})
    return here if all(saved.get(k, mine[k]) == mine[k] for k in ("bucket_name", "checkpoint_bucket_path")) else set()


def send_part(cfg: Config, manifest: dict[str, Any], commit: bool) -> str:
    """Publish what is on this disk of a save, with commit=True its manifest; why that did not succeed, or ""."""
    if not part(cfg, manifest):
        return ""
    try:
        done = publish(Place.of(cfg), Path(cfg.output_dir, manifest["name"]), commit=commit, replace=True)
    except (gcs.BucketError, OSError) as error:
        return str(error)
    return "" if done or not commit else "the bucket does not show what was sent"


def generation(cfg: Config) -> int:
    """The highest generation of any save in the bucket, complete or not; 0 if there is none. Raises BucketError."""
    place = Place.of(cfg)
    return max((r.manifest["generation"] for r in place.checkpoints(place.objects()) if r.manifest), default=0)


def pull(cfg: Config, found: Found) -> Path:
    """Bring that save, by its name and save_id, into output_dir, on one process of each node. Returns its folder."""
    # nodes can share the folder: one fetches, the others find it there
    return fetch(Place.of(cfg), found.name, Path(cfg.output_dir), found.save_id, wait=True)


def read_starts(cfg: Config) -> bytes:
    """What the machine before counted (preflight.Starts); b"" if it counted nothing, or the bucket does not answer."""
    with contextlib.suppress(gcs.BucketError):
        bucket, name = _starts(cfg)
        return (bucket.read(name) or (b"", 0))[0]
    return b""


def write_starts(cfg: Config, content: bytes) -> None:
    """The same for the machine that comes next. Nothing waits for a bucket that does not answer."""
    with contextlib.suppress(gcs.BucketError):
        bucket, name = _starts(cfg)
        bucket.create(name, content, (bucket.read(name) or (b"", 0))[1])


def _starts(cfg: Config) -> tuple[gcs.Bucket, str]:
    place = Place(gcs.Bucket(str(cfg.bucket_name), patience=5, timeout=5), cfg.checkpoint_bucket_path)
    return place.bucket, place.name(history.LOGS, ".starts")


def restore_logs(cfg: Config) -> str:
    """Bring trace and curves of earlier starts to a machine that has none; a line to print. Never raises for them."""
    try:
        return history.fetch(Place.of(cfg, history.PATIENCE), Path(cfg.logging_dir))
    except (gcs.BucketError, OSError) as error:
        return f"logs      of earlier starts stay in the bucket: {error}"
