import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

# as in an activated environment: `python` in what is printed, and in children's shells, is this one
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # `nohup pytest`: the runs that tests start would ignore it too
    signal.signal(signal.SIGHUP, lambda *_: None)  # as a handler it is not inherited

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from fakegcs import FakeGCS  # noqa: E402

import data  # noqa: E402

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


# the tests that take most of the suite's time (pytest --durations=30), which `make test-quick` leaves out; every file but
# the storm's has others
LONG = """
    test_k_steps_and_the_rest_are_ten_steps[1] test_k_steps_and_the_rest_are_ten_steps[ddp
    test_k_steps_and_the_rest_are_ten_steps[fsdp_4] test_sigkill_at_random_moments test_sigterm_while_compiling
    test_one_layout test_many_layouts test_killed_and_restarted test_a_hang_in_what_may_take_long_is_found
    test_how_two_ranks_end test_a_hang_is_found
    test_left_over_variables_start_one_process test_what_compiling_lacks_is_said test_a_first_collective_that_hangs
    test_five_minutes test_real_runs test_bucket_recipe
    test_machine_check test_the_answer_comes_first test_search_on_made_up_hardware test_a_calibrated_plan
    test_killed_at_every_file_operation test_a_killed_import_or_export test_onnx test_one_tokenizer_from_text_to_export
    test_51_billion_tokens test_compiles_once_for_any_depth test_step_command test_offload
    test_plan_predicts_what_a_run_allocates[2 test_the_first_steps_are_the_golden_ones[bf16]
    test_two_commits test_checks_on_a_cpu test_checks_without_a_gpu test_makes_the_environment_in_the_folder
    test_files_of_somebody_where_a_command_writes test_everything_on_a_disk_that_lacks
    test_a_node_that_may_not_write test_a_host_dies test_nodes_that_share_a_disk test_slurm test_pods
    test_closed_and_ascii_streams test_what_broke_first_decides test_max_restarts test_a_stop_while_a_node_unpacks
    test_sixty_files_killed test_k_steps_and_the_rest_are_ten_steps[fsdp_2
    test_spikes_are_skipped_alike test_show_prints_the_plan test_depths_that_were_not_looked_at
    test_a_machine_that_lacks test_mean_of_layouts test_sigterm_while_waiting_for_another_rank test_one_downloader_per_folder
    test_the_reason_arrives_though_rank_0 test_the_launcher_knows_that_a_run_was_stopped
    test_plan_predicts_what_a_run_allocates[1
""".split()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name.replace(" ", "_").startswith(tuple(LONG)):
            item.add_marker("long")


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


@contextlib.contextmanager
def bad_shard(shard: Path) -> Iterator[None]:
    """In this context another file is in a shard's place, with ids that no model has."""
    good, status = shard.read_bytes(), shard.stat()
    np.savez(other := shard.with_name("other.npz"), input_ids=np.full(3000, 60000, np.uint16))
    os.replace(other, shard)  # one that is cut short where it lies can end a run without a save
    yield
    shard.write_bytes(good)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A new folder, on a disk of its own so small where this user may mount one; whether so."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mounted = not subprocess.run(command, capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def server(monkeypatch):
    """A bucket server that this test's client talks to; no manifest in it ever speaks for what is not there."""
    with FakeGCS() as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        yield running
    assert not running.violations


@pytest.fixture
def data_py(capsys):
    """data_py(*arguments): `python data.py ARGUMENTS` in this process; exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = data.main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's own
            code = error.code
        return code, *capsys.readouterr()

    return run


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=["cuda", "cpu"], help="the checks of a GPU (tests/gpu/card.py); cpu: tiny ones"
    )
    parser.addoption("--report", help="with --device: a file for the report in markdown")
    parser.addoption("--kills", type=int, default=200, help="SIGKILLs of the long storm, with -m slow")
    parser.addoption("--minutes", type=float, default=30, help="how long tests/test_storm.py goes on, with -m slow")
    parser.addoption("--seed", type=int, default=0, help="the same storm once more, with -m slow")
