"""Where time and memory go: a trace of some steps."""

from pathlib import Path

import torch

import configs
from configs import Config


class Profiler:
    """Records the steps named by cfg.profile into LOGGING_DIR/profile.

    *.pt.trace.json opens in https://ui.perfetto.dev and TensorBoard, memory.pickle in https://pytorch.org/memory_viz.
    """

    def __init__(self, cfg: Config, device: torch.device):
        [self.steps] = configs.step_ranges("profile", cfg.profile)
        self.folder, self.cuda = Path(cfg.logging_dir, "profile"), device.type == "cuda"
        self.profile: torch.profiler.profile | None = None

    def at(self, step: int) -> str | None:
        """Called before each step. Returns a message once the trace is written."""
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
