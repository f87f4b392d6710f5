"""What the start of a run needs from its bucket: the checkpoint to go on from, its logs, and parts that nodes have."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import Config
from refocused.bucket import gcs, history
from refocused.bucket.remote import Place, fetch, present, publish
from refocused.checkpoint import manifest as local
from refocused.checkpoint import selection
from refocused.checkpoint.manifest import STATE, CheckpointError


def choose(cfg: Config) -> selection.Choice:
    """Which checkpoint, on disk or in the bucket, a run starts from; as selection.choose. Raises BucketError, too."""
    place = Place.of(cfg)
    objects = place.objects()
    choice = selection.choose(cfg.output_dir, cfg.resume, str(place), place.checkpoints(objects))
    if cfg.resume == "latest" and not choice.path and (strangers := [*place.strangers(objects, []).values()]):
        raise CheckpointError(
            f"resume=latest: {place} has no checkpoint of this trainer, but another system's: {strangers[0]}"
            f"{f' and {len(strangers) - 1} more' * (len(strangers) > 1)}; take its weights with `ckpt.py import`, or begin "
            "without resume, or choose another checkpoint_bucket_path"
        )
    return choice


def bring_together(cfg: Config, on_each_node: Callable[..., list[Any]]) -> str:
    """Publish the last save of which each node has a part, if it never came to the bucket: only there it is whole.

    Collective, by processes.on_each_node. Returns a line to print, or "". Raises BucketError.
    """
    parts = [part for found in on_each_node(in_parts, cfg) for part in found or ()]
    said = ""
    for save in sorted({m["save_id"]: m for m, _ in parts}.values(), key=selection.key, reverse=True):
        if set().union(*(files for manifest, files in parts if manifest == save)) == save["files"].keys():
            problems = [w for commit in (False, True) for w in on_each_node(send_part, cfg, save, commit) if w]
            said = f"each node has a part of {save['name']}: sent to the bucket{', in vain: ' * bool(problems)}"
            said += "; ".join(dict.fromkeys(problems))
            if not problems:
                break
    return said


def in_parts(cfg: Config) -> list[tuple[dict[str, Any], set[str]]]:
    """Saves of which this disk has a part, later than all that are complete in the bucket: (manifest, files here).

    A run of several nodes that was killed before the upload leaves such. What is damaged, or was to go to another
    place, does not count. Raises BucketError.
    """
    found = []
    for manifest in local.read_manifests(cfg.output_dir)[0]:
        folder, here = Path(cfg.output_dir, manifest["name"]), present(manifest, cfg.output_dir)
        wanted = cfg.resume == "latest" or Path(cfg.resume or "").name == folder.name
        if not wanted or len(here) == len(manifest["files"]):
            continue
        try:
            state = local.decode_state((folder / STATE).read_bytes(), folder / STATE) if STATE in here else {}
        except (CheckpointError, OSError):
            continue
        mine, saved = vars(cfg), state.get("config", {})
        same = all(saved.get(k, mine[k]) == mine[k] for k in ("bucket_name", "checkpoint_bucket_path"))
        if same and local.is_whole(folder, manifest):
            found.append((manifest, here))
    if not found:  # as on most starts: the bucket need not be listed
        return []
    place = Place.of(cfg)
    there = [selection.key(r.manifest) for r in place.checkpoints(place.objects()) if not r.problem]
    return [(manifest, here) for manifest, here in found if selection.key(manifest) > max(there, default=(-1,))]


def send_part(cfg: Config, manifest: dict[str, Any], commit: bool) -> str:
    """Publish what is on this disk of a save, with commit=True its manifest; why that did not succeed, or ""."""
    try:
        if local.read_manifest(Path(cfg.output_dir, manifest["name"])) != manifest:
            return ""
        done = publish(Place.of(cfg), Path(cfg.output_dir, manifest["name"]), commit=commit, replace=True)
    except CheckpointError:  # there is no part of it here
        return ""
    except (gcs.BucketError, OSError) as error:
        return str(error)
    return "" if done or not commit else "the bucket does not show what was sent"


def generation(cfg: Config, unavailable: int | None = None) -> int:
    """The highest generation of any save in the bucket, complete or not; 0 if there is none. Raises BucketError.

    unavailable: what stands for it while the bucket does not answer; None raises.
    """
    try:
        place = Place.of(cfg)
        return max((r.manifest["generation"] for r in place.checkpoints(place.objects()) if r.manifest), default=0)
    except gcs.Unavailable:
        if unavailable is None:
            raise
        return unavailable


def pull(cfg: Config, found: selection.Choice) -> Path:
    """Bring that save into output_dir, on one process of each node: where they share it, one fetches. Its folder."""
    assert found.name
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
