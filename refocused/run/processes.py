"""Devices and processes: which device this is, how processes meet, agree and part.

Everything is written once for CPU, CUDA and MPS; a single process is a process group of one.
"""

import atexit
import contextlib
import ctypes
import datetime
import gc
import glob
import os
import random
import resource
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.distributed as dist

from configs import Config, ConfigError
from refocused.run.exits import INTERNAL, leave

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
BUSY = 1.25  # load per core from which waiting threads take the time of those that work
FIRST_SECONDS = 60.0  # in which the first collective must be over
STORE_SECONDS = 10.0  # in which torchrun's store must be found
NCCL_LATER = 120.0  # seconds after gloo's time is up and said, when NCCL ends the process with SIGABRT, without a word
DEVICES, DRIVER = "/dev/nvidia[0-9]*", Path("/proc/driver/nvidia/version")  # a container has the host's numbers


class PeersError(ValueError):
    """The processes of a launch do not reach each other."""

    exit_code = INTERNAL


@dataclass
class Progress:
    """Where this process is, for who watches over it."""

    step: int | None = None  # the last one that is finished, None before the loop
    ticks: int = 0  # meetings of all ranks so far
    at: float = 0.0  # time.monotonic() of the last one
    patient: int = 0  # above 0 in what may rightly take long


progress = Progress()
store: Any = None  # of this launch, what one rank notes there the others read; Any: the stubs do not know clone()
# the processes again, None until start(): for what is agreed on after a step, and with time for what may be long
meetings: dist.ProcessGroup | None = None
patient: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Env:
    """Where this process runs."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    threads: int  # intra-op threads on a CPU
    bandwidth: float | None = None  # GB/s of an all-reduce, as a bus carries them; None where not measured

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()


def world_size() -> int:
    """Processes of this launch, known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def any_device() -> torch.device:
    """An accelerator if there is one, or the CPU. Raises ConfigError for a GPU that torch cannot use."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        refuse_idle_gpu()
    return accelerator or torch.device("cpu")


def pick_device(local_rank: int, local_world_size: int) -> torch.device:
    """This process's accelerator, or the CPU. Raises ConfigError for more processes than accelerators."""
    accelerator = any_device()
    if accelerator.type == "cpu":
        return accelerator
    count = torch.accelerator.device_count()
    if local_world_size > count:
        hide = ", or hide them (CUDA_VISIBLE_DEVICES=) to run on the CPU" if accelerator.type == "cuda" else ""
        raise ConfigError(
            f"{local_world_size} processes on a machine with {count} {accelerator.type} device(s); "
            f"use --nproc_per_node={count}{hide}"
        )
    return torch.device(accelerator.type, local_rank)


def refuse_idle_gpu() -> None:
    """Raise ConfigError where there is a GPU that torch was built for and cannot use, rather than train without it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "NoDevFiles")
    found = sorted(glob.glob(DEVICES))
    if not torch.version.cuda or not found or hidden:
        return
    driver = "unknown"
    with contextlib.suppress(OSError):  # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat ..."
        driver = next((word for word in DRIVER.read_text().split() if word[:1].isdigit() and "." in word), driver)
    raise ConfigError(
        f"{found[0]} is here, but torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no usable GPU "
        f"(driver {driver}; CUDA 13 needs 580, CUDA 12 needs 525): update the driver, or install torch for the CUDA "
        "that nvidia-smi shows; CUDA_VISIBLE_DEVICES= trains on the CPU"
    )


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


def cores(local_world_size: int) -> int:
    """Of the CPU, for each of so many processes on this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // local_world_size)


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
        threads = cfg.cpu_threads or cores(local_world)
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
        os.environ.setdefault("NCCL_ALGO", "Ring")  # trees of other shapes sum in other orders
        torch.use_deterministic_algorithms(True)
        deterministic: Any = torch.utils.deterministic  # a module whose attribute the stubs do not know
        deterministic.fill_uninitialized_memory = False  # takes time, and nothing here reads what it did not write
        torch.backends.cudnn.benchmark = False

    backend = {"cuda": "cpu:gloo,cuda:nccl"}.get(device.type, "gloo")
    timeout = datetime.timedelta(seconds=cfg.collective_timeout_seconds)
    join(backend, rank, world, timeout + datetime.timedelta(seconds=NCCL_LATER * (device.type == "cuda")))
    global meetings, patient
    meetings = dist.new_group(backend="gloo", timeout=timeout)
    # shards are unpacked, a checkpoint is hashed and pulled, and the last upload waited for
    longer = datetime.timedelta(hours=2, seconds=cfg.upload_deadline_seconds)
    patient = dist.new_group(backend="gloo", timeout=timeout + longer)
    world_group = dist.group.WORLD
    assert world_group is not None
    atexit.register(outlive, world_group)
    return Env(rank, world, local_rank, local_world, device, threads, first_collective(device))


def join(backend: str, rank: int, world: int, timeout: datetime.timedelta) -> None:
    """Make the process group. Raises ConfigError, PeersError."""
    global store
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    restarts, nodes = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("GROUP_WORLD_SIZE", "1")
    if restarts != "0" and nodes != "1":
        raise ConfigError(
            f"--max-restarts={restarts} on {nodes} nodes: they count restarts apart and would not find each other again; "
            "leave it out, and start the command again on all nodes with resume=latest"
        )
    find_store()
    try:
        shared, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun's store outlives its ranks: after a restart the addresses of those before would be found in it
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except RuntimeError as error:
        raise PeersError(f"rank {rank} does not reach the others: {str(error).splitlines()[0]}; {advice()}") from error


