"""Every command of the README runs as it stands there, in order, in a fresh copy of the tree."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_shards
from fakegcs import FakeGCS
from launch import GUARD
from test_gcs import free_port

# the demo, in seconds
SHORT = "cpu_threads=1 max_steps=4 warmup_steps=1 eval_steps=4 eval_samples=8 logging_steps=2 save_steps=2"


def commands() -> list[str]:
    blocks = re.findall(r"(?:^    .+\n)+", (ROOT / "README.md").read_text(), re.M)
    lines = [line[4:].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(make|pip|python(?! -c)|torchrun|tensorboard|\./setup\.sh) ", line)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tracked and new files, a demo-like set of shards, and one short run to look at."""
    folder = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    subprocess.run(["cp", "--parents", "-r", *listed.stdout.split(), str(folder)], cwd=ROOT, check=True)
    return folder


def run(copy: Path, line: str, **env: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        line,
        shell=True,
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=GUARD,
        env={**os.environ, "PATH": path, **env},
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_every_command_is_known():
    """No command of the README is outside the tests below, and each of them finds its own."""
    known = re.compile(
        r"make (train|test)$|pip install |tensorboard --logdir logs/demo$|\./setup\.sh --check$|torchrun --standalone "
        r"--nproc_per_node=2 train\.py configs/|python (train|data|ckpt|sample|bench|report)\.py "
    )
    found = commands()
    assert len(found) > 20 and [line for line in found if not known.match(line)] == []


def test_training_commands(copy):
    """The demo's data, training with torchrun and without (a few steps), then looking at it, sampling and exporting."""
    for line in commands():
        if re.search(
            r"gs://|checkpoint_bucket_path|configs/production|[A-Z]{3}|bench|pictures|^(make|pip|tensorboard|\./)", line
        ):
            continue
        training = "train.py configs/demo.py" in line
        more = f" {SHORT}" if training else " max_new_tokens=8" if "sample.py" in line else ""
        if training and "torchrun" in line and "resume" in line:
            more += " max_steps=6"  # goes on after the first run's four
        out = run(copy, line + more)
        if "nproc_per_node" in line and "resume" in line:
            assert re.search(r"resume +checkpoint-epoch0-step4-files0", out), out


def test_planning_commands(copy):
    """Help, the plan of the production config, the machine check, and what `make` would run."""
    for line in commands():
        if "configs/production" in line and "torchrun" in line:
            run(copy, line.split("nproc_per_node=2 ")[1].replace("train.py", "python train.py") + " --show")
        elif "--show" in line or "setup.sh --check" in line:
            run(copy, line)
    assert "nproc_per_node=2 train.py configs/demo.py" in run(copy, "make -n train NPROC=2")
    assert "python -m pytest" in run(copy, "make -n test")


def test_bucket_recipe(copy):
    """The server from PyPI, a run that publishes and a listing, as one block of a shell."""
    blocks = re.findall(r"(?:^    .+\n)+", (ROOT / "README.md").read_text(), re.M)
    [recipe] = [block for block in blocks if "fake_gcs_server" in block]
    script = "\n".join(["trap 'kill %1' EXIT", *(line.strip() for line in recipe.splitlines()[1:])])  # without pip's
    (copy / "recipe.sh").write_text(
        script.replace("4443", str(free_port())).replace("demo.py", "demo.py cpu_threads=1")
    )
    run(copy, "python data.py demo")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.Popen(
        ["bash", "-e", "recipe.sh"], cwd=copy, env={**os.environ, "PATH": path}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        out, _ = shell.communicate(timeout=GUARD)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)  # the server is a child of the child that the script stops
    assert re.search(r"checkpoint-epoch0-step20-files0 .* complete", out), out


def test_bucket_download(copy):
    """The download of shards, from a bucket server."""
    seed = write_shards(copy / "seed", tokens=5000)
    with FakeGCS(buckets=("my-bucket",)) as server:
        for path in seed.rglob("*.npz"):
            server.put(f"tokens/{path.relative_to(seed)}", path.read_bytes(), bucket="my-bucket")
        [line] = [line for line in commands() if "download gs://" in line]
        run(copy, line, STORAGE_EMULATOR_HOST=server.url)
    assert len(list((copy / "data/tokenized").rglob("*.npz"))) == len(list(seed.rglob("*.npz")))
