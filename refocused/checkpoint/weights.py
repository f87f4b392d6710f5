"""Whole tensors from safetensors files, one at a time: a checkpoint's, whichever layout wrote it, or any other folder's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from refocused.checkpoint import tensors
from refocused.checkpoint.manifest import CheckpointError

# what a value of another type or size than meant comes to, somewhere between json and its use
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Part(NamedTuple):
    """What one file has of a tensor."""

    file: tensors.File
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def read(self) -> Tensor:
        return self.file.read(self.key)


class Weights:
    """{name: tensor}, read when it is asked for; name() says what a key of the files stands for, None for nothing."""

    def __init__(self, path: Path, files: list[Path], name: Callable[[str], str | None]):
        self.path = path
        self.parts: dict[str, list[Part]] = {}
        for file in files:
            try:
                opened = tensors.File(file)
                offsets = json.loads(opened.note.get("DCP_SHARDING_INFO", "{}"))
                for key, (_, sizes, _) in opened.tensors.items():
                    if (ours := name(key)) is not None:
                        at = offsets[key]["saved_offsets"] if offsets else [0] * len(sizes)
                        self.parts.setdefault(ours, []).append(Part(opened, key, tuple(at), sizes))
            except CheckpointError:
                raise
            except MALFORMED as error:
                raise CheckpointError(f"{file} is damaged: {error}") from error

    def size(self, name: str) -> tuple[int, ...]:
        parts = [[a + n for a, n in zip(part.offsets, part.sizes, strict=True)] for part in self.parts[name]]
        return tuple(map(max, *parts)) if len(parts) > 1 else tuple(parts[0])

    def check(self, model: nn.Module) -> None:
        """Raise CheckpointError unless the parameters are the model's, each of its shape, whole and a number."""
        wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, parts in self.parts.items():
            key, size = parts[0].key, self.size(name)
            if name not in wanted:
                raise CheckpointError(f"{self.path} has {key} {list(size)}, which this model does not")
            if size != wanted[name]:
                raise CheckpointError(f"{self.path}: {key} is {list(size)}, {list(wanted[name])} by the config")
            tensors.check_cover(self.path, key, size, [(part.offsets, part.sizes) for part in parts])
        if missing := sorted(wanted.keys() - self.parts.keys()):
            raise CheckpointError(f"{self.path} lacks {', '.join(missing[:4])}{' ...' * (len(missing) > 4)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __getitem__(self, name: str) -> Tensor:
        first, *others = self.parts[name]
        if not others:
            return first.read()
        t = first.read()
        whole = torch.empty(self.size(name), dtype=t.dtype)
        for part in (first, *others):
            whole[tuple(slice(at, at + n) for at, n in zip(part.offsets, part.sizes, strict=True))] = part.read()
        return whole

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Copy them into the model, which has passed check. Raises CheckpointError."""
        for name, p in model.named_parameters():
            t = self[name]
            if not t.is_floating_point():
                raise CheckpointError(f"{self.path}: {name} is of {t.dtype}: quantized weights cannot be trained")
            p.copy_(t)
