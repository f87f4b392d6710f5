"""Signals: how a run is asked to stop."""

import contextlib
import os
import select
import signal
import socket
import threading
import time

from refocused.run.exits import STOPPED


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a stop at the next step boundary; a second one exits at once.

    Until the loop has begun the next boundary can be minutes away (other nodes are waited for, blocks compiled) and
    nothing is trained that could be lost, so the process waits PATIENCE seconds for it and leaves.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    PATIENCE = 15.0  # torchrun kills its processes 30 s after it was told to stop

    def __init__(self):
        self.since, self.begun = 0.0, False
        # a thread is told of signals also while the main one sits in a collective, where no handler would run
        signals, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        # under nohup a closed terminal is ignored; torchrun's is not, it passes that on and kills those that ignore it
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and "RANK" not in os.environ
        for number in self.NUMBERS:
            if not (ignored and number == signal.SIGHUP):
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self.listen, args=(signals,), daemon=True, name="signals").start()

    def pass_on(self, stopping: float) -> None:
        """Note that another rank was told to stop, if so."""
        if stopping and not self.since:
            self.since = time.monotonic()

    def listen(self, signals: socket.socket) -> None:
        while True:
            impatient = self.since and not self.begun
            left = max(0.0, self.since + self.PATIENCE - time.monotonic()) if impatient else None
            if not select.select([signals], [], [], left)[0]:
                if not self.begun:
                    with contextlib.suppress(OSError):  # a closed terminal
                        os.write(2, b"stopped by a signal before the first step: what was saved before stands\n")
                    os._exit(STOPPED)
                continue
            if (number := signals.recv(1)[0]) not in self.NUMBERS:
                continue
            if not self.since:
                self.since = time.monotonic()
                self.announce()
            elif time.monotonic() - self.since > 1.0:  # sooner, it is the same Ctrl-C passed on by torchrun
                os._exit(128 + number)

    def announce(self) -> None:
        """Say at once that the first signal was heard; one rank does, and never waits for a terminal that is held."""
        if os.environ.get("RANK", "0") == "0":
            what = "after this step" if self.begun else "before the first step"
            with contextlib.suppress(OSError):
                if select.select([], [2], [], 0)[1]:
                    os.write(2, f"\nstopping {what}; again to quit now\n".encode())
