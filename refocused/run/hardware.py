"""Measures the rates of GPUs and disks for a few seconds and names the slow one."""

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs import Config
from refocused.run import gpus, processes
from refocused.run.processes import Env

SLACK = 0.9  # slow is what is below this share of the others, or of the ceiling
NOISE = 0.5  # the same of disks: one and the same varies by more than a tenth from one measurement to the next
UNITS = {"product": "TFLOP/s", "written": "MB/s", "read": "MB/s"}  # else GB/s


def seconds(device: torch.device, function: Callable[[], Any], repeats: int) -> float:
    """Of one call, the best of `repeats` after a first one."""
    found = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def gpu(device: torch.device, n: int = 8192, nbytes: int = 1 << 28) -> dict[str, float]:
    """A device's bf16 product n x n x n in TFLOP/s, its memory and, of a GPU, copies to and from the host in GB/s."""
    x = torch.randn(n, n, device=device).bfloat16()  # ones cost less power, and are a tenth faster
    found = {"product": 2 * n**3 / seconds(device, lambda: x @ x, 10) / 1e12}
    a, b = (torch.empty(nbytes // 4, device=device).fill_(1.0) for _ in range(2))
    found["memory"] = 3 * nbytes / seconds(device, lambda: torch.add(a, b, out=a), 5) / 1e9
    if device.type == "cuda":
        host, there = torch.empty(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8, device=device)
        with contextlib.suppress(RuntimeError):  # a system that pins nothing shows in the rate
            host = host.pin_memory()
        found["to GPU"] = nbytes / seconds(device, lambda: there.copy_(host, non_blocking=True), 3) / 1e9
        found["from GPU"] = nbytes / seconds(device, lambda: host.copy_(there, non_blocking=True), 3) / 1e9
    return found


def disk(folder: Path, nbytes: int = 1 << 28) -> dict[str, float]:
    """MB/s of writing a file with fsync, and of reading it back, past the system's cache where that can be told."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(nbytes >> 20):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.perf_counter()
        while file.read(1 << 20):
            pass
        return {"written": nbytes / written / 1e6, "read": nbytes / (time.perf_counter() - begin) / 1e6}


def of_node(folder: Path, nbytes: int) -> tuple[str, dict[str, float]]:
    """A name for this node's disk, and its rates; none if it fails, which is reported where the disk is needed."""
    name = f"the disk of {folder} on {socket.gethostname()}"
    try:
        return name, disk(folder, nbytes)
    except OSError as error:
        return f"{name} ({error.strerror})", {}


def slow(
    rows: list[dict[str, float]], names: list[str], ceiling: float | None = None, slack: float = SLACK
) -> list[str]:
    """A line for each rate that is below the others', or below the ceiling of products where that is known."""
    found = []
    for key in rows[0]:
        for row, name in zip(rows, names, strict=True):
            others = sorted(r[key] for r in rows if r is not row)
            usual = others[len(others) // 2] if others else 0.0
            bound = max(usual, ceiling or 0.0) if key == "product" else usual
            if row[key] < slack * bound:
                against = "the others" if bound == usual else "such a GPU in good health"
                found.append(f"{name} is slow: {key} {row[key]:.3g} {UNITS.get(key, 'GB/s')}, {against} {bound:.3g}")
    return found


def describe(rows: list[dict[str, float]], names: list[str], device_name: str) -> list[str]:
    """The lowest to highest rates, then a line for each that is slow."""
    spans = {key: sorted(row[key] for row in rows) for key in rows[0]}
    shown = [f"{key} {span[0]:.3g} to {span[-1]:.3g} {UNITS.get(key, 'GB/s')}" for key, span in spans.items()]
    known = gpus.find(device_name)
    return [", ".join(shown), *slow(rows, names, known.ceiling / 1e12 if known and known.ceiling else None)]


def measure_devices(cfg: Config, env: Env, n: int = 8192, nbytes: int = 1 << 28) -> str:
    """Lines for the plan: the rates of this run's GPUs and disks, and which of them is slow. Collective."""
    rows = processes.gather(gpu(env.device, n, nbytes))
    line, *complaints = describe(rows, [f"rank {rank}" for rank in range(env.world_size)], env.device_name)
    nodes = [node for node in processes.on_each_node(env, of_node, Path(cfg.output_dir), nbytes) if node]
    if disks := {name: rates for name, rates in nodes if rates}:
        write, read = (min(rates[key] for rates in disks.values()) for key in ("written", "read"))
        line += f", disk of output_dir {write:,.0f} MB/s written and {read:,.0f} read"
        complaints += slow(list(disks.values()), list(disks), slack=NOISE)
    complaints += [f"{name} could not be measured" for name, rates in nodes if not rates]
    return "\n".join([f"measured  {line}", *(f"note      {text}" for text in complaints)])
