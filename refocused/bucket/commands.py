"""ckpt.py's commands that need no tensors: list, verify, pull, push, prune."""

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from refocused.bucket import gcs
from refocused.bucket.remote import STRANGE, Place, Remote, compare_bytes, listed, open_url, prune, publish, pull
from refocused.checkpoint import manifest as local
from refocused.checkpoint import selection
from refocused.checkpoint.manifest import MANIFEST, STATE, CheckpointError

Json = dict[str, Any]
Read = Callable[[], tuple[Json, Json]]  # the manifest and the state; raises CheckpointError


def list_command(argv: list[str], hashes: bool = False) -> int:
    """Print a table of the checkpoints in folders and buckets; the exit code says whether one is damaged."""
    parser = argparse.ArgumentParser(prog=f"ckpt.py {'verify' if hashes else 'list'}")
    parser.add_argument("places", nargs="+", metavar="DIR_OR_URL")
    places = parser.parse_args(argv).places
    there = [where for where in places if len(places) == 1 or where.startswith("gs://") or Path(where).is_dir()]
    found = [row for where in there for row in rows(where, hashes)]
    if not found:
        print(f"no checkpoints in {' or '.join(places)}")
        return 0
    table = [["name", "step", "tokens", "loss", "size", "age", "where", ""], *(cells for cells, _ in found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *numbers, where, note in table:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:-2], strict=True))]
        cells += [where.ljust(widths[-2])] if len(places) > 1 else []
        print("  ".join([*cells, note]).rstrip())
    return CheckpointError.exit_code if any(damaged for _, damaged in found) else 0


verify_command = functools.partial(list_command, hashes=True)


def pull_command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ckpt.py pull")
    parser.add_argument(
        "url", metavar="gs://BUCKET/PREFIX[/CHECKPOINT]", help="a checkpoint, or a prefix for the last one saved"
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    args = parser.parse_args(argv)
    print(pull(args.url, args.folder))
    return 0


def push_command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ckpt.py push")
    parser.add_argument("folder", metavar="CHECKPOINT_DIR", type=Path)
    parser.add_argument("url", metavar="gs://BUCKET/PREFIX")
    args = parser.parse_args(argv)
    place, _ = open_url(args.url)
    folder = Path(os.path.abspath(args.folder))
    local.verify(folder)
    if not publish(place, folder):
        raise gcs.Unavailable(f"{place}/{folder.name}: the bucket does not show what was sent; try again")
    print(f"{place}/{folder.name}")
    return 0


def prune_command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ckpt.py prune")
    parser.add_argument("url", metavar="gs://BUCKET/PREFIX")
    parser.add_argument(
        "--keep", type=int, default=0, help="how many of the newest complete checkpoints to keep (default: 0, all)"
    )
    parser.add_argument(
        "--keep-every", type=int, default=0, help="keep checkpoints whose step is a multiple of this for ever"
    )
    parser.add_argument("--damaged", action="store_true", help="delete damaged checkpoints too, also newer ones")
    args = parser.parse_args(argv)
    if min(args.keep, args.keep_every) < 0:
        parser.error("--keep and --keep-every must not be negative")
    for line in prune(open_url(args.url)[0], args.keep, args.keep_every, args.damaged):
        print(line)
    return 0


def rows(where: str, hashes: bool) -> Iterator[tuple[list[str], bool]]:
    """(cells, whether it is damaged) for the checkpoints of a folder or bucket, what was saved last first, or for the one
    that `where` names."""
    strangers: dict[str, str] = {}
    if where.startswith("gs://"):
        place, only = open_url(where)
        objects = place.objects()
        remotes = place.checkpoints(objects)
        gone = selection.abandoned(remote.manifest for remote in remotes if remote.manifest)
        reads: dict[str, Read] = {r.name: functools.partial(read_there, place, r, objects, hashes) for r in remotes}
        strangers = place.strangers(objects, remotes)
    else:
        folder, only = Path(where), ""
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a directory")
        alone = [folder] if hashes or (folder / MANIFEST).exists() else []
        gone = selection.abandoned(local.read_manifests(folder)[0])
        paths = [folder / name for name in selection.names(folder)] or alone
        reads = {path.name: functools.partial(local.read, path, hashes) for path in paths}
    note = "verified" if hashes else "complete"
    for name in [name for name in reads if only in ("", name)]:
        try:
            more = ", abandoned: a later save went on from before it" * (name in gone)
            yield row(where, name, note + more, *reads[name]()), False
        except gcs.Gone:  # a run has pruned it since it was listed
            continue
        except CheckpointError as error:
            yield row(where, name, str(error)), True
    for name in [name for name in strangers if only in ("", name)]:
        yield row(where, name, f"{strangers[name]}: {STRANGE}"), name not in reads


def read_there(place: Place, remote: Remote, objects: dict[str, gcs.Object], hashes: bool) -> tuple[Json, Json]:
    if problem := remote.problem or (hashes and compare_bytes(place, remote, objects)):
        raise CheckpointError(problem)
    state = listed(remote.manifest, objects)[STATE]
    return remote.manifest, local.decode_state(place.bucket.content(state), place.bucket.url(state.name))


def row(where: str, name: str, note: str, manifest: Json | None = None, state: Json | None = None) -> list[str]:
    """The cells of list_command's table; "-" for what is not known."""
    step, tokens, loss, size, age = (f"{local.step_of(name):,}" if local.parse(name) else "-"), "-", "-", "-", "-"
    if manifest:
        seconds = max(0, time.time() - manifest["time"])
        unit, length = next(((u, n) for u, n in (("d", 86400), ("h", 3600), ("min", 60)) if seconds >= n), ("s", 1))
        age = f"{seconds / length:.0f} {unit}"
        size = f"{sum(entry['size'] for entry in manifest['files'].values()) / 1e6:,.1f} MB"
    if state:
        tokens = "-" if state.get("tokens") is None else f"{state['tokens']:,}"
        loss = "-" if state.get("loss") is None else f"{state['loss']:.4f}"
    return [name, step, tokens, loss, size, age, where, note]
