"""What only a GPU does, as far as a machine without one can tell."""

import os
import re
import subprocess
import sys
import types
from collections import Counter

import google_crc32c
import numpy as np
import pytest
import torch
from conftest import ROOT

from refocused.checkpoint.crc32c import Plain
from refocused.checkpoint.saver import _Host
from refocused.measure import acceptance


def test_saves_where_memory_cannot_be_pinned(monkeypatch):
    """The system refuses to pin host memory: the copies are made through unpinned memory, and the run is told so."""
    calls = []

    def register(*args) -> int:
        calls.append(args)
        return 2  # cudaErrorMemoryAllocation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # nothing to wait for
    monkeypatch.setattr(torch.cuda, "cudart", lambda: types.SimpleNamespace(cudaHostRegister=register))
    host, tree = _Host(), {"model.a": torch.arange(100.0), "model.b": torch.ones(3, dtype=torch.bfloat16)}
    copies = host.copy(tree)
    assert calls and all(torch.equal(copies[key], t) for key, t in tree.items())
    assert "unpinned" in host.note and "error 2" in host.note
    host.free()  # what is not registered is not unregistered


def test_runs_without_googles_packages():
    """Nothing that trains needs google-cloud-storage; the checksum in numpy is google_crc32c's, in any pieces."""
    code = "import sys; sys.modules['google'] = sys.modules['google_crc32c'] = None; import train, ckpt, data, sample, bench"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    rng = np.random.default_rng(0)
    whole, pieces = google_crc32c.Checksum(), Plain()
    for size in (0, 1, 9, 255, 256, 257, 70_000, (1 << 20) - 1, 1 << 20, (2 << 20) + 777):
        data = rng.bytes(size)
        assert Plain(data).digest() == google_crc32c.Checksum(data).digest(), size
        whole.update(data)
        pieces.update(data)
    assert pieces.digest() == whole.digest()


COMMAND = [sys.executable, "-m", "refocused.measure.acceptance"]


def test_acceptance_without_a_gpu():
    """`make gpu-check` where there is no GPU: a SKIP for every check, and exit 0."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    hidden = subprocess.run(COMMAND, cwd=ROOT, env=environment, capture_output=True, text=True)
    verdicts = Counter(line.split()[0] for line in hidden.stdout.splitlines() if re.match("(PASS|FAIL|SKIP) ", line))
    checks = sum(len(found) for _, found in acceptance.PARTS.values())
    assert hidden.returncode == 0 and verdicts == {"SKIP": checks}, hidden.stdout + hidden.stderr


@pytest.mark.parametrize("part", acceptance.PARTS)
def test_acceptance_on_a_cpu(part):
    """Every check that a CPU can run, tiny: none fails, so that the first run on a card does not die of a typo."""
    command = [*COMMAND, "--device", "cpu", "--tiny", "--part", str(part)]
    tiny = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert tiny.returncode == 0 and "PASS " in tiny.stdout, tiny.stdout + tiny.stderr
