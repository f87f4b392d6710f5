"""The watchdog: a run that hangs says where, and ends, so that it can be restarted."""

import contextlib
import datetime
import faulthandler
import itertools
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque

from configs import Config
from refocused.run import processes
from refocused.run.exits import INTERNAL, leave
from refocused.run.logs import log_error
from refocused.run.optim import checkpoint_bytes
from refocused.run.preflight import Starts
from refocused.run.processes import Env, progress

# {rank: (before, after)}, each [its number, collectives so far, the last step, host], or None before the first one
Heartbeats = dict[int, tuple[list | None, list | None]]
LATER = 60.0  # seconds after the limit in which Python's threads can report


def times(limit: float) -> tuple[float, float]:
    """Seconds between two heartbeats, and, in a hang, for finding out who is missing."""
    period = min(10.0, max(0.1, limit / 10)) if limit else 10.0
    return period, 4 * period + 5


class Watchdog:
    """From the start to the last save, threads that see whether the ranks still exchange anything.

    Every step and every batch of an evaluation calls processes.max_over_ranks. If no call ends for
    max(watchdog_seconds, 20 median steps), the stacks of all threads go to stderr, then a line that names the missing
    ranks, from the heartbeats in the store; then the process leaves. Before begin() and in may_take_long()
    the limit is `longest`, unless a rank has fallen silent.

    A collective that hangs fills a GPU's queue, and a launch into a full queue keeps the GIL (pytorch#109074), so that
    no thread here runs. With several ranks faulthandler, which needs no GIL, ends a process without heartbeats, with
    exit code 1. Its clock also runs while a process is stopped.
    """

    def __init__(self, cfg: Config, env: Env, starts: Starts | None):
        self.cfg, self.env, self.starts = cfg, env, starts
        self.period, self.looking = times(cfg.watchdog_seconds)
        self.longest = 7200.0  # seconds that a save, or a wait for the bucket, may take
        self.seconds: deque[float] = deque(maxlen=100)  # of the last steps
        self.over = threading.Event()
        progress.at = self.last = time.monotonic()
        progress.long_waits += 1
        if cfg.watchdog_seconds:
            threading.Thread(target=self.watch, daemon=True, name="watchdog").start()
        threading.Thread(target=self.heartbeat, daemon=True, name="heartbeat").start()

    def begin(self, step: int) -> None:
        """The loop begins after this step."""
        progress.step, progress.at = step, time.monotonic()
        self.last = progress.at
        progress.long_waits -= 1

    def step(self, step: int) -> None:
        """A step is finished."""
        now = time.monotonic()
        self.seconds.append(now - self.last)
        self.last, progress.step = now, step

    def end(self) -> None:
        """The loop is over. What is left is the last save, at 10 MB/s at least, and its upload."""
        progress.long_waits, progress.at = progress.long_waits + 1, time.monotonic()
        self.longest = self.limit + checkpoint_bytes(self.cfg) / 1e7 + self.cfg.upload_deadline_seconds

    def stop(self) -> None:
        """Everything is saved."""
        self.over.set()

    @property
    def limit(self) -> float:
        """Seconds without a collective that are a hang."""
        return max(self.cfg.watchdog_seconds, 20 * statistics.median(list(self.seconds) or [0.0]))

    def heartbeat(self) -> None:
        store = processes.store.clone() if processes.store is not None else None  # a client per thread: one waits
        for count in itertools.count():
            if self.starts:
                self.starts.note()
            if store is not None:
                mine = [count, progress.collectives, progress.step, socket.gethostname()]
                try:
                    store.set(f"heartbeat {self.env.rank}", json.dumps(mine))
                except RuntimeError:  # its host is gone, and torch prints a stack at each attempt
                    store = None
            if self.cfg.watchdog_seconds and self.env.world_size > 1:
                with contextlib.suppress(Exception):  # a closed stderr
                    faulthandler.dump_traceback_later(self.limit + LATER, exit=True)
            if self.over.wait(self.period):
                return faulthandler.cancel_dump_traceback_later()

    def watch(self) -> None:
        while True:
            asleep = time.monotonic()
            if self.over.wait(self.period):
                return
            now = time.monotonic()
            if now - asleep > 2 * self.period + 1:  # the whole process was stopped, perhaps the machine
                progress.at = now
            elif (idle := now - progress.at) > self.limit:
                if not progress.long_waits or idle > self.longest or self.peer_is_silent():
                    self.abort(time.monotonic() - progress.at)

    def peer_is_silent(self) -> bool:
        """In what may take long: whether another rank, or the store, gives no sign of life for several periods."""
        if processes.store is None:
            return False
        idle_since, begin, pause = progress.at, time.monotonic(), max(2.5 * self.period, min(60.0, self.limit))
        looks = self.two_looks(pause)
        if self.over.is_set() or progress.at != idle_since or time.monotonic() - begin > 2 * pause + self.looking:
            return False  # it has gone on, or this machine was stopped, perhaps with the others
        silent = [rank for rank, (before, after) in (looks or {}).items() if after and before == after]
        return looks is None or (bool(silent) and self.env.rank not in silent)

    def abort(self, idle: float) -> None:
        with contextlib.suppress(Exception):  # a closed stderr
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        where = f"rank {self.env.rank} on {socket.gethostname()}"
        when = "before the first step" if progress.step is None else f"after step {progress.step:,}"
        who = "the stacks above show where"
        if processes.store is not None:
            who = who_is_missing(self.two_looks(2.5 * self.period))
        text = f"error: {where} hangs: nothing for {idle:.0f} s {when}; {who}{flight_recorder(self.env.rank, idle)}"
        log_error(text, self.cfg)
        leave(INTERNAL, text, at_once=True)

    def two_looks(self, pause: float) -> Heartbeats | None:
        """Each rank's heartbeat now and after a pause; None if the store does not answer."""
        looks: list[list[list | None]] = []

        def look() -> None:
            for wait in (0.0, pause):
                time.sleep(wait)
                store = processes.store.clone()
                store.set_timeout(datetime.timedelta(seconds=2))
                found: list[list | None] = [None] * self.env.world_size
                for rank in range(self.env.world_size):
                    with contextlib.suppress(RuntimeError):
                        if store.check([f"heartbeat {rank}"]):
                            found[rank] = json.loads(store.get(f"heartbeat {rank}"))
                looks.append(found)

        looking = threading.Thread(target=look, daemon=True)  # a store whose host is stopped would hold this thread
        looking.start()
        looking.join(pause + self.looking)
        return dict(enumerate(zip(*looks, strict=True))) if len(looks) == 2 else None


