"""The plan's step times against runs: `python bench.py plan --check`; part 4 of `make gpu-check` has a table of its own."""

import contextlib
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from configs import Config
from refocused.measure import calibrate, cost, planner, steps
from refocused.measure.calibrate import WALL
from refocused.run.origin import hardware

# (size, processes, strategy, keys): what changes a step's time, one thing at a time
LAYOUTS = (
    ("medium", 1, "ddp", "per_device_train_batch_size=1"),
    ("medium", 1, "ddp", "per_device_train_batch_size=2"),
    ("medium", 1, "ddp", "per_device_train_batch_size=4"),
    ("medium", 1, "ddp", "per_device_train_batch_size=8"),
    ("medium", 1, "ddp", "per_device_train_batch_size=2 gradient_accumulation_steps=2"),
    ("medium", 1, "ddp", "per_device_train_batch_size=4 activation_checkpointing=selective"),
    ("medium", 1, "ddp", "per_device_train_batch_size=4 activation_checkpointing=full"),
    ("medium", 2, "ddp", "per_device_train_batch_size=1"),
    ("medium", 2, "ddp", "per_device_train_batch_size=2 gradient_accumulation_steps=2"),
    ("medium", 2, "fsdp", "per_device_train_batch_size=1"),
    ("medium", 2, "fsdp", "per_device_train_batch_size=4"),
    ("medium", 2, "fsdp", "per_device_train_batch_size=2 gradient_accumulation_steps=2"),
    ("wide", 1, "ddp", "per_device_train_batch_size=1"),
    ("wide", 1, "ddp", "per_device_train_batch_size=4 activation_checkpointing=full"),
    ("wide", 2, "fsdp", "per_device_train_batch_size=2"),
)
ALL = ["sequence_length=512"]  # of the benchmark's sizes, for a check of minutes
ERROR, RANK = 0.2, 0.9


def predicted(layouts: list[tuple], settings: list[str], clock: Callable[[], float]) -> list[float]:
    """Seconds of each layout's step on this machine, which is calibrated for each number of processes."""
    found: dict[tuple, float] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for world in sorted({layout[1] for layout in layouts}):
        mine = [(layout, configured(layout, settings)) for layout in layouts if layout[1] == world]
        works = [planner.seen(cfg, world, device).work for _, cfg in mine]
        machine = calibrate.calibrate(mine[0][1], world, set().union(*(work.shapes() for work in works)), clock)
        for (layout, cfg), work in zip(mine, works, strict=True):
            found[layout] = cost.step(work, cfg, world, machine).seconds
    return [found[layout] for layout in layouts]


def configured(layout: tuple, settings: list[str]) -> Config:
    size, _, strategy, keys = layout
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        return steps.write_inputs(Path(folder), steps.SIZES[size], [*keys.split(), f"parallel={strategy}", *settings])


def measured(layout: tuple, settings: list[str], rounds: int, cache: Path, figure: str) -> float:
    """Seconds of a step of train.py in processes of its own: the best of rounds of one step."""
    size, world, strategy, keys = layout
    settings = [*keys.split(), *settings]
    with tempfile.TemporaryDirectory(prefix="plan-") as name, contextlib.ExitStack() as running:
        steps.write_inputs(Path(name), steps.SIZES[size], settings)
        contender = steps.start(f"ours-{strategy}-{world}", Path(name), settings, cache)
        for process in contender.processes:
            running.callback(process.wait)
            running.callback(process.kill)
        contender.turn(2)
        return min(contender.turn(1)[figure] for _ in range(rounds))


def ranks(values: list[float]) -> list[int]:
    return [sorted(values).index(value) for value in values]


def table(layouts: list[tuple], found: list[float], seen: list[float]) -> tuple[str, float, float]:
    """The markdown table, the largest relative error and the rank correlation (Spearman)."""
    lines = ["| size | layout | predicted, s | measured, s | predicted / measured |", "|---|---|---:|---:|---:|"]
    names = {"ddp": "DDP", "fsdp": "FSDP2"}
    for (size, world, strategy, keys), mine, real in zip(layouts, found, seen, strict=True):
        where = "one process" if world == 1 else f"{names[strategy]} {world}"
        lines.append(f"| {size} | {where}, {keys.replace(' ', ', ')} | {mine:.3f} | {real:.3f} | {mine / real:.2f} |")
    worst = max(abs(mine / real - 1) for mine, real in zip(found, seen, strict=True))
    return "\n".join(lines), worst, statistics.correlation(ranks(found), ranks(seen))


def check(layouts: list[tuple], settings: list[str], rounds: int, busy: bool) -> tuple[str, bool]:
    """The table with its summary, and whether the plan is good enough."""
    clock, figure = (calibrate.busy, "busy") if busy else (WALL, "seconds")
    with tempfile.TemporaryDirectory(prefix="plan-cache-") as cache:
        before = predicted(layouts, settings, clock)
        seen = [measured(layout, settings, rounds, Path(cache), figure) for layout in layouts]
        found = [min(pair) for pair in zip(before, predicted(layouts, settings, clock), strict=True)]
    text, worst, rank = table(layouts, found, seen)
    text += (
        f"\n\nlargest error {worst:.0%}, rank correlation {rank:.3f}, {len(layouts)} layouts; best of {rounds} steps"
    )
    return text + (", in CPU seconds per thread" if busy else ""), worst <= ERROR and rank >= RANK


def main(settings: list[str], rounds: int, busy: bool) -> int:
    print(hardware(), flush=True)
    text, good = check(list(LAYOUTS), [*ALL, *settings], rounds, busy)
    print(text)
    return 0 if good else 1
