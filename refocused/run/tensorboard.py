"""The curves: TensorBoard's event files."""

import io
import os
import socket
import textwrap
import time
from typing import Any

from refocused.run.logs import Logs


class TensorBoard:
    """Event files in logging_dir, written by the thread that calls.

    The thread of tensorboard's own writer dies if a disk is full. It names its files by the clock, and TensorBoard reads
    them in the order of their names: after a clock that went back, new curves would be hidden.
    """

    def __init__(self, logs: Logs, step: int):
        """step: the last one that stands; what earlier files show beyond it is hidden."""
        # slow to import, and rank 0 alone needs it
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        from torch.utils.tensorboard import summary

        self.Event, self.SessionLog, self.RecordWriter, self.summary = Event, SessionLog, RecordWriter, summary
        self.logs, self.step = logs, step
        self.file = logs.file("events")  # named when it is opened

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        self.write(step, [self.summary.scalar(name, value) for name, value in values.items() if value is not None])

    def text(self, step: int, name: str, text: str) -> None:
        """Lines in a fixed pitch."""
        block = textwrap.indent(text, "    ", lambda line: True)
        self.write(step, [self.summary.text(name, block.encode("utf-8", "backslashreplace").decode())])

    def write(self, step: int, summaries: list[Any]) -> None:
        now = time.time()
        events = [self.Event(wall_time=now, step=step, summary=one) for one in summaries]
        if self.file.fd < 0:  # new, or failed or removed meanwhile
            self.file.path = self.logs.folder / next_name(self.logs)
            status = self.SessionLog(status=self.SessionLog.START)
            first = self.Event(wall_time=now, file_version="brain.Event:2")
            events = [first, self.Event(wall_time=now, step=self.step + 1, session_log=status), *events]
        self.step = max(self.step, step)
        buffer = io.BytesIO()
        for event in events:
            self.RecordWriter(buffer).write(event.SerializeToString())
        self.file.write(buffer.getvalue())


def next_name(logs: Logs) -> str:
    """A name that sorts behind every event file that is there."""
    names = logs.folder.glob(f"events.out.tfevents.{'[0-9]' * 10}.*")
    newest = max((int(path.name[20:30]) for path in names), default=0)
    return f"events.out.tfevents.{max(int(time.time()), newest + 1):010d}.{socket.gethostname()}.{os.getpid()}"
