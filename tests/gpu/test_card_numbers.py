"""Losses, gradients and kernels of the device against a CPU, eager code and plain products."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from card import COMMON, apart, losses
from launch import GUARD

import configs
import model as neox
from refocused.run import hardware


def test_rates(card, say):
    """A large product beside what is known of the card; its memory, and copies to and from the host."""
    rates = hardware.gpu(torch.device(card.device), *(() if card.cuda else (256, 1 << 16)))
    say("; ".join(hardware.describe([rates], [card.device], torch.cuda.get_device_name() if card.cuda else "CPU")))


HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
EXACT = "import torch as _torch\n_torch.set_float32_matmul_precision = lambda precision: None\n"


@pytest.mark.parametrize("precision, limit", [("no", 1e-4), ("bf16", 1e-2)])
def test_device_against_cpu(card, run, say, precision, limit):
    """Ten losses with the GPU and without it, products in full fp32."""
    card.needs_cuda()
    keys = [f"mixed_precision={precision}"]
    found = apart(*(losses(run(name, *keys, before=EXACT, env=env)) for name, env in (("cpu", HIDDEN), ("gpu", {}))))
    say(f"{found:.2g}", f"{limit:g}")
    assert found <= limit


def test_compiled_against_eager(card, run, say):
    card.needs_cuda("compiling for a CPU has tests of its own")
    runs = [run(f"compile-{on}", "mixed_precision=bf16", f"compile_model={on}") for on in ("false", "true")]
    found = apart(*map(losses, runs))
    say(f"{found:.2g}", "1e-2")
    assert found <= 1e-2


def test_attention_kernel(card, say):
    """What torch chooses for causal attention."""
    dtype, shape = (torch.bfloat16, (8, 16, 1024, 384)) if card.cuda else (torch.float32, (1, 2, 32, 24))
    with torch.profiler.profile() as profile:
        F.scaled_dot_product_attention(
            *torch.randn(*shape, device=card.device, dtype=dtype).chunk(3, -1), is_causal=True
        )
        if card.cuda:
            torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if re.search("flash|efficient|cudnn|attention", event.key)]
    say(", ".join(names)[:160])


def test_documents_apart(card, say):
    """Attention within documents, its output and gradients, by CUDA's kernel in bf16 against the mask in fp32; compiled,
    documents of other lengths compile nothing again."""
    T, end = (1024, 50256) if card.cuda else (64, 256)
    wide = ["hidden_size=2048", "num_attention_heads=16"] if card.cuda else []
    cfg, _ = configs.load([str(configs.DEMO), *card.base, *wide])
    exact = neox.Attention(cfg).to(card.device)
    half = neox.Attention(cfg).to(card.device, torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())
    worst = 0.0
    for compiled, share in itertools.product((False, True) if card.cuda else (False,), (0.005, 0.03)):
        if compiled and share == 0.005:  # of tokens that begin a document
            half.compile(dynamic=False)
        idx = torch.where(torch.rand(4, T, device=card.device) < share, end, 0)
        documents = neox.Documents.of(idx, end, neox.takes_edges(idx.device, cfg.head_dim))
        tables = neox.rotary_tables(torch.arange(T, device=card.device), cfg.head_dim // 4, 10_000)
        x = torch.randn(4, T, cfg.hidden_size, device=card.device).bfloat16()
        found = []
        with torch._dynamo.config.patch(error_on_recompile=share == 0.03):
            for attention in (exact, half):
                given = x.to(attention.dense.weight.dtype).requires_grad_()
                y = attention(given, *tables, documents=documents)
                gradients = torch.autograd.grad(y.float().square().sum(), (given, *attention.parameters()))
                found.append([t.float() for t in (y, *gradients)])
        worst = max(worst, *(((b - a).norm() / a.norm()).item() for a, b in zip(*found, strict=True)))
    say(f"{worst:.2g}", "2e-2")
    assert worst <= 2e-2


def test_layouts_agree(card, run, say):
    """Two ranks on one card, with accumulation, against one process: DDP, FSDP2, HSDP."""
    one = losses(run("one", "global_batch_size=8", "max_steps=6", "per_device_train_batch_size=8"))
    keys = "global_batch_size=8 max_steps=6 per_device_train_batch_size=2".split()
    layouts = {"ddp": [], "fsdp": ["parallel=fsdp"], "hsdp": ["parallel=fsdp", "shard_size=1"]}
    worst = max(apart(one, losses(run(name, *keys, *more, nproc=2))) for name, more in layouts.items())
    say(f"{worst:.2g}", "1e-5")
    assert worst <= 1e-5


@pytest.mark.parametrize("beside, split_k", [(0, False), (8, False), (0, True), (8, True)])
def test_same_twice(card, say, beside, split_k):
    """deterministic=true: 200 batches twice from one state, every gradient by its name, then Muon's update; alone on the
    card and with eight copies beside, with split-K and without. Which tensors had other bits, and how often."""
    if not card.cuda and (beside or split_k):
        pytest.skip("on a CPU one case shows that the check works")
    base = [word for word in card.base if not word.startswith(("mixed", "compile"))]
    keys = [*base, *COMMON, "mixed_precision=bf16", f"compile_model={card.cuda}".lower(), "optimizer=muon"]
    script = str(Path(__file__).with_name("twice.py"))
    command = [sys.executable, script, "200" if card.cuda else "2", str(split_k).lower(), *keys, "deterministic=true"]
    copies = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(1 + beside)]
    found = [copy.communicate(timeout=GUARD)[0] for copy in copies]
    assert not any(copy.returncode for copy in copies)
    differ = [json.loads(text.splitlines()[-1]) for text in found]
    say(f"{sum(map(bool, differ))} of {len(differ)} processes had other bits: {differ}"[:300], "none" * (not split_k))
    assert split_k or not any(differ)
