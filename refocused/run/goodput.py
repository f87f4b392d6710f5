"""Where the time that was paid for went: training, and what was lost to which cause, from the clocks in trace.jsonl."""

import contextlib
import os
import time
from collections.abc import Iterable
from typing import Any

from refocused.run.messages import duration
from refocused.run.trace import number

CAUSES = {
    "gap_seconds": "between runs",
    "startup_seconds": "start-up",
    "compile_seconds": "compilation and warm-up",
    "replay_seconds": "steps run again",
    "data_seconds": "data wait",
    "save_seconds": "save stall",
    "eval_seconds": "evaluation",
    "end_seconds": "last save and upload",
}
# what a run notes since its process began; "began" is Unix time, "from" the step that it started at
OWN = [key for key in CAUSES if key not in ("gap_seconds", "replay_seconds")]
NOTED = ["began", "from", "step", "run_seconds", *OWN]


def goodput(clocks: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds: {"paid_seconds": first process's start to last sign of life, "train_seconds": ..., and each of CAUSES}.

    clocks: the trace's lines whose event is "clock", in their order. The last one of each run counts, a damaged one does
    not. Between a run that was done and one that goes on from it nothing is paid for.
    """
    runs = {clock["began"]: clock for clock in clocks if is_whole(clock)}
    seconds = dict.fromkeys(("paid_seconds", "train_seconds", *CAUSES), 0.0)
    reached, over = 0, None
    for run in runs.values():
        lost = {key: run[key] for key in OWN}
        busy = max(0.0, run["run_seconds"] - sum(lost.values()))
        steps = run["step"] - run["from"]
        again = min(steps, max(0, reached - run["from"]))
        lost["replay_seconds"] = busy * again / steps if steps else 0.0
        lost["gap_seconds"] = max(0.0, run["began"] - over) if over is not None else 0.0
        for key, value in lost.items():
            seconds[key] += value
        seconds["train_seconds"] += busy - lost["replay_seconds"]
        seconds["paid_seconds"] += run["run_seconds"] + lost["gap_seconds"]
        reached = max(reached, run["step"])
        over = None if run.get("done") is True else run["began"] + run["run_seconds"]
    return seconds


def is_whole(clock: dict[str, Any]) -> bool:
    figures = [number(clock.get(key)) for key in NOTED]
    return all(figure is not None and figure >= 0 for figure in figures) and clock["from"] <= clock["step"]


def sentence(seconds: dict[str, float], price: float = 0.0) -> str:
    """In words; price: dollars per hour of all machines together, 0 for none."""
    paid = seconds["paid_seconds"]

    def amount(value: float) -> str:
        return duration(value) + (f" (${value / 3600 * price:,.2f})" if price else "")

    lost = sorted(((seconds[key], name) for key, name in CAUSES.items()), reverse=True)
    parts = [f"{name} {amount(value)}" for value, name in lost if value >= max(0.5, 0.001 * paid)]
    share = seconds["train_seconds"] / paid if paid else 0.0
    return f"{share:.1%} of {amount(paid)} became training" + (f"; lost: {', '.join(parts)}" if parts else "")


def age() -> float:
    """Seconds since this process began, its imports included; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0
