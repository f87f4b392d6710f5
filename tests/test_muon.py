"""Muon shared out: the same bits as torch's on whole matrices, few collectives, and nothing applied that must not be."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import on_ranks, train
from test_resume import newest, steps, take, tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import configs
import model as neox
from refocused.run import optim
from refocused.run.muon import Muon, owners

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # tensors() reads without ranks
KEYS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
SHAPES = [(24, 8), (8, 8), (32, 8), (8, 32), (3, 5), (1, 7), (9, 4)]  # rows that do not divide, and too few for all


def matrices(shapes, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def trained(shapes, place, kind, steps: int = 3, apply=None) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Parameters and momenta, whole, after some updates with given gradients; the collectives of the last update."""
    parameters = [torch.nn.Parameter(place(t)) for t in matrices(shapes, 0)]
    optimizer = kind(parameters, **KEYS)
    optimizer.apply = apply
    for step in range(steps):
        for p, g in zip(parameters, matrices(shapes, 1 + step), strict=True):
            p.grad = place(g)
        with CommDebugMode() as count:
            optimizer.step()
    momenta = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    whole = [[getattr(t, "full_tensor", lambda t=t: t)().detach() for t in ts] for ts in (parameters, momenta)]
    return *whole, count.get_total_counts()


def _rank(rank: int, world: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world,))
    places = {"ddp": lambda t: t.clone(), "fsdp": lambda t: distribute_tensor(t, mesh, [Shard(0)])}
    found = {name: [trained(shapes, place, Muon) for shapes in (SHAPES, SHAPES * 3)] for name, place in places.items()}
    torch.save(found, f"{out}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_shared_out(world, tmp_path):
    """Whole (DDP) and by rows (FSDP2) on 2 and 3 ranks against torch.optim.Muon on one: every bit of it, on every rank.

    As many collectives for three times the matrices: one gather, or two exchanges.
    """
    on_ranks(world, _rank, world, str(tmp_path))
    expected = [trained(shapes, torch.clone, torch.optim.Muon) for shapes in (SHAPES, SHAPES * 3)]
    for file in sorted(Path(tmp_path).iterdir()):
        for name, runs in torch.load(file).items():
            for (parameters, momenta, collectives), wanted in zip(runs, expected, strict=True):
                for t, w in zip(parameters + momenta, wanted[0] + wanted[1], strict=True):
                    assert torch.equal(t, w), (file, name, t.shape)
                assert collectives == {"ddp": 1, "fsdp": 2}[name]


def test_alone_and_not_applied():
    """On one process torch's bits; told on the device not to apply, nothing moves, though the gradients are NaN."""
    ours = trained(SHAPES, torch.clone, Muon, apply=torch.tensor(True))
    theirs = trained(SHAPES, torch.clone, torch.optim.Muon)
    assert all(map(torch.equal, ours[0] + ours[1], theirs[0] + theirs[1])) and ours[2] == 0
    parameters = [torch.nn.Parameter(t) for t in matrices(SHAPES, 0)]
    optimizer = Muon(parameters, **KEYS)
    for p in parameters:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.apply = torch.tensor(False)
    optimizer.step()
    assert all(map(torch.equal, parameters, matrices(SHAPES, 0)))
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())


def test_the_schedule_is_both_optimizers():
    """AdamW and Muon have the same rate at each step; Muon's other numbers are torch's."""
    cfg = configs.load(["optimizer=muon", "min_learning_rate=1e-3"])[0]
    adam, muon = optim.make_optimizers(neox.GPTNeoX(cfg), cfg)
    for step in (0, 59, 700, 1499):
        rate = optim.set_rate([adam, muon], step, cfg)
        assert {group["lr"] for group in adam.param_groups + muon.param_groups} == {rate}
        assert rate == optim.learning_rate(step, cfg)
    assert (muon.param_groups[0]["momentum"], muon.param_groups[0]["ns_steps"]) == (0.95, 5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resume_is_bitwise(shards, tmp_path, parallel):
    """4 steps on two processes, a resume and 6 more against ten: losses, weights and momenta, bit for bit."""
    args = [f"data_dir={shards}", "optimizer=muon", f"parallel={parallel}", "save_steps=4", "save_total_limit=0"]
    train(tmp_path / "whole", *args, nproc=2)
    take(tmp_path / "whole", 4, tmp_path / "rest")
    train(tmp_path / "rest", *args, "resume=latest", nproc=2)
    assert steps(tmp_path / "rest") == {s: bits for s, bits in steps(tmp_path / "whole").items() if s > 4}
    x, y = (tensors(newest(tmp_path / name)) for name in ("whole", "rest"))
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    assert sum("momentum_buffer" in name for name in x) == 8


def test_shares_are_balanced():
    """The 24 blocks of the production model on 8 ranks: the busiest has at most a tenth more than its share."""
    shapes = [torch.Size(s) for _ in range(24) for s in ((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192))]
    cost = [min(s) ** 2 * (2 * max(s) + min(s)) for s in shapes]
    loads = [sum(cost[i] for i in mine) for mine in owners(shapes, 8)]
    assert sorted(i for mine in owners(shapes, 8) for i in mine) == list(range(96)) and max(loads) < 1.1 * sum(cost) / 8
