"""Checkpoints: the live state -> a directory, and back into any strategy and world size.

    OUTPUT_DIR/checkpoint-epoch{E}-step{S}-files{F}/
        shard-*.safetensors   parameters and optimizer state, each rank's part in files of about 1 GiB
        state.json            what train.py needs besides tensors: step, tokens, loss, config, ...
        MANIFEST.json         every file's size, CRC-32C and SHA-256; the checkpoint exists when this is valid

    python ckpt.py list DIR
    python ckpt.py verify DIR_OR_CHECKPOINT

torch.distributed.checkpoint plans who writes which part of which tensor, and reads the parts back into another layout.
Its storage is safetensors, not its own .distcp: no byte of a checkpoint is ever unpickled.
"""

import concurrent.futures
import contextlib
import json
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.futures import Future

import manifest
from configs import ConfigError
from manifest import CheckpointError, lock, name, names, parse, read_state, verify

__all__ = ["CheckpointError", "Choice", "Saver", "agree", "choose", "load", "lock", "name", "names", "parse"]
__all__ += ["read_state", "state_tree", "verify"]

FILE_BYTES = 1 << 30  # a data file is closed once it holds this much, so that uploads can run side by side
SLOTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}  # an optimizer's tensors per parameter


class Choice(NamedTuple):
    path: Path | None  # None: a fresh run
    state: dict[str, Any]  # the checkpoint's state.json
    passed_over: list[tuple[str, str]]  # newer checkpoints that cannot be loaded: (name, reason)
    save_id: str = ""


