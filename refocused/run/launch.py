"""torchrun with the run's own exit code and the run's own last line.

    python -m refocused.run.launch --standalone --nproc_per_node=2 train.py configs/demo.py resume=latest

Flags, their PET_* variables and the engine are torchrun's. torchrun itself ends every failure with exit code 1 and a
traceback, so a supervisor could not tell a mistake from a stop that is to be continued.
"""

import argparse
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

from configs import ConfigError
from refocused import entry
from refocused.run.exits import DONE, INTERNAL, MISTAKE, STOPPED, Cause, in_order

SILENT = "it ended without a message"


def cause_of_failure(rank: int, failure: ProcessFailure) -> Cause:
    """What torchrun knows of a rank that failed."""
    code, message = failure.exitcode, failure.message
    if isinstance(message, dict):
        return cause_of_report(message, f"rank {rank}", code)
    if code == -signal.SIGKILL:
        message = "it was killed by SIGKILL; out of memory? `dmesg` says so"
    elif code > 0:
        message = SILENT
    if code == 1:  # Python's own for a traceback, and faulthandler's for a process that hangs
        code, message = INTERNAL, f"{message}; the lines above may say why"
    ended_by_torchrun = code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    return Cause(code if code > 0 else INTERNAL, message, failure.timestamp, ended_by_torchrun, f"rank {rank}")


def cause_of_report(report: dict[str, Any], who: str, code: int = INTERNAL) -> Cause:
    """What a rank left in its error file."""
    extra = report.get("extraInfo", {})
    at = extra.get("at", float(extra.get("timestamp", 0)))
    return Cause(report.get("errorCode", code), report["message"], at, extra.get("secondary", False), who)


def causes_of_reports(folder: Path, since: float) -> list[Cause]:
    """What the ranks of the last attempt left in the folder."""
    found = sorted((path.stat().st_mtime, path) for path in folder.glob("**/error.json"))
    last = [path for at, path in found if at >= since and path.parent.parent == found[-1][1].parent.parent]
    return [cause_of_report(json.loads(p.read_text())["message"], f"rank {p.parent.name} of this node") for p in last]


def report_lines(causes: list[Cause]) -> list[str]:
    """A line for each cause, without the secondary ones. The one that decides comes last."""
    said: dict[tuple[int, str], str] = {}
    for cause in causes:
        if not cause.secondary or causes[0].secondary:
            last = (cause.message.strip().splitlines() or [SILENT])[-1]
            said.setdefault((cause.code, last), f"launch: {cause.who} ended with {cause.code}: {last}")
    return list(said.values())[::-1]


def cause_of_torchrun(error: Exception, secondary: bool) -> Cause:
    """Of a failure of torchrun itself: a mistake in its flags, or a node or store that a restart may find again."""
    inner = error.__cause__ if isinstance(error, RendezvousConnectionError) and error.__cause__ else error
    message = (str(inner).strip().splitlines() or [type(error).__name__])[0]
    code = MISTAKE if isinstance(error, ValueError | AssertionError) else INTERNAL
    if "EADDRINUSE" in message or "in use" in message:
        code, message = MISTAKE, f"{message}; choose another --master_port or --rdzv_endpoint"
    elif isinstance(error, RendezvousTimeoutError):
        message = "the other nodes did not start in time; run the command on each of them"
    elif isinstance(error, RendezvousConnectionError | dist.DistNetworkError):
        message = f"no answer at the endpoint, so the node that serves it has ended or has not started: {message}"
    return Cause(code, message, secondary=secondary, who="torchrun")


def check(args: argparse.Namespace) -> None:
    """Flags for which torchrun has no message, and what one machine needs. Raises ConfigError."""
    if not re.fullmatch(r"[1-9]\d*|gpu|cpu|xpu|auto", args.nproc_per_node):
        raise ConfigError(f"--nproc_per_node={args.nproc_per_node} is no number from 1 on, gpu or cpu")
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", args.nnodes):
        raise ConfigError(f"--nnodes={args.nnodes} is no number from 1 on")
    if args.nproc_per_node == "gpu" and not torch.cuda.is_available():
        print("launch: there is no GPU: one process trains on the CPU", file=sys.stderr)
        args.nproc_per_node = "1"
    if args.standalone or args.nnodes in ("1", "1:1"):
        args.local_addr = args.local_addr or "127.0.0.1"  # this machine's own name may not resolve


def launch(argv: list[str]) -> int:
    args = torchrun.parse_args(argv)
    check(args)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun sets, in three lines of warning
    if "TORCH_LOGS" not in os.environ:
        for name in logging.root.manager.loggerDict:
            if name.startswith("torch.distributed.elastic"):  # each has a level of its own; our last line says it all
                logging.getLogger(name).setLevel(logging.CRITICAL)
    begin = time.time() - 1
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        args.log_dir = args.log_dir or folder  # where the ranks' reports go
        try:
            torchrun.run(args)
            return DONE
        except ChildFailedError as error:
            causes = [cause_of_failure(rank, failure) for rank, failure in error.failures.items()]
        except SignalException:
            causes = causes_of_reports(Path(args.log_dir), begin)
            causes = causes or [Cause(STOPPED, "stopped by a signal; earlier checkpoints stand", who="every rank")]
        except Exception as error:  # torchrun's own; what its ranks reported comes first
            causes = causes_of_reports(Path(args.log_dir), begin)
            causes.append(cause_of_torchrun(error, secondary=bool(causes)))
    causes = in_order(causes)
    print(*report_lines(causes), sep="\n", file=sys.stderr, flush=True)
    return causes[0].code


if __name__ == "__main__":
    sys.exit(entry.run(launch, sys.argv[1:]))
