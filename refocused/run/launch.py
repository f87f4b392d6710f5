"""torchrun with the run's own exit code and the run's own last line.

    python -m refocused.run.launch --standalone --nproc_per_node=2 train.py configs/demo.py resume=latest

Flags and engine are torchrun's. That turns every failure into exit code 1 under a traceback of its own, and then a
supervisor cannot tell a mistake, which ends the machine, from a stop, which is to be continued.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed.run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from refocused import entry
from refocused.run.exits import CRASH_LOOP, DONE, INTERNAL, MISTAKE, NO_DATA, NOT_FINITE, NOT_IN_BUCKET, STOPPED

# of several ranks' codes the one that says most: what no restart mends, then a stop, then what follows from others
ORDER = (MISTAKE, NOT_FINITE, NO_DATA, CRASH_LOOP, NOT_IN_BUCKET, STOPPED, INTERNAL)


def weight(code: int) -> int:
    """Where a code stands in ORDER; unknown ones come after it, and last the ranks that torchrun itself ended."""
    return ORDER.index(code) if code in ORDER else len(ORDER) + (code in (-signal.SIGTERM, -signal.SIGKILL, 143))


def of_failures(failures: Mapping[int, ProcessFailure]) -> tuple[int, str]:
    """Exit code and last line for what torchrun reports of its ranks."""
    first = min(failures.values(), key=lambda failure: failure.timestamp)
    rank, failure = min(failures.items(), key=lambda item: (weight(item[1].exitcode), item[1] is not first))
    code, message = failure.exitcode, failure.message
    words = message.get("message", "") if isinstance(message, dict) else message if code < 0 else ""
    return (code if code > 0 else INTERNAL), line(rank, code, words)


def line(rank: int | str, code: int, words: str) -> str:
    last = (words.strip().splitlines() or ["it left without a word"])[-1]
    return f"launch: rank {rank} ended with {code}: {last}"


def of_reports(folder: Path, since: float) -> tuple[int, str]:
    """The same after a signal to this process, from the reports that the ranks left in folder."""
    found = [path for path in folder.glob("**/error.json") if path.stat().st_mtime >= since]
    reports = [(json.loads(path.read_text())["message"], path.parent.name) for path in found]
    if not reports:
        return STOPPED, "launch: stopped by a signal; what was saved before stands"
    report, rank = min(reports, key=lambda item: weight(item[0].get("errorCode", INTERNAL)))
    code = report.get("errorCode", INTERNAL)
    return code, line(f"{rank} of this node", code, report["message"])


def launch(argv: list[str]) -> int:
    args = torchrun.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun sets, in three lines of warning
    if "TORCH_LOGS" not in os.environ:
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
            logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own; the last line says it all
    begin = time.time() - 1
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        args.log_dir = args.log_dir or folder  # where the ranks' reports go
        try:
            torchrun.run(args)
            return DONE
        except ChildFailedError as error:
            code, last = of_failures(error.failures)
        except SignalException:
            code, last = of_reports(Path(args.log_dir), begin)
    print(last, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(entry.run(launch, sys.argv[1:]))
