"""The held-out loss of a model, and whether its loss is finite at all."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from configs import Config
from refocused.checkpoint import tensors
from refocused.run import processes, strategy
from refocused.run.signals import StopSignal
from refocused.shards.shard import DataError
from refocused.shards.tokenizers import fits


class Score(NamedTuple):
    """Sums over the targets of all ranks, the losses in nats."""

    loss: float
    text_loss: float  # of the targets that stand for bytes: without end-of-text and what else is no text
    tokens: float
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
def evaluate(
    model: torch.nn.Module, dataset, cfg: Config, env: processes.Env, stop: StopSignal | None = None,
    each_batch: Callable[[], object] = lambda: None,
) -> Score | None:  # fmt: skip
    """The score of a model on the data.Dataset's fixed held-out windows; None when a stop was asked for. Collective.

    each_batch is called after every batch.
    """
    model.eval()
    ids = dataset.eval_ids(cfg.eval_samples)
    lengths = byte_table(cfg.tokenizer, cfg.vocab_size)
    # MPS has no fp64
    loss = torch.zeros(2, device=env.device, dtype=torch.float32 if env.device.type == "mps" else torch.float64)
    tokens, size, stopped = 0, 0, False
    # every rank has as many batches as the others, so that they meet in max_over_ranks()
    for x, y in dataset.blocks(ids, cfg.per_device_train_batch_size, env.rank, env.world_size):  # (B, T) each
        with strategy.autocast(cfg, env):
            losses = model(x.to(env.device), y.to(env.device), reduction="none")  # (B, T)
        of_text = torch.zeros_like(y) if lengths is None else lengths[y.clamp(min=0)] * (y >= 0)
        loss += torch.stack((losses.sum(), losses[(of_text > 0).to(env.device)].sum()))
        tokens, size = tokens + int((y >= 0).sum()), size + int(of_text.sum())
        each_batch()
        if stopped := stop is not None and any(processes.max_over_ranks(stop.since > 0)):
            break
    model.train()
    tensors.reshard(model)
    counts = torch.tensor([tokens, size], device=env.device, dtype=loss.dtype)
    return None if stopped else Score(*processes.all_reduce(torch.cat((loss, counts))).tolist())


@torch.no_grad()
def loss_is_finite(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, cfg: Config, env: processes.Env) -> bool:
    """Whether the weights give a finite loss on x, y (B, T) of every rank. Only then may they be saved."""
    with strategy.eager(cfg), strategy.autocast(cfg, env):  # no time to compile a forward alone
        loss = model(x.to(env.device), y.to(env.device))
    tensors.reshard(model)
    return bool(processes.all_reduce(loss.detach().clone()).isfinite())
