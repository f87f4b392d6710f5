"""ckpt.py's commands that need no tensors: list, verify, pull, push, prune."""

import argparse
import functools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from refocused.bucket import gcs
from refocused.bucket.remote import STRANGE, Place, compare_bytes, listed, open_url, prune, publish, pull
from refocused.checkpoint import manifest as local
from refocused.checkpoint import selection
from refocused.checkpoint.manifest import MANIFEST, STATE, CheckpointError


def list_command(argv: list[str], hashes: bool = False) -> int:
    parser = argparse.ArgumentParser(prog=f"ckpt.py {'verify' if hashes else 'list'}")
    parser.add_argument("places", nargs="+", metavar="DIR_OR_URL")
    return show(parser.parse_args(argv).places, hashes)


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
        raise gcs.BucketError(f"{place}/{folder.name}: the bucket does not show what was sent; try again")
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


class Row(NamedTuple):
    """A checkpoint in a listing."""

    name: str
    note: str
    manifest: dict[str, Any] | None = None  # None where there is a problem with it
    state: dict[str, Any] = {}

    def cells(self) -> list[str]:
        """name, step, tokens, loss, size, age"""
        cells = [self.name, f"{local.step_of(self.name):,}" if local.parse(self.name) else "-"]
        for key, form in (("tokens", ",d"), ("loss", ".4f")):
            cells.append("-" if self.state.get(key) is None else format(self.state[key], form))
        if not self.manifest:
            return [*cells, "-", "-"]
        size = sum(entry["size"] for entry in self.manifest["files"].values())
        return [*cells, f"{size / 1e6:,.1f} MB", _age(time.time() - self.manifest["time"])]


def show(places: list[str], hashes: bool) -> int:
    """Print a table of the checkpoints in folders and buckets; the exit code says whether one is damaged."""
    there = [where for where in places if len(places) == 1 or where.startswith("gs://") or Path(where).is_dir()]
    found = [(where, row, damaged) for where in there for row, damaged in rows(where, hashes)]
    if not found:
        print(f"no checkpoints in {' or '.join(places)}")
        return 0
    table = [["name", "step", "tokens", "loss", "size", "age", "where", ""]]
    table += [[*row.cells(), where, row.note] for where, row, _ in found]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *numbers, where, note in table:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:-2], strict=True))]
        cells += [where.ljust(widths[-2])] if len(places) > 1 else []
        print("  ".join([*cells, note]).rstrip())
    return CheckpointError.exit_code if any(damaged for *_, damaged in found) else 0


def rows(where: str, hashes: bool) -> Iterable[tuple[Row, bool]]:
    """(row, whether it is damaged) for the checkpoints of a folder or bucket, what was saved last first, or for the one
    that `where` names."""
    if where.startswith("gs://"):
        yield from rows_there(*open_url(where), hashes)
        return
    folder = Path(where)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory")
    alone = [folder] if hashes or (folder / MANIFEST).exists() else []
    gone = selection.abandoned(local.read_manifests(folder)[0])
    for path in [folder / name for name in selection.names(folder)] or alone:
        try:
            state = local.read_state(path, hashes)
            yield Row(path.name, _note(hashes, path.name in gone), local.read_manifest(path), state), False
        except CheckpointError as error:
            yield Row(path.name, str(error)), True


def rows_there(place: Place, only: str, hashes: bool) -> Iterable[tuple[Row, bool]]:
    objects = place.objects()
    remotes = place.checkpoints(objects)
    gone = selection.abandoned(remote.manifest for remote in remotes if remote.manifest)
    for remote in remotes:
        if only not in ("", remote.name):
            continue
        try:
            if problem := remote.problem or (hashes and compare_bytes(place, remote, objects)):
                raise CheckpointError(problem)
            state = listed(remote.manifest, objects)[STATE]
            decoded = local.decode_state(place.bucket.content(state), place.bucket.url(state.name))
            yield Row(remote.name, _note(hashes, remote.name in gone), remote.manifest, decoded), False
        except gcs.Gone:  # a run has pruned it since it was listed
            continue
        except CheckpointError as error:
            yield Row(remote.name, str(error)), True
    for stranger in place.strangers(objects, remotes):
        name = stranger.removeprefix(f"{place}/").partition("/")[0]
        if only in ("", name):
            yield Row(name, f"{stranger}: {STRANGE}"), name not in {r.name for r in remotes}


def _note(hashes: bool, gone: bool) -> str:
    return ("verified" if hashes else "complete") + ", abandoned: a later save went on from before it" * gone


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
