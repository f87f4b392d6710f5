"""Saves behind training, at most one at a time."""

import concurrent.futures
import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs import ConfigError
from refocused import files
from refocused.checkpoint import atomic, manifest
from refocused.checkpoint.manifest import CheckpointError
from refocused.checkpoint.tensors import local_part, on_all_ranks, own_part, write

Tree = dict[str, Tensor]
AT_ONCE = "REFOCUSED_COPY_AT_ONCE"  # in the environment: training waits for the copies of a save
FILES_AT_A_TIME = 4  # that a rank writes: with one, a core that hashes is slower than most disks


class Saver:
    """Writes checkpoints behind training, at most one at a time. Construction, save() and close() are collective.

    A save that fails, as one with values that are not finite does, leaves nothing under a final name: poll() tells why,
    on every rank. A save may wait, written but not committed, for confirm(): weights that an update has just ruined look
    like any others until a loss is computed with them. The copy is made beside forward and backward, which only read:
    before_update() comes before anything that changes the tensors.

    generation: the highest of any save that the run knows of. more: files that every checkpoint holds besides, by name.
    stall_seconds: for which the last save() held training up.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        *,
        async_save: bool = True,
        save_total_limit: int = 0,
        keep_every: int = 0,
        generation: int | None = None,
        more: Mapping[str, bytes] | None = None,
    ):
        self.output_dir = Path(output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)  # once: a folder that goes away in mid-run is not made again
        self.generation = manifest.generation(output_dir) if generation is None else generation
        self.more = more or {}
        self.async_save, self.save_total_limit, self.keep_every = async_save, save_total_limit, keep_every
        self.group = dist.new_group(backend="gloo")  # its own: a collective behind training must not meet training's
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.owner = self.rank == 0 or atomic.holds(output_dir)  # of its disk: the one process that names what is on it
        self.stall_seconds = 0.0
        self.last: str | None = None  # name of the last complete save
        self.last_generation = 0  # and its number; 0 while this run has none
        self._host = _Host()
        self.before_update = self._host.wait
        self._thread = concurrent.futures.ThreadPoolExecutor(1)  # kept, as starting one costs a turn of the GIL, 5 ms
        self._saving: concurrent.futures.Future | None = None
        self._good: concurrent.futures.Future[bool] = concurrent.futures.Future()  # whether the last save counts
        self._good.set_result(True)  # there is none yet
        self._error: str | None = None

    def reserve(self, tree: Tree) -> str:
        """Allocate memory for the copies before training, so that the first save is quick. A line to print, or ""."""
        if self.async_save:
            self._host.begin(own_part(tree, self.rank, self.world))
            self._host.end()
        return self._host.note

    def save(self, name: str, tree: Tree, state: dict[str, Any], validated: bool = True) -> str | None:
        """Save the tree and the state (JSON, rank 0's) as they are now. If not validated, confirm(True) commits it.

        Returns why the save before has failed, if nobody has asked.
        """
        start = time.perf_counter()
        failure = self.wait()
        self._good = concurrent.futures.Future()
        if validated:
            self._good.set_result(True)
        part = own_part(tree, self.rank, self.world)
        if self.async_save:
            self._host.begin(part)
        text = "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in state.items()) + "\n}\n"
        need = sum(t.nbytes for t in tree.values())
        more = {manifest.STATE: text.encode(), **self.more}
        self._saving = self._thread.submit(self._write, name, part, more, need)
        if not self.async_save:
            self.join()
        self.stall_seconds = time.perf_counter() - start
        return failure

    @property
    def busy(self) -> bool:
        """Whether the last save is still under way here."""
        return self._saving is not None and not self._saving.done()

    @property
    def confirmed(self) -> bool:
        """Whether the last save was validated, or confirmed or dropped since."""
        return self._good.done()

    def confirm(self, good: bool) -> None:
        """Commit the save in flight, or drop it: a step with its weights was finite, or was not."""
        if not self._good.done():
            self._good.set_result(good)

    def poll(self) -> str | None:
        """Why the last save failed, if it has; costs nothing."""
        return None if self.busy else self._error

    def wait(self) -> str | None:
        """Wait for the save in flight; return why it failed, and forget it."""
        self.join()
        error, self._error = self._error, None
        return error

    def give_time(self, seconds: float) -> None:
        """Before this process ends after an error: a save in flight that counts may still become complete."""
        if self._saving and self._good.done():
            concurrent.futures.wait([self._saving], seconds)

    def close(self) -> str | None:
        """wait(), then give back the process group and the host memory."""
        error = self.wait()
        self._thread.shutdown()
        self._host.free()
        dist.destroy_process_group(self.group)
        return error

    def join(self) -> None:
        """Wait for the save in flight, which is dropped if it was not confirmed by now."""
        self.confirm(False)
        if self._saving:
            self._saving.result()
            self._saving = None

    def _write(self, name: str, part: Tree, more: dict[str, bytes], need: int) -> None:
        final = self.output_dir / name
        source = self._host.views if self.async_save else {key: local_part(t) for key, t in part.items()}
        try:
            save_id = on_all_ranks(self.group, self._begin, need)[0]
            self.generation += 1
            folder = atomic.unfinished(final, save_id)
            written = on_all_ranks(self.group, write, folder, self.rank, part, source, FILES_AT_A_TIME)
            if not self._good.result():  # not confirmed: the save is dropped, and the checkpoint before it stands
                if self.owner:
                    files.remove(folder)
                return
            listed = {file: entry for of_rank in written for file, entry in of_rank.items()}
            made = on_all_ranks(self.group, self._commit, folder, final, save_id, listed, more)[0]
            try:
                on_all_ranks(self.group, self._follow, folder, final, save_id, made)
            except CheckpointError:
                with contextlib.suppress(CheckpointError, OSError):  # another node could not complete it
                    if self.owner and manifest.read_manifest(final)["save_id"] == save_id:
                        atomic.delete(final)
                raise
            self.last, self.last_generation = name, self.generation
            files.notes.append(f"saved {name}")
            if self.rank == 0:
                atomic.prune(self.output_dir, name, self.save_total_limit, self.keep_every)
        except Exception as error:
            self._error = f"saving {name}: {error}"
            if self.owner:
                with contextlib.suppress(OSError, ConfigError):  # then the next start does it
                    atomic.check_lock(self.output_dir)  # what lies there may be another run's by now
                    atomic.recover(self.output_dir)

    def _begin(self, need: int) -> str:
        self._host.end()  # first, as an update may wait for it
        if self.rank == 0:
            atomic.check_space(self.output_dir, need)
        return secrets.token_hex(8)

    def _commit(self, folder: Path, final: Path, save_id: str, listed: dict, more: dict[str, bytes]) -> bytes:
        """On rank 0: commit, and return the manifest."""
        return b"" if self.rank else atomic.commit(folder, final, save_id, listed, more, self.generation)

    def _follow(self, folder: Path, final: Path, save_id: str, made: bytes) -> None:
        """On a node without rank 0's disk: give its files the same name and manifest."""
        if self.rank and self.owner:
            atomic.put(folder, final, save_id, made)


class _Host:
    """Host memory for the copies of a save: one block, allocated once, pinned if there is a GPU.

    CUDA copies on a stream of its own, a CPU in the saving thread, another accelerator at once.
    """

    def __init__(self):
        self.block, self.pinned, self.note = torch.empty(0, dtype=torch.uint8), False, ""
        self.local: Tree = {}
        self.views: Tree = {}
        self.stream: torch.cuda.Stream | None = None
        self.made: torch.cuda.Event | None = None  # on the stream, behind the copies
        self.done = threading.Event()  # on a CPU
        self.done.set()

    def begin(self, part: Tree) -> None:
        """Start to copy the local parts of the tensors, of which none may change before wait()."""
        self.local = {key: local_part(t) for key, t in part.items()}
        if self.local.keys() != self.views.keys():
            self.free()
            self.allocate(self.local)
        devices = {t.device.type for t in self.local.values()}
        if "cuda" in devices and AT_ONCE not in os.environ:
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())  # behind the last update
            with torch.cuda.stream(self.stream):
                self.copy()
            self.made = self.stream.record_event()
        elif devices <= {"cpu"} and AT_ONCE not in os.environ:
            self.done.clear()
        else:
            self.copy()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()

    def copy(self) -> None:
        for key, t in self.local.items():
            self.views[key].copy_(t, non_blocking=True)

    def end(self) -> None:
        """In the saving thread: the copies are made when this returns."""
        try:
            if self.made:
                self.made.synchronize()
            elif not self.done.is_set():
                self.copy()
        finally:
            self.done.set()

    def wait(self) -> None:
        """Before an update. A CPU waits until the copies are made; on CUDA the update's stream does."""
        if self.made:
            torch.cuda.current_stream().wait_event(self.made)
        self.done.wait()

    def allocate(self, local: Tree) -> None:
        spans = {key: -(-t.nbytes // 64) * 64 for key, t in local.items()}
        self.block = torch.empty(max(64, sum(spans.values())), dtype=torch.uint8)
        if torch.cuda.is_available():  # registered, as pin_memory=True would round up to a power of two
            status = int(torch.cuda.cudart().cudaHostRegister(self.block.data_ptr(), self.block.nbytes, 0))
            self.pinned = status == 0
            if not self.pinned:
                self.note = (
                    f"saves     copy through unpinned memory, several times slower: the system pins no "
                    f"{self.block.nbytes / 2**30:.1f} GiB (CUDA error {status}); raise `ulimit -l`"
                )
                with contextlib.suppress(Exception):  # the failed call's error waits for the next kernel to find it
                    torch.zeros(1, device="cuda")
        at = 0
        for key, t in local.items():
            self.views[key] = self.block[at : at + t.nbytes].view(t.dtype).view(t.shape)
            at += spans[key]

    def free(self) -> None:
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.block.data_ptr())
        self.block, self.views, self.pinned = torch.empty(0, dtype=torch.uint8), {}, False
