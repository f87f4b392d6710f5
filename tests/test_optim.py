"""What stands between gradients and weights: moments in bf16, and clipping left to the optimizer's kernel."""

import dataclasses

import pytest
import torch
from launch import TINY, train
from test_resume import newest, steps, take, tensors
from test_train import relative

import configs
from model import GPTNeoX, num_parameters
from refocused.run import adamw, optim, strategy
from refocused.run.adamw import HalfAdamW

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # tensors() reads without ranks
KEYS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (3,), (64, 33))]


def gradients(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def test_bf16_moments(monkeypatch):
    """To the bit torch's fp32 AdamW whose moments are rounded to bf16 after each step, whatever pieces it works in."""
    ours, theirs = parameters(), parameters()
    monkeypatch.setattr(adamw, "SCRATCH", 128)  # (64, 33) is many pieces, the others share one
    half, whole = HalfAdamW(ours, **KEYS), torch.optim.AdamW(theirs, **KEYS)
    for seed in range(1, 6):
        gradients(ours, seed)
        gradients(theirs, seed)
        half.step()
        whole.step()
        for p, q in zip(ours, theirs, strict=True):
            for slot in ("exp_avg", "exp_avg_sq"):
                whole.state[q][slot].copy_(whole.state[q][slot].bfloat16())
                assert half.state[p][slot].dtype == torch.bfloat16
                assert torch.equal(half.state[p][slot].float(), whole.state[q][slot]), (seed, slot)
            assert torch.equal(p, q) and half.state[p]["step"] == seed
    before = [t.clone() for p in ours for t in (p, *half.state[p].values())]
    half.found_inf = torch.ones(())
    half.step()
    assert all(map(torch.equal, before, [t for p in ours for t in (p, *half.state[p].values())]))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, HalfAdamW])
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clipping_in_the_kernel(kind, scale, device):
    """Divided by the kernel as it reads: the update of gradients clipped before it, and the same norm."""
    found = []
    for later in (False, True):
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(device)
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator).to(device)
        optimizer = kind(model.parameters(), **KEYS)
        scaler = torch.amp.GradScaler(device, enabled=False)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(device) * scale
            norm, divisor = strategy.clip_gradients(model, 1.0, later)
            assert (divisor is not None) == later and (norm > 1) == (scale > 1)
            optim.update([optimizer], scaler, torch.tensor(True, device=device), divisor)
        found.append([norm, *(t.detach() for p in model.parameters() for t in (p, p.grad))])
    for a, b in zip(*found, strict=True):  # on a GPU a rounding of the divisor moves what bf16 rounds the other way
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7 if device == "cpu" else 1e-4)
    # on a CPU the pass of its own stays: its numbers are those of every run before
    assert optim.clips([optimizer]) == (device == "cuda")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_runs_with_bf16_moments(shards, tmp_path, parallel):
    """It trains like fp32's, is saved in 8 bytes per parameter, resumes bit for bit, and not into moments of fp32."""
    common = [f"data_dir={shards}", "max_steps=12", "save_steps=5", f"parallel={parallel}"]
    exact = train(tmp_path / "exact", *common, nproc=2)
    half = [*common, "adam_moments=bf16"]
    whole = train(tmp_path / "whole", *half, nproc=2)
    assert relative(exact.losses, whole.losses) < 2e-2
    saved = tensors(newest(tmp_path / "whole"))
    sizes = {key: t.nbytes for key, t in saved.items() if not key.startswith("optim.step")}
    cfg = configs.load([*TINY, *half])[0]
    assert sum(sizes.values()) == optim.checkpoint_bytes(cfg) == 8 * num_parameters(cfg)[0]
    muon = [p.numel() for name, p in GPTNeoX(cfg).named_parameters() if "layers." in name and p.dim() == 2]
    both = optim.checkpoint_bytes(dataclasses.replace(cfg, adam_moments="fp32", optimizer="muon"))
    assert both == 12 * num_parameters(cfg)[0] - 4 * sum(muon)
    take(tmp_path / "whole", 5, tmp_path / "again")
    train(tmp_path / "again", *half, "resume=latest", nproc=2)
    assert steps(tmp_path / "again").items() <= steps(tmp_path / "whole").items()
    again = tensors(newest(tmp_path / "again"))
    assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)
    refused = train(tmp_path / "again", *common, "resume=latest", nproc=2, code=2)
    assert "adam_moments bf16 -> fp32; go on with adam_moments=bf16" in refused.text
