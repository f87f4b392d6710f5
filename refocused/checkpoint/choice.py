"""Which checkpoint a run starts from."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from configs import ConfigError
from refocused.checkpoint import manifest, order
from refocused.checkpoint.manifest import CheckpointError, names, read_state
from refocused.entry import here


class Choice(NamedTuple):
    path: Path | None  # None: a fresh run
    state: dict[str, Any]  # the checkpoint's state.json
    passed_over: list[tuple[str, str]]  # newer checkpoints that cannot be loaded: (name, reason)
    save_id: str = ""

    @property
    def name(self) -> str | None:
        return self.path.name if self.path else None


def choose(output_dir: str | os.PathLike, resume: str | None) -> Choice:
    """Which checkpoint a run starts from; what it returns is verified, hash by hash.

    resume is None, "latest" (what was saved last), a checkpoint's name in output_dir, or a path. Raises CheckpointError,
    or ConfigError if resume is None although there are checkpoints. Rank 0 chooses for all.
    """
    ours, others = manifest.read_manifests(output_dir)
    there = [*others, *(m["name"] for m in order.newest_first(ours))]  # so a search meets and names what cannot be read
    listing = f"{output_dir} has {', '.join(there)}" if there else f"{output_dir} has no checkpoints"
    if resume is None:
        if ours:
            raise ConfigError(
                f"output_dir={output_dir} already has {len(ours)} checkpoint{'s' * (len(ours) > 1)}, the last one "
                f"{there[len(others)]}; continue with resume=latest or start afresh in another output_dir"
            )
        if others:
            raise ConfigError(
                f"{listing}, which this program cannot read: damaged, or another program's. It leaves them as they are; choose "
                f"another output_dir. `{here('python ckpt.py import FOLDER OUT')}` takes over a model's weights"
            )
        return Choice(None, {}, [])
    if resume != "latest":
        path = Path(output_dir, resume)  # an absolute path stays itself
        if not os.path.isdir(path):
            path = Path(resume)
        try:
            if not os.path.isdir(path):
                raise CheckpointError(f"no such directory, neither in {output_dir} nor as a path")
            if inside := names(path):
                raise CheckpointError(
                    f"a folder of checkpoints; name one, {path / inside[0]}, or set output_dir={path}"
                )
            return _chosen(path, [])
        except CheckpointError as error:
            raise CheckpointError(f"resume={resume}: {error}; {listing}") from error
    passed_over: list[tuple[str, str]] = []
    for candidate in there:
        try:
            return _chosen(Path(output_dir, candidate), passed_over)
        except CheckpointError as error:
            passed_over.append((candidate, str(error)))
    if passed_over:
        reasons = "".join(f"\n  {reason}" for _, reason in passed_over)
        raise CheckpointError(f"resume=latest: no checkpoint in {output_dir} can be loaded:{reasons}")
    return Choice(None, {}, [])


def _chosen(path: Path, passed_over: list[tuple[str, str]]) -> Choice:
    state = read_state(path)
    if isinstance(loss := state.get("loss"), float) and not math.isfinite(loss):
        raise CheckpointError(f"{path} was saved while the loss was not finite: nothing good can start from it")
    return Choice(path, state, passed_over, manifest.read_manifest(path)["save_id"])
