"""The mean of several checkpoints' weights, without their optimizers.

python ckpt.py average CHECKPOINT CHECKPOINT ... OUT [--weights 1,2,3]

Averaging the last checkpoints of a run stands in for part of its decay (Izmailov et al. 2018, arXiv:1803.05407).
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import ckpt
from configs import ConfigError
from refocused.checkpoint import manifest, tensors
from refocused.checkpoint.folder import FUNCTION, Source
from refocused.checkpoint.manifest import CheckpointError
from refocused.commands.export import check_free, coming
from refocused.entry import here
from refocused.shards import tokenizers

KEPT = ("tokens", "imported_from", "eos_token_id")  # of the newest one's state


class Weights:
    """A verified checkpoint's parameters, one at a time, whichever layout wrote them."""

    def __init__(self, path: Path):
        metadata = dcp.HuggingFaceStorageReader(str(path)).read_metadata()
        self.path = path
        self.there = {
            key: (tuple(saved.size), saved.properties.dtype)
            for key, saved in metadata.state_dict_metadata.items()
            if key.startswith("model.") and isinstance(saved, TensorStorageMetadata)
        }
        for key, saved in tensors.read_metadata(path).items():
            tensors.check_cover(path, key, saved)
        self.parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {key: [] for key in self.there}
        for index, place in metadata.storage_data.items():
            if index.fqn in self.parts:
                self.parts[index.fqn].append((place.relative_path, tuple(index.offset)))

    def read(self, key: str) -> Tensor:
        size, dtype = self.there[key]
        whole = torch.empty(size, dtype=dtype)
        for file, offset in self.parts[key]:
            with safe_open(self.path / file, "pt") as opened:
                part = opened.get_tensor(key)
            whole[tuple(slice(at, at + n) for at, n in zip(offset, part.shape, strict=True))] = part
        return whole


class Mean:
    """{key: the weighted mean of a parameter}, made when it is asked for: one tensor of one checkpoint at a time."""

    def __init__(self, members: list[Weights], weights: list[float]):
        self.members, self.weights = members, weights

    def __getitem__(self, key: str) -> Tensor:
        total = torch.zeros(self.members[0].there[key][0], dtype=torch.float64)  # the mean of equals is what they are
        for member, weight in zip(self.members, self.weights, strict=True):
            total.add_(member.read(key), alpha=weight)
        return total.div_(math.fsum(self.weights)).to(self.members[0].there[key][1])


def average(sources: list[Source], weights: list[float], out: Path) -> Path:
    """Write the weighted mean into a checkpoint below `out`, as of the highest step among them; its path.

    Holds one file's worth of the result and one tensor of one checkpoint. Raises ConfigError, CheckpointError.
    """
    newest = max(sources, key=lambda source: source.state["step"])
    members = [Weights(source.path) for source in sources]
    for source, member in zip(sources, members, strict=True):
        for key in FUNCTION:
            if (a := getattr(source.cfg, key)) != (b := getattr(newest.cfg, key)):
                raise ConfigError(f"{source.path} has {key}={a}, {newest.path} {key}={b}: no mean of different models")
        if member.there != members[0].there:
            difference = tensors.differences(members[0].there, member.there)
            raise CheckpointError(f"{source.path} (here) and {sources[0].path} (there) differ: {difference}")
    known = manifest.parse(newest.path.name)
    final = out.absolute() / (newest.path.name if known else manifest.name(0, newest.state["step"], 0))
    state = {
        "step": newest.state["step"],
        **{str(key): newest.state[key] for key in KEPT if key in newest.state},
        "trained_on": newest.trained_on,
        "averaged": [[str(source.path), weight] for source, weight in zip(sources, weights, strict=True)],
        "config": dataclasses.asdict(newest.cfg),
        "run": {"torch": torch.__version__},
    }
    shapes = {key: torch.empty(size, dtype=dtype, device="meta") for key, (size, dtype) in members[0].there.items()}
    names = (tokenizers.FILE, tokenizers.SETTINGS)
    files = {name: (newest.path / name).read_bytes() for name in names if (newest.path / name).is_file()}
    tensors.save_alone(final, shapes, state, Mean(members, weights), files)
    return final


def main(argv: list[str]) -> int:
    """ckpt.py average. Raises ConfigError, CheckpointError, BucketError."""
    parser = argparse.ArgumentParser(prog="ckpt.py average", description="The mean of checkpoints' weights.")
    place = "at least two: a checkpoint, a folder of them (the last), or gs://..."
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help=place)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, for init_from=OUT, export and eval")
    parser.add_argument("--weights", help="one number for each, as 1,2,3; all alike unless given")
    args = parser.parse_args(argv)
    check_free(args.out)
    try:
        weights = [float(word) for word in args.weights.split(",")] if args.weights else [1.0] * len(args.checkpoints)
    except ValueError:
        weights = []
    if len(weights) != len(args.checkpoints) or not 0 < sum(weights) < math.inf or min(weights) < 0:
        raise ConfigError(
            f"--weights={args.weights}: {len(args.checkpoints)} checkpoints need as many numbers, none negative, not all 0"
        )
    if len(weights) < 2:
        raise ConfigError("the mean of one checkpoint is that checkpoint; name at least two, and OUT behind them")
    sources = [ckpt.find(checkpoint) for checkpoint in args.checkpoints]
    for source in sources:
        if source.is_hf:
            way = here(f"python ckpt.py import {source.path} OUT")
            raise ConfigError(f"{source.path} is a Hugging Face folder; first: `{way}`")
    with coming(args.out) as folder:
        made = average(sources, weights, folder)
        for source in sources:
            manifest.check_unchanged(source.path)
    print(f"{len(sources)} checkpoints -> {args.out.absolute() / made.name}")
    return 0
