"""Whole tensors from safetensors files, one at a time: a checkpoint's, whichever layout wrote it, or any other folder's."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from refocused.checkpoint import tensors
from refocused.checkpoint.manifest import CheckpointError

# what a value of another type or size than meant comes to, somewhere between json and its use
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Weights:
    """{name: tensor}, read when it is asked for; name() says what a key of the files stands for, None for nothing."""

    def __init__(self, path: Path, files: list[Path], name: Callable[[str], str | None]):
        self.path = path
        self.parts: dict[str, list[tensors.Part]] = {}
        for file in files:
            for key, part in tensors.parts_in(file).items():
                if (ours := name(key)) is not None:
                    self.parts.setdefault(ours, []).append(part)

    def size(self, name: str) -> tuple[int, ...]:
        return tensors.whole_size(self.parts[name])

    def check(self, model: nn.Module) -> None:
        """Raise CheckpointError unless the parameters are the model's, each of its shape, whole and a number."""
        wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, parts in self.parts.items():
            key, size = parts[0].key, self.size(name)
            if name not in wanted:
                raise CheckpointError(f"{self.path} has {key} {list(size)}, which this model does not")
            if size != wanted[name]:
                raise CheckpointError(f"{self.path}: {key} is {list(size)}, {list(wanted[name])} by the config")
            tensors.check_cover(parts, size)
        if missing := sorted(wanted.keys() - self.parts.keys()):
            raise CheckpointError(f"{self.path} lacks {', '.join(missing[:4])}{' ...' * (len(missing) > 4)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __getitem__(self, name: str) -> Tensor:
        first, *others = self.parts[name]
        if not others:
            return first.read()
        whole = torch.empty(self.size(name), dtype=first.dtype)
        for part in (first, *others):
            part.copy_to(whole, [0] * whole.ndim)
        return whole

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Copy them into the model, which has passed check. Raises CheckpointError."""
        for name, p in model.named_parameters():
            t = self[name]
            if not t.is_floating_point():
                raise CheckpointError(f"{self.path}: {name} is of {t.dtype}: quantized weights cannot be trained")
            p.copy_(t)
