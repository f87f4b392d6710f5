"""The mean of several checkpoints' weights, without their optimizers: `python ckpt.py average`.

python ckpt.py average CHECKPOINT CHECKPOINT ... OUT

Averaging the last checkpoints of a run stands in for part of its decay (Izmailov et al. 2018, arXiv:1803.05407).
"""

import argparse
import dataclasses
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
    """{key: the mean of a parameter}, made when it is asked for: one tensor of one checkpoint at a time."""

    members: list[dict[str, list[tensors.Part]]]

    def __getitem__(self, key: str) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)  # so that the mean of equals is what they are
        for member in self.members:
            total = total + tensors.whole(member[key]).double()
        return (total / len(self.members)).float()


def average(sources: list[Source], out: Path) -> Path:
    """Write the mean as a checkpoint below `out`; its path. The rest is taken from the one of the highest step.

    Raises ConfigError, CheckpointError.
    """
    newest = max(sources, key=lambda source: source.state["step"])
    with torch.device("meta"):
        model = GPTNeoX(newest.cfg)
    tree = tensors.state_tree(model)
    for source in sources:
        way = f"{newest.path} and it have no mean"
        check_same_model(str(source.path), vars(source.cfg), newest.cfg, MODEL, way)
    mean = Mean([tensors.fitting_parts(source.path, tree) for source in sources])
    name = newest.path.name if manifest.parse(newest.path.name) else manifest.name(0, newest.state["step"], 0)
    state = {
        "step": newest.state["step"],
        **{str(key): newest.state[key] for key in KEPT if key in newest.state},
        "trained_on": newest.trained_on,
        "averaged": [str(source.path) for source in sources],
        "config": dataclasses.asdict(newest.cfg),
    }
    names = (tokenizers.FILE, tokenizers.SETTINGS)
    files = {name: (newest.path / name).read_bytes() for name in names if (newest.path / name).is_file()}
    tensors.save_alone(out / name, tree, state, mean, files)
    return out / name


def main(argv: list[str]) -> int:
    """ckpt.py average. Raises ConfigError, CheckpointError, BucketError."""
    parser = argparse.ArgumentParser(prog="ckpt.py average", description="The mean of checkpoints' weights.")
    place = "a checkpoint, a folder of checkpoints (the last one), or gs://...; named twice it counts twice"
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help=place)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, for init_from=OUT, export and eval")
    args = parser.parse_args(argv)
    check_free(args.out)
    if len(args.checkpoints) < 2:
        raise ConfigError("the mean of one checkpoint is that checkpoint; name at least two, and OUT behind them")
    sources = [ckpt.find(checkpoint) for checkpoint in args.checkpoints]
    with coming(args.out) as folder:
        made = average(sources, folder)
        for source in sources:
            manifest.check_unchanged(source.path)
    print(f"{len(sources)} checkpoints -> {args.out.absolute() / made.name}")
    return 0
