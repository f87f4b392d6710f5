"""How a process leaves: the exit codes of a run, and the one way out."""

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable

import torch.distributed as dist

DONE = 0
MISTAKE = 2  # in the config or the command
NOT_FINITE = 65
NO_DATA = 66  # or no checkpoint that can be loaded
INTERNAL = 70  # a bug, lost peers, or a hang
NOT_IN_BUCKET = 74  # the last checkpoint did not get there
STOPPED = 75  # by a signal, and saved
CRASH_LOOP = 78

at_leave: list[Callable[[int, str], None]] = []  # called with code and words, whatever the way out


def leave(code: int, words: str = "", at_once: bool = False) -> int:
    """The last act of every process of a run; its words have been said, and are handed on to torchrun's report.

    After an error nobody knows where the other processes are, and taking the group down would wait for them, under NCCL
    for ever, or fail on a GPU that has failed. Such a process is gone, as is any `at_once`; else the code is returned.
    """
    for function in at_leave:
        with contextlib.suppress(Exception):  # what they note matters less than leaving
            function(code, words)
    if code and (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        extra = {"py_callstack": words or f"exit code {code}", "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(file, "w") as report:
            json.dump({"message": {"message": words, "errorCode": code, "extraInfo": extra}}, report)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    if at_once or (dist.is_initialized() and (code or dist.get_world_size() > 1)):
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    return code
