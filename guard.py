"""What a run refuses: ranks that disagree, other data than the checkpoint's, steps whose figures cannot be right."""

import dataclasses
import json
from pathlib import Path

import torch
import torch.distributed as dist

import data
import parallel
from configs import Config, ConfigError
from manifest import CheckpointError

PLACES = ("data_dir", "cache_dir", "output_dir", "logging_dir")  # nodes may keep things in different places
WINDOW = 128  # steps that a spike is compared with; from half of it on


class NotFinite(ValueError):
    """Too many steps in a row whose loss or gradient norm is no number."""

    exit_code = 65


def check_ranks(cfg: Config, dataset: data.Dataset) -> None:
    """Raise ConfigError, on every rank alike, unless all were started with the same config and see the same shards."""
    mine = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in PLACES}
    mine["the shards in data_dir"] = dataset.fingerprint
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if differing := [key for key in mine if theirs[key] != everyone[0][key]]:
            shown = ", ".join(f"{key} ({theirs[key]} and {everyone[0][key]})" for key in differing[:3])
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ConfigError(f"ranks {rank} and 0 differ in {shown}{more}; start all with the same command and data")


def check_same_data(state: dict, cfg: Config, dataset: data.Dataset) -> None:
    """Raise DataError unless the checkpoint's run read these shards in this order, or allow_data_change is set."""
    if "data" not in state:
        raise CheckpointError("the checkpoint holds imported weights only; start a run from it with init_from=PATH")
    changes = data.explain_change(state["data"]["manifest"], dataset.manifest)
    for key in ("seed", "sequence_length", "eval_files"):
        if state["config"][key] != getattr(cfg, key):
            changes += f"\n{key} {state['config'][key]} -> {getattr(cfg, key)}"
    if changes and not cfg.allow_data_change:
        raise data.DataError(
            f"the checkpoint was trained on other data or in another order:\n{changes}\n"
            "restore it, or set allow_data_change=true to go on with what is there now"
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
            parallel.largest(spike)
        return deviations, (spike == 0) if self.skips else torch.ones_like(spike, dtype=torch.bool)

    def verdict(self, deviations: list[float]) -> str | None:
        """On the host, later: what is said about a step with these deviations; None when it was no spike."""
        if not any(d > self.sigma for d in deviations):
            return None
        above = " and ".join(f"{name} {d:.1f}" for name, d in zip(("loss", "norm"), deviations, strict=True))
        return f"{above} deviations above the last {WINDOW} steps, {'not ' * self.skips}applied"


def report(step: int, loss: float, norm: float, what: str, ids, dataset: data.Dataset, cfg: Config, monitor) -> None:
    """Say and write down which text a step was made of whose figures cannot be right."""
    windows = [{"shard": path, "offset": int(offset)} for path, offset in dataset.locate(ids)]
    path = Path(cfg.logging_dir, f"bad-step-{step}.json")
    first = ", ".join(f"{w['shard']} at {w['offset']}" for w in windows[:3])
    monitor.say(f"Step {step}: loss={loss:.4f}, grad norm={norm:.4f}: {what}. Read {first}, ...; all windows in {path}")
    if monitor.env.main:
        figures = {"step": step, "loss": str(loss), "grad_norm": str(norm), "verdict": what}
        path.write_text(json.dumps({**figures, "windows": windows}, indent=1))
