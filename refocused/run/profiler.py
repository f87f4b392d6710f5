"""Where time and memory go: a trace of some steps, and what an out-of-memory error needs explained."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import configs
from configs import Config
from refocused.entry import ROOT, here
from refocused.run.processes import Env


class Profiler:
    """Records the steps named by cfg.profile on rank 0, into LOGGING_DIR/profile.

    *.pt.trace.json opens in https://ui.perfetto.dev and TensorBoard, memory.pickle in https://pytorch.org/memory_viz.
    """

    def __init__(self, cfg: Config, env: Env):
        self.steps = next(iter(configs.step_ranges("profile", cfg.profile)), range(0)) if env.main else range(0)
        self.folder, self.cuda = Path(cfg.logging_dir, "profile"), env.device.type == "cuda"
        self.profile: torch.profiler.profile | None = None

    def at(self, step: int) -> str | None:
        """Called before each step; returns a message once the trace is written."""
        if step in self.steps and not self.profile:
            kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * self.cuda
            if self.cuda:
                torch.cuda.memory._record_memory_history(max_entries=100_000)
            self.profile = torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)
            self.profile.start()
        return self.close() if step >= self.steps.stop else None

    def close(self) -> str | None:
        """Write what was recorded, if anything."""
        if not self.profile:
            return None
        profile, self.profile = self.profile, None
        profile.stop()
        path = self.folder / f"steps-{self.steps.start}-{self.steps.stop - 1}.pt.trace.json"
        said = f"profile of steps {self.steps.start}-{self.steps.stop - 1} in {path}"
        try:  # a full disk costs the profile and not the run
            self.folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
            if self.cuda:
                torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
        except (OSError, RuntimeError) as error:
            said = f"no profile in {path}: {error}"
        if self.cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
        return said


# cuBLAS's words, the driver's and NCCL's, the CPU allocator's; only the caching allocator's error has a class of its own
NO_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "out of memory", "can't allocate memory")


def out_of_memory(error: BaseException) -> str | None:
    """The line of the error that says so, if it is of that kind."""
    lines = [line for line in str(error).splitlines() if any(words in line for words in NO_MEMORY)]
    if isinstance(error, torch.OutOfMemoryError):
        return (lines or str(error).splitlines() or [type(error).__name__])[0]
    return lines[0] if lines and isinstance(error, RuntimeError) else None


def explain_out_of_memory(cfg: Config, world_size: int) -> str:
    """What the plan says that each process needs, by kind, and the keys that help."""
    # in a process of its own: this one has a process group, and no memory
    command = [sys.executable, "-m", "refocused.run.memory", json.dumps(dataclasses.asdict(cfg)), str(world_size)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    needs = done.stdout.strip() or f"no plan: {done.stderr.strip()[-300:]}"
    B = cfg.per_device_train_batch_size
    offload = "cpu_offload=true" + " mixed_precision=bf16" * (cfg.mixed_precision == "fp16")
    return (
        f"{needs}\n"
        f"what helps: per_device_train_batch_size={max(1, B // 2)} with gradient_accumulation_steps="
        f"{cfg.batch(world_size)[0] * (2 if B > 1 else 1)} (now {B} and {cfg.batch(world_size)[0]}), "
        f"activation_checkpointing=full (now {cfg.activation_checkpointing}), "
        f"parallel=fsdp (now {cfg.parallel}), and with it {offload}; "
        f"`{here('python bench.py plan CONFIG.py')} --search` compares them"
    )
