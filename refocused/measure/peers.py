"""The contenders of `bench.py step`: this trainer, two designs that people know, and the matrix products alone.

Each runs in its own process. It makes optimizer steps without end and calls its gate after every step.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import configs
import train
from configs import Config
from data import Dataset
from refocused.checkpoint import huggingface
from refocused.run import devices, processes
from refocused.run.signals import StopSignal


class Gate:
    """Lets a loop run as many steps as the parent asks for, and reports seconds and memory.

    Every loop calls tick() after each optimizer step; train.py's takes it as a parameter.
    """

    def __init__(self):
        self.channel = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever else is printed goes to the log

    def wait(self) -> None:
        """Until the parent asks for a round; called first when everything is imported."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self.left, self.begin = int(line), time.perf_counter()

    def tick(self) -> None:
        self.left -= 1
        if self.left:
            return
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - self.begin
        report = {"seconds": seconds, "memory": devices.peak_memory(devices.any_device())}
        self.channel.write(json.dumps(report) + "\n")
        self.wait()


def ours(cfg: Config, gate: Gate) -> None:
    gate.wait()
    train.train(cfg, {}, processes.start(cfg), Dataset.open(cfg), StopSignal(), gate.tick)


def read_windows(cfg: Config) -> torch.Tensor:
    """The benchmark's shard in memory, as windows of T + 1 tokens."""
    with np.load(next(Path(cfg.data_dir).glob("*.npz"))) as shard:
        return torch.from_numpy(shard["input_ids"].astype(np.int64)).unfold(
            0, cfg.sequence_length + 1, cfg.sequence_length
        )


def transformers_design(cfg: Config, gate: Gate) -> None:
    """The common design: Transformers' model, AdamW, torch.compile, Accelerate's loop."""
    from accelerate import Accelerator
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, get_cosine_schedule_with_warmup

    gate.wait()
    accelerator = Accelerator(
        mixed_precision=cfg.mixed_precision,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        cpu=devices.any_device().type == "cpu",
    )
    model: Any = GPTNeoXForCausalLM(GPTNeoXConfig(**huggingface.to_config(cfg), use_cache=False))
    model = torch.compile(model) if cfg.compile_model else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, cfg.warmup_steps, cfg.max_steps)
    loader: Any = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(read_windows(cfg)),
        cfg.per_device_train_batch_size,
        shuffle=True,
        num_workers=2,
        drop_last=True,
    )
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for [batch] in itertools.chain.from_iterable(itertools.repeat(loader)):
        with accelerator.accumulate(model):
            ids = batch[:, :-1].contiguous()
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            gate.tick()


class GPT2(nn.Module):
    """GPT-2's shape with GPT-NeoX's matrix sizes: learned positions, sequential residual, an untied head."""

    def __init__(self, cfg):
        super().__init__()
        C, inner, self.heads = cfg.hidden_size, cfg.intermediate_size, cfg.num_attention_heads
        self.tokens, self.positions = nn.Embedding(cfg.vocab_size, C), nn.Embedding(cfg.sequence_length, C)
        linears = {"qkv": (C, 3 * C), "proj": (C, C), "up": (C, inner), "down": (inner, C)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape) for name, shape in linears.items()})
            for _ in range(cfg.num_hidden_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2 * cfg.num_hidden_layers + 1))
        self.head = nn.Linear(C, cfg.vocab_size, bias=False)
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear | nn.Embedding) else None)

    def forward(self, idx, targets):
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))  # (B, T, C)
        for i, block in enumerate(self.blocks):
            heads = block["qkv"](self.norms[2 * i](x)).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in heads)  # (B, H, T, D)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["proj"](y.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](self.norms[2 * i + 1](x))))
        return F.cross_entropy(self.head(self.norms[-1](x)).flatten(0, 1), targets.flatten())


def nanogpt(cfg: Config, gate: Gate) -> None:
    """A nanoGPT-style loop: random windows, autocast, whole-model compile, fused AdamW."""
    gate.wait()
    where = devices.any_device()
    model = GPT2(cfg).to(where)
    compiled = torch.compile(model) if cfg.compile_model else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    windows, accumulation = read_windows(cfg), cfg.gradient_accumulation_steps
    dtype = devices.DTYPES[cfg.mixed_precision]
    while True:
        for _ in range(accumulation):
            chosen = torch.randint(len(windows), (cfg.per_device_train_batch_size,))
            batch = windows[chosen].to(where, non_blocking=True)
            with torch.autocast(where.type, dtype, enabled=dtype != torch.float32):
                loss = compiled(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) / accumulation
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.tick()


def floor(cfg: Config, gate: Gate) -> None:
    """Only a step's matrix products: forward, input's and weight's gradient of each Linear and the head; of attention two
    forward and four backward, over the causal half. Operands and results lie ready in memory."""
    gate.wait()
    where, dtype = devices.any_device(), devices.DTYPES[cfg.mixed_precision]
    C, inner, T = cfg.hidden_size, cfg.intermediate_size, cfg.sequence_length
    B, H, L = cfg.per_device_train_batch_size, cfg.num_attention_heads, cfg.num_hidden_layers

    def normal(*shape):
        return torch.randn(*shape, device=where).to(dtype)

    def linear(inputs, outputs):
        x, dy, w = normal(B * T, inputs), normal(B * T, outputs), normal(outputs, inputs)
        return lambda: (torch.mm(x, w.T, out=dy), torch.mm(dy, w, out=x), torch.mm(dy.T, x, out=w))

    def attention():
        q, k, s = normal(B * H, T, C // H), normal(B * H, T // 2, C // H), normal(B * H, T, T // 2)
        over_d = [lambda: torch.bmm(q, k.mT, out=s)] * 2  # scores; the gradient of the weights
        over_t = [lambda: torch.bmm(s, k, out=q), lambda: torch.bmm(s.mT, q, out=k)]  # output, dq; dk, dv
        return lambda: [product() for product in (*over_d, *over_t, *over_t)]

    block = [linear(C, 3 * C), attention(), linear(C, C), linear(C, inner), linear(inner, C)]
    head = linear(C, cfg.vocab_size)
    with torch.no_grad():
        while True:
            for _ in range(cfg.gradient_accumulation_steps):
                for _ in range(L):
                    for product in block:
                        product()
                head()
            gate.tick()


def main(argv: list[str]) -> None:
    """`peers.py NAME CONFIG.py [key=value ...]`: one contender, told by bench.py over its standard input."""
    gate = Gate()
    contenders = {"ours": ours, "transformers": transformers_design, "nanogpt": nanogpt, "floor": floor}
    contenders[argv[0]](configs.load(argv[1:])[0], gate)


if __name__ == "__main__":
    main(sys.argv[1:])
