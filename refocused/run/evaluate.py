"""The model asked without being trained: the held-out loss, and whether it gives one at all."""

import torch

from configs import Config
from refocused.run import processes, strategy
from refocused.run.signals import StopSignal


@torch.no_grad()
def evaluate(model: torch.nn.Module, dataset, cfg: Config, env: processes.Env, stop: StopSignal) -> float | None:
    """Token-weighted mean loss over the data.Dataset's fixed held-out windows; None when a stop was asked for meanwhile."""
    loss = torch.zeros((), device=env.device)
    model.eval()
    stopped = False
    for x, y in dataset.held_out(cfg, env.rank, env.world_size):
        with strategy.autocast(cfg, env):
            loss += model(x.to(env.device), y.to(env.device))
        if stopped := any(processes.agree(stop.since > 0)):
            break
    model.train()
    strategy.reshard(model)
    tokens = len(dataset.eval_ids(cfg.eval_samples)) * cfg.sequence_length
    return None if stopped else processes.total(loss).item() / tokens


@torch.no_grad()
def sound(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, cfg: Config, env: processes.Env) -> bool:
    """Whether the weights as they are now give a finite loss on x, y (B, T) of every rank: they may be saved then."""
    with torch.compiler.set_stance("force_eager"), strategy.autocast(cfg, env):  # no time to compile a forward alone
        loss = model(x.to(env.device), y.to(env.device))
    strategy.reshard(model)
    return bool(processes.total(loss.detach().clone()).isfinite())
