"""Saves behind training, at most one at a time."""

import concurrent.futures
import contextlib
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from refocused import files
from refocused.checkpoint import atomic, manifest
from refocused.checkpoint.tensors import CopyPlanner, Writer, cause, local_part, own_part

FILES_AT_A_TIME = 4  # that a rank writes: with one, a core that hashes is slower than most disks


class Saver:
    """Writes checkpoints behind training, at most one at a time. Every method but poll is collective.

    A save that fails leaves nothing under a final name and does not raise: poll() tells why, on every rank. One of
    tensors that are not all finite fails so too. `generation` is the highest of any save that the run knows of;
    `files`, by name, what else every checkpoint holds.
    A save may wait, written but not committed, for confirm(): weights that an update has just ruined look like any others
    until a loss is computed with them, and would take the place of the good ones.
    Of the last save: stall_seconds, for which save() held training up; write_seconds, until it was complete.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        *,
        async_save: bool = True,
        save_total_limit: int = 0,
        keep_every: int = 0,
        generation: int | None = None,
        files: Mapping[str, bytes] | None = None,
    ):
        self.output_dir = Path(output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)  # on nodes that share no disk, and never again: see Writer
        self.generation = manifest.generation(output_dir) if generation is None else generation
        self.files = files or {}
        self.async_save, self.save_total_limit, self.keep_every = async_save, save_total_limit, keep_every
        self.group = dist.new_group(backend="gloo")  # its own: a collective behind training must not meet training's
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.owner = self.rank == 0 or atomic.holds(output_dir)  # of its disk: the one process that names what is on it
        self.stall_seconds = self.write_seconds = 0.0
        self.last: str | None = None  # name of the last complete save
        self.last_generation = 0  # and its number; 0 while this run has none
        self.news: deque[str] = deque()  # names of saves that are complete and that nobody has been told of yet
        self._host = _Host()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)  # kept, as starting one costs a turn of the GIL, 5 ms
        self._saving: concurrent.futures.Future | None = None
        self._proof: concurrent.futures.Future[bool] = concurrent.futures.Future()  # whether the last save counts
        self._proof.set_result(True)  # there is none yet
        self._error: str | None = None

    def reserve(self, tree: dict[str, Tensor]) -> str:
        """Before training: memory for the copies, so that the first save is as quick as the others.

        Returns what there is to say about that memory, or "".
        """
        if self.async_save:
            self._host.copy(own_part(tree, self.rank, self.world))
        return self._host.note

    def save(self, name: str, tree: dict[str, Tensor], state: dict[str, Any], validated: bool = True) -> None:
        """Save the tree and the state (JSON, rank 0's) as they are now; the caller may change them at once.

        Not validated, it is committed once confirm(True) says so, on every rank.
        """
        start = time.perf_counter()
        self.join()
        self._proof = concurrent.futures.Future()
        if validated:
            self._proof.set_result(True)
        part = own_part(tree, self.rank, self.world)
        source = self._host.copy(part) if self.async_save else {key: local_part(t) for key, t in part.items()}
        text = "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in state.items()) + "\n}\n"
        need = sum(t.nbytes for t in tree.values())
        more = {manifest.STATE: text.encode(), **self.files}
        self._saving = self._thread.submit(self._write, start, name, part, source, more, need)
        if not self.async_save:
            self.join()
        self.stall_seconds = time.perf_counter() - start

    @property
    def busy(self) -> bool:
        """Whether the last save is still under way here; another one would have to wait for it."""
        return self._saving is not None and not self._saving.done()

    @property
    def confirmed(self) -> bool:
        """Whether the last save was validated, or its fate told since; the same on every rank."""
        return self._proof.done()

    def confirm(self, good: bool) -> None:
        """Say whether the save in flight counts: what it holds has, or has not, gone through a step since."""
        if not self._proof.done():
            self._proof.set_result(good)

    def poll(self) -> str | None:
        """Why the last save failed, if it has; costs nothing."""
        return None if self._saving and not self._saving.done() else self._error

    def wait(self) -> str | None:
        """Wait for the save in flight; return why it failed, and forget it."""
        self.join()
        error, self._error = self._error, None
        return error

    def give_time(self, seconds: float) -> None:
        """Before this process ends after an error: a save in flight that counts may still become complete."""
        if self._saving and self._proof.done():
            concurrent.futures.wait([self._saving], seconds)

    def close(self) -> str | None:
        """wait(), then give back the process group and the host memory."""
        error = self.wait()
        self._thread.shutdown()
        self._host.free()
        dist.destroy_process_group(self.group)
        return error

    def join(self) -> None:
        """Wait for the save in flight; one that was not confirmed by now does not count."""
        self.confirm(False)
        if self._saving:
            self._saving.result()
            self._saving = None

    def _write(
        self,
        start: float,
        name: str,
        part: dict[str, Tensor],
        source: dict[str, Tensor],
        more: dict[str, bytes],
        need: int,
    ) -> None:
        try:
            box = [secrets.token_hex(8)]
            dist.broadcast_object_list(box, group=self.group, group_src=0)
            self.generation += 1
            writer = Writer(self.output_dir / name, box[0], more, need, self.generation, at_a_time=FILES_AT_A_TIME)
            dcp.save(part, storage_writer=writer, planner=CopyPlanner(source), process_group=self.group)
            if not self._proof.result():  # no failure: it counts no more than what it would have replaced
                if self.owner:
                    files.remove(writer.folder)
                return
            self._commit(writer)
            self.last, self.last_generation = name, self.generation
            self.news.append(name)
            self.write_seconds = time.perf_counter() - start
            if self.rank == 0:
                atomic.prune(self.output_dir, name, self.save_total_limit, self.keep_every)
        except BaseException as error:  # CheckpointException is no Exception
            self._error = f"saving {name}: {cause(error)}"
            if self.owner:
                with contextlib.suppress(OSError):  # then the next start does it
                    atomic.recover(self.output_dir)

    def _commit(self, writer: Writer) -> None:
        """Commit on rank 0, and give the files of a node that does not share its disk the same name and manifest."""
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                writer.commit()
                box[0] = (writer.final / manifest.MANIFEST).read_bytes()
            except OSError as error:
                box[0] = error
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        if isinstance(box[0], OSError):
            raise box[0]
        problem = None
        if self.rank and self.owner:
            try:
                atomic.put(writer.folder, writer.final, writer.id, box[0])
            except OSError as error:
                problem = f"{cause(error)} (rank {self.rank})"
        problems: list[str | None] = [None] * self.world
        dist.all_gather_object(problems, problem, group=self.group)
        if any(problems):
            if self.owner:
                atomic.withdraw(writer.final, writer.id)
            raise OSError("; ".join(filter(None, problems)))


class _Host:
    """Host memory for the copies of a save, one block that is allocated once, and pinned if there is a GPU."""

    def __init__(self):
        self.block, self.pinned, self.note = torch.empty(0, dtype=torch.uint8), False, ""
        self.views: dict[str, Tensor] = {}

    def copy(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """The local parts of the tensors, copied: all that an asynchronous save costs the training loop."""
        local = {key: local_part(t) for key, t in part.items()}
        layout = {key: (t.shape, t.dtype) for key, t in local.items()}
        if layout != {key: (view.shape, view.dtype) for key, view in self.views.items()}:
            self.free()
            self.allocate(local)
        for key, t in local.items():
            self.views[key].copy_(t, non_blocking=True)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return self.views

    def allocate(self, local: dict[str, Tensor]) -> None:
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
