"""What stands between gradients and weights: moments in bf16, clipping left to the optimizer's kernel, and Muon shared out:
the same bits as torch's on whole matrices, few collectives, and nothing applied that must not be."""

import pytest
import torch
import torch.distributed as dist
from launch import TINY, on_ranks, train
from test_resume import newest, steps, take, tensors
from test_train import relative
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import configs
from model import GPTNeoX, num_parameters
from refocused.run import optim, optimizers, strategy
from refocused.run.optimizers import HalfAdamW, Muon, owners

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # tensors() reads without ranks
KEYS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
MUON = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def matrices(shapes, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_bf16_moments(monkeypatch):
    """To the bit torch's fp32 AdamW whose moments are rounded to bf16 after each step, whatever pieces it works in."""
    shapes = (7, 5), (3,), (64, 33)
    ours, theirs = ([torch.nn.Parameter(t) for t in matrices(shapes, 0)] for _ in range(2))
    monkeypatch.setattr(optimizers, "SCRATCH", 128)  # (64, 33) is many pieces, the others share one
    half, whole = HalfAdamW(ours, **KEYS), torch.optim.AdamW(theirs, **KEYS)
    for seed in range(1, 6):
        for p, q, grad in zip(ours, theirs, matrices(shapes, seed), strict=True):
            p.grad, q.grad = grad.clone(), grad
        half.step()
        whole.step()
        for p, q in zip(ours, theirs, strict=True):
            for slot in ("exp_avg", "exp_avg_sq"):
                whole.state[q][slot].copy_(whole.state[q][slot].bfloat16())
                assert half.state[p][slot].dtype == torch.bfloat16
                assert torch.equal(half.state[p][slot].float(), whole.state[q][slot]), (seed, slot)
            assert torch.equal(p, q) and half.state[p]["step"] == seed
    tree = [t for p in ours for t in (p, *half.state[p].values())]
    before = [t.clone() for t in tree]
    half.found_inf = torch.ones(())
    half.step()
    assert all(map(torch.equal, before, tree))


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


@pytest.mark.parametrize(
    "keys, clips",
    [("", True), ("adam_moments=bf16", True), ("optimizer=muon", False), ("parallel=fsdp cpu_offload=true", False)],
)
def test_who_clips_in_the_kernel(keys, clips):
    """CUDA's AdamW. On a CPU the pass of its own stays: its numbers are those of every run before."""
    cfg, _ = configs.load([*TINY, *keys.split()])
    adam = all(isinstance(kind, torch.optim.AdamW) for kind in optim.make_optimizers(GPTNeoX(cfg), cfg))
    assert optim.clips_in_kernel(cfg, "cuda") == clips == (adam and not cfg.cpu_offload)
    assert not optim.clips_in_kernel(cfg, "cpu")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("keys, step", [("adam_moments=bf16", 5), ("optimizer=muon", 4)])
def test_resume_is_bitwise(shards, tmp_path, parallel, keys, step):
    """Some steps on two processes, a resume and the rest against all in one: losses, weights, moments, bit for bit. The
    tensors have the bytes that checkpoint_bytes says. Bf16 moments train like fp32's, and no run of those goes on."""
    common = [f"data_dir={shards}", "max_steps=12", f"save_steps={step}", "save_total_limit=0", f"parallel={parallel}"]
    whole = train(tmp_path / "whole", *common, keys, nproc=2)
    take(tmp_path / "whole", step, tmp_path / "rest")
    train(tmp_path / "rest", *common, keys, "resume=latest", nproc=2)
    assert steps(tmp_path / "rest") == {s: bits for s, bits in steps(tmp_path / "whole").items() if s > step}
    x, y = (tensors(newest(tmp_path / name)) for name in ("whole", "rest"))
    assert x.keys() == y.keys() and [name for name in x if not torch.equal(x[name], y[name])] == []
    cfg = configs.load([*TINY, *common, keys])[0]
    assert sum(t.nbytes for key, t in x.items() if not key.startswith("optim.step")) == optim.checkpoint_bytes(cfg)
    if cfg.optimizer == "muon":
        muon = [p.numel() for name, p in GPTNeoX(cfg).named_parameters() if "layers." in name and p.dim() == 2]
        assert sum("momentum_buffer" in name for name in x) == 8
        assert optim.checkpoint_bytes(cfg) == 12 * num_parameters(cfg)[0] - 4 * sum(muon)
    else:
        exact = train(tmp_path / "exact", *common, nproc=2)
        assert relative(exact.losses, whole.losses) < 2e-2 and optim.checkpoint_bytes(cfg) == 8 * num_parameters(cfg)[0]
        refused = train(tmp_path / "rest", *common, "resume=latest", nproc=2, code=2)
        assert "adam_moments bf16 -> fp32; go on with adam_moments=bf16" in refused.text


SHAPES = [(24, 8), (8, 8), (32, 8), (8, 32), (3, 5), (1, 7), (9, 4)]  # rows that do not divide, and too few for all


def trained(shapes, place, kind, steps: int = 3, apply=None) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Parameters and momenta, whole, after some updates with given gradients; the collectives of the last update."""
    parameters = [torch.nn.Parameter(place(t)) for t in matrices(shapes, 0)]
    optimizer = kind(parameters, **MUON)
    optimizer.apply = apply
    for step in range(steps):
        for p, g in zip(parameters, matrices(shapes, 1 + step), strict=True):
            p.grad = place(g)
        with CommDebugMode() as count:
            optimizer.step()
    momenta = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    whole = [[getattr(t, "full_tensor", lambda t=t: t)().detach() for t in ts] for ts in (parameters, momenta)]
    return *whole, count.get_total_counts()


def as_on_one(rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world,))
    for place, collectives in ((torch.clone, 1), (lambda t: distribute_tensor(t, mesh, [Shard(0)]), 2)):
        for shapes in (SHAPES, SHAPES * 3):
            parameters, momenta, count = trained(shapes, place, Muon)
            wanted = trained(shapes, torch.clone, torch.optim.Muon)
            assert all(map(torch.equal, parameters + momenta, wanted[0] + wanted[1])) and count == collectives, len(
                shapes
            )
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_shared_out(world):
    """Whole (DDP) and by rows (FSDP2) on 2 and 3 ranks against torch.optim.Muon on one: every bit of it, on every rank.

    As many collectives for three times the matrices: one gather, or two exchanges.
    """
    on_ranks(world, as_on_one, world)


def test_alone_and_not_applied():
    """On one process torch's bits; told on the device not to apply, nothing moves, though the gradients are NaN."""
    ours = trained(SHAPES, torch.clone, Muon, apply=torch.tensor(True))
    theirs = trained(SHAPES, torch.clone, torch.optim.Muon)
    assert all(map(torch.equal, ours[0] + ours[1], theirs[0] + theirs[1])) and ours[2] == 0
    parameters = [torch.nn.Parameter(t) for t in matrices(SHAPES, 0)]
    optimizer = Muon(parameters, **MUON)
    for p in parameters:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.apply = torch.tensor(False)
    optimizer.step()
    assert all(map(torch.equal, parameters, matrices(SHAPES, 0)))
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())


def test_the_schedule_is_both_optimizers():
    """AdamW and Muon have the same rate at each step; Muon's other numbers are torch's."""
    cfg = configs.load(["optimizer=muon", "min_learning_rate=1e-3"])[0]
    adam, muon = optim.make_optimizers(GPTNeoX(cfg), cfg)
    for step in (0, 59, 700, 1499):
        rate = optim.set_rate([adam, muon], step, cfg)
        assert {group["lr"] for group in adam.param_groups + muon.param_groups} == {rate}
        assert rate == optim.learning_rate(step, cfg)
    assert (muon.param_groups[0]["momentum"], muon.param_groups[0]["ns_steps"]) == (0.95, 5)


def test_shares_are_balanced():
    """The 24 blocks of the production model on 8 ranks: the busiest has at most a tenth more than its share."""
    shapes = [torch.Size(s) for _ in range(24) for s in ((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192))]
    cost = [min(s) ** 2 * (2 * max(s) + min(s)) for s in shapes]
    loads = [sum(cost[i] for i in mine) for mine in owners(shapes, 8)]
    assert sorted(i for mine in owners(shapes, 8) for i in mine) == list(range(96)) and max(loads) < 1.1 * sum(cost) / 8
