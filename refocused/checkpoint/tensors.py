"""Tensors to files and back: the live state -> a directory, and back into any strategy and world size.

A rank writes the shards that it holds, and its share of what other ranks hold, too. The files are safetensors: no byte
of them is unpickled. A file's DCP_SHARDING_INFO says where in its tensor each part lies, so that
torch.distributed.checkpoint's HuggingFaceStorageReader reads them, too.
"""

import contextlib
import itertools
import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import _TYPES, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from refocused.checkpoint import atomic, manifest
from refocused.checkpoint.manifest import CheckpointError
from refocused.files import digest, remove, sync, why, widen

FILE_BYTES = 1 << 30  # a data file is closed once it holds this much, so that uploads can run side by side
Tree = dict[str, Tensor]
NOTE = "DCP_SHARDING_INFO"  # in a file's metadata: {name: {"saved_offsets": [...]}}
ADAM = ("exp_avg", "exp_avg_sq")
SLOTS = {"AdamW": ADAM, "HalfAdamW": ADAM, "Muon": ("momentum_buffer",)}  # an optimizer's tensors per parameter


def state_tree(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Tree:
    """Every tensor that cannot be computed, by a flat name; the tensors alias the live ones.

    `model.<parameter>` and `optim.<slot>.<parameter>`, without the prefixes of DDP and torch.compile; a tied parameter
    comes once, a frozen one has no optimizer state. State that the first step would create is created here.
    """
    reshard(model)
    keys: dict[Tensor, str] = {
        p: key.replace("_orig_mod.", "").removeprefix("module.") for key, p in model.named_parameters()
    }
    tree = {f"model.{key}": p.detach() for p, key in keys.items()}
    for optimizer in optimizers:
        create_state(optimizer)
        for p, slots in optimizer.state.items():
            tree |= {f"optim.{slot}.{keys[p]}": value for slot, value in slots.items()}
    return tree


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 keeps whole after a forward without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """What the first step would create, where it is not there yet, of the dtype `moments` of an optimizer that has it."""
    kind, dtype = type(optimizer).__name__, getattr(optimizer, "moments", None)  # None for the parameter's
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and not optimizer.state[p]:
                if SLOTS[kind] == ADAM:  # the fused kernel counts on the device, the others on the CPU
                    device = p.device if group["fused"] else "cpu"
                    optimizer.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for slot in SLOTS[kind]:
                    optimizer.state[p][slot] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def local_part(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def place(t: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of what this rank holds of a tensor."""
    if not isinstance(t, DTensor):
        return (0,) * t.ndim, tuple(t.shape)
    [chunk] = t.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes)


def copies(t: Tensor, rank: int, world: int) -> tuple[int, int]:
    """(how many ranks hold the values that this rank holds, which of them it is)."""
    if not isinstance(t, DTensor):
        return world, rank
    count, number, mesh = 1, 0, t.device_mesh
    for dim, placement in enumerate(t.placements):
        if placement.is_replicate():
            number = number * mesh.size(dim) + mesh.get_local_rank(dim)
            count *= mesh.size(dim)
    return count, number


def own_part(tree: Tree, rank: int, world: int) -> Tree:
    """What this rank writes: each value of the tree is in one rank's part, and the parts are about equal."""
    part: Tree = {}
    loads: dict[int, list[int]] = {}  # by the number of copies: the bytes that each of these ranks writes
    for key, t in sorted(tree.items(), key=lambda item: (-item[1].nbytes, item[0])):
        count, number = copies(t, rank, world)
        load = loads.setdefault(count, [0] * count)
        owner = load.index(min(load))
        load[owner] += t.nbytes
        if owner == number and local_part(t).numel():  # a short tensor leaves the last ranks without rows
            part[key] = t
    return part


def write(folder: Path, rank: int, part: Tree, values: Any, at_a_time: int = 1) -> dict[str, Any]:
    """Write a rank's part of a save, durable when this returns; {file name: {size, crc32c, sha256}}.

    values: what gives a tensor by its name, each once. at_a_time: files, each with its tensors in memory.
    Raises OSError, and CheckpointError at a tensor that no run could go on from.
    """
    with contextlib.suppress(FileExistsError):  # of another rank
        os.mkdir(folder)  # not its parent, should that be gone: it held the lock
    batches: list[Tree] = []
    size = FILE_BYTES
    for key, t in part.items():
        if size >= FILE_BYTES:
            batches.append({})
            size = 0
        batches[-1][key] = t
        size += local_part(t).nbytes
    paths = [folder / f"shard-{rank:05d}-{i:05d}{manifest.SHARD}" for i in range(len(batches))]
    with ThreadPoolExecutor(at_a_time) as pool:
        found = list(pool.map(_write_file, paths, batches, itertools.repeat(values)))
    return {path.name: entry for path, entry in zip(paths, found, strict=True)}


def _write_file(path: Path, part: Tree, values: Any) -> dict[str, Any]:
    batch: Tree = {}
    for key in part:
        t = local_part(values[key])
        if t.numel() and t.is_floating_point():
            least, largest = t.aminmax()  # one pass that needs no memory; a NaN is both
            if not (least.isfinite() and largest.isfinite()):
                raise CheckpointError(f"{key} has values that are not finite")
        batch[key] = t.cpu().contiguous()
    offsets = {key: {"saved_offsets": place(t)[0]} for key, t in part.items()}
    save_file(batch, path, {NOTE: json.dumps(offsets), "format": "pt"})
    widen(path)  # save_file makes it readable by its owner alone
    sync(path)
    return digest(path)


class Part(NamedTuple):
    """What a safetensors file has of a tensor: `sizes` of it from `offsets` on, in the bytes from `begin` on."""

    path: Path
    key: str
    begin: int
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """The tensor, or its rows from `first` to before `last`. Not mapped, as some disks map no file."""
        sizes, begin = self.sizes, self.begin
        if sizes and last is not None:
            begin += first * math.prod(sizes[1:]) * self.dtype.itemsize
            sizes = (last - first, *sizes[1:])
        size = math.prod(sizes) * self.dtype.itemsize
        try:
            content = np.fromfile(self.path, np.uint8, size, offset=begin)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {why(error)}") from error
        if len(content) != size:
            raise CheckpointError(f"{self.path} ends early")
        return torch.from_numpy(content).view(self.dtype).view(sizes)

    def copy_to(self, target: Tensor, at: Sequence[int]) -> None:
        """Copy what it has of the values that belong into `target`, which lies at `at` in the whole tensor."""
        low = [max(pair) for pair in zip(at, self.offsets, strict=True)]
        high = [min(a + n, b + m) for a, n, b, m in zip(at, target.shape, self.offsets, self.sizes, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            t = self.read(low[0] - self.offsets[0], high[0] - self.offsets[0]) if low else self.read()
            for dim in range(1, len(low)):
                t = t.narrow(dim, low[dim] - self.offsets[dim], high[dim] - low[dim])
            target[tuple(slice(a - c, b - c) for a, b, c in zip(low, high, at, strict=True))].copy_(t)


def parts_in(path: Path) -> dict[str, Part]:
    """What a safetensors file holds. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
            if length > min(size, 100 << 20):  # what safetensors itself allows
                raise ValueError("no safetensors header")
            header = json.loads(file.read(length))
        note = json.loads((header.pop("__metadata__", None) or {}).get(NOTE, "{}"))
        parts = {}
        for key, entry in header.items():
            dtype: Any = _TYPES[entry["dtype"]]
            sizes, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            at = tuple(note[key]["saved_offsets"]) if note else (0,) * len(sizes)
            counts = all(type(n) is int and n >= 0 for n in (*at, *sizes, begin)) and len(at) == len(sizes)
            if not counts or math.prod(sizes) * dtype.itemsize != end - begin or 8 + length + end > size:
                raise ValueError(f"{key[:80]} does not fit in it")
            parts[key] = Part(path, key, 8 + length + begin, dtype, at, sizes)
        return parts
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {why(error)}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error


def whole_size(parts: Sequence[Part]) -> tuple[int, ...]:
    """The size of a tensor by its parts. Raises CheckpointError where they are of different tensors."""
    if len({(part.dtype, len(part.sizes)) for part in parts}) > 1:
        raise CheckpointError(
            f"{parts[0].path.parent}: parts of {parts[0].key} differ in dtype or number of dimensions"
        )
    ends = [[at + n for at, n in zip(part.offsets, part.sizes, strict=True)] for part in parts]
    return tuple(map(max, zip(*ends, strict=True)))


def on_all_ranks(group: dist.ProcessGroup | None, function: Callable, *args: Any) -> list[Any]:
    """What the function returns on each rank. Collective. Raises CheckpointError on all with the reasons of each that fails."""
    result, problem = None, None
    try:
        result = function(*args)
    except Exception as error:
        problem = f"{type(error).__name__}: {error} (rank {dist.get_rank(group) if dist.is_initialized() else 0})"
    told: list[Any] = [(result, problem)]
    if dist.is_initialized():
        told *= dist.get_world_size(group)
        dist.all_gather_object(told, (result, problem), group=group)
    if problems := [problem for _, problem in told if problem]:
        raise CheckpointError("; ".join(problems))
    return [result for result, _ in told]


def save_alone(
    final: Path, tree: Tree, state: dict[str, Any], values: Any = None, files: atomic.Files | None = None
) -> None:
    """One blocking save by one process, which needs no process group. Raises CheckpointError.

    values: what gives a tensor by its name, if the tree is only their shapes. files: what else belongs to the checkpoint.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    more = {manifest.STATE: json.dumps(state).encode(), **(files or {})}
    save_id, generation = secrets.token_hex(8), manifest.generation(final.parent) + 1
    folder = atomic.unfinished(final, save_id)
    try:
        atomic.check_space(final.parent, sum(t.nbytes for t in tree.values()))
        listed = write(folder, 0, tree, values or tree)
        atomic.commit(folder, final, save_id, listed, more, generation)
    except (OSError, ValueError) as error:
        remove(folder)
        raise CheckpointError(f"{final} was not saved: {error}") from error


def load(path: str | os.PathLike, tree: Tree) -> None:
    """Fill the tensors of the tree, of any layout, with those of a verified checkpoint. Collective.

    In place, one tensor at a time. A tree of `model.` names alone leaves the optimizer's state unread. Raises
    CheckpointError, before any value changes, if names, shapes or dtypes differ, or a tensor's parts do not cover it.
    """
    saved = fitting_parts(path, tree)

    @torch.no_grad()
    def fill() -> None:
        for key, t in tree.items():
            for part in saved[key]:
                part.copy_to(local_part(t.detach()), place(t)[0])

    try:
        on_all_ranks(None, fill)
    except CheckpointError as error:
        raise CheckpointError(f"{path} could not be loaded: {error}") from error


def saved_parts(path: str | os.PathLike) -> dict[str, list[Part]]:
    """The parts of each tensor of a checkpoint. Raises CheckpointError."""
    saved: dict[str, list[Part]] = {}
    for file in sorted(Path(path).glob(f"*{manifest.SHARD}")):
        for key, part in parts_in(file).items():
            saved.setdefault(key, []).append(part)
    return saved


def fitting_parts(path: str | os.PathLike, tree: Tree) -> dict[str, list[Part]]:
    """Those that fill the tree, whose tensors may be on the meta device. Raises CheckpointError as load does."""
    groups = {key.split(".")[0] for key in tree}
    saved = {key: parts for key, parts in saved_parts(path).items() if key.split(".")[0] in groups}
    there = {key: (whole_size(parts), parts[0].dtype) for key, parts in saved.items()}
    here = {key: (tuple(t.shape), t.dtype) for key, t in tree.items()}
    if there != here:
        raise CheckpointError(f"{path} is of another model or optimizer: {differences(there, here)}")
    for key, parts in saved.items():
        check_cover(parts, here[key][0])
    return saved


def whole(parts: Sequence[Part]) -> Tensor:
    """The tensor that the parts make up."""
    t = torch.empty(whole_size(parts), dtype=parts[0].dtype)
    for part in parts:
        part.copy_to(t, [0] * t.ndim)
    return t


def check_cover(parts: Sequence[Part], size: Sequence[int]) -> None:
    """Raise CheckpointError unless the parts of a tensor cover each of its elements once."""
    where = f"{parts[0].path.parent}: parts of {parts[0].key}"
    boxes = sorted((part.offsets, part.sizes) for part in parts if math.prod(part.sizes))
    for i, (at, n) in enumerate(boxes):
        for other, other_size in boxes[i + 1 :]:
            if at and other[0] >= at[0] + n[0]:
                break  # they are sorted: no later one begins before this one's rows end
            if all(a < c + m and c < a + k for a, k, c, m in zip(at, n, other, other_size, strict=True)):
                raise CheckpointError(f"{where} overlap at {list(other)}")
    found, whole = sum(math.prod(n) for _, n in boxes), math.prod(size)
    if found != whole:
        raise CheckpointError(f"{where} are {found:,} of its {whole:,} values")


def differences(there: dict[str, tuple], here: dict[str, tuple], show: int = 4) -> str:
    def what(side: dict[str, tuple], key: str) -> str:
        return f"{list(side[key][0])} {str(side[key][1]).removeprefix('torch.')}" if key in side else "absent"

    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    parts = [f"{key} is {what(there, key)} there, {what(here, key)} here" for key in keys[:show]]
    return "; ".join(parts) + (f"; and {len(keys) - show} more" if len(keys) > show else "")
