import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

# as in an activated environment: `python` in what is printed, and in children's shells, is this one
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # `nohup pytest`: the runs that tests start would ignore it too
    signal.signal(signal.SIGHUP, lambda *_: None)  # as a handler it is not inherited

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from fakegcs import FakeGCS  # noqa: E402

ROOT = Path(__file__).parent.parent
FUZZ_CASES = int(os.environ.get("FUZZ_CASES", 2000))  # of each parser


def pytest_configure(config):
    """Hide the GPU, from torch (which looks when it is first used) and from child processes; `make gpu-check` uses it."""
    if device := config.getoption("--device"):
        sys.path.append(str(ROOT / "tests/gpu"))
        config.pluginmanager.import_plugin("card")
    elif any(
        (ROOT / "tests/gpu") in ((path := Path(arg.split("::")[0]).resolve()), *path.parents) for arg in config.args
    ):
        raise pytest.UsageError(
            "tests/gpu are checks of a GPU: run `make gpu-check`, or give --device cpu to try them out"
        )
    if device != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path, config):
    """The checks of a GPU are there with --device alone."""
    return True if collection_path.name == "gpu" and not config.getoption("--device") else None


@pytest.fixture
def device(request) -> str:
    """cpu; cuda where `make gpu-check` runs the same test on a GPU."""
    return request.config.getoption("--device") or "cpu"


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(1)  # sums are taken in one order


def write_shards(folder: Path, shards: int = 4, tokens: int = 3000, vocab: int = 257, seed: int = 0) -> Path:
    """Mapped shards of learnable text: each token is mostly a function of the one before."""
    rng = np.random.default_rng(seed)
    follows = rng.permutation(vocab)
    for i in range(shards):
        noise = rng.random(tokens) < 0.2
        stream = rng.integers(0, vocab, tokens)
        for t in range(1, tokens):
            if not noise[t]:
                stream[t] = follows[stream[t - 1]]
        path = folder / f"part{i}" / f"tokenized_cleaned_{i:02d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, input_ids=stream.astype(np.uint16))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A data_dir of four small shards, the last one held out."""
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def server(monkeypatch):
    """A bucket server that this test's client talks to."""
    with FakeGCS() as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        yield running


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=["cuda", "cpu"], help="the checks of a GPU (tests/gpu/card.py); cpu: tiny ones"
    )
    parser.addoption("--report", help="with --device: a file for the report in markdown")
    parser.addoption("--kills", type=int, default=200, help="SIGKILLs of the long storm, with -m slow")
    parser.addoption("--minutes", type=float, default=30, help="how long tests/test_storm.py goes on, with -m slow")
    parser.addoption("--seed", type=int, default=0, help="the same storm once more, with -m slow")
