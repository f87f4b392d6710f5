"""What only a GPU does, as far as a machine without one can tell."""

import re
import subprocess
import sys
import types

import conftest
import pytest
import torch
from conftest import ROOT
from launch import GUARD

from refocused.checkpoint.saver import _Host


def test_saves_where_memory_cannot_be_pinned(monkeypatch):
    """The system refuses to pin host memory: the copies are made through unpinned memory, and the run is told so."""
    calls = []

    def register(*args) -> int:
        calls.append(args)
        return 2  # cudaErrorMemoryAllocation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: types.SimpleNamespace(cudaHostRegister=register))
    host, tree = _Host(), {"model.a": torch.arange(100.0), "model.b": torch.ones(3, dtype=torch.bfloat16)}
    host.begin(tree)
    host.end()
    assert calls and all(torch.equal(host.views[key], t) for key, t in tree.items())
    assert "unpinned" in host.note and "error 2" in host.note
    host.free()  # what is not registered is not unregistered


def check(*words: str) -> tuple[int, str]:
    """`make gpu-check` with these words more; (its exit code, what it says)."""
    command = [sys.executable, *"-m pytest -q -n 0 -p no:cacheprovider --timeout".split(), str(GUARD), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_checks_without_a_gpu(request):
    """Where there is no GPU all checks are skipped, and what a check writes is no test of the default suite."""
    code, said = check("--device", "cuda", "tests/gpu", "tests/test_loss.py")
    assert code == 0 and re.search(r"\n\d+ skipped, \d+ deselected", said) and "| SKIP | " in said, said
    assert conftest.pytest_ignore_collect(ROOT / "tests/gpu", request.config)
    code, said = check("tests/gpu/test_card_saves.py")
    assert code == 4 and "run `make gpu-check`" in said and "fixture" not in said


@pytest.mark.parametrize("part", ["numbers", "saves", "speed"])
def test_checks_on_a_cpu(part, tmp_path):
    """Every check that a CPU can run, tiny: none fails, so that the first run on a card does not die of a typo."""
    report = tmp_path / "report.md"
    code, said = check("--device", "cpu", f"tests/gpu/test_card_{part}.py", "--report", str(report))
    assert code == 0, said
    assert "| PASS | " in report.read_text() and "FAIL" not in report.read_text()
