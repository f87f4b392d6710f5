"""What an exception means to the user: the exit code, the message, and which rank prints it."""

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from configs import Config
from refocused import entry
from refocused.run import processes
from refocused.run.environment import launch_or_alone
from refocused.run.exits import INTERNAL, MISTAKE

GRACE = 5.0  # seconds that another rank has to report first
# gloo's errors have no class of their own; NCCL's and the store's do
GLOO = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "connectFullMesh",
        "Socket Timeout", "Connection refused", "gloo/transport")  # fmt: skip
# the messages of cuBLAS, of the driver and NCCL, of the CPU allocator; only the caching allocator has an error class
NO_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "out of memory", "can't allocate memory")


def lost_peers(error: BaseException) -> bool:
    """Whether other ranks left this one alone, or it cannot reach them."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return type(error) is RuntimeError and any(sign in str(error) for sign in GLOO)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message as entry.explain gives them, with a sentence also for what torch raises in a run."""
    if isinstance(error, KeyboardInterrupt):  # before there was a StopSignal
        return 128 + signal.SIGINT, "interrupted"
    if any(kind.__name__ == "ShortenTraceback" for kind in type(error).__mro__):  # of inductor, also without Triton
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        why = next((line for line in said if "error:" in line), said[0])
        return MISTAKE, (
            f"error: torch could not compile the model: {why}; it needs a compiler (Debian, Ubuntu: apt-get install g++ "
            "python3-dev) and a folder with room that is not mounted noexec (TORCHINDUCTOR_CACHE_DIR); "
            "compile_model=false trains without, slower"
        )
    if lost_peers(error):
        rank, step = launch_or_alone().rank, processes.progress.step
        when = f"at step {step:,}" if step is not None else "before the first step"
        cause = str(error).strip().splitlines()[0]
        return INTERNAL, f"error: rank {rank} on {socket.gethostname()} lost its peers {when}: {cause}"
    return entry.explain(error)


def explain_out_of_memory(error: BaseException, cfg: Config) -> str | None:
    """Of an error for lack of memory: its line and, once per launch, the plan's needs and the keys that help; or None."""
    if not (lack := out_of_memory(error)):
        return None
    text = f"error: out of memory: {lack}"
    with contextlib.suppress(RuntimeError):  # the store's host has gone
        if processes.store is not None and processes.store.add("explain", 1) > 1:
            return text
    world_size = launch_or_alone().world_size
    # in a process of its own: this one has a process group, and no memory
    command = [sys.executable, "-m", "refocused.run.memory", json.dumps(dataclasses.asdict(cfg)), str(world_size)]
    env = {**os.environ, "PYTHONPATH": str(entry.ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    needs = done.stdout.strip() or f"no plan: {done.stderr.strip()[-300:]}"
    B, accumulation = cfg.per_device_train_batch_size, cfg.batch(world_size)[0]
    return (
        f"{text}\n{needs}\n"
        f"what helps: per_device_train_batch_size={max(1, B // 2)} with gradient_accumulation_steps="
        f"{accumulation * (2 if B > 1 else 1)} (now {B} and {accumulation}), "
        f"activation_checkpointing=full (now {cfg.activation_checkpointing}), parallel=fsdp (now {cfg.parallel}), and with "
        f"it cpu_offload=true{' mixed_precision=bf16' * (cfg.mixed_precision == 'fp16')}; "
        f"`{entry.here('python bench.py plan CONFIG.py')} --search` compares them"
    )


def out_of_memory(error: BaseException) -> str | None:
    """The line of the error that says so, if it is of that kind."""
    lines = [line for line in str(error).splitlines() if any(sign in line for sign in NO_MEMORY)]
    if isinstance(error, torch.OutOfMemoryError):
        return (lines or str(error).splitlines() or [type(error).__name__])[0]
    return lines[0] if lines and isinstance(error, RuntimeError) else None


def report(error: BaseException, speak: Callable[[], None]) -> None:
    """Call speak on each rank; an error that is the same on all ranks is reported by rank 0 alone, if it is alive.

    Rank 0 can be the store's host, so it stays until the others know. A rank that lost its peers waits, so that torchrun
    first gets the report of the rank that knows why.
    """
    launch, store, heard = launch_or_alone(), processes.store, False
    shared = getattr(error, "same_on_all_ranks", False) and launch.world_size > 1
    if shared and launch.rank and store is None:
        time.sleep(GRACE)  # no group yet: torchrun ends this rank as soon as rank 0 has left
    elif shared and launch.rank:
        with contextlib.suppress(RuntimeError):  # rank 0 has not spoken, or the store's host has gone, so nobody knows
            store.wait(["said"], datetime.timedelta(seconds=GRACE))
            heard = True
        with contextlib.suppress(RuntimeError):
            if store.add("hearing", 1) == launch.world_size - 1:
                store.set("heard", "1")
    if not heard:
        speak()
    if store is not None and not launch.rank:
        with contextlib.suppress(RuntimeError):
            store.set("said", "1")
            store.wait(["heard"] if shared else ["said"], datetime.timedelta(seconds=2 * GRACE))
    if lost_peers(error):
        time.sleep(GRACE / 2)