def flight_recorder(rank: int, seconds: float) -> str:
    """Names the file that NCCL's flight recorder has written in the last seconds, if there is one."""
    names = [os.environ.get(key) for key in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")]
    names += [os.path.expanduser("~/.cache/torch/comm_lib_trace_rank_"), "/tmp/nccl_trace_rank_"]  # of torch 2.13, 2.11
    for path in (f"{name}{rank}" for name in names if name):
        with contextlib.suppress(OSError):
            if os.path.getmtime(path) > time.time() - seconds:
                return f"; NCCL's flight recorder: {path}"
    return ""


def who_is_missing(looks: Heartbeats | None) -> str:
    """The ranks that do not answer, or are behind, by two looks at the heartbeats."""
    if looks is None:
        return "the store does not answer, so the missing rank is not known"
    names = {r: f"rank {r} (on {a[3]}, step {a[2] or 0:,})" if a else f"rank {r}" for r, (_, a) in looks.items()}
    if silent := [names[rank] for rank, (before, after) in looks.items() if before == after]:
        return "; ".join(f"{name} does not answer" for name in silent)
    most = max(after[1] for _, after in looks.values() if after)
    if behind := [names[rank] for rank, (_, after) in looks.items() if after and after[1] < most]:
        return "; ".join(f"{name} is behind" for name in behind)
    return "every rank answers and waits; the stacks above show where"
