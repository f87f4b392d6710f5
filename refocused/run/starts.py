"""The crash-loop guard: starts in a row that came to nothing."""

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch

import configs
from configs import Config
from refocused import files
from refocused.checkpoint import manifest
from refocused.run import exits, guard, processes

WRITING = threading.Lock()


class CrashLoop(ValueError):
    """The last starts ended without a new step, and nothing has changed since."""

    exit_code = exits.CRASH_LOOP
    same_on_all_ranks = True


class Starts:
    """Counts the starts in a row without a new step, in a small file of output_dir; on rank 0, once that is locked.

    A start counts until it has made a step beyond all before, or a checkpoint: after a damaged one the steps that count
    are behind those that were made. One that ended as it should, or for a reason that its exit code names, does not
    count; nor do those of another config or other sources.
    """

    CALM = (exits.DONE, exits.MISTAKE, exits.NO_DATA, exits.STOPPED)

    def __init__(self, cfg: Config):
        """Raises CrashLoop."""
        self.path = Path(os.path.realpath(cfg.output_dir), ".starts")
        what = configs.to_json(cfg) + guard.sources() + torch.__version__
        key = hashlib.sha256(what.encode()).hexdigest()
        self.state: dict[str, Any] = {"of": key, "failed": 0, "step": 0, "saved": 0, "reason": ""}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            before = json.loads(self.path.read_bytes()) if self.path.is_file() else None
            if isinstance(before, dict) and before.get("of") == key:
                good = {k: v for k, v in before.items() if type(v) is type(self.state.get(k))}
                self.state |= good
        saved = manifest.generation(cfg.output_dir)
        if saved > self.state["saved"]:
            self.state |= {"failed": 0, "saved": saved}
        if cfg.max_failed_starts and self.state["failed"] >= cfg.max_failed_starts:
            reason = str(self.state["reason"]).strip().splitlines() or ["killed, or out of host memory, without a word"]
            raise CrashLoop(
                f"{self.state['failed']} starts in a row ended without a new step, the last with: {reason[-1]}; mend that, "
                f"or change the config, or remove {self.path} to try once more"
            )
        self.failed = self.state["failed"]
        self.write(failed=self.failed + 1, reason="")
        exits.at_leave.append(self.ended)

    def write(self, **changes: Any) -> None:
        """Replace the file, to survive even a power cut; where the disk refuses, training goes on uncounted."""
        with WRITING, contextlib.suppress(OSError):
            self.state |= changes
            files.write(self.path, json.dumps(self.state).encode())

    def note(self) -> None:
        """Called now and then: whether there is a new step by now."""
        step = processes.progress.step
        if step is not None and step > self.state["step"]:
            self.failed = 0
            self.write(failed=0, step=step, reason="")

    def ended(self, code: int, words: str) -> None:
        """Called as the process leaves."""
        self.note()
        if code in self.CALM or code >= 128:
            self.write(failed=self.failed)
        elif self.state["failed"]:
            self.write(reason=words)
