"""The exit codes of a run, and the one function that ends a process."""

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch.distributed as dist

from refocused.run.environment import launch_or_alone

DONE = 0
MISTAKE = 2  # in the config or the command
NOT_FINITE = 65
NO_DATA = 66  # or no checkpoint that can be loaded
INTERNAL = 70  # a bug, lost peers, a hang, or a bucket that does not answer
NOT_IN_BUCKET = 74  # the last checkpoint did not get there
STOPPED = 75  # when asked to; what can be saved is
CRASH_LOOP = 78

FINAL = (MISTAKE, NOT_FINITE, NO_DATA, CRASH_LOOP)  # what no restart mends

at_leave: list[Callable[[int, str], None]] = []  # called with code and message, whatever the way out


@dataclass(frozen=True)
class Cause:
    """Why a process ends."""

    code: int
    message: str = ""
    at: float = 0.0  # time.time() of the failure; causes without one keep the order in which they are given
    secondary: bool = False  # from what happened elsewhere: peers were lost, or a launcher ended this process
    who: str = ""


def in_order(causes: Iterable[Cause]) -> list[Cause]:
    """The causes, first the one whose code decides: what no restart mends, then in time, last the secondary ones."""
    return sorted(causes, key=lambda cause: (cause.code not in FINAL, cause.secondary, cause.at))


def leave(code: int, message: str = "", at_once: bool = False, at: float | None = None, secondary: bool = False) -> int:
    """The last call of every process of a run. The message, which has been printed, goes into torchrun's report too.

    at, secondary: of a Cause. After an error, taking the process group down could wait for the others for ever, or fail
    on a GPU that has failed. Such a process exits here, as any does `at_once`; otherwise the code is returned.
    """
    for function in at_leave:
        with contextlib.suppress(Exception):  # what they note matters less than leaving
            function(code, message)
    if code and (file := launch_or_alone().error_file):
        at = at or time.time()
        extra = {"py_callstack": message or f"exit code {code}", "timestamp": str(int(at)), "at": at}
        extra["secondary"] = secondary
        with contextlib.suppress(OSError), open(file, "w") as report:
            json.dump({"message": {"message": message, "errorCode": code, "extraInfo": extra}}, report)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    if at_once or (dist.is_initialized() and (code or dist.get_world_size() > 1)):
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    return code
