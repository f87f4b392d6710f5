"""Devices and processes: which device this is, how processes meet, agree and part.

Everything is written once for CPU, CUDA and MPS; a single process is a process group of one.
"""

import atexit
import contextlib
import ctypes
import datetime
import gc
import os
import resource
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.distributed as dist

from configs import Config, ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True)
class Env:
    """Where this process runs."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    threads: int  # intra-op threads on a CPU

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()


def world_size() -> int:
    """Processes of this launch, known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def pick_device(local_rank: int, local_world_size: int) -> torch.device:
    """This process's accelerator, or the CPU. Raises ConfigError for more processes than accelerators."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_world_size > count:
        hide = ", or hide them (CUDA_VISIBLE_DEVICES=) to run on the CPU" if accelerator.type == "cuda" else ""
        raise ConfigError(
            f"{local_world_size} processes on a machine with {count} {accelerator.type} device(s); "
            f"use --nproc_per_node={count}{hide}"
        )
    return torch.device(accelerator.type, local_rank)


def check_precision(cfg: Config, device: torch.device) -> None:
    """fp16 needs kernels that not every CPU has; found here instead of in the first step."""
    if device.type == "cpu" and cfg.mixed_precision == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ConfigError("mixed_precision=fp16: this CPU has no fp16 matrix products; use bf16 or no")
    if device.type == "mps" and world_size() > 1:
        raise ConfigError("MPS runs one process: start train.py without torchrun")


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks: by default each tensor of a step is mapped, zeroed page by page, and unmapped."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing through mmap
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing back to the kernel


def start(cfg: Config) -> Env:
    """Pick the device, set threads and numerics, join the process group. Raises ConfigError."""
    rank, world = int(os.environ.get("RANK", 0)), world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # read when the allocator starts; blocks can grow, so less is lost
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = pick_device(local_rank, local_world)
    check_precision(cfg, device)
    # torchrun sets OMP_NUM_THREADS=1, which would leave cores idle whenever there are fewer processes than cores
    threads = torch.get_num_threads()
    if device.type == "cpu" or cfg.cpu_offload:  # whose optimizer runs in host memory
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = cfg.cpu_threads or max(1, cores // local_world)
        torch.set_num_threads(threads)
    if device.type == "cpu":
        # inductor merges the two equal bias gradients of a parallel-residual block into one kernel that does not
        # compile with bf16 parameters (torch 2.13); without horizontal fusion there is nothing to merge
        inductor.cpp.max_horizontal_fusion_size = 1
        keep_freed_memory()
    else:
        torch.accelerator.set_device_index(local_rank)
    torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for on a GPU; no effect on a CPU
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False

    backend = {"cuda": "cpu:gloo,cuda:nccl"}.get(device.type, "gloo")
    timeout = datetime.timedelta(minutes=30, seconds=cfg.upload_deadline_seconds)  # others wait for the upload too
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    atexit.register(outlive, dist.group.WORLD)
    return Env(rank, world, local_rank, local_world, device, threads)


def outlive(group: dist.ProcessGroup) -> None:
    """At exit: DDP's reducer goes first, this reference to its process group last.

    Ending a group waits for gloo's threads, and one of them can be waiting for the GIL to free the tensor of the last
    collective. A Python reference lets go of the GIL first; the reducer does not, and would wait for ever (torch 2.13).
    """
    gc.collect()


def stop() -> None:
    """Leave the process group, all ranks together; the barrier and the collection keep gloo from aborting at exit."""
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()


def leave() -> None:
    """Leave the process group after an error, when nobody knows where the other ranks are."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def total(value: torch.Tensor) -> torch.Tensor:
    """Sum of a device tensor over all ranks, in place."""
    return reduced(value, dist.ReduceOp.SUM)


def largest(value: torch.Tensor) -> torch.Tensor:
    """Largest value of a device tensor over all ranks, in place."""
    return reduced(value, dist.ReduceOp.MAX)


def reduced(value: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if dist.get_world_size() > 1:  # alone there is nothing to do, and MPS has no collectives
        dist.all_reduce(value, op=op)
    return value


class Readback:
    """Carries figures from the device to the host a step late, so that the host never waits for the step in flight."""

    def __init__(self, device: torch.device):
        self.device, self.pending = device, deque()

    def put(self, tag, figures: torch.Tensor) -> None:
        """Start copying a small 1-D tensor; `tag` comes back with it."""
        if self.device.type == "cpu":
            self.pending.append((tag, figures, None))
            return
        host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=self.device.type == "cuda")
        host.copy_(figures, non_blocking=True)
        event = torch.Event(self.device.type)
        event.record()
        self.pending.append((tag, host, event))

    def take(self, wait: bool) -> Iterator[tuple[Any, list[float]]]:
        """(tag, figures) of every step but the newest, or of that too with `wait`, oldest first."""
        while len(self.pending) > (0 if wait else 1):
            tag, host, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            yield tag, host.tolist()


def on_each_node(env: Env, function: Callable, *args: Any, but_rank_0: bool = False) -> None:
    """Run function(*args) on the first process of every node; a failure on one is raised on all ranks. Collective."""
    error = None
    if env.local_rank == 0 and not (env.main and but_rank_0):
        try:
            function(*args)
        except Exception as caught:
            error = caught
    errors: list[Exception | None] = [None] * env.world_size
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise error


def on_rank_0(function: Callable, *args: Any) -> Any:
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


def agree(*flags: float) -> list[float]:
    """The largest of each flag over all ranks: a host-side collective that does not wait for the device."""
    values = torch.tensor(flags, dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def peak_memory(env: Env) -> int:
    """Bytes: peak allocated on the accelerator, or peak resident size of the process on a CPU."""
    if env.device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    with contextlib.suppress(OSError):  # getrusage's figure would include what the parent had when it forked us
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(env: Env, cfg: Config) -> str:
    """Device, processes, strategy and precision in words."""
    if env.device.type == "cpu":
        device = f"CPU, {env.threads} thread{'s' if env.threads > 1 else ''} per process"
    else:
        device = env.device_name
    strategy = cfg.parallel if env.world_size > 1 or cfg.parallel == "fsdp" else "one process"
    if cfg.shard_size not in (0, env.world_size):
        strategy += f" {env.world_size // cfg.shard_size} copies x {cfg.shard_size} shards"
    compiled = "compiled" if cfg.compile_model else "not compiled"
    return f"{env.world_size} x {device}; {strategy}, {cfg.mixed_precision.replace('no', 'fp32')}, {compiled}"
