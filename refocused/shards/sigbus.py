"""The last words of a process that read a shard in the moment in which it was cut short."""

import ctypes
import os
import signal
from collections.abc import Sequence

from refocused.shards.shard import DataError, Shard

libc = ctypes.CDLL(None)
libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
_installed: list[object] = []  # ctypes does not keep what C holds


def explain_bus_errors(shards: Sequence[Shard]) -> None:
    """From now on a SIGBUS in this process ends it with a line that names the shard, and with exit code 66.

    Shards are checked before they are read, so that takes a file that shrinks within microseconds. Python's own signal
    handlers run between two instructions of Python and never would: the read is what the signal repeats for ever.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)  # takes the GIL, whether or not this thread has it
    def last_words(number: int) -> None:
        libc.signal(number, None)  # the default: whatever happens below, the process ends
        for shard in shards:
            if (now := shard.map.size()) < shard.size:
                words = f"error: {shard.file} was cut from {shard.size} to {now} bytes while it was read; put it back"
                os.write(2, os.fsencode(words + "\n"))
                os._exit(DataError.exit_code)
        os.write(
            2, b"error: a mapped file could not be read and no shard is shorter: look at the disk and at /dev/shm\n"
        )

    _installed[:] = [last_words]
    libc.signal(signal.SIGBUS, ctypes.cast(last_words, ctypes.c_void_p))
