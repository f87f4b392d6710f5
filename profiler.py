"""Where time and memory go: a trace of some steps, and what an out-of-memory error needs explained."""

import multiprocessing
from pathlib import Path

import torch

import configs
import parallel
from configs import Config


class Profiler:
    """Records the steps named by cfg.profile on rank 0, into LOGGING_DIR/profile.

    *.pt.trace.json opens in https://ui.perfetto.dev and TensorBoard, memory.pickle in https://pytorch.org/memory_viz.
    """

    def __init__(self, cfg: Config, env: parallel.Env):
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
        self.profile.stop()
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"steps-{self.steps.start}-{self.steps.stop - 1}.pt.trace.json"
        self.profile.export_chrome_trace(str(path))
        if self.cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profile = None
        return f"profile of steps {self.steps.start}-{self.steps.stop - 1} in {path}"


def is_out_of_memory(error: BaseException) -> bool:
    """An accelerator's error has a class of its own, the CPU allocator's only its words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain_out_of_memory(error: BaseException, cfg: Config, world_size: int) -> str:
    """What the plan says that each process needs, by kind, and the keys that help."""
    try:  # in a process of its own: this one has a process group, and no memory
        import planner

        with multiprocessing.get_context("spawn").Pool(1) as pool:
            needs = pool.apply(planner.estimate, (cfg, world_size))
        kinds = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in needs.device.items() if size)
        needs = f"planned GiB per process: {kinds}; {needs.total / 2**30:.2f} in all"
    except Exception as failure:  # the error to explain is another one
        needs = f"no plan: {type(failure).__name__}: {failure}"
    B = cfg.per_device_train_batch_size
    offload = "cpu_offload=true" + " mixed_precision=bf16" * (cfg.mixed_precision == "fp16")
    return (
        f"out of memory: {str(error).splitlines()[0]}\n{needs}\n"
        f"what helps: per_device_train_batch_size={max(1, B // 2)} with gradient_accumulation_steps="
        f"{cfg.batch(world_size)[0] * (2 if B > 1 else 1)} (now {B} and {cfg.batch(world_size)[0]}), "
        f"activation_checkpointing=full (now {cfg.activation_checkpointing}), "
        f"parallel=fsdp (now {cfg.parallel}), and with it {offload}; python bench.py plan compares them"
    )
