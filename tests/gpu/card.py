"""`make gpu-check`: what the checks of a GPU share, which tests belong to them, and their report.

A plugin of pytest, there with --device. Tests of this folder and all others that take the fixture `device` are run; on a
CPU at sizes of seconds, to try the checks themselves. `say` puts a value into the report; without a bound it is a fact.
"""

import json
import platform
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import TINY, Run

from refocused.measure import steps

SMALL = (
    "vocab_size=50257 hidden_size=512 num_hidden_layers=4 num_attention_heads=8 intermediate_size=2048 "
    "sequence_length=512 max_position_embeddings=512 per_device_train_batch_size=8 gradient_accumulation_steps=1 "
    "learning_rate=1e-3 compile_model=false mixed_precision=no cpu_threads=1 tokenizer=gpt2"
).split()
COMMON = (
    "dataloader_num_workers=1 max_steps=10 warmup_steps=2 logging_steps=1 save_steps=0 save_seconds=0 "
    "save_total_limit=2 eval_samples=8 sample_tokens=0 check_hardware=false max_failed_starts=0"
).split()
# what a run's config file does before it, for runs of the 1.4 billion parameters: 17 GB at the end would be most of it
UNSAVED = "import ckpt as _ckpt\n_ckpt.Checkpoints.save = lambda *_, **__: 0.0\n"
# beside each log line what this process's allocator gave back, and what the driver counts as taken of the GPU
TELLING = f"""{UNSAVED}import torch as _torch
from refocused.run import strategy as _strategy, monitor as _monitor
_line = _monitor.Monitor.log_line
def _more(self, *args):
    _line(self, *args)
    _free, _whole = _torch.cuda.mem_get_info() if self.env.device.type == "cuda" else (0, 0)
    print("retries", _strategy.alloc_retries(), "driver", _whole - _free, flush=True)
_monitor.Monitor.log_line = _more
"""


class Card:
    """Where the checks run and how large they are."""

    def __init__(self, device: str):
        self.device, self.cuda = device, device == "cuda"
        self.base = SMALL if self.cuda else [word for word in TINY if word not in COMMON]
        self.production = "from configs.production import *\n" if self.cuda else ""

    def needs_cuda(self, why: str = "needs a GPU") -> None:
        if not self.cuda:
            pytest.skip(why)


def trace(run: Run) -> list[dict]:
    """The step lines of a run."""
    lines = map(json.loads, (run.log.parent / "logs/trace.jsonl").read_text().splitlines())
    return [line for line in lines if "event" not in line]


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in trace(run)]


def largest(run: Run, key: str) -> float:
    return max(float(line.get(key) or 0) for line in trace(run))


def apart(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two runs' losses."""
    assert len(a) == len(b) > 0, f"{len(a)} and {len(b)} losses"
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="session")
def card(request) -> Card:
    return Card(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _returned(card):
    yield
    if card.cuda:
        torch.cuda.empty_cache()  # the runs of the next check share the card with this process


@pytest.fixture
def say(record_property) -> Callable[..., None]:
    """Note a value, and the bound that it is held against."""

    def note(value: str, bound: str = "") -> None:
        record_property("value", value)
        record_property("bound", bound)

    return note


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> Path:
    """The compiler's cache, of all runs but those that want an empty one."""
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(scope="session")
def tokens(card, tmp_path_factory) -> Callable[[int], Path]:
    """A data_dir of random tokens in documents of a hundred on average, for a vocabulary; made once."""
    made: dict[int, Path] = {}

    def of(vocabulary: int) -> Path:
        if vocabulary not in made:
            made[vocabulary] = tmp_path_factory.mktemp(f"tokens-{vocabulary}")
            for i in range(3):
                rng = np.random.default_rng(i)
                stream = rng.integers(0, vocabulary, 2_000_000 if card.cuda else 20_000, dtype=np.uint16)
                stream[rng.random(len(stream)) < 0.01] = vocabulary - 1  # end-of-text, of both tokenizers
                np.savez(made[vocabulary] / f"tokenized_cleaned_{i}.npz", input_ids=stream)
        return made[vocabulary]

    return of


@pytest.fixture
def start(card, tokens, kernels, tmp_path) -> Callable[..., Run]:
    """A launch that goes on; several ranks share the GPU where there is one.

    before: Python that each rank runs first; production: the 1.4 billion parameters, on a GPU.
    """

    def begin(name: str, *keys: str, nproc=1, env=None, before="", production=False) -> Run:
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(kernels), **(env or {})}
        if nproc > 1 and card.cuda:  # NCCL refuses one GPU twice, except to what it takes for two machines
            environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NCCL_NET": "Socket"}
            environment |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), "lo")
            before = "import os\nos.environ['NCCL_HOSTID'] = 'host' + os.environ['RANK']\ndel os\n" + before
        whole = production and card.cuda
        given = [f"data_dir={tokens(50257 if card.cuda else 257)}", *COMMON, *keys]
        config = (card.production if whole else "") + before
        return Run(given, nproc, tmp_path / name, environment, config, [] if whole else card.base)

    return begin


@pytest.fixture
def run(start) -> Callable[..., Run]:
    """A launch that has ended, with the exit code that is wanted."""

    def whole(name: str, *keys: str, code: int = 0, **more) -> Run:
        running = start(name, *keys, **more)
        codes = running.wait()
        if "Duplicate GPU detected" in running.text:
            pytest.skip("this NCCL refuses two ranks on one GPU")
        assert codes == [code] * len(codes), f"exit codes {codes}, expected {code}\n{running.text[-3000:]}"
        return running

    return whole


def pytest_collection_modifyitems(config, items):
    """Only what takes the device; without a GPU all is skipped."""
    chosen = [item for item in items if item.path.parent.name == "gpu" or "device" in item.fixturenames]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip("no GPU that torch can use"))


ROWS: list[tuple[str, str, str, str]] = []


def pytest_runtest_logreport(report):
    if report.when != "call" and not (report.skipped or report.failed):
        return
    said = dict(report.user_properties)
    value, bound = said.get("value", ""), said.get("bound", "")
    if report.skipped:
        value = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    elif report.failed:
        value = f"{value} {str(getattr(report.longrepr, 'reprcrash', report.longrepr)).splitlines()[-1]}"
    verdict = "FAIL" if report.failed else "SKIP" if report.skipped else "fact" if value and not bound else "PASS"
    ROWS.append((report.nodeid.split("::")[-1].removeprefix("test_").replace("_", " "), verdict, value, bound))


def pytest_terminal_summary(terminalreporter, config):
    where = f"{steps.hardware()}; {config.getoption('--device')}; Python {platform.python_version()}, CUDA {torch.version.cuda}"
    lines = [where, "", "| check | | value | bound |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(re.sub(r"\s+", " ", cell.replace("|", "/")) for cell in row) + " |" for row in ROWS]
    terminalreporter.write("\n" + "\n".join(lines) + "\n")
    if path := config.getoption("--report"):
        Path(path).write_text("\n".join(lines) + "\n")
