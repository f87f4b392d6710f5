"""Processes: how they start, exchange data and end. A single one is a process group of one."""

import atexit
import contextlib
import datetime
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs import Config, ConfigError
from refocused import locks
from refocused.run import devices
from refocused.run.environment import Launch, launch
from refocused.run.exits import INTERNAL, leave
from refocused.run.logs import log_error

BUSY = 1.25  # load per core from which waiting threads take time from working ones
FIRST_SECONDS = 60.0  # in which the first collective must be over
STORE_SECONDS = 30.0  # in which torchrun's store must be found
EXCHANGE_SECONDS = 600.0  # in which a step's exchange between ranks must be over, at least
NCCL_LATER = 120.0  # seconds after gloo's error, when NCCL ends the process with SIGABRT and no message
ADVICE = (
    "try NCCL_P2P_DISABLE=1, in a container --ipc host, and on several nodes NCCL_SOCKET_IFNAME and "
    "GLOO_SOCKET_IFNAME set to the network between them (`ip address` lists them)"
)


class PeersError(ValueError):
    """The processes of a launch cannot reach each other."""

    exit_code = INTERNAL


@dataclass
class Progress:
    """Where this process is, for the watchdog."""

    step: int | None = None  # the last one that is finished, None before the loop
    collectives: int = 0  # calls of max_over_ranks so far
    at: float = 0.0  # time.monotonic() of the last one
    long_waits: int = 0  # above 0 in what may take long


progress = Progress()
store: Any = None  # of this launch, shared by its ranks; Any: the stubs do not know clone()
# groups of all ranks over gloo, None until start(): for what follows a step, and for what may take long
host_group: dist.ProcessGroup | None = None
long_group: dist.ProcessGroup | None = None


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


def exchange_seconds(cfg: Config) -> float:
    """The timeout of an exchange between ranks: later than the watchdog, which finds out who is missing."""
    return max(EXCHANGE_SECONDS, 2 * cfg.watchdog_seconds)


def group_timeout(cfg: Config, device: torch.device) -> datetime.timedelta:
    """Of the groups that a step's collectives use."""
    return datetime.timedelta(seconds=exchange_seconds(cfg) + NCCL_LATER * (device.type == "cuda"))


def start(cfg: Config) -> Env:
    """Pick the device, set threads and numerics, join the process group. Raises ConfigError, PeersError."""
    here = launch()
    if here.left_over:
        way = "this is one process; CUDA_VISIBLE_DEVICES chooses a GPU"
        log_error(f"note      {here.left_over} without RANK: ignored, {way}")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # read when the allocator starts; blocks can grow, so less is lost
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = devices.pick_device(here.local_rank, here.local_world_size)
    devices.check_precision(cfg, device)
    threads = devices.tune(cfg, device, here.local_rank, here.local_world_size)
    backend = {"cuda": "cpu:gloo,cuda:nccl"}.get(device.type, "gloo")
    join(here, backend, group_timeout(cfg, device))
    global host_group, long_group
    timeout = datetime.timedelta(seconds=exchange_seconds(cfg))
    host_group = dist.new_group(backend="gloo", timeout=timeout)
    # shards are unpacked, a checkpoint is hashed and downloaded, the last upload is waited for
    longer = datetime.timedelta(hours=2, seconds=cfg.upload_deadline_seconds)
    long_group = dist.new_group(backend="gloo", timeout=timeout + longer)
    # Ending a group waits for gloo's threads, and one can wait for the GIL to free the last collective's tensor. A Python
    # reference releases the GIL, DDP's reducer does not (torch 2.13): this reference makes the reducer go first.
    atexit.register(lambda _: gc.collect(), dist.group.WORLD)
    bandwidth = first_collective(device)
    return Env(here.rank, here.world_size, here.local_rank, here.local_world_size, device, threads, bandwidth)


def join(here: Launch, backend: str, timeout: datetime.timedelta) -> None:
    """Make the process group. Raises ConfigError, PeersError."""
    global store
    if not here.address:
        try:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"one process needs the loopback interface (`ip link set lo up`): {first}") from error
        return
    if here.max_restarts and here.nodes > 1:
        raise ConfigError(
            f"--max-restarts={here.max_restarts} on {here.nodes} nodes: each node counts its own restarts, so they would "
            "not meet again; leave it out, and start the command again on all nodes with resume=latest"
        )
    try:
        # torchrun's store was there before its ranks: one that is not found soon has gone with its torchrun
        patience = datetime.timedelta(seconds=STORE_SECONDS) if here.torchruns_store else timeout
        shared, rank, world = next(dist.rendezvous("env://", timeout=patience))
        shared.set_timeout(timeout)
        # it outlives its ranks: after a restart the addresses of those before would be found in it
        store = dist.PrefixStore(f"attempt {here.restarts}", shared)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        if here.torchruns_store and store is None:
            host, port = here.address
            raise PeersError(f"the torchrun of this process is gone: no store at {host}:{port}: {first}") from error
        raise PeersError(f"rank {here.rank} cannot reach the others: {first}; {ADVICE}") from error


