"""The held-out loss."""

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
