"""The mean of several checkpoints' weights, without their optimizers: `python ckpt.py average`.

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
from refocused.checkpoint.source import Source
from refocused.commands.export import check_free, coming
from refocused.shards import tokenizers

KEPT = ("tokens", "imported_from", "eos_token_id")  # of the newest one's state


@dataclasses.dataclass
class Mean:
    """{key: the weighted mean of a parameter}, made when it is asked for: one tensor of one checkpoint at a time."""

    members: list[dict[str, list[tensors.Part]]]
    weights: list[float]

    def __getitem__(self, key: str) -> Tensor:
        # in fp64, so that the mean of equals is what they are
        total = torch.zeros((), dtype=torch.float64)
        for member, weight in zip(self.members, self.weights, strict=True):
            total = total + tensors.whole(member[key]).double() * weight
        return (total / math.fsum(self.weights)).float()


def average(sources: list[Source], weights: list[float], out: Path) -> Path:
    """Write the weighted mean as a checkpoint below `out`; its path. The rest is taken from the one of the highest step.

    Raises ConfigError, CheckpointError.
    """
    newest = max(sources, key=lambda source: source.state["step"])
    with torch.device("meta"):
        model = GPTNeoX(newest.cfg)
    tree = tensors.state_tree(model)
    for source in sources:
        way = f"{newest.path} and it have no mean"
        check_same_model(str(source.path), vars(source.cfg), newest.cfg, MODEL, way)
    mean = Mean([tensors.fitting_parts(source.path, tree) for source in sources], weights)
    name = newest.path.name if manifest.parse(newest.path.name) else manifest.name(0, newest.state["step"], 0)
    state = {
        "step": newest.state["step"],
        **{str(key): newest.state[key] for key in KEPT if key in newest.state},
        "trained_on": newest.trained_on,
        "averaged": [[str(source.path), weight] for source, weight in zip(sources, weights, strict=True)],
        "config": dataclasses.asdict(newest.cfg),
    }
    names = (tokenizers.FILE, tokenizers.SETTINGS)
    files = {name: (newest.path / name).read_bytes() for name in names if (newest.path / name).is_file()}
    tensors.save_alone(out / name, tree, state, mean, files)
    return out / name


def main(argv: list[str]) -> int:
    """ckpt.py average. Raises ConfigError, CheckpointError, BucketError."""
    parser = argparse.ArgumentParser(prog="ckpt.py average", description="The mean of checkpoints' weights.")
    place = "at least two: a checkpoint, a folder of checkpoints (the last one), or gs://..."
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help=place)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, for init_from=OUT, export and eval")
    parser.add_argument("--weights", help="one number for each checkpoint, as 1,2,3 (default: all the same)")
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
    with coming(args.out) as folder:
        made = average(sources, weights, folder)
        for source in sources:
            manifest.check_unchanged(source.path)
    print(f"{len(sources)} checkpoints -> {args.out.absolute() / made.name}")
    return 0
