"""The optimizers, the rate's schedule, and one guarded update."""

import math

import torch
from torch.distributed.fsdp import FSDPModule

from configs import Config
from model import num_parameters


def learning_rate(step: int, cfg: Config) -> float:
    """The rate of update number `step` (from 0): linear warm-up, then cfg.lr_scheduler_type; pure, so never saved."""
    peak, floor = cfg.learning_rate, cfg.min_learning_rate
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    begin = cfg.warmup_steps
    if cfg.lr_scheduler_type == "warmup_stable_decay":
        begin = max(begin, cfg.max_steps - (cfg.decay_steps or cfg.max_steps // 5))
    done = min(1.0, max(0, step - begin) / max(1, cfg.max_steps - begin))
    match cfg.lr_scheduler_type:
        case "cosine":
            return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
        case "constant":
            return peak
        case "linear" | "warmup_stable_decay":
            return peak + (floor - peak) * done
        case unknown:
            raise NotImplementedError(f"lr_scheduler_type={unknown}")


def make_optimizers(model: torch.nn.Module, cfg: Config) -> list[torch.optim.Optimizer]:
    """Fused AdamW, weight decay on matrices only; with optimizer=muon the blocks' matrices are Muon's instead.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) in the scaling of Liu et al. 2025, arXiv:2502.16982,
    so that AdamW's learning rate and weight decay fit it.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with_muon, half = {"adamw": False, "muon": True}[cfg.optimizer], {"fp32": False, "bf16": True}[cfg.adam_moments]
    if with_muon or half:
        from refocused.run import optimizers as own
    muons = [p for name, p in named if with_muon and "layers." in name and p.dim() == 2]
    rest = [p for _, p in named if not any(p is m for m in muons)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    kind = own.HalfAdamW if half else torch.optim.AdamW
    optimizers: list[torch.optim.Optimizer]
    optimizers = [kind(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.adam_epsilon, fused=True)]
    if muons:
        rate, decay = cfg.learning_rate, cfg.weight_decay
        optimizers.append(own.Muon(muons, rate, decay, momentum=0.95, ns_steps=5, adjust_lr_fn="match_rms_adamw"))
    if isinstance(model, FSDPModule) and not cfg.cpu_offload:
        streams = torch.get_device_module(next(model.parameters()).device)

        def note(*_) -> None:  # for strategy.sync_gradients
            model.updated = streams.current_stream().record_event()

        for optimizer in optimizers:
            optimizer.register_step_post_hook(note)
    return optimizers


def checkpoint_bytes(cfg: Config) -> int:
    """Of the fp32 weights and the optimizers' state, which is what a checkpoint holds; its other files are small."""
    every = num_parameters(cfg)[0]
    C, inner = cfg.hidden_size, cfg.intermediate_size
    muons = cfg.num_hidden_layers * (4 * C * C + 2 * C * inner) if cfg.optimizer == "muon" else 0
    return 4 * every + 4 * muons + (4 if cfg.adam_moments == "bf16" else 8) * (every - muons)


def set_rate(optimizers: list[torch.optim.Optimizer], step: int, cfg: Config) -> float:
    """Give every optimizer the rate of update number `step` (from 0), and return it."""
    rate = learning_rate(step, cfg)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rate


def clips_in_kernel(cfg: Config, device_type: str) -> bool:
    """Whether update() takes a divisor: CUDA's fused AdamW divides as it reads, which saves a pass over gradients."""
    return device_type == "cuda" and cfg.optimizer == "adamw" and not cfg.cpu_offload


def update(
    optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, apply: torch.Tensor,
    divisor: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """One update by every optimizer, or by none unless `apply` (a bool on the device); gradients are unscaled already.

    divisor: of the gradients, an fp32 scalar on the device; None where they are clipped already.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Muon):
            vars(optimizer)["apply"] = apply
            optimizer.step()
            continue
        # the fused kernel skips the update by itself: nobody waits for the verdict, except where parameters are in host
        # memory: it must have arrived before the host reads it, which the optimizer's own copy does not wait for
        where = optimizer.param_groups[0]["params"][0].device
        found_inf = (~apply).float().to(where)
        vars(optimizer).update(grad_scale=divisor, found_inf=found_inf)  # as GradScaler hands them over
        optimizer.step()
    scaler.update()
