"""The mean of several checkpoints' weights, without their optimizers.

python ckpt.py average CHECKPOINT CHECKPOINT ... OUT [--weights 1,2,3]

Averaging the last checkpoints of a run stands in for part of its decay (Izmailov et al. 2018, arXiv:1803.05407).
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

import ckpt
from configs import MODEL, ConfigError, check_same_model
from model import GPTNeoX
from refocused.checkpoint import manifest, tensors
from refocused.checkpoint.folder import Source, weights_of
from refocused.checkpoint.weights import Weights
from refocused.commands.export import check_free, coming
from refocused.entry import here
from refocused.shards import tokenizers

KEPT = ("tokens", "imported_from", "eos_token_id")  # of the newest one's state


class Mean:
    """{key: the weighted mean of a parameter}, made when it is asked for: one tensor of one checkpoint at a time."""

    def __init__(self, members: list[Weights], weights: list[float]):
        self.members, self.weights = members, weights

    def __getitem__(self, key: str) -> Tensor:
        name = key.removeprefix("model.")
        total = torch.zeros(self.members[0].size(name), dtype=torch.float64)  # so the mean of equals is what they are
        for member, weight in zip(self.members, self.weights, strict=True):
            total.add_(member[name], alpha=weight)
        return total.div_(math.fsum(self.weights)).float()


def average(sources: list[Source], weights: list[float], out: Path) -> Path:
    """Write the weighted mean into a checkpoint below `out`, as of the highest step among them; its path.

    Holds one file's worth of the result and one tensor of one checkpoint. Raises ConfigError, CheckpointError.
    """
    newest = max(sources, key=lambda source: source.state["step"])
    with torch.device("meta"):
        model = GPTNeoX(newest.cfg)
    members = [weights_of(source) for source in sources]
    for source, member in zip(sources, members, strict=True):
        way = f"{newest.path} and it have no mean"
        check_same_model(str(source.path), vars(source.cfg), newest.cfg, MODEL, way)
        member.check(model)
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
    names = (tokenizers.FILE, tokenizers.SETTINGS)
    files = {name: (newest.path / name).read_bytes() for name in names if (newest.path / name).is_file()}
    tensors.save_alone(final, tensors.state_tree(model), state, Mean(members, weights), files)
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
