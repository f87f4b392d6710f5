"""Optimizers that torch does not have: Muon with its work shared out among the ranks, AdamW whose moments are bf16."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from refocused.checkpoint.tensors import create_state, local_part

T = TypeVar("T")

SCRATCH = 1 << 24  # elements of each bf16 moment that exist in fp32 at a time
BUCKET_BYTES = 1 << 29  # of bf16 updates that travel at once: few collectives, whatever the number of matrices


class Muon(torch.optim.Muon):
    """torch.optim.Muon, to the bit, where each rank orthogonalises 1/W of the matrices.

    Momentum is fp32, kept and saved as there: by every rank under DDP, by rows under FSDP2. A bucket of updates then takes one
    gather under DDP, and under FSDP2 an exchange that brings the rows of a matrix to its owner and one that takes them
    back. `apply` is a bool on the device that step() obeys: where it is false nothing changes, and no host waits for it.
    """

    apply: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None):
        create_state(self)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for bucket in bounded(parameters, lambda p: 2 * p.numel(), BUCKET_BYTES):
                self.update(bucket, group)

    def update(self, bucket: list[Tensor], group: dict[str, Any]) -> None:
        """One update of these matrices, which lie alike: all whole, or all sharded over the same ranks."""

        def settle(old: Tensor, new: Tensor) -> None:
            old.copy_(new if self.apply is None else torch.where(self.apply.to(old.device), new, old))

        parts = []
        for p in bucket:
            assert p.grad is not None
            gradient, momentum = local_part(p.grad), local_part(self.state[p]["momentum_buffer"])
            settle(momentum, momentum.lerp(gradient, 1 - group["momentum"]))
            parts.append((gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum).bfloat16())

        def orthogonal(t: Tensor) -> Tensor:
            return _zeropower_via_newtonschulz(t, group["ns_coefficients"], group["ns_steps"], group["eps"])

        for p, update in zip(bucket, shared(bucket, parts, orthogonal), strict=True):
            rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape)
            weight = local_part(p)
            settle(weight, weight.mul(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate))


def bounded(items: Sequence[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Consecutive items whose sizes add up to `most` at most, or one that is larger."""
    batch: list[T] = []
    total = 0
    for item in items:
        if batch and total + size(item) > most:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


def owners(shapes: list[torch.Size], world: int) -> list[list[int]]:
    """Which matrices each of `world` ranks orthogonalises: the costliest first, to whom has least."""
    share: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    cost = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]
    for i in sorted(range(len(shapes)), key=lambda i: (-cost[i], i)):
        rank = load.index(min(load))
        load[rank] += cost[i]
        share[rank].append(i)
    return share


def shared(bucket: list[Tensor], parts: list[Tensor], orthogonal: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """orthogonal() of the matrices whose `parts` the ranks hold, again in parts; each matrix is done by one rank."""
    first, shapes = bucket[0], [p.shape for p in bucket]
    ranks = dist.group.WORLD if dist.is_initialized() else None
    if isinstance(first, DTensor):
        ranks = first.device_mesh.get_group(first.placements.index(Shard(0)))
    if ranks is None or (world := dist.get_world_size(ranks)) == 1:
        return [orthogonal(part) for part in parts]
    work = exchanged if isinstance(first, DTensor) else gathered
    return work(parts, shapes, owners(shapes, world), orthogonal, ranks)


def gathered(parts, shapes, share, orthogonal, ranks: dist.ProcessGroup) -> list[Tensor]:
    """Every rank has all matrices: each does its own, and one gather gives all to all."""
    sizes = [[shapes[i].numel() for i in mine] for mine in share]
    most = max(map(sum, sizes))
    send = parts[0].new_zeros(most)
    done = [orthogonal(parts[i]).flatten() for i in share[dist.get_rank(ranks)]]
    if done:
        torch.cat(done, out=send[: sum(t.numel() for t in done)])
    received = send.new_empty(len(share) * most)
    dist.all_gather_into_tensor(received, send, group=ranks)
    found = list(parts)
    for rank, mine in enumerate(share):
        for i, flat in zip(mine, received[rank * most :][: sum(sizes[rank])].split(sizes[rank]), strict=True):
            found[i] = flat.view(shapes[i])
    return found


def exchanged(parts, shapes, share, orthogonal, ranks: dist.ProcessGroup) -> list[Tensor]:
    """Every rank has some rows of all matrices: they go to the owner in one exchange, and come back in another."""
    world, me = len(share), dist.get_rank(ranks)
    # as DTensor shards: torch.chunk's rows, the last ranks may have fewer or none
    ends = [[min(-(-n // world) * r, n) for r in range(world + 1)] for n, _ in shapes]
    sizes = [  # [sender][receiver][matrix of the receiver]: elements
        [[(ends[i][s + 1] - ends[i][s]) * shapes[i][1] for i in mine] for mine in share] for s in range(world)
    ]
    mine, order = share[me], list(itertools.chain(*share))
    outgoing, incoming = [sum(n) for n in sizes[me]], [sum(sizes[s][me]) for s in range(world)]
    send = torch.cat([parts[i].flatten() for i in order])
    received = send.new_empty(sum(incoming))
    dist.all_to_all_single(received, send, incoming, outgoing, group=ranks)
    rows = [chunk.split(sizes[s][me]) for s, chunk in enumerate(received.split(incoming))]  # [sender][matrix]
    done = [orthogonal(torch.cat([rows[s][k] for s in range(world)]).view(shapes[i])) for k, i in enumerate(mine)]
    back = [t[ends[i][s] : ends[i][s + 1]].flatten() for s in range(world) for t, i in zip(done, mine, strict=True)]
    results = torch.empty_like(send)
    dist.all_to_all_single(results, torch.cat(back) if back else received, outgoing, incoming, group=ranks)
    found = list(parts)
    for i, t in zip(order, results.split(list(itertools.chain(*sizes[me]))), strict=True):
        found[i] = t.view(parts[i].shape)
    return found


class HalfAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with fused=True, the moments rounded to bf16 after each step; weights stay fp32.

    torch's kernel wants moments of the weights' dtype, so a piece of them at a time is widened, updated by that kernel
    and rounded back. A rounding to bf16 loses changes below 1/256 of a value: a moment whose decay is slower than that
    would stand still, which is why configs refuses such betas.
    """

    moments = torch.bfloat16  # what checkpoint.tensors creates state in

    @torch.no_grad()
    def step(self, closure=None):
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        create_state(self)
        for group in self.param_groups:
            pieces: list[tuple[Tensor, ...]] = []
            stepped = [p for p in group["params"] if p.grad is not None]
            for p in stepped:
                state = self.state[p]
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                flat = (local_part(t).view(-1).split(SCRATCH) for t in tensors)
                pieces += zip(*flat, itertools.repeat(state["step"]), strict=False)
            if stepped:
                counts = [self.state[p]["step"] for p in stepped]
                torch._foreach_add_(counts, 1 if found_inf is None else 1 - found_inf)
            for batch in bounded(pieces, lambda piece: piece[0].numel(), SCRATCH):
                weights, gradients, firsts, seconds, steps = map(list, zip(*batch, strict=True))
                first, second = [t.float() for t in firsts], [t.float() for t in seconds]
                torch._fused_adamw_(
                    weights, gradients, first, second, [], steps, lr=group["lr"], beta1=group["betas"][0],
                    beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                    maximize=False, grad_scale=grad_scale, found_inf=found_inf,
                )  # fmt: skip
                torch._foreach_copy_(firsts, first)
                torch._foreach_copy_(seconds, second)
