"""What is not trained on: copies of the model that differ, and steps whose figures cannot be right."""

import hashlib
import math
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from configs import Config
from refocused.checkpoint.tensors import local_part
from refocused.run import processes
from refocused.run.exits import INTERNAL

WINDOW = 128  # steps that a spike is compared with; from half of it on
SIGMA = 6.0  # deviations above them that make a spike
OVERFLOWS = 40  # steps in a row in which fp16's scaler may halve its scale, from 2**16 far below 1


class ReplicasDiffer(ValueError):
    """Ranks that should hold the same parameters do not."""

    exit_code = INTERNAL
    same_on_all_ranks = True


@torch.no_grad()
def check_replicas(model: torch.nn.Module, cfg: Config, step: int) -> None:
    """Raise ReplicasDiffer, on every rank alike, unless all copies of the model have the same bits. Collective.

    Under DDP each rank has a copy, under HSDP each shard_size of them; one copy needs no comparison. A sum of the
    bits as integers sees any single change, and two that cancel out are no accident.
    """
    world = dist.get_world_size()
    size = 1 if cfg.parallel == "ddp" else cfg.shard_size or world  # ranks that share one copy
    if size == world:
        return
    sums = []
    for p in model.parameters():
        bits = local_part(p).detach().flatten().view(torch.uint8)
        whole = len(bits) // 4 * 4
        sums += [bits[:whole].view(torch.int32).sum(dtype=torch.int64), bits[whole:].sum(dtype=torch.int64)]
    everyone = processes.gather(hashlib.sha256(str(torch.stack(sums).tolist()).encode()).hexdigest())
    odd = []
    for part in range(size):
        ranks = range(part, world, size)
        [(most, _)] = Counter(everyone[rank] for rank in ranks).most_common(1)
        odd += [rank for rank in ranks if everyone[rank] != most]
    if odd:
        who = f"rank {odd[0]} has" if len(odd) == 1 else f"ranks {', '.join(map(str, sorted(odd)))} have"
        raise ReplicasDiffer(
            f"at step {step:,} {who} other parameters than the rest{' (or rank 0 has)' * (world == 2 * size)}: memory or a "
            "GPU is faulty, or an update was not the same on all; nothing was saved, the last checkpoint stands: "
            "resume=latest, on other hardware if it happens again"
        )


class Spikes:
    """How far a step's loss and gradient norm lie above those of the WINDOW steps before, in standard deviations.

    Everything stays on the device, so that a step can be refused before its update without the host waiting for it.
    What spikes enters the window too: a level that has changed for good is soon the normal one.
    """

    def __init__(self, cfg: Config, device: torch.device, window: list[list[float]] | None):
        self.skips = {"report": False, "skip": True}[cfg.spikes]
        # -1 marks a row that is not filled yet: neither a loss nor a norm can be negative
        self.window = torch.full((WINDOW, 2), -1.0, device=device)
        if window:
            self.window.copy_(torch.tensor(window))

    def check(self, step: int, figures: Tensor) -> tuple[Tensor, Tensor]:
        """Deviations (2,) of figures (loss, norm), and whether to apply the step, a bool that is equal on all ranks."""
        filled = self.window[:, :1] >= 0  # (WINDOW, 1)
        n = filled.sum()
        mean = torch.where(filled, self.window, 0.0).sum(0) / n
        std = (torch.where(filled, self.window - mean, 0.0).square().sum(0) / (n - 1)).sqrt()
        deviations = torch.where(n >= WINDOW // 2, (figures - mean) / std, 0.0)
        row = step % WINDOW
        self.window[row] = torch.where(figures.isfinite().all(), figures, self.window[row])
        spike = (deviations > SIGMA).any().float()
        if self.skips:  # GPUs of different kinds may round a norm differently, and the answer must not
            processes.all_reduce(spike, dist.ReduceOp.MAX)
        return deviations, (spike == 0) if self.skips else torch.ones_like(spike, dtype=torch.bool)

    def status(self, deviations: list[float]) -> str | None:
        """On the host, later: what is said about a step with these deviations; None when it was no spike."""
        if not any(d > SIGMA for d in deviations):
            return None
        above = " and ".join(f"{name} {d:.1f}" for name, d in zip(("loss", "norm"), deviations, strict=True))
        return f"{above} deviations above the last {WINDOW} steps, {'not ' * self.skips}applied"


class Guard:
    """Whether a step is applied, decided on the device before its update; and its status on the host, a step later."""

    def __init__(self, cfg: Config, device: torch.device, scaled: bool, window: list[list[float]] | None):
        """scaled: by fp16's gradient scaler, which adapts to an infinite norm; window: as a checkpoint has it."""
        self.max_bad_steps, self.scaled = cfg.max_bad_steps, scaled
        self.spikes = Spikes(cfg, device, window) if cfg.spikes != "off" else None
        self.bad_in_a_row = self.overflows = 0  # up to the last step that the host knows of

    def check(self, step: int, loss_sum: Tensor, norm: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """From this rank's sum of losses and norm, scalars: figures (loss, norm) with what else a status needs, and
        whether to apply the step; both on the device and equal on all ranks. Collective.

        A norm that is finite here and not elsewhere (a flipped bit after the reduction) is not finite anywhere: the
        ranks' answers travel with their losses.
        """
        loss, broken = processes.all_reduce(torch.stack((loss_sum, (~norm.isfinite()).to(loss_sum.dtype))))
        norm = torch.where((broken > 0) & norm.isfinite(), math.inf, norm)
        figures = torch.stack((loss / tokens, norm))
        apply = figures.isfinite().all()
        if self.spikes:
            deviations, calm = self.spikes.check(step, figures)
            figures, apply = torch.cat((figures, deviations)), apply & calm
        return figures, apply

    def status(self, loss: float, norm: float, *deviations: float) -> str | None:
        """What is wrong with a step of these figures, as check returned them; None where nothing is."""
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        finite = math.isfinite(loss) and self.overflows <= (OVERFLOWS if self.scaled else 0)
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        if not finite:
            return "not applied"
        return self.spikes.status(list(deviations)) if self.spikes and not self.overflows else None

    @property
    def too_many_bad_steps(self) -> bool:
        return self.bad_in_a_row >= self.max_bad_steps

    def window(self) -> list[list[float]] | None:
        return self.spikes.window.tolist() if self.spikes else None
