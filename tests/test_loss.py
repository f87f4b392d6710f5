"""The loss without full logits: the same value and gradients as the plain one, in memory that does not grow."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import Config
from model import Head, LinearCrossEntropy, softmax_loss
from refocused.run.memory import Ledger

N, C, V = 96, 32, 501


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(V, C, generator=generator)).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[5:20] = -100
    return x, weight, targets


def exact(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """Loss and both gradients of the plain loss in fp64."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = F.cross_entropy(x @ weight.T, targets, reduction="sum", ignore_index=-100)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


def error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rows", [N, 40], ids=["one chunk", "three chunks, the last one short"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
def test_value_and_gradients(dtype, limit, rows, device):
    """Chunked loss, input and weight gradient against the plain loss in fp64, with targets that do not count.

    The gradients were made in forward: of half the loss they are half of them.
    """
    x, weight, targets = (t.detach().to(device) for t in inputs(dtype))
    x.requires_grad_(), weight.requires_grad_()
    loss, again = (LinearCrossEntropy.apply(x, weight, targets, rows, softmax_loss, 1) for _ in range(2))
    gradients = torch.autograd.grad(loss, (x, weight))
    half = torch.autograd.grad(again * 0.5, (x, weight))
    assert error([2 * g for g in half], [g.double() for g in gradients]) < 1e-6
    assert loss.dtype == torch.float32 and gradients[1].dtype == torch.float32
    wanted = exact(x, weight, targets)
    # the logits of a bf16 product are rounded to bf16; their error averages out in the loss
    assert abs(loss.item() / wanted[0].item() - 1) < (1e-6 if dtype == torch.float32 else 2e-4)
    assert error(list(gradients), wanted[1:]) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary, width", [(V, C), (50257, 64), (1009, 256)])
def test_padding_changes_nothing(vocabulary, width, dtype):
    """An odd vocabulary padded to a multiple of 128, as on a GPU: loss, both gradients and evaluation, bit for bit. In fp32
    training and evaluation have the plain loss of the logits that the head returns."""
    found = []
    for multiple in (1, 128):
        torch.manual_seed(0)
        head = Head(Config(hidden_size=width, vocab_size=vocabulary, num_attention_heads=4))
        head.multiple, head.max_logits = multiple, vocabulary * 128  # three chunks of 128 rows
        x = torch.randn(2, 192, width).to(dtype).requires_grad_()
        targets = torch.randint(vocabulary, (2, 192))
        targets[0, 5:20] = -100
        with torch.no_grad():
            evaluation = head(x, targets)
            plain = F.cross_entropy(
                head(x.float()).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
            )
        loss = head(x, targets)
        rel = 1e-6 if dtype == torch.float32 else 1e-3
        assert [loss.item(), evaluation.item()] == pytest.approx([plain.item()] * 2, rel=rel)
        found.append([loss.detach(), *torch.autograd.grad(loss, (x, head.weight)), evaluation])
    assert found[0][2].shape == head.weight.shape == (vocabulary, width)
    assert all(map(torch.equal, *found))


def test_peak_memory_does_not_grow_with_the_batch():
    """Peak memory over forward and backward at 256 and 1,024 rows in chunks, against the logits that all of them have."""

    def peak(rows: int, chunk: int) -> int:
        with FakeTensorMode(), Ledger() as ledger:
            x, weight = (torch.empty(n, C, requires_grad=True) for n in (rows, 50304))
            targets = torch.zeros(rows, dtype=torch.int64)
            LinearCrossEntropy.apply(x, weight, targets, chunk, softmax_loss, 1).backward()
        return ledger.peak

    logits = 4 * 1024 * 50304
    assert peak(1024, 64) - peak(256, 64) < logits / 100 < logits < peak(1024, 1024)
