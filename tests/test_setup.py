"""setup.sh on this machine, in a copy of the folder: it says what is true and touches nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from launch import GUARD


@pytest.fixture
def copy(tmp_path) -> Path:
    """A checkout with setup.sh and nothing to install."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    shutil.copy(ROOT / "setup.sh", folder)
    (folder / "requirements.txt").write_text("")
    return folder


def setup(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    (folder.parent / "home").mkdir(exist_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(folder.parent / "home"), **env}
    return subprocess.run([str(folder / "setup.sh"), *args], env=env, capture_output=True, text=True, timeout=GUARD)


def test_check_says_what_is_here_and_changes_nothing(copy):
    """Python, memory, disk and the GPU or its absence; the folder and the home directory are as before."""
    before = sorted(copy.rglob("*"))
    done = setup(copy, "--check")
    assert done.returncode == 0 and "ok       Python 3." in done.stdout and "GiB free" in done.stdout, done
    gpu = "GPU(s): " if shutil.which("nvidia-smi") else "no GPU: nvidia-smi is not here. CPU only"
    assert gpu in done.stdout and "no .venv yet" in done.stdout and done.stdout.endswith("Nothing was changed.\n")
    assert sorted(copy.rglob("*")) == before and not list((copy.parent / "home").iterdir())


def test_makes_the_environment_in_the_folder(copy):
    """Without --check: .venv with its own Python, the stamp that the Makefile looks at, nothing in the home directory;
    then a requirement that is not installed is missing, and exit 1."""
    done = setup(copy)
    assert done.returncode == 0 and ".venv has what requirements.txt names" in done.stdout, done
    outside = {path.name for path in (copy.parent / "home").iterdir()} - {".rustup"}  # pip asks rustc for its version
    assert (copy / ".venv" / "runtime").exists() and not outside
    (copy / "requirements.txt").write_text("# a comment\nnumpy==2.4.6\n")
    done = setup(copy, "--check")
    assert done.returncode == 1 and "numpy not installed, wanted 2.4.6" in done.stdout, done


def test_no_python(copy):
    """A PATH that has the tools of the shell but no Python, and an interpreter that does not exist: missing, exit 1. An
    unknown option: exit 2."""
    done = setup(copy, "--chek")
    assert done.returncode == 2 and "--check" in done.stderr
    tools = copy.parent / "bin"
    tools.mkdir()
    for name in ("env", "bash", "dirname", "getconf", "awk", "df", "sed", "head", "tail", "git"):
        (tools / name).symlink_to(shutil.which(name))
    for env in ({"PATH": str(tools)}, {"PYTHON": "python9.9"}):
        done = setup(copy, **env)
        assert done.returncode == 1 and "MISSING  Python 3.11, 3.12 or 3.13" in done.stdout, done
        assert not (copy / ".venv").exists()


def test_measures_and_lists_the_bucket(copy, server):
    """With code and an interpreter beside it: the speed of this machine in one line, and whether the bucket is there."""
    for name in ("configs", "refocused"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("model.py", "data.py"):
        shutil.copy(ROOT / name, copy)
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for bucket, code, words in (("bucket", 0, "gs://bucket/ can be listed, 0"), ("other", 1, "MISSING  bucket")):
        done = setup(copy, "--check", "configs/demo.py", f"bucket_name={bucket}", STORAGE_EMULATOR_HOST=server.url)
        assert done.returncode == code and words in done.stdout and "TFLOP/s" in done.stdout, done
