"""AdamW whose moments are bf16: a third less to keep, to save and to upload than weights and moments in fp32."""

import itertools

import torch
from torch import Tensor

from refocused.checkpoint.tensors import create_state, local_part
from refocused.run.muon import bounded

SCRATCH = 1 << 24  # elements of each moment that exist in fp32 at a time


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
                flat = [
                    local_part(t).view(-1).split(SCRATCH) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                ]
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
