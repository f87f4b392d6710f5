"""What a run refuses: ranks that disagree, and steps whose figures cannot be right."""

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist

from configs import KEYS, Config, ConfigError
from refocused.run import processes

PLACES = ("data_dir", "cache_dir", "output_dir", "logging_dir")  # nodes may keep things in different places
WINDOW = 128  # steps that a spike is compared with; from half of it on


def check_ranks(cfg: Config, fingerprint: str) -> None:
    """Raise ConfigError, on every rank alike, unless all have the same config and shards of the same fingerprint."""
    mine = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in PLACES}
    mine["the shards in data_dir"] = fingerprint
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if differing := [key for key in mine if theirs[key] != everyone[0][key]]:
            shown = ", ".join(f"{key} ({theirs[key]} and {everyone[0][key]})" for key in differing[:3])
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ConfigError(f"ranks {rank} and 0 differ in {shown}{more}; start all with the same command and data")


def check_same_batch(state: dict[str, Any], cfg: Config, global_batch: int) -> None:
    """Raise ConfigError unless a step has as many sequences as those of a checkpoint's run had, or it is allowed."""
    before = (
        state.get("global_batch")
        or Config(**{key: value for key, value in state["config"].items() if key in KEYS}).batch(
            state["run"]["world_size"]
        )[1]
    )
    if before != global_batch and not cfg.allow_batch_change:
        raise ConfigError(
            f"the checkpoint's steps have {before} sequences, this run's would have {global_batch}: keep them with "
            f"global_batch_size={before}, or set allow_batch_change=true to go on with {global_batch}"
        )


class Spikes:
    """How far a step's loss and gradient norm lie above those of the WINDOW steps before, in standard deviations.

    Everything stays on the device, so that a step can be refused before its update without the host waiting for it.
    What spikes enters the window too: a level that has changed for good is soon the normal one.
    """

    def __init__(self, cfg: Config, device: torch.device, window: list[list[float]] | None):
        self.sigma, self.skips = cfg.spike_sigma, cfg.spike_action == "skip"
        # -1 marks a row that is not filled yet: neither a loss nor a norm can be negative
        self.window = torch.full((WINDOW, 2), -1.0, device=device)
        if window:
            self.window.copy_(torch.tensor(window))

    def judge(self, step: int, figures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Deviations (2,) of figures (loss, norm), and whether to apply the step, a bool that is equal on all ranks."""
        filled = self.window[:, :1] >= 0  # (WINDOW, 1)
        n = filled.sum()
        mean = torch.where(filled, self.window, 0.0).sum(0) / n
        std = (torch.where(filled, self.window - mean, 0.0).square().sum(0) / (n - 1)).sqrt()
        deviations = torch.where(n >= WINDOW // 2, (figures - mean) / std, 0.0)
        row = step % WINDOW
        self.window[row] = torch.where(figures.isfinite().all(), figures, self.window[row])
        spike = (deviations > self.sigma).any().float()
        if self.skips:  # GPUs of different kinds may round a norm differently, and a verdict must not
            processes.largest(spike)
        return deviations, (spike == 0) if self.skips else torch.ones_like(spike, dtype=torch.bool)

    def verdict(self, deviations: list[float]) -> str | None:
        """On the host, later: what is said about a step with these deviations; None when it was no spike."""
        if not any(d > self.sigma for d in deviations):
            return None
        above = " and ".join(f"{name} {d:.1f}" for name, d in zip(("loss", "norm"), deviations, strict=True))
        return f"{above} deviations above the last {WINDOW} steps, {'not ' * self.skips}applied"


class Guard:
    """Each step's verdict: on the device before its update, so that nobody waits; on the host, in words, a step later."""

    def __init__(self, cfg: Config, device: torch.device, scaler: torch.amp.GradScaler, state: dict[str, Any]):
        self.max_bad_steps, self.scaler = cfg.max_bad_steps, scaler
        self.spikes = Spikes(cfg, device, state.get("spike_window")) if cfg.spike_sigma else None
        self.bad_in_a_row = 0  # up to the last step that the host knows of

    def judge(self, step: int, figures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Figures (loss, norm) with what else a verdict needs, and whether to apply the step; both on the device."""
        apply = figures.isfinite().all()
        if self.spikes:
            deviations, calm = self.spikes.judge(step, figures)
            figures, apply = torch.cat((figures, deviations)), apply & calm
        return figures, apply

    def verdict(self, loss: float, norm: float, *deviations: float) -> str | None:
        """What is wrong with a step of these figures, as judge returned them; None where nothing is."""
        finite = math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())  # its scale adapts
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        if not finite:
            return "not applied"
        return self.spikes.verdict(list(deviations)) if self.spikes else None

    @property
    def gives_up(self) -> bool:
        return self.bad_in_a_row >= self.max_bad_steps

    def state(self) -> dict[str, Any]:
        return {"spike_window": self.spikes and self.spikes.window.tolist(), "scaler": self.scaler.state_dict()}