def choose(output_dir: str | os.PathLike, resume: str | None) -> Choice:
    """Which checkpoint a run starts from; what it returns is verified, hash by hash.

    resume is None, "latest", a checkpoint's name in output_dir, or a path. Raises CheckpointError, or ConfigError if
    resume is None although there are checkpoints. All ranks must start from the same one: agree(choose, ...).
    """
    there = names(output_dir)
    listing = f"{output_dir} has {', '.join(there)}" if there else f"{output_dir} has no checkpoints"
    if resume is None:
        if there:
            raise ConfigError(
                f"output_dir={output_dir} already has {len(there)} checkpoint{'s' * (len(there) > 1)}, the last one "
                f"{there[0]}; continue with resume=latest or start afresh in another output_dir"
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
    passed_over = []
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
    return Choice(path, read_state(path), passed_over, manifest.read_manifest(path)["save_id"])


def agree(function: Callable, *args: Any) -> Any:
    """Run function(*args) on rank 0; every rank returns its result or raises its exception. Collective."""
    if not dist.is_initialized():
        return function(*args)
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function(*args)
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def state_tree(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that cannot be computed, by a flat name; the tensors alias the live ones.

    `model.<parameter>` and `optim.<slot>.<parameter>`, the names without the prefixes of DDP and torch.compile; a tied
    parameter comes once, a frozen one has no optimizer state. Optimizer state that the first step would create is
    created, so that a load can be in place.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation some parameters are still whole
    keys = {p: key.replace("_orig_mod.", "").removeprefix("module.") for key, p in model.named_parameters()}
    tree = {f"model.{key}": p.detach() for p, key in keys.items()}
    for optimizer in optimizers:
        _create_state(optimizer)
        for p, slots in optimizer.state.items():
            tree |= {f"optim.{slot}.{keys[p]}": value for slot, value in slots.items()}
    return tree


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and not optimizer.state[p]:
                if kind == "AdamW":  # the fused kernel counts on the device, the others on the CPU
                    device = p.device if group["fused"] else "cpu"
                    optimizer.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for slot in SLOTS[kind]:
                    optimizer.state[p][slot] = torch.zeros_like(p, memory_format=torch.preserve_format)


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _own_part(tree: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What this rank writes: its shards, and its share of the tensors that every rank holds whole."""
    part, load = {}, [0] * world
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


class Saver:
    """Writes checkpoints behind training, at most one at a time. Every method but poll is collective.

    A save that fails leaves nothing under a final name and does not raise: poll() tells why, on every rank.
    Of the last save: stall_seconds, for which save() held training up; write_seconds, until it was complete.
    """

    def __init__(
        self, output_dir: str | os.PathLike, *, async_save: bool = True, save_total_limit: int = 0, keep_every: int = 0
    ):
        self.output_dir = Path(output_dir)
        self.async_save, self.save_total_limit, self.keep_every = async_save, save_total_limit, keep_every
        self.group = dist.new_group(backend="gloo")  # its own: a collective behind training must not meet training's
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.stall_seconds = self.write_seconds = 0.0
        self.last: str | None = None  # name of the last complete save
        self._host = _Host()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)  # kept, as starting one costs a turn of the GIL, 5 ms
        self._saving: concurrent.futures.Future | None = None
        self._error: str | None = None

    def reserve(self, tree: dict[str, Tensor]) -> None:
        """Before training: ConfigError if the disk has no room for the tree; memory for the copies, so that the first
        save is as quick as the others."""
        agree(manifest.check_space, self.output_dir, sum(t.nbytes for t in tree.values()))
        if self.async_save:
            self._host.copy(_own_part(tree, self.rank, self.world))

    def save(self, name: str, tree: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Save the tree and the state (JSON, rank 0's) as they are now; the caller may change them at once."""
        start = time.perf_counter()
        self.join()
        part = _own_part(tree, self.rank, self.world)
        source = self._host.copy(part) if self.async_save else {key: _local(t) for key, t in part.items()}
        text = "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in state.items()) + "\n}\n"
        need = sum(t.nbytes for t in tree.values())
        self._saving = self._thread.submit(self._write, start, name, part, source, text.encode(), need)
        if not self.async_save:
            self.join()
        self.stall_seconds = time.perf_counter() - start

    def poll(self) -> str | None:
        """Why the last save failed, if it has; costs nothing."""
        return None if self._saving and not self._saving.done() else self._error

    def wait(self) -> str | None:
        """Wait for the save in flight; return why it failed, and forget it."""
        self.join()
        error, self._error = self._error, None
        return error

    def close(self) -> str | None:
        """wait(), then give back the process group and the host memory."""
        error = self.wait()
        self._thread.shutdown()
        self._host.free()
        dist.destroy_process_group(self.group)
        return error

    def join(self) -> None:
        """Wait for the save in flight."""
        if self._saving:
            self._saving.result()
            self._saving = None

    def _write(
        self, start: float, name: str, part: dict[str, Tensor], source: dict[str, Tensor], state: bytes, need: int
    ) -> None:
        try:
            box = [secrets.token_hex(8)]
            dist.broadcast_object_list(box, group=self.group, group_src=0)
            writer = _Writer(self.output_dir / name, box[0], state, need)
            dcp.save(part, storage_writer=writer, planner=_SavePlanner(source), process_group=self.group)
            self._commit_on_other_nodes(writer)
            self.last, self.write_seconds = name, time.perf_counter() - start
            if self.rank == 0:
                manifest.prune(self.output_dir, name, self.save_total_limit, self.keep_every)
        except BaseException as error:  # CheckpointException is no Exception
            self._error = f"saving {name}: {_cause(error)}"
            if self.rank == 0:
                with contextlib.suppress(OSError):  # then the next start does it
                    manifest.recover(self.output_dir)

    def _commit_on_other_nodes(self, writer: "_Writer") -> None:
        """Give the files of a node that does not share rank 0's disk the same name and manifest, for the bucket."""
        box = [(writer.final / manifest.MANIFEST).read_bytes() if self.rank == 0 else None]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        problem = None
        if self.rank and os.environ.get("LOCAL_RANK") == "0" and writer.folder.exists():
            try:
                manifest.put(writer.folder, writer.final, writer.id, box[0])
            except (FileExistsError, FileNotFoundError):
                pass  # a shared disk: renamed by now, which NFS can show late
            except OSError as error:
                problem = f"{_cause(error)} (rank {self.rank})"
        problems: list[str | None] = [None] * self.world
        dist.all_gather_object(problems, problem, group=self.group)
        if any(problems):
            raise OSError("; ".join(filter(None, problems)))


def save_alone(final: Path, tree: dict[str, Tensor], state: dict[str, Any]) -> None:
    """One blocking save by one process, which needs no process group. Raises CheckpointError."""
    writer = _Writer(final, secrets.token_hex(8), json.dumps(state).encode(), sum(t.nbytes for t in tree.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        try:
            dcp.save(tree, storage_writer=writer, planner=_SavePlanner(tree), no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"{final} was not saved: {_cause(error)}") from error


class _Host:
    """Host memory for the copies of a save, one block that is allocated once, and pinned if there is a GPU."""

    def __init__(self):
        self.block, self.views = torch.empty(0, dtype=torch.uint8), {}

    def copy(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """The local parts of the tensors, copied: all that an asynchronous save costs the training loop."""
        local = {key: _local(t) for key, t in part.items()}
        layout = {key: (t.shape, t.dtype) for key, t in local.items()}
        if layout != {key: (view.shape, view.dtype) for key, view in self.views.items()}:
            self.free()
            self.allocate(local)
        for key, t in local.items():
            self.views[key].copy_(t, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return self.views

    def allocate(self, local: dict[str, Tensor]) -> None:
        spans = {key: -(-t.nbytes // 64) * 64 for key, t in local.items()}
        self.block = torch.empty(max(64, sum(spans.values())), dtype=torch.uint8)
        if torch.cuda.is_available():  # registered, as pin_memory=True would round up to a power of two
            status = torch.cuda.cudart().cudaHostRegister(self.block.data_ptr(), self.block.nbytes, 0)
            assert int(status) == 0, f"cudaHostRegister of {self.block.nbytes:,} bytes: error {status}"
        at = 0
        for key, t in local.items():
            self.views[key] = self.block[at : at + t.nbytes].view(t.dtype).view(t.shape)
            at += spans[key]

    def free(self) -> None:
        if self.views and torch.cuda.is_available():
            torch.cuda.cudart().cudaHostUnregister(self.block.data_ptr())
        self.block, self.views = torch.empty(0, dtype=torch.uint8), {}


class _SavePlanner(DefaultSavePlanner):
    """Plans with the live tensors' layout, hands out the bytes of their copies."""

    def __init__(self, source: dict[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.source = source

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.source[index.fqn]


class _Writer(dcp.HuggingFaceStorageWriter):
    """DCP's sharded safetensors layout, with hashes and one commit.

    The base class first builds each file as one bytes object, which doubles the memory and holds the GIL, and with it
    the training loop, for 1.5 s per 512 MB; safetensors' save_file does neither.
    """

    def __init__(self, final: Path, save_id: str, state: bytes, need: int):
        self.folder = final.with_name(f"{manifest.TEMPORARY}{save_id}-{final.name}")
        super().__init__(str(self.folder), save_distributed=True)
        self.final, self.id, self.state, self.need = final, save_id, state, need

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        os.makedirs(self.folder, exist_ok=True)
        if self.rank == 0:
            manifest.check_space(self.folder, self.need)
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files; the results carry {size, crc32c, sha256} of each to rank 0."""
        results: list[WriteResult] = []
        batch: dict[str, Tensor] = {}
        offsets: dict[str, Any] = {}
        size = 0
        for item in plan.items:
            batch[item.index.fqn] = t = planner.resolve_data(item).cpu().contiguous()
            offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            size += t.nbytes
            if size >= FILE_BYTES or item is plan.items[-1]:
                path = self.folder / f"shard-{self.rank:05d}-{len(results):05d}.safetensors"
                save_file(batch, path, {"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})
                path.chmod(self.folder.stat().st_mode & 0o666)  # save_file makes it readable by its owner alone
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                found = manifest.digest(path)
                results.append(WriteResult(MetadataIndex(path.name), found["size"], found))
                batch, offsets, size = {}, {}, 0
        future: Future = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, once every rank has written."""
        files = {result.index.fqn: result.storage_data for of_rank in results for result in of_rank}
        manifest.commit(self.folder, self.final, self.id, files, self.state)


def load(path: str | os.PathLike, tree: dict[str, Tensor]) -> None:
    """Fill the tensors of the tree, of any layout, with those of a verified checkpoint. Collective.

    In place: besides the tree there is never more than one tensor in memory. A tree of `model.` names alone leaves the
    optimizer's state unread. Raises CheckpointError, before any value changes, if names, shapes or dtypes differ.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        saved = reader.read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise CheckpointError(f"{path} could not be loaded: {error}") from error
    groups = {key.split(".")[0] for key in tree}
    there = {
        key: (tuple(meta.size), meta.properties.dtype) for key, meta in saved.items() if key.split(".")[0] in groups
    }
    here = {key: (tuple(t.shape), t.dtype) for key, t in tree.items()}
    if there != here:
        raise CheckpointError(f"{path} is of another model or optimizer: {_differences(there, here)}")
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with torch.no_grad():
            dcp.load(dict(tree), storage_reader=reader, planner=planner)
    except CheckpointException as error:
        raise CheckpointError(f"{path} could not be loaded: {_cause(error)}") from error


def _differences(there: dict[str, tuple], here: dict[str, tuple], show: int = 4) -> str:
    def what(side: dict[str, tuple], key: str) -> str:
        return f"{list(side[key][0])} {str(side[key][1]).removeprefix('torch.')}" if key in side else "absent"

    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    parts = [f"{key} is {what(there, key)} there, {what(here, key)} here" for key in keys[:show]]
    return "; ".join(parts) + (f"; and {len(keys) - show} more" if len(keys) > show else "")


def _cause(error: BaseException) -> str:
    failures = error.failures if isinstance(error, CheckpointException) else {}
    causes = [f"{type(e).__name__}: {e} (rank {rank})" for rank, (e, _) in failures.items()]
    return "; ".join(causes) or f"{type(error).__name__}: {error}"


def main(argv: list[str]) -> int:
    """The command line; the commands are in sync.py and, those that need a model, in export.py. Returns the exit code."""
    try:
        if argv[:1] in (["export"], ["import"]):
            import export

            return (export.main_export if argv[0] == "export" else export.main_import)(argv[1:])
        import sync

        return sync.main(argv)
    except ValueError as error:
        if not hasattr(error, "exit_code"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
