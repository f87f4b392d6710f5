"""Measures the rates of GPUs for a few seconds and names the slow one."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from refocused.run import gpus, processes
from refocused.run.processes import Env

SLACK = 0.9  # slow is what is below this share of the others, or of the ceiling


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


def describe(rows: list[dict[str, float]], names: list[str], device_name: str) -> list[str]:
    """The lowest to highest rates, then a line for each that is below the others', or below a known ceiling of products."""
    known = gpus.find(device_name)
    shown, slow = [], []
    for key in rows[0]:
        unit, rates = "TFLOP/s" if key == "product" else "GB/s", sorted(row[key] for row in rows)
        shown.append(f"{key} {rates[0]:.3g} to {rates[-1]:.3g} {unit}")
        for row, name in zip(rows, names, strict=True):
            others = sorted(r[key] for r in rows if r is not row)
            usual = others[len(others) // 2] if others else 0.0
            bound = max(usual, known.ceiling / 1e12) if key == "product" and known and known.ceiling else usual
            if row[key] < SLACK * bound:
                against = "the others" if bound == usual else "such a GPU in good health"
                slow.append(f"{name} is slow: {key} {row[key]:.3g} {unit}, {against} {bound:.3g}")
    return [", ".join(shown), *slow]


def measure_devices(env: Env) -> str:
    """Lines for the plan: the rates of this run's GPUs, and which of them is slow. Collective."""
    rows = processes.gather(gpu(env.device))
    line, *slow = describe(rows, [f"rank {rank}" for rank in range(env.world_size)], env.device_name)
    return "\n".join([f"measured  {line}", *(f"note      {text}" for text in slow)])
