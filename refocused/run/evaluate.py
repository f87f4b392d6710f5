"""The model asked without being trained: the held-out loss, and whether it gives one at all."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs import Config
from refocused.run import processes, strategy
from refocused.run.signals import StopSignal
from refocused.shards.shard import DataError
from refocused.shards.tokenizers import fits


class Score(NamedTuple):
    """What a model makes of a text: sums over targets of all ranks, the losses in nats."""

    loss: float
    tokens: float
    text_loss: float  # of the targets that stand for bytes: without end-of-text and what else is no text
    bytes: float  # 0 where no tokenizer says

    @property
    def mean(self) -> float:
        return self.loss / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for each byte of text, by which models with different tokenizers can be compared."""
        return self.text_loss / math.log(2) / self.bytes if self.bytes else None


@functools.cache
def byte_table(tokenizer: str | None, vocab_size: int) -> Tensor | None:
    """int64 (vocab_size): bytes per id; None where the tokenizer cannot say or is not the model's. Collective, once."""
    try:
        known = processes.on_rank_0(lambda: (found := fits(tokenizer, vocab_size)) and found.byte_lengths())
    except DataError:
        return None
    return torch.tensor(known + [0] * (vocab_size - len(known))) if known else None


@torch.no_grad()
def score(
    model: torch.nn.Module, blocks: Iterable[tuple[Tensor, Tensor]], lengths: Tensor | None, cfg: Config,
    env: processes.Env, stop: StopSignal | None = None,
) -> Score | None:  # fmt: skip
    """The score of a model that is in eval mode on blocks x, y (B, T), as many on every rank; lengths: byte_table.

    None when a stop was asked for meanwhile. Collective.
    """
    # MPS has no fp64
    loss = torch.zeros(2, device=env.device, dtype=torch.float32 if env.device.type == "mps" else torch.float64)
    tokens = size = 0
    for x, y in blocks:
        with strategy.autocast(cfg, env):
            losses = model(x.to(env.device), y.to(env.device), reduction="none")  # (B, T)
        of_text = torch.zeros_like(y) if lengths is None else lengths[y.clamp(min=0)] * (y >= 0)
        loss += torch.stack((losses.sum(), losses[(of_text > 0).to(env.device)].sum()))
        tokens, size = tokens + int((y >= 0).sum()), size + int(of_text.sum())
        if stop is not None and any(processes.max_over_ranks(stop.since > 0)):
            return None
    counts = torch.tensor([tokens, size], device=env.device, dtype=loss.dtype)
    both, text, tokens, size = processes.all_reduce(torch.cat((loss, counts))).tolist()
    return Score(both, tokens, text, size)


def evaluate(
    model: torch.nn.Module, dataset, cfg: Config, env: processes.Env, stop: StopSignal | None = None,
    ids: np.ndarray | None = None, counted: Callable[[Iterator], Iterable] = iter,
) -> Score | None:  # fmt: skip
    """The score of a model on the data.Dataset's fixed held-out windows; None when a stop was asked for. Collective.

    ids: some of these windows alone; counted: what passes the batches on and counts them.
    """
    model.eval()
    ids = dataset.eval_ids(cfg.eval_samples) if ids is None else ids
    blocks = counted(dataset.blocks(ids, cfg.per_device_train_batch_size, env.rank, env.world_size))
    found = score(model, blocks, byte_table(cfg.tokenizer, cfg.vocab_size), cfg, env, stop)
    model.train()
    strategy.reshard(model)
    return found


@torch.no_grad()
def loss_is_finite(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, cfg: Config, env: processes.Env) -> bool:
    """Of the weights as they are now, on x, y (B, T) of every rank: then they may be saved."""
    with strategy.eager(cfg), strategy.autocast(cfg, env):  # no time to compile a forward alone
        loss = model(x.to(env.device), y.to(env.device))
    strategy.reshard(model)
    return bool(processes.all_reduce(loss.detach().clone()).isfinite())
