"""The loss without full logits: the same value and gradients as the plain one, in memory that does not grow."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from configs import Config
from model import Head, LinearCrossEntropy, softmax_loss

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


@pytest.mark.parametrize("rows", [N, 40, 1], ids=["one chunk", "three chunks, the last one short", "a row each"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
def test_value_and_gradients(dtype, limit, rows, device):
    """Chunked loss, input and weight gradient against the plain loss in fp64, with targets that do not count.

    The gradients were made in forward: of half the loss they are half of them.
    """
    x, weight, targets = (t.detach().to(device) for t in inputs(dtype))
    x.requires_grad_(), weight.requires_grad_()
    half_loss = LinearCrossEntropy.apply(x, weight, targets, rows, softmax_loss, 1) * 0.5
    half = torch.autograd.grad(half_loss, (x, weight))
    loss = LinearCrossEntropy.apply(x, weight, targets, rows, softmax_loss, 1)
    gradients = torch.autograd.grad(loss, (x, weight))
    assert error([2 * g for g in half], [g.double() for g in gradients]) < 1e-6
    assert loss.dtype == torch.float32 and gradients[1].dtype == torch.float32
    wanted = exact(x, weight, targets)
    # the logits of a bf16 product are rounded to bf16; their error averages out in the loss
    assert abs(loss.item() / wanted[0].item() - 1) < (1e-6 if dtype == torch.float32 else 2e-4)
    assert error(list(gradients), wanted[1:]) < limit


def test_head_agrees_with_and_without_gradients():
    """The head's loss in training, in evaluation, and the plain loss of the logits that it returns: the same sum."""
    head = Head(Config(hidden_size=C, vocab_size=V, num_attention_heads=4))
    head.max_logits = V * 10  # ten rows per chunk
    x, _, targets = inputs(torch.float32)
    x, targets = x.detach().view(2, N // 2, C), targets.view(2, N // 2)
    training = head(x, targets)
    with torch.no_grad():
        evaluation = head(x, targets)
        plain = F.cross_entropy(head(x).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    assert training.item() == pytest.approx(plain.item(), rel=1e-6)
    assert evaluation.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary, width", [(V, C), (50257, 64), (1009, 256)])
def test_padding_changes_nothing(vocabulary, width, dtype):
    """An odd vocabulary padded to a multiple of 128, as on a GPU: loss, both gradients and evaluation, bit for bit."""
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
        loss = head(x, targets)
        assert head.weight.shape == (vocabulary, width)
        found.append([loss.detach(), *torch.autograd.grad(loss, (x, head.weight)), evaluation])
    assert found[0][2].shape == (vocabulary, width)
    for plain, padded in zip(*found, strict=True):
        assert torch.equal(plain, padded)


PEAK = """
import sys, torch, torch.nn.functional as F
from model import LinearCrossEntropy, softmax_loss
torch.set_num_threads(1)
kind, N = sys.argv[1], int(sys.argv[2])
x, w = torch.randn(N, 32, requires_grad=True), torch.randn(50304, 32, requires_grad=True)
y = torch.zeros(N, dtype=torch.int64)
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
if kind == "plain":
    loss = F.cross_entropy(x @ w.T, y, reduction="sum")
else:
    loss = LinearCrossEntropy.apply(x, w, y, 64, softmax_loss, 1)
loss.backward()
print((peak() - before) >> 10)
"""


def test_peak_memory_does_not_grow_with_the_batch():
    """Peak resident memory over forward and backward: chunked at 256 and 1024 rows alike, plain far above both."""

    def mebibytes(kind: str, rows: int) -> int:
        command = [sys.executable, "-c", PEAK, kind, str(rows)]
        # large blocks go back at once: the peak is then what lives, not what the allocator keeps
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env).stdout)

    few, many, plain = mebibytes("chunked", 256), mebibytes("chunked", 1024), mebibytes("plain", 1024)
    assert many < few + 10  # one copy of the logits would be 147 more
    assert plain > 2 * 1024 * 50304 * 4 >> 20
    assert many < plain / 3
