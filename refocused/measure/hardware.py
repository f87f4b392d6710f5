"""A few seconds at the start that find the slow one: GPU, link or disk. `./setup.sh --check`, and train.py on GPUs."""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from configs import Config
from refocused import entry
from refocused.run import processes
from refocused.run.processes import Env

# reached in bf16 by products of this size on a machine that is well, TFLOP/s: ml-engineering's table (Stas Bekman)
CEILINGS = {"A100-SXM": 271.2, "H100 80GB HBM3": 794.5, "H200": 794.5}  # not of the slower PCIe and NVL cards
SLACK = 0.9  # below this share of the others, or of the ceiling, it is slow
UNITS = {"product": "TFLOP/s", "to GPU": "GB/s", "from GPU": "GB/s"}


def seconds(device: torch.device, function, repeats: int) -> float:
    """Of one call, the best of `repeats` after a first one; the device is waited for."""
    found = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def gpu(device: torch.device, n: int = 8192, nbytes: int = 1 << 28) -> dict[str, float]:
    """Rates of one device: a bf16 product n x n x n in TFLOP/s; copies from and to pinned memory in GB/s, of a GPU."""
    x = torch.randn(n, n, device=device).bfloat16()  # ones cost less power, and are a tenth faster
    found = {"product": 2 * n**3 / seconds(device, lambda: x @ x, 10) / 1e12}
    if device.type == "cuda":
        host, there = (
            torch.empty(nbytes, dtype=torch.uint8, pin_memory=True),
            torch.empty(nbytes, dtype=torch.uint8, device=device),
        )
        found["to GPU"] = nbytes / seconds(device, lambda: there.copy_(host, non_blocking=True), 3) / 1e9
        found["from GPU"] = nbytes / seconds(device, lambda: host.copy_(there, non_blocking=True), 3) / 1e9
    return found


def disk(folder: Path, nbytes: int = 1 << 28) -> tuple[float, float]:
    """MB/s of writing a file in folder, fsync included, and of reading it back, not from memory where that can be told."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(nbytes >> 20):
            file.write(block)
        os.fsync(file.fileno())
        wrote = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        ready = time.perf_counter()
        while file.read(1 << 20):
            pass
        read = time.perf_counter() - ready
    return nbytes / (wrote - begin) / 1e6, nbytes / read / 1e6


def slow(rows: list[dict[str, float]], names: list[str], ceiling: float | None) -> list[str]:
    """What is slower than its like: rows of rates, their owners' names, and what the product should reach if known."""
    found = []
    for key in rows[0]:
        for row, name in zip(rows, names, strict=True):
            others = sorted(r[key] for r in rows if r is not row)
            usual = others[len(others) // 2] if others else 0.0
            bound = max(usual, ceiling or 0.0) if key == "product" else usual
            if row[key] < SLACK * bound:
                against = "the others" if bound == usual else "such a GPU in good health"
                found.append(f"{name} is slow: {key} {row[key]:.3g} {UNITS[key]}, {against} {bound:.3g}")
    return found


def words(rows: list[dict[str, float]], names: list[str], device_name: str) -> list[str]:
    """The lowest to highest rates, then a line for each that is slow."""
    shown = [
        f"{key} {min(r[key] for r in rows):.3g} to {max(r[key] for r in rows):.3g} {UNITS[key]}" for key in rows[0]
    ]
    ceiling = next((rate for part, rate in CEILINGS.items() if part in device_name and "NVL" not in device_name), None)
    return [", ".join(shown), *slow(rows, names, ceiling)]


def sniff(cfg: Config, env: Env, n: int = 8192, nbytes: int = 1 << 28) -> str:
    """Lines for the plan: this run's GPUs, all-reduce and disk, and which of them is slow. Collective."""
    mine = gpu(env.device, n, nbytes)
    rows: list[dict[str, float]] = [{}] * env.world_size
    dist.all_gather_object(rows, mine, group=processes.patient)
    names = [f"rank {rank}" for rank in range(env.world_size)]
    write, read = processes.on_rank_0(disk, Path(cfg.output_dir), nbytes)
    first, *complaints = words(rows, names, env.device_name)
    line = f"measured  {first}, disk of output_dir {write:,.0f} MB/s written and {read:,.0f} read"
    return "\n".join([line, *(f"note      {text}" for text in complaints)])


def main(argv: list[str]) -> int:
    """What setup.sh prints: a line of rates, then one for each GPU that is slow."""
    count = torch.cuda.device_count()
    devices = [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    rows = [gpu(device) if count else gpu(device, n=1024) for device in devices]
    name = torch.cuda.get_device_name(0) if count else "CPU"
    write, read = disk(Path("."), 1 << (28 if count else 25))
    first, *complaints = words(rows, [str(device) for device in devices], name)
    print(f"{first} ({name}); this disk {write:,.0f} MB/s written and {read:,.0f} read")
    for text in complaints:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main, sys.argv[1:]))