def first_collective(device: torch.device) -> float | None:
    """One all-reduce, before memory is full and minutes are spent; its GB/s on GPUs. Ends the process if it hangs."""
    world = dist.get_world_size()
    if world == 1:
        return None

    where = f"rank {dist.get_rank()} on {socket.gethostname()}"

    def give_up() -> None:
        message = f"error: {where}: the first all-reduce was not over in {FIRST_SECONDS:g} s; {ADVICE}"
        print(message, file=sys.stderr, flush=True)
        leave(INTERNAL, message, at_once=True)

    watch = threading.Timer(FIRST_SECONDS, give_up)
    watch.daemon = True
    watch.start()
    block = torch.ones((64 if device.type == "cuda" else 1) << 18, device=device)  # of 4 bytes
    try:
        max_over_ranks(0.0)
        for _ in range(3):  # the first one makes the connections
            begin = time.perf_counter()
            dist.all_reduce(block)
            block[-1].item()  # wait for it
            seconds = time.perf_counter() - begin
    except RuntimeError as error:
        raise PeersError(f"{where}: the first all-reduce failed: {str(error).splitlines()[0]}; {ADVICE}") from error
    watch.cancel()
    return 2 * (world - 1) / world * block.nbytes / seconds / 1e9 if device.type == "cuda" else None


def stop() -> None:
    """Leave the process group, all ranks together; the barrier and the collection keep gloo from aborting at exit."""
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()


def all_reduce(value: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """Sum of a device tensor over all ranks, in place, or what else op names."""
    if dist.get_world_size() > 1:  # alone there is nothing to do, and MPS has no collectives
        dist.all_reduce(value, op=op)
    return value


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank; group: long_group by default. Collective."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=group or long_group)
    return everyone


@contextlib.contextmanager
def may_take_long() -> Iterator[None]:
    """For the watchdog: what runs in this context may take long."""
    progress.long_waits += 1
    try:
        yield
    finally:
        progress.long_waits -= 1
        progress.at = time.monotonic()


def result_or_error(function: Callable, args: tuple) -> tuple[Any, Exception | None]:
    """The result of function(*args), or its error."""
    try:
        return function(*args), None
    except Exception as error:
        return None, error


def on_each_node(env: Env, function: Callable, *args: Any, but_rank_0: bool = False) -> list[Any]:
    """Run function(*args), however long, on the first process of every node; a failure is raised on all. Collective.

    Returns each rank's result, None for those that did not run it. Raises ConfigError for a node without a first process.
    """
    node, first = socket.gethostname(), env.local_rank == 0
    with may_take_long():
        mine = result_or_error(function, args) if first and not (env.main and but_rank_0) else (None, None)
        everyone = gather((*mine, node, first))
    if without := {node for *_, node, _ in everyone} - {node for *_, node, first in everyone if first}:
        nodes = ", ".join(sorted(without))
        raise ConfigError(f"no process of {nodes} has LOCAL_RANK=0, the first of a node; torchrun sets it")
    for _, error, *_ in everyone:
        if error is not None:
            raise error
    return [result for result, *_ in everyone]


def on_rank_0(function: Callable, *args: Any) -> Any:
    """Run function(*args), however long, on rank 0; every rank returns its result or raises its error. Collective."""
    if not dist.is_initialized():
        return function(*args)
    box: list[Any] = [None]
    with may_take_long():
        if dist.get_rank() == 0:
            box[0] = result_or_error(function, args)
        dist.broadcast_object_list(box, src=0, group=long_group)
    result, error = box[0]
    if error is not None:
        raise error
    return result


def max_over_ranks(*flags: float) -> list[float]:
    """The largest of each flag over all ranks: a host-side collective that does not wait for the device."""
    values = torch.tensor(flags, dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=host_group)
    progress.collectives, progress.at = progress.collectives + 1, time.monotonic()
    return values.tolist()


def age() -> float:
    """Seconds since this process began, its imports included; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ticks = int(locks.began("self"))
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0


def busy_note(device: torch.device, threads: int, key: str = ", or cpu_threads=1,") -> str:
    """A note where other work has this machine's cores: OpenMP's threads wait for each other in a loop."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if device.type != "cpu" or threads == 1 or passive or load < BUSY * cores:
        return ""
    return (
        f"{load:.0f} processes want this machine's {cores} cores: OMP_WAIT_POLICY=PASSIVE in front of the command{key} "
        "may make it many times faster (on idle cores slower)"
    )


def warn_if_busy(device: torch.device, threads: int, key: str = ", or cpu_threads=1,") -> None:
    """For commands beside train.py, whose plan has it."""
    if note := busy_note(device, threads, key):
        print(f"note: {note}", file=sys.stderr, flush=True)


def describe(env: Env, cfg: Config) -> str:
    """Device, processes, strategy and precision in words."""
    device = env.device_name
    if env.device.type == "cpu":
        device += f", {env.threads} thread{'s' if env.threads > 1 else ''} per process"
    strategy = cfg.parallel if env.world_size > 1 or cfg.parallel == "fsdp" else "one process"
    if cfg.shard_size not in (0, env.world_size):
        strategy += f" {env.world_size // cfg.shard_size} copies x {cfg.shard_size} shards"
    compiled = "compiled" if cfg.compile_model else "not compiled"
    bus = f", all-reduce {env.bandwidth:.3g} GB/s" if env.bandwidth else ""
    return f"{env.world_size} x {device}{bus}; {strategy}, {cfg.mixed_precision.replace('no', 'fp32')}, {compiled}"
