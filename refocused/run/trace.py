"""trace.jsonl: the proof that a resumed run is the same run, and where the time that was paid for went."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refocused.run.logs import File
from refocused.run.messages import duration

LARGEST = 1 << 53  # of a number in a line; beyond it JSON's numbers are not exact everywhere
CAUSES = {  # of time that did not become training: in words
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


class Diverged(ValueError):
    """With deterministic=true a replay was not the same run."""

    exit_code = 70


def number(value: Any) -> float | None:
    """A value of a line as a finite number; None where it is none: anything may have damaged the file."""
    return float(value) if type(value) in (int, float) and abs(value) <= LARGEST else None


class Lines:
    """The lines of a trace.jsonl with a whole number "step"; others are counted. Iterating raises OSError."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0  # bytes of whole lines so far, without a last one that a kill cut
        self.unreadable = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with open(self.path, "rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self.size += len(raw)
                line: Any = None
                with contextlib.suppress(ValueError, RecursionError):
                    line = json.loads(raw)
                step = line.get("step") if isinstance(line, dict) else None
                if type(step) is int and 0 <= step <= LARGEST and type(line.get("event", "")) is str:
                    yield line
                else:
                    self.unreadable += 1


class Trace:
    """trace.jsonl: a line for each step, and lines with an "event". Steps that are run again are compared with theirs."""

    COMPARED = ("loss_hex", "grad_norm_hex", "lr_hex", "samples")

    def __init__(self, file: File, start_step: int, max_steps: int = LARGEST):
        """Raises OSError where what is there cannot be read."""
        self.file = file
        self.expected: dict[int, dict[str, Any]] = {}
        self.events: dict[tuple[str, int], dict[str, Any]] = {}
        self.clocks: dict[str, dict[str, Any]] = {}  # of each run, by when it began, its last one
        self.evaluation: float | None = None  # the loss that follows the checkpoint of start_step
        lines, made = Lines(file.path), set[int]()
        for line in lines:
            step = line["step"]
            if line.get("event", "skip") == "skip":  # a step; one that came before differed: it began another run
                if step in made:
                    made = {s for s in made if s < step}
                    self.expected = {s: was for s, was in self.expected.items() if s < step}
                    self.events = {key: was for key, was in self.events.items() if key[1] < step}
                made.add(step)
            if line.get("event") == "clock":
                self.clocks[str(line.get("began"))] = line
            elif step == start_step and line.get("event") in ("checkpoint", "eval"):
                self.evaluation = number(line.get("loss"))
            elif step <= start_step:
                continue
            elif "event" not in line:
                self.expected[step] = line
            else:
                self.events[line["event"], step] = line
        self.unreadable = lines.unreadable
        with open(file.path, "rb") as torn:
            torn.seek(lines.size)
            tail = torn.read(9)
        if any(own.startswith(tail[: len(own)]) for own in (b'{"step": ', b'{"event": ')):
            os.truncate(file.path, lines.size)
        else:  # no line of ours: it stays, and is counted as unreadable
            file.write(b"\n")
        self.same = self.missing = 0
        self.first_difference: str | None = None
        known = [*self.expected, *(step for kind, step in self.events if kind == "skip")]
        self.last = max((step for step in known if step <= max_steps), default=0)  # that a replay goes to

    def record(self, step: int, figures: dict[str, float], ids: np.ndarray, extra: dict[str, Any]) -> None:
        """Compare a step with its line, and write one if there is none or it differs."""
        line: dict[str, Any] = {"step": step}
        for key, value in figures.items():
            line |= {key: readable(value), f"{key}_hex": value.hex()}
        line["samples"] = fingerprint(ids)
        if self.events.pop(("skip", step), None):
            self.differs(step, "was skipped, is run")
        if before := self.expected.pop(step, None):
            differs = [k for k in self.COMPARED if before.get(k) != line[k]]
            if differs:
                self.differs(step, ", ".join(difference(k, before, line) for k in differs))
            else:
                self.same += 1
                if not self.first_difference:
                    return  # the line stands already; behind a difference all are written, as another run's
        elif step < self.last:
            self.missing += 1
        self.write(line | {key: readable(value) for key, value in extra.items()})

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")

    def event(self, kind: str, step: int, **fields: Any) -> bool:
        """Something that happened after `step`; False if its line is there already, whatever its *_seconds."""
        line = {"event": kind, "step": step, **{key: readable(value) for key, value in fields.items()}}
        before = self.events.pop((kind, step), {})
        if all(before.get(key) == value for key, value in line.items() if not key.endswith("_seconds")):
            return False
        self.write(line)
        return True

    def skipped(self, step: int, ids: np.ndarray) -> None:
        line = {"samples": fingerprint(ids)}
        before = self.events.get(("skip", step))
        if self.expected.pop(step, None):
            self.differs(step, "was run, is skipped")
        elif before and before.get("samples") != line["samples"]:
            self.differs(step, difference("samples", before, line))
        if self.first_difference:
            self.events.pop(("skip", step), None)
        self.event("skip", step, **line)

    def differs(self, step: int, how: str) -> None:
        if self.first_difference is None:
            self.first_difference = f"step {step}: {how}"
            # another run from here on, and so are its checkpoints and evaluations, whatever they are called
            self.events = {key: line for key, line in self.events.items() if key[0] == "skip"}

    def replayed(self, step: int, over: bool = False) -> tuple[int, str | None] | None:
        """(how many steps were identical, the first difference or None), once, at the end of what can be compared."""
        if not self.last or (step < self.last and not over):
            return None
        self.last = 0
        return (self.same, self.first_difference) if self.same or self.missing or self.first_difference else None


def difference(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What was and what is; in hexadecimals only what decimals do not tell apart."""
    plain = key.removesuffix("_hex")
    was, value = (f"{line[plain]:.6g}" if isinstance(line.get(plain), float) else "" for line in (before, now))
    if was and value and was != value:
        return f"{plain} was {was}, is {value}"
    return f"{key} was {str(before.get(key))[:80]}, is {now[key]}"


def readable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]


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
