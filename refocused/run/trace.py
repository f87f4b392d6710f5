"""trace.jsonl: the proof that a resumed run is the same run."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np


class Diverged(ValueError):
    """With deterministic=true a replay was not the same run."""

    exit_code = 70


class Trace:
    """trace.jsonl: one line per step, the proof that a resumed run is the same run, and lines with an "event" between.

    Steps that are run again after a resume are compared with the lines that are there already.
    """

    COMPARED = ("loss_hex", "grad_norm_hex", "lr_hex", "samples")

    def __init__(self, path: Path, start_step: int):
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a kill may have cut the last line
        self.file = path.open("a", buffering=1)  # a line reaches the kernel at once: a SIGKILL loses none
        os.truncate(path, len(whole))
        self.expected: dict[int, dict] = {}
        self.events: dict[tuple[str, int], dict] = {}
        for line in map(json.loads, whole.splitlines()):  # of a step that came more than once the last line counts
            if (step := line["step"]) <= start_step:
                continue
            if "event" not in line:
                self.expected[step] = line
                self.events.pop(("skip", step), None)
            else:
                self.events[line["event"], step] = line
                if line["event"] == "skip":
                    self.expected.pop(step, None)
        self.same, self.first_difference = 0, None
        self.last = max(self.expected, default=0)

    def record(self, step: int, figures: dict[str, float], ids: np.ndarray, extra: dict[str, Any]) -> None:
        line = {"step": step}
        for key, value in figures.items():
            line |= {key: readable(value), f"{key}_hex": value.hex()}
        line["samples"] = fingerprint(ids)
        if self.events.pop(("skip", step), None):
            self.differs(step, "was skipped, is run")
        before = self.expected.pop(step, None)
        if before is not None:
            differs = [k for k in self.COMPARED if before.get(k) != line[k]]
            if not differs:
                self.same += 1
                return  # the line stands already
            self.differs(step, ", ".join(f"{k} was {before.get(k)}, is {line[k]}" for k in differs))
        self.file.write(json.dumps(line | {key: readable(value) for key, value in extra.items()}) + "\n")

    def event(self, kind: str, step: int, **fields: Any) -> bool:
        """Something that happened after `step`; False if it stands already, the clock's figures (*_seconds) apart."""
        line = {"event": kind, "step": step, **{key: readable(value) for key, value in fields.items()}}
        before = self.events.pop((kind, step), {})
        if all(before.get(key) == value for key, value in line.items() if not key.endswith("_seconds")):
            return False
        self.file.write(json.dumps(line) + "\n")
        return True

    def skipped(self, step: int, ids: np.ndarray) -> None:
        if self.expected.pop(step, None):
            self.differs(step, "was run, is skipped")
        self.event("skip", step, samples=fingerprint(ids))

    def differs(self, step: int, how: str) -> None:
        if self.first_difference is None:
            self.first_difference = f"step {step}: {how}"

    def replayed(self, step: int) -> str | None:
        """After the last step that was run before: what the comparison came to."""
        if not self.last or step < self.last:
            return None
        self.last = 0
        if self.first_difference:
            return f"replayed {self.same} steps identically, then not the same run: {self.first_difference}"
        return f"replayed {self.same} steps, {self.same} identical"

    def close(self) -> None:
        self.file.close()


def readable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]
