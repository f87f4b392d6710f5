"""Tensors to files and back: the live state -> a directory, and back into any strategy and world size.

torch.distributed.checkpoint plans who writes which part of which tensor, and reads the parts back into another layout.
Its storage is safetensors, not its own .distcp: no byte of a checkpoint is ever unpickled.
"""

import contextlib
import itertools
import json
import math
import os
import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.futures import Future

from refocused.checkpoint import atomic, manifest
from refocused.checkpoint.manifest import CheckpointError
from refocused.files import digest, sync, why, widen

FILE_BYTES = 1 << 30  # a data file is closed once it holds this much, so that uploads can run side by side
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
ADAM = ("exp_avg", "exp_avg_sq")
SLOTS = {"AdamW": ADAM, "HalfAdamW": ADAM, "Muon": ("momentum_buffer",)}  # an optimizer's tensors per parameter


def state_tree(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that cannot be computed, by a flat name; the tensors alias the live ones.

    `model.<parameter>` and `optim.<slot>.<parameter>`, the names without the prefixes of DDP and torch.compile; a tied
    parameter comes once, a frozen one has no optimizer state. Optimizer state that the first step would create is
    created, so that a load can be in place.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation some parameters are still whole
    keys: dict[Tensor, str] = {
        p: key.replace("_orig_mod.", "").removeprefix("module.") for key, p in model.named_parameters()
    }
    tree = {f"model.{key}": p.detach() for p, key in keys.items()}
    for optimizer in optimizers:
        create_state(optimizer)
        for p, slots in optimizer.state.items():
            tree |= {f"optim.{slot}.{keys[p]}": value for slot, value in slots.items()}
    return tree


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """What the first step would create, where it is not there yet; `moments`, where it has them, is their dtype."""
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


def own_part(tree: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What this rank writes: its shards, and its share of the tensors that every rank holds whole."""
    part: dict[str, Tensor] = {}
    load = [0] * world
    for key, t in sorted(tree.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(t, DTensor):
            if t.to_local().numel():  # a short tensor leaves the last ranks without rows
                part[key] = t
        else:
            owner = load.index(min(load))
            load[owner] += t.nbytes
            if owner == rank:
                part[key] = t
    return part


class Source(Protocol):
    """Tensors by name."""

    def __getitem__(self, key: str, /) -> Tensor: ...


class CopyPlanner(DefaultSavePlanner):
    """Plans with the live tensors' layout, hands out the bytes of their copies."""

    def __init__(self, source: Source):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.source = source

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.source[index.fqn]


class Writer(dcp.HuggingFaceStorageWriter):
    """DCP's sharded safetensors layout, with hashes and one commit.

    The base class first builds each file as one bytes object, which doubles the memory and holds the GIL, and with it
    the training loop, for 1.5 s per 512 MB; safetensors' save_file does neither.
    """

    def __init__(
        self, final: Path, save_id: str, more: Mapping[str, bytes], need: int, generation: int, at_a_time: int = 1
    ):
        self.folder = final.with_name(f"{atomic.TEMPORARY}{save_id}-{final.name}")
        super().__init__(str(self.folder), save_distributed=True)
        self.final, self.id, self.more, self.need, self.generation = final, save_id, more, need, generation
        self.at_a_time = at_a_time  # files that a rank writes, each with its tensors in memory

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        with contextlib.suppress(FileExistsError):  # of another rank
            os.mkdir(self.folder)  # not its parent, should that be gone: it held the lock
        if self.rank == 0:
            atomic.check_space(self.folder, self.need)
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files; the results carry {size, crc32c, sha256} of each to rank 0.

        Raises CheckpointError, and so fails the save on all ranks, at a tensor that no run could go on from.
        """
        files: list[list[WriteItem]] = []
        size = FILE_BYTES
        for item in plan.items:
            if size >= FILE_BYTES:
                files.append([])
                size = 0
            files[-1].append(item)
            assert item.tensor_data is not None
            size += item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        with ThreadPoolExecutor(self.at_a_time) as pool:
            results = list(pool.map(self.write_file, range(len(files)), files, itertools.repeat(planner)))
        future: Future = Future()
        future.set_result(results)
        return future

    def write_file(self, number: int, items: list[WriteItem], planner: SavePlanner) -> WriteResult:
        """One of this rank's files, on the disk when it returns. Raises CheckpointError at a value that is not finite."""
        batch: dict[str, Tensor] = {}
        offsets: dict[str, Any] = {}
        for item in items:
            t = planner.resolve_data(item)
            assert isinstance(t, Tensor) and item.tensor_data is not None
            check_finite(item.index.fqn, t)
            batch[item.index.fqn] = t.cpu().contiguous()
            offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        path = self.folder / f"shard-{self.rank:05d}-{number:05d}.safetensors"
        save_file(batch, path, {"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})
        widen(path)  # save_file makes it readable by its owner alone
        sync(path)
        found = digest(path)
        return WriteResult(MetadataIndex(path.name), found["size"], found)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, once every rank has written; commit() makes it a checkpoint."""
        self.files = {result.index.fqn: result.storage_data for of_rank in results for result in of_rank}

    def commit(self) -> None:
        atomic.commit(self.folder, self.final, self.id, self.files, self.more, self.generation)


def check_finite(key: str, t: Tensor) -> None:
    """Raise CheckpointError if the tensor holds a NaN or an infinity. One pass that needs no memory."""
    if t.numel() and t.is_floating_point():
        least, largest = t.aminmax()  # a NaN is both
        if not (least.isfinite() and largest.isfinite()):
            raise CheckpointError(f"{key} has values that are not finite")


class File:
    """The tensors in a safetensors file, read and not mapped: some disks map no file. Raises CheckpointError."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}  # dtype, shape, place in the file
        try:
            with open(path, "rb") as file:
                size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
                if length > min(size, 100 << 20):  # what safetensors itself allows
                    raise ValueError("no safetensors header")
                header = json.loads(file.read(length))
            self.note: dict[str, str] = header.pop("__metadata__", None) or {}
            for key, entry in header.items():
                dtype, shape, (begin, end) = TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
                counts = all(type(n) is int and n >= 0 for n in (*shape, begin))
                if not counts or math.prod(shape) * dtype.itemsize != end - begin or 8 + length + end > size:
                    raise ValueError(f"{key[:80]} does not fit in it")
                self.tensors[key] = (dtype, shape, 8 + length + begin)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {why(error)}") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows of it."""
        dtype, shape, begin = self.tensors[key]
        if rows:
            row = math.prod(shape[1:]) * dtype.itemsize
            begin, shape = begin + rows.start * row, (rows.stop - rows.start, *shape[1:])
        content = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        try:
            with open(self.path, "rb") as file:
                file.seek(begin)
                if file.readinto(content.numpy().data) != len(content):
                    raise CheckpointError(f"{self.path} ends early")
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {why(error)}") from error
        return content.view(dtype).view(shape)


class Reader(dcp.HuggingFaceStorageReader):
    """Of a checkpoint's files, what a rank needs, through File."""

    def read_metadata(self) -> Metadata:
        self.parts: dict[MetadataIndex, tuple[File, str]] = {}
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for path in sorted(Path(self.path).glob(f"*{manifest.SHARD}")):
            file = File(path)
            try:
                offsets = json.loads(file.note["DCP_SHARDING_INFO"])
                for key, (dtype, shape, _) in file.tensors.items():
                    at = torch.Size(offsets[key]["saved_offsets"])
                    if len(at) != len(shape) or min(at, default=0) < 0:
                        raise ValueError(f"{key[:80]} of shape {list(shape)} lies at {list(at)}")
                    chunks.setdefault(key, []).append(ChunkStorageMetadata(at, torch.Size(shape)))
                    dtypes[key] = dtype
                    self.parts[MetadataIndex(key, at)] = file, key
            except (ValueError, LookupError, TypeError, RecursionError, RuntimeError) as error:
                raise CheckpointError(f"{path} cannot be used: {type(error).__name__}: {str(error)[:200]}") from error
        if uneven := [key for key, parts in chunks.items() if len({len(part.sizes) for part in parts}) > 1]:
            raise CheckpointError(f"{self.path}: parts of {uneven[0]} have different numbers of dimensions")
        ends = {key: [map(sum, zip(p.offsets, p.sizes, strict=True)) for p in parts] for key, parts in chunks.items()}
        found: dict[str, Any] = {
            key: TensorStorageMetadata(
                TensorProperties(dtypes[key]), torch.Size(map(max, zip(*ends[key], strict=True))), parts
            )
            for key, parts in chunks.items()
        }
        return Metadata(found, storage_data=self.parts, storage_meta=StorageMeta(load_id=self.load_id))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            file, key = self.storage_data[item.storage_index]
            at, size = item.storage_offsets, item.lengths
            t = file.read(key, slice(at[0], at[0] + size[0]) if size else None)
            for dim in range(1, len(size)):
                t = t.narrow(dim, at[dim], size[dim])
            target = planner.resolve_tensor(item)
            target.detach().copy_(t)
            planner.commit_tensor(item, target)
        future: Future = Future()
        future.set_result(None)
        return future


def save_alone(
    final: Path,
    tree: dict[str, Tensor],
    state: dict[str, Any],
    source: Source | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """One blocking save by one process, which needs no process group. Raises CheckpointError.

    source: where the values are, if the tree is only their shapes; each is asked for once, when it is written.
    files: what else belongs to the checkpoint, by name.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    need, generation = sum(t.nbytes for t in tree.values()), manifest.generation(final.parent) + 1
    more = {manifest.STATE: json.dumps(state).encode(), **(files or {})}
    writer = Writer(final, secrets.token_hex(8), more, need, generation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        try:
            dcp.save(tree, storage_writer=writer, planner=CopyPlanner(source or tree), no_dist=True)
            writer.commit()
        except (CheckpointException, OSError) as error:
            raise CheckpointError(f"{final} was not saved: {cause(error)}") from error


def load(path: str | os.PathLike, tree: dict[str, Tensor]) -> None:
    """Fill the tensors of the tree, of any layout, with those of a verified checkpoint. Collective.

    In place: besides the tree there is never more than one tensor in memory. A tree of `model.` names alone leaves the
    optimizer's state unread. Raises CheckpointError, before any value changes, if names, shapes or dtypes differ, or if
    a tensor's parts do not cover it.
    """
    saved = read_metadata(path)
    groups = {key.split(".")[0] for key in tree}
    there = {
        key: (tuple(meta.size), meta.properties.dtype) for key, meta in saved.items() if key.split(".")[0] in groups
    }
    here = {key: (tuple(t.shape), t.dtype) for key, t in tree.items()}
    if there != here:
        raise CheckpointError(f"{path} is of another model or optimizer: {differences(there, here)}")
    for key in here:
        check_cover(path, key, saved[key].size, [(part.offsets, part.sizes) for part in saved[key].chunks])
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with torch.no_grad():
            dcp.load(dict(tree), storage_reader=Reader(str(path)), planner=planner)
    except CheckpointException as error:
        raise CheckpointError(f"{path} could not be loaded: {cause(error)}") from error


def read_metadata(path: str | os.PathLike) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and parts of every tensor. Raises CheckpointError."""
    found = Reader(str(path)).read_metadata().state_dict_metadata
    return {key: meta for key, meta in found.items() if isinstance(meta, TensorStorageMetadata)}


def check_cover(path: str | os.PathLike, key: str, size: Sequence[int], parts: Iterable[tuple[Any, Any]]) -> None:
    """Raise CheckpointError unless the parts of a tensor, (offsets, sizes) each, cover each of its elements once.

    A gap would leave what was there before the load, of an overlap it would depend on the order which part counts.
    """
    boxes = sorted((tuple(at), tuple(n)) for at, n in parts if math.prod(n))
    for i, (at, n) in enumerate(boxes):
        for other, other_size in boxes[i + 1 :]:
            if at and other[0] >= at[0] + n[0]:
                break  # they are sorted: no later one begins before this one's rows end
            if all(a < c + m and c < a + k for a, k, c, m in zip(at, n, other, other_size, strict=True)):
                raise CheckpointError(f"{path}: parts of {key} overlap at {list(other)}")
    found, whole = sum(math.prod(n) for _, n in boxes), math.prod(size)
    if found != whole:
        raise CheckpointError(f"{path}: parts of {key} are {found:,} of its {whole:,} values")


def differences(there: dict[str, tuple], here: dict[str, tuple], show: int = 4) -> str:
    def what(side: dict[str, tuple], key: str) -> str:
        return f"{list(side[key][0])} {str(side[key][1]).removeprefix('torch.')}" if key in side else "absent"

    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    parts = [f"{key} is {what(there, key)} there, {what(here, key)} here" for key in keys[:show]]
    return "; ".join(parts) + (f"; and {len(keys) - show} more" if len(keys) > show else "")


def cause(error: BaseException) -> str:
    failures = error.failures if isinstance(error, CheckpointException) else {}
    causes = [f"{type(e).__name__}: {e} (rank {rank})" for rank, (e, _) in failures.items()]
    return "; ".join(causes) or f"{type(error).__name__}: {error}"
