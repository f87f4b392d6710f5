"""This machine as hardware for the plan: its products, memory and collectives, timed in the processes of a real group."""

import functools
import math
import multiprocessing
import os
import queue
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from configs import Config
from refocused.measure import gpus
from refocused.measure.cost import Hardware
from refocused.run import environment, exits, processes

WALL = time.perf_counter


class CalibrationError(ValueError):
    exit_code = 1


def busy() -> float:
    """CPU seconds of this process's threads, shared out: what the wall clock would say had nobody else a core."""
    return time.process_time() / torch.get_num_threads()


def seconds(
    function: Callable[[], Any], device: torch.device, clock: Callable[[], float], atleast: float = 0.2
) -> float:
    """Of one call, the best of at least three, and of as many as `atleast` seconds have room for, after a first one."""
    found: list[float] = []
    begin = WALL()
    while len(found) < 4 or WALL() - begin < atleast:
        start = clock()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        found.append(clock() - start)
    return min(found[1:])


def factor(shape: tuple, stride: tuple, dtype: torch.dtype, *, device: torch.device) -> torch.Tensor:
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return torch.randn(size, device=device).to(dtype).as_strided(shape, stride)


def rates(cfg: Config, shapes: list[tuple], env: processes.Env, clock: Callable[[], float]) -> dict[str, Any]:
    """{"timed": seconds of each product, by shape; bytes/s or FLOP/s of the other kinds; seconds of an empty collective}."""
    device, world = env.device, env.world_size
    measure = functools.partial(seconds, device=device, clock=clock)
    found: dict[str, Any] = {"timed": {}}
    for shape in shapes:
        a, b = (factor(*parts, device=device) for parts in shape)
        found["timed"][shape] = measure(functools.partial(torch.matmul, a, b))
    large = 1 << (24 if device.type == "cpu" else 28)
    large -= large % (world << 16)  # of which each rank has a part, and the softmax whole rows
    x, y = torch.randn(large, device=device), torch.randn(large, device=device)
    found["bandwidth"] = 12 * large / measure(lambda: torch.add(x, y, out=x))
    h = x.bfloat16()
    found["element-wise"] = 4 * large / measure(lambda: F.gelu(h))
    found["loss"] = 8 * large / measure(lambda: torch.softmax(h.view(-1, 1 << 16), dim=-1))
    p = torch.nn.Parameter(x)
    p.grad = y
    optimizer = torch.optim.AdamW([p], fused=True)
    found["optimizer"] = 28 * large / measure(optimizer.step)
    shape = (cfg.per_device_train_batch_size, cfg.num_attention_heads, cfg.sequence_length, cfg.head_dim)
    q, k, v = (torch.randn(shape, device=device).to(h.dtype).requires_grad_() for _ in range(3))

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    found["attention"] = 7 * q.numel() * cfg.sequence_length / measure(attend)
    if world > 1:
        part, others = x[: large // world], (world - 1) / world
        ways = {
            "gather": lambda: dist.all_gather_into_tensor(x, part.clone()),
            "reduce": lambda: dist.reduce_scatter_tensor(part, y),
            "all-reduce": lambda: dist.all_reduce(y),
        }
        for kind, way in ways.items():
            dist.barrier()
            # atleast 0: every rank makes the same number of calls
            found[kind] = (2 if kind == "all-reduce" else 1) * others * 4 * large / measure(way, atleast=0)
        few = x[:world]
        found["latency"] = measure(lambda: dist.all_reduce(few), atleast=0)
    return found


def rank_of(rank: int, world: int, port: int, cfg: Config, shapes: list[tuple], clock, results) -> None:
    os.environ |= environment.variables(rank, world, port)
    warnings.simplefilter("ignore", FutureWarning)  # names of collectives that older torch does not have
    try:
        env = processes.start(cfg)
        results.put((rates(cfg, shapes, env, clock), env.device.type, env.device_name))
        processes.stop()
    except Exception:  # the others wait for it, but not who started them
        traceback.print_exc()
        exits.leave(exits.INTERNAL, at_once=True)


def calibrate(cfg: Config, world: int, shapes: Iterable[tuple], clock: Callable[[], float] = WALL) -> Hardware:
    """The hardware of `world` processes on this machine, with each product of those shapes timed; slowest rank counts."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    port = environment.free_port()
    shapes = sorted(set(shapes), key=repr)
    ranks = [context.Process(target=rank_of, args=(r, world, port, cfg, shapes, clock, results)) for r in range(world)]
    for process in ranks:
        process.start()
    found: list[tuple] = []
    while len(found) < world:
        try:
            found.append(results.get(timeout=1))
        except queue.Empty:
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.kill()
                raise CalibrationError("a process of the calibration failed, as its words above say") from None
    for process in ranks:
        process.join()
    rows, device, name = [row for row, _, _ in found], found[0][1], found[0][2]
    slowest = {key: min(row[key] for row in rows) for key in rows[0] if key not in ("timed", "latency")}
    timed = {shape: max(row["timed"][shape] for row in rows) for shape in shapes}
    products = max((flops(shape) / timed[shape] for shape in shapes), default=1e12)
    speeds = {key: rate for key, rate in slowest.items() if key not in ("bandwidth", "attention")}
    if world > 1:
        speeds["copies"] = speeds["all-reduce"]  # which they are, among fewer ranks
    return Hardware(
        name, products, slowest["attention"], slowest["bandwidth"], overlaps=device != "cpu", peak=gpus.peak_flops(name),
        latency=max(row.get("latency", 0.0) for row in rows), launch=4e-6, timed=timed, speeds=speeds, node=world,
    )  # fmt: skip


def described(machine: Hardware) -> str:
    """The rates, in words."""
    gigabytes = {"memory": machine.bandwidth, **machine.speeds}
    return f"products up to {machine.products / 1e12:.3g} TFLOP/s, GB/s: " + ", ".join(
        f"{key} {rate / 1e9:.3g}" for key, rate in gigabytes.items()
    )


def flops(shape: tuple) -> float:
    (a, *_), (b, *_) = shape
    return 2.0 * math.prod(a) * b[-1]
