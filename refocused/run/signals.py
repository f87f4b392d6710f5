"""What asks a run to stop: a signal, the end of its time, the death of its torchrun, a notice of preemption."""

import contextlib
import http.client
import os
import select
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path

from refocused.run.environment import launch
from refocused.run.exits import STOPPED, leave

DMI = Path("/sys/class/dmi/id")
EARLY = "stopped by a signal before the first step: earlier checkpoints stand"


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a stop at the next step boundary. A second signal exits at once.

    The end of `minutes` asks for a stop, too. So does the death of the torchrun that started this process, which would
    keep its GPU and its run's lock. Before the loop the next boundary can be minutes away, and no step can be lost: after
    PATIENCE seconds the process exits.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    PATIENCE = 15.0  # torchrun kills its processes 30 s after it was told to stop

    def __init__(self, minutes: float = 0.0):
        self.since, self.begun = 0.0, False
        self.minutes, self.end = minutes, time.monotonic() + 60 * minutes if minutes else float("inf")
        self.parent = os.getppid() if launch().torchrun else None
        # a thread gets signals also while the main one waits in a collective, where no handler would run
        signals, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        # under nohup SIGHUP is ignored, but not under torchrun, which kills the processes that ignore it
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not launch().address
        for number in self.NUMBERS:
            if not (ignored and number == signal.SIGHUP):
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self.listen, args=(signals,), daemon=True, name="signals").start()

    def ask(self, why: str = "", speak: bool = True) -> None:
        """Stop at the next step boundary; why: what to say, where it was no signal."""
        if not self.since:
            self.since = time.monotonic()
            if speak:
                what = "after this step" if self.begun else "before the first step"
                write_stderr(f"\n{why}{': ' * bool(why)}stopping {what}; again to quit now\n")

    def pass_on(self, stopping: float) -> None:
        """Note that another rank was told to stop, if so."""
        if stopping and not self.since:
            self.since = time.monotonic()

    def listen(self, signals: socket.socket) -> None:
        while True:
            if select.select([signals], [], [], 1.0)[0] and (number := signals.recv(1)[0]) in self.NUMBERS:
                if not self.since:
                    # torchrun passes a signal to all its ranks, so one says it
                    self.ask(speak=not launch().rank)
                elif time.monotonic() - self.since > 1.0:  # sooner, it is the same Ctrl-C passed on by torchrun
                    leave(128 + number, "stopped at once by a second signal", at_once=True)
            if self.parent and os.getppid() != self.parent:
                self.ask("the torchrun of this process is gone")
            if time.monotonic() > self.end:
                self.ask(f"stop_after_minutes={self.minutes:g} have passed")
            if self.since and not self.begun and time.monotonic() > self.since + self.PATIENCE:
                write_stderr(EARLY + "\n")
                leave(STOPPED, EARLY, at_once=True)


def write_stderr(text: str) -> None:
    """Write where that can be done at once: a terminal that is held is not waited for."""
    with contextlib.suppress(OSError):  # a closed one
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode())


def watch_preemption(ask: Callable[[str], None]) -> None:
    """On a machine of Google's or AWS's, a thread of the node's first process calls ask(why) once the machine is to go."""
    if launch().local_rank:
        return
    google, aws = os.environ.get("GCE_METADATA_HOST", ""), os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "")
    with contextlib.suppress(OSError):
        if not google and (DMI / "product_name").read_text().startswith("Google"):  # as Google's own libraries find it
            google = "metadata.google.internal"
        if not aws and (DMI / "sys_vendor").read_text().startswith("Amazon EC2"):
            aws = "http://169.254.169.254"
    for host, off, notice in ((google, "NO_GCE_CHECK", google_notice), (aws, "AWS_EC2_METADATA_DISABLED", aws_notice)):
        if host and os.environ.get(off, "").lower() != "true":
            threading.Thread(target=wait_for_notice, args=(notice, host, ask), daemon=True, name="preemption").start()


def wait_for_notice(notice: Callable[[str], None], host: str, ask: Callable[[str], None]) -> None:
    while True:
        try:
            notice(host)
            return ask("this machine is being taken away (preempted)")
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                return None  # this server knows no preemption
            time.sleep(10.0)


def request(url: str, headers: dict[str, str], method: str = "GET", timeout: float = 5.0) -> tuple[str, Message]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would answer for its own machine
    with opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=timeout) as answer:
        return answer.read(1 << 12).decode("latin-1").strip(), answer.headers


def google_notice(host: str) -> None:
    """Return once the metadata server says that this machine was preempted; it answers when the value changes."""
    url = f"http://{host}/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=300&last_etag="
    etag = "0"  # none is this, so the first answer comes at once
    while True:
        value, headers = request(url + etag, {"Metadata-Flavor": "Google"}, timeout=330)
        if value == "TRUE":
            return
        etag = headers["ETag"] or "0"
        time.sleep(0.1)  # a server that does not wait must not be asked without end


def aws_notice(host: str) -> None:
    """Return once the metadata service (IMDSv2) has an interruption notice for this spot instance, two minutes before."""
    while True:
        token, _ = request(f"{host}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
        try:
            request(f"{host}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
            return
        except urllib.error.HTTPError as error:
            if error.code != 404:  # which means that there is no notice
                raise
        time.sleep(5.0)
