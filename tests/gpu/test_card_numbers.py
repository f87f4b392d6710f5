"""Losses, gradients and kernels of the device against a CPU, eager code and plain products."""

import dataclasses
import functools
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from card import apart, losses

import configs
import model as neox
from refocused.run import gpus, optim, strategy

HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


def test_rates(card, say):
    """A large product, as a share of what is known of the card; copies to the host."""
    n, size = (8192, 1 << 30) if card.cuda else (256, 1 << 16)
    a, b = (torch.randn(n, n, device=card.device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * n**3 / card.seconds(functools.partial(torch.mm, a, b, out=torch.empty_like(a)), 50)
    known = gpus.find(torch.cuda.get_device_name()) if card.cuda else None
    shares = {"peak": known.peak, "rate measured elsewhere": known.ceiling} if known else {}
    text = f"{rate / 1e12:.4g} TFLOP/s bf16 at {n}^3"
    text += "".join(f", {rate / full:.0%} of the {what}" for what, full in shares.items() if full)
    there = torch.empty(size, dtype=torch.uint8, device=card.device)
    for pinned in (True, False) if card.cuda else (False,):
        here = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        copied = size / card.seconds(functools.partial(here.copy_, there, non_blocking=True), 3) / 1e9
        text += f", {copied:.1f} GB/s to {'pinned' if pinned else 'pageable'} memory"
    say(text)


@pytest.mark.parametrize("precision, limit", [("no", 1e-4), ("bf16", 1e-2)])
def test_device_against_cpu(card, run, say, precision, limit):
    """Ten losses with the GPU and without it, products in full fp32."""
    card.needs_cuda()
    exact = "import torch as _torch\n_torch.set_float32_matmul_precision = lambda precision: None\n"
    keys = [f"mixed_precision={precision}"]
    found = apart(*(losses(run(name, *keys, before=exact, env=env)) for name, env in (("cpu", HIDDEN), ("gpu", {}))))
    say(f"{found:.2g}", f"{limit:g}")
    assert found <= limit


def test_compiled_against_eager(card, run, say):
    card.needs_cuda("compiling for a CPU has tests of its own")
    runs = [run(f"compile-{on}", "mixed_precision=bf16", f"compile_model={on}") for on in ("false", "true")]
    found = apart(*map(losses, runs))
    say(f"{found:.2g}", "1e-2")
    assert found <= 1e-2


@pytest.mark.parametrize(
    "parallel, level", itertools.product(("ddp", "fsdp"), configs.CHOICES["activation_checkpointing"])
)
def test_no_recompilation(card, run, parallel, level):
    """50 steps with evaluations: nothing is compiled after the first one."""
    card.needs_cuda("compiling for a CPU has tests of its own")
    keys = [f"parallel={parallel}", f"activation_checkpointing={level}", "compile_model=true", "max_steps=50"]
    keys += ["mixed_precision=bf16", "eval_steps=2", "gradient_accumulation_steps=2"]
    before = "import torch as _torch\n_torch._logging.set_logs(recompiles=True)\n"
    assert "Recompiling" not in run("recompile", *keys, before=before).text.partition("Step 2: eval_loss")[2]


def test_attention_kernel(card, say):
    """What torch chooses for causal attention, against plain products in fp32."""
    dtype, shape = (torch.bfloat16, (8, 16, 1024, 384)) if card.cuda else (torch.float32, (1, 2, 32, 24))
    q, k, v = torch.randn(*shape, device=card.device, dtype=dtype).chunk(3, dim=-1)
    with torch.profiler.profile() as profile:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        card.synchronize()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    names = [event.key for event in profile.key_averages() if re.search("flash|efficient|cudnn|attention", event.key)]
    error = ((y.float() - plain).norm() / plain.norm()).item()
    say(f"{error:.2g}; {', '.join(names)[:160]}", "1e-2 of the plain products")
    assert error < 1e-2


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


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_clipping(card, say, moments):
    """The update whose kernel divides the gradients against one clipped before."""
    weights = []
    cfg = dataclasses.replace(
        configs.load([str(configs.DEMO), *card.base])[0], adam_moments=moments, learning_rate=1e-2
    )
    for later in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(1000, 999, device=card.device)
        optimizers = optim.make_optimizers(model, cfg)
        assert optim.clips(optimizers) == card.cuda
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            _, divisor = strategy.clip_gradients(model, 1.0, later)
            scaler = torch.amp.GradScaler(card.device, enabled=False)
            optim.update(optimizers, scaler, torch.tensor(True, device=card.device), divisor)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    error = ((weights[0] - weights[1]).norm() / weights[0].norm()).item()
    say(f"{error:.2g}", "1e-4")  # a rounding of the divisor moves what is about to round the other way
    assert error <= 1e-4 or not card.cuda


def test_layouts_agree(card, run, say):
    """Two ranks on one card, with accumulation, against one process: DDP, FSDP2, HSDP."""
    one = losses(run("one", "global_batch_size=8", "max_steps=6", "per_device_train_batch_size=8"))
    keys = "global_batch_size=8 max_steps=6 per_device_train_batch_size=2".split()
    layouts = {"ddp": [], "fsdp": ["parallel=fsdp"], "hsdp": ["parallel=fsdp", "shard_size=1"]}
    worst = max(apart(one, losses(run(name, *keys, *more, nproc=2))) for name, more in layouts.items())
    say(f"{worst:.2g}", "1e-5")
    assert worst <= 1e-5