def free_port() -> int:
    """For a store on this machine, below those that the system gives to connections: one of these, free now, may be
    taken by any connection of another process before the store listens."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def find_store() -> None:
    """Raise PeersError where torchrun's store, which was there before its ranks were, has gone with its torchrun.

    A rank that was still importing would not see its parent die, and torch would look for the store for ten minutes.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    end, place = time.monotonic() + STORE_SECONDS, (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    while True:
        try:
            socket.create_connection(place, STORE_SECONDS).close()
            return
        except ConnectionRefusedError as error:
            if time.monotonic() > end:
                raise PeersError(
                    f"the torchrun of this process is gone: nothing answers at {place[0]}:{place[1]}"
                ) from error
            time.sleep(0.5)
        except OSError:  # what else there may be, torch says
            return


def advice() -> str:
    return (
        "try NCCL_P2P_DISABLE=1, in a container --ipc host, and on several nodes NCCL_SOCKET_IFNAME and "
        "GLOO_SOCKET_IFNAME set to the network between them (`ip address` lists them)"
    )


def first_collective(device: torch.device) -> float | None:
    """One all-reduce, before memory is full and minutes are spent; its GB/s on GPUs. Ends the process if it hangs."""
    world = dist.get_world_size()
    if world == 1:
        return None

    def give_up() -> None:
        where = f"rank {dist.get_rank()} on {socket.gethostname()}"
        words = f"error: {where}: the first all-reduce was not over in {FIRST_SECONDS:g} s; {advice()}"
        print(words, file=sys.stderr, flush=True)
        leave(INTERNAL, words, at_once=True)

    watch = threading.Timer(FIRST_SECONDS, give_up)
    watch.daemon = True
    watch.start()
    block = torch.ones((64 if device.type == "cuda" else 1) << 18, device=device)  # of 4 bytes
    try:
        agree(0.0)
        for _ in range(3):  # the first one makes the connections
            begin = time.perf_counter()
            dist.all_reduce(block)
            block[-1].item()  # wait for it
            seconds = time.perf_counter() - begin
    except RuntimeError as error:
        raise PeersError(
            f"rank {dist.get_rank()}: the first all-reduce failed: {str(error).splitlines()[0]}; {advice()}"
        ) from error
    watch.cancel()
    return 2 * (world - 1) / world * block.nbytes / seconds / 1e9 if device.type == "cuda" else None


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
        self.device = device
        self.pending: deque[tuple[Any, torch.Tensor, torch.Event | None]] = deque()

    def put(self, tag: Any, figures: torch.Tensor) -> None:
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


@contextlib.contextmanager
def patiently() -> Iterator[None]:
    """What may rightly take long: nobody calls it a hang."""
    progress.patient += 1
    try:
        yield
    finally:
        progress.patient -= 1
        progress.at = time.monotonic()


def on_each_node(env: Env, function: Callable, *args: Any, but_rank_0: bool = False) -> list[Any]:
    """Run function(*args), however long, on the first process of every node; a failure is raised on all. Collective.

    Returns each rank's result, None for those that did not run it.
    """
    result, error = None, None
    with patiently():
        if env.local_rank == 0 and not (env.main and but_rank_0):
            try:
                result = function(*args)
            except Exception as caught:
                error = caught
        outcomes: list[Any] = [None] * env.world_size
        dist.all_gather_object(outcomes, (result, error), group=patient)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def on_rank_0(function: Callable, *args: Any) -> Any:
    """Run function(*args), however long, on rank 0; every rank returns its result or raises its error. Collective."""
    if not dist.is_initialized():
        return function(*args)
    box: list[Any] = [None, None]
    with patiently():
        if dist.get_rank() == 0:
            try:
                box[0] = function(*args)
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=patient)
    if box[1] is not None:
        raise box[1]
    return box[0]


def agree(*flags: float) -> list[float]:
    """The largest of each flag over all ranks: a host-side collective that does not wait for the device."""
    values = torch.tensor(flags, dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=meetings)
    progress.ticks, progress.at = progress.ticks + 1, time.monotonic()
    return values.tolist()


def peak_memory(env: Env) -> int:
    """Bytes: peak allocated on the accelerator, or peak resident size of the process on a CPU."""
    if env.device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    with contextlib.suppress(OSError):  # getrusage's figure would include what the parent had when it forked us
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def busy(env: Env) -> str:
    """A note where other work has this machine's cores: OpenMP's threads wait for each other in a loop, and for a core."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if env.device.type != "cpu" or env.threads == 1 or passive or load < BUSY * cores:
        return ""
    return (
        f"{load:.0f} processes want this machine's {cores} cores: OMP_WAIT_POLICY=PASSIVE in front of the command, or "
        "cpu_threads=1, may make it many times faster (on idle cores slower)"
    )


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
    bus = f", all-reduce {env.bandwidth:.3g} GB/s" if env.bandwidth else ""
    return f"{env.world_size} x {device}{bus}; {strategy}, {cfg.mixed_precision.replace('no', 'fp32')}, {compiled}"
