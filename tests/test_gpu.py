"""What only a GPU does, as far as a machine without one can tell."""

import os
import re
import subprocess
import sys
import types
from collections import Counter

import pytest
import torch
from conftest import ROOT

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
    """Nothing that trains needs google-cloud-storage; without the checksum's package there is a sentence."""
    code = "import sys; sys.modules['google'] = None; import train, ckpt, data, sample, bench"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    code = "from importlib import util; find = util.find_spec; "
    code += "util.find_spec = lambda name: name != 'google_crc32c' and find(name); import ckpt"
    lacking = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert lacking.returncode == 2 and "has no google_crc32c; run " in lacking.stderr


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
