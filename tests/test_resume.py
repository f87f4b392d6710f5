"""The resumed run is the same run, bit for bit: after every step, every kind of kill, in every layout, from a bucket."""

import json
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, write_shards
from launch import GUARD, TINY, Run, stopped_at, train, until

import data
from configs import Config
from refocused.checkpoint import manifest, selection
from refocused.checkpoint.tensors import load
from refocused.run import messages

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # tensors() reads without ranks


def newest(folder: Path) -> Path:
    """The last checkpoint of a run's folder."""
    return folder / "out" / selection.names(folder / "out")[0]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter and moment, whole, whatever layout wrote it."""
    manifest.verify(checkpoint)
    saved = dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    tree = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in saved.items()}
    load(checkpoint, tree)
    return tree


def steps(folder: Path) -> dict[int, tuple]:
    """What trace.jsonl proves of each step; a step that is there twice must be there with the same bits."""
    found: dict[int, tuple] = {}
    for line in trace(folder):
        if "event" not in line:
            bits = tuple(line[k] for k in ("loss_hex", "grad_norm_hex", "lr_hex", "samples"))
            assert found.setdefault(line["step"], bits) == bits, line
    return found


def trace(folder: Path) -> list[dict]:
    """The lines of a run's trace, each of which must be whole."""
    return [json.loads(line) for line in (folder / "logs" / "trace.jsonl").read_text().splitlines()]


def forget(folder: Path, after: int) -> None:
    """Delete the checkpoints beyond a step, as if a kill had come before them."""
    for name in selection.names(folder / "out"):
        if manifest.step_of(name) > after:
            shutil.rmtree(folder / "out" / name)


def lines(text: str) -> list[str]:
    """The log lines without what depends on the clock."""
    return [line.split(" | ")[0] for line in re.findall(r"^Step \d+: loss=.*", text, re.M)]


def assert_same_run(a: Path, b: Path) -> None:
    """Same losses, norms, rates and samples at every step, same bits in every parameter and moment at the end."""
    assert steps(a) == steps(b)
    assert_same_tensors(newest(a), newest(b))


def assert_same_tensors(a: Path, b: Path) -> None:
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys()
    assert [name for name in x if not torch.equal(x[name], y[name])] == []


def take(source: Path, step: int, target: Path) -> None:
    """A folder as it was when the run in `source` had just saved `step`."""
    [checkpoint] = (source / "out").glob(f"checkpoint-*-step{step}-*")
    shutil.copytree(checkpoint, target / "out" / checkpoint.name)


LAYOUTS = {
    "1": (1, ["hidden_dropout=0.1"]),
    "ddp 2, bf16": (2, ["parallel=ddp", "mixed_precision=bf16"]),
    "fsdp 2, bf16": (2, ["parallel=fsdp", "mixed_precision=bf16", "gradient_accumulation_steps=2"]),
    "ddp 4": (4, ["parallel=ddp", "per_device_train_batch_size=2"]),
    "fsdp 4": (4, ["parallel=fsdp", "per_device_train_batch_size=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_k_steps_and_the_rest_are_ten_steps(shards, tmp_path, layout):
    """For every k: a run resumed after k steps against the one that made all ten, step by step and at the end."""
    nproc, args = LAYOUTS[layout]
    args = [f"data_dir={shards}", "save_steps=1", "save_total_limit=0", *args]
    whole = train(tmp_path / "whole", *args, nproc=nproc)
    assert sorted(steps(tmp_path / "whole")) == list(range(1, 11))
    for k in range(1, 10):
        folder = tmp_path / f"from-{k}"
        take(tmp_path / "whole", k, folder)
        run = train(folder, *args, "resume=latest", "save_steps=0", nproc=nproc)
        assert lines(run.text) == lines(whole.text)[k:]
        assert steps(folder) == {s: bits for s, bits in steps(tmp_path / "whole").items() if s > k}
        assert_same_tensors(newest(tmp_path / "whole"), newest(folder))


STORMS = {  # processes, kills in the suite (0: in the long one alone), keys
    "ddp 2": (2, 5, ["parallel=ddp"]),
    "fsdp 2, bf16": (2, 5, ["parallel=fsdp", "mixed_precision=bf16"]),
    "ddp 4": (4, 0, ["parallel=ddp", "per_device_train_batch_size=2"]),
    "fsdp 4": (4, 0, ["parallel=fsdp", "per_device_train_batch_size=2"]),
    "ddp 2, bf16, compiled": (2, 2, ["parallel=ddp", "mixed_precision=bf16", "compile_model=true"]),
}


SHORT, LONG = (
    [name for name in STORMS if STORMS[name][1]],
    [pytest.param(name, marks=pytest.mark.slow) for name in STORMS],
)


@pytest.mark.parametrize("layout", SHORT + LONG)
def test_sigkill_at_random_moments(shards, tmp_path, layout, request):
    """A run whose ranks are killed again and again ends with the bits of one that was left alone; slow: --kills in all,
    shared among the layouts."""
    nproc, kills, args = STORMS[layout]
    rng = random.Random(1)
    if request.node.get_closest_marker("slow"):
        kills, rng = request.config.getoption("kills") // len(STORMS), random.Random()
    args = [f"data_dir={shards}", "max_steps=30", "save_steps=3", "resume=latest", *args]
    if "compile_model=true" in args:  # fills the compiler's cache, so that the kills are spread over the run itself
        train(tmp_path / "warm", *args)
    begin, out = time.monotonic(), tmp_path / "storm" / "out"
    train(tmp_path / "calm", *args, nproc=nproc)
    duration = time.monotonic() - begin
    for _ in range(kills):
        if any(manifest.step_of(name) == 30 for name in selection.names(out)):
            for name in selection.names(out)[:-1]:  # the run is through: once more, from the oldest that is left
                shutil.rmtree(out / name)
        run = Run(args, nproc, out.parent)
        time.sleep(rng.uniform(0.2, 1.1) * duration)  # a random moment is the point
        run.kill()
        assert "not the same run" not in run.text, run.text
    assert "not the same run" not in train(out.parent, *args, nproc=nproc).text
    assert_same_run(tmp_path / "calm", out.parent)


def test_replay_is_proven(shards, tmp_path):
    """After a SIGKILL the steps that are run again are compared with the trace, whose last line the kill may have cut. A
    second run in the same folder is refused until then, and told by whom."""
    args = [f"data_dir={shards}", "max_steps=4000", "save_steps=50", "resume=latest"]
    run = Run(args, 1, tmp_path)
    run.wait_for(r"Step 63: ")
    until(lambda: selection.names(tmp_path / "out"))
    refused = train(tmp_path, *args, code=2).text
    assert f"pid {run.ranks[0].pid}" in refused and os.uname().nodename in refused
    run.kill()
    again = len(steps(tmp_path)) - manifest.step_of(newest(tmp_path).name)
    assert again > 0
    with (tmp_path / "logs" / "trace.jsonl").open("a") as file:
        file.write('{"step": 99, "loss"')
    run = Run(args, 1, tmp_path)
    run.wait_for(r"replayed \d+ steps, ")
    run.kill()
    assert f"replayed {again} steps, {again} identical" in run.text


def test_a_resume_with_another_config(shards, tmp_path):
    """Another learning rate is not the same run: the first difference is named. With twice the batch the run goes on at
    the next unread sample."""
    args = [f"data_dir={shards}", "save_steps=4", "save_total_limit=0"]
    train(tmp_path, *args)
    forget(tmp_path, after=4)
    run = train(tmp_path, *args, "resume=latest", "learning_rate=2e-2")
    said = r"then not the same run: step 5: .*lr was 0.00\d+, is 0.01\d* \(learning_rate 0.01 -> 0.02 changed\)"
    assert re.search(said, run.text) and "config: learning_rate 0.01 -> 0.02" in run.text
    forget(tmp_path, after=4)
    twice = ["max_steps=6", "resume=latest", "gradient_accumulation_steps=2", "allow_change=true"]
    assert "continues at sample 16," in train(tmp_path, f"data_dir={shards}", *twice).text
    last = json.loads((newest(tmp_path) / "state.json").read_text())
    assert last["step"] == 6 and last["samples_seen"] == 16 + 2 * 8


SIGNALS = [(signal.SIGTERM, "Step 5: loss"), (signal.SIGINT, "eval_loss"), (signal.SIGUSR1, "ready in")]
SIGNALS += [(signal.SIGHUP, "Step 5: loss")]


@pytest.mark.parametrize("number, moment", SIGNALS)
def test_a_signal_on_one_rank_stops_all_and_loses_nothing(shards, tmp_path, number, moment):
    """A signal to one rank in the loop, in evaluation or at the start: all save the same step, exit 75; then the same run."""
    args = [f"data_dir={shards}", "max_steps=150", "eval_steps=5", "save_steps=7", "resume=latest"]
    run = Run(args, 2, tmp_path / "stopped")
    run.wait_for(moment)
    run.signal(number, rank=1)
    assert run.wait() == [75, 75], run.text
    stopped = stopped_at(run.text)
    assert manifest.step_of(newest(tmp_path / "stopped").name) == stopped < 150
    resumed = Run(args, 2, tmp_path / "stopped")
    resumed.wait_for(rf"Step {stopped + 2}: loss")
    resumed.kill()
    whole = Run(args, 2, tmp_path / "whole")
    whole.wait_for(rf"Step {stopped + 2}: loss")
    whole.kill()
    a, b = steps(tmp_path / "stopped"), steps(tmp_path / "whole")
    assert len(a.keys() & b.keys()) > stopped and all(a[s] == b[s] for s in a.keys() & b.keys())


STOP_IN_EVALUATION = """
import os, signal, time, train as _train
def _evaluate(*args, evaluate=_train.evaluate):
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        while not args[-1].since:  # the thread that listens has not seen it yet
            time.sleep(0.01)
    return evaluate(*args)
_train.evaluate = _evaluate
"""


@pytest.mark.parametrize("max_steps", [5, 10])
def test_an_evaluation_that_a_stop_meets_is_made_by_the_next_start(shards, tmp_path, max_steps):
    """SIGTERM to one rank in the evaluation at step 5, the last one or not, and again at the next start: 75, saved; then it
    is made once, with the loss of a run that was left alone; the start after that has nothing to do any more."""
    args = [f"data_dir={shards}", "eval_steps=5", f"max_steps={max_steps}", "resume=latest"]
    train(tmp_path / "whole", *args, nproc=2)
    for _ in range(2):
        run = Run(args, 2, tmp_path / "stopped", config=STOP_IN_EVALUATION)
        assert run.wait() == [75, 75], run.text
        assert "stopped at step 5, " in run.text and "eval_loss" not in run.text
    ends = [train(tmp_path / "stopped", *args, nproc=2).text.split("\n")[-5:] for _ in range(2)]
    assert any(line.startswith(f"done: {max_steps} steps") for line in ends[0]), ends
    assert any(line.startswith("nothing to do: ") for line in ends[1]), ends
    traces = (trace(tmp_path / name) for name in ("whole", "stopped"))
    whole, stopped = ([(x["step"], x["loss"]) for x in lines if x.get("event") == "eval"] for lines in traces)
    assert whole == stopped and [step for step, _ in whole] == list(range(5, max_steps + 1, 5))


def test_a_closed_terminal_saves(shards, tmp_path):
    """The terminal of a run goes away: writes to it fail, SIGHUP comes, and the run is saved with exit code 75."""
    config = tmp_path / "empty.py"
    config.write_text("seed = 42")
    places = [f"output_dir={tmp_path}/out", f"logging_dir={tmp_path}/logs", f"data_dir={shards}", "max_steps=100000"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), str(config), *TINY, *places])
    log = tmp_path / "logs" / "train.log"

    def step_20_was_printed() -> bool:
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)
        return log.exists() and "Step 20:" in log.read_text()

    until(step_20_was_printed)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    stopped = stopped_at(log.read_text())
    assert manifest.step_of(newest(tmp_path).name) == stopped


def test_sigterm_while_compiling(shards, tmp_path):
    """SIGTERM to both ranks while a cold cache is filled: out with exit 75; started again, the run goes through."""
    args = [f"data_dir={shards}", "compile_model=true", "max_steps=3", "resume=latest"]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = Run(args, 2, tmp_path, env=cache)
    until(lambda: list((tmp_path / "cache").rglob("*.cpp")))
    run.signal(signal.SIGTERM)
    assert "ready in" not in run.text
    assert run.wait() == [75, 75], run.text
    assert re.search(r"stopped .*(before the first step|at step 1 )", run.text), run.text
    train(tmp_path, *args, nproc=2, env=cache)
    assert sorted(steps(tmp_path)) == [1, 2, 3]


def test_sigterm_while_waiting_for_another_rank(shards, tmp_path):
    """A rank whose peer never comes sits in a rendezvous where no handler runs: it leaves with 75 all the same."""
    run = Run([f"data_dir={shards}"], 2, tmp_path)
    run.signal(signal.SIGKILL, rank=1)
    run.ranks[1].join()
    until(lambda: socket.socket().connect_ex(("127.0.0.1", run.port)) == 0)  # the store that ranks meet in is there
    run.signal(signal.SIGTERM, rank=0)
    assert run.wait() == [75, -signal.SIGKILL], run.text
    assert "before the first step" in run.text


def test_a_resume_is_explained(shards, tmp_path):
    """What is printed about the choice: other data, checkpoints or another run's logs without resume, nothing to do, a step
    back, a damaged checkpoint."""
    args = [f"data_dir={shards}", "save_steps=5"]
    train(tmp_path, *args)
    five = selection.names(tmp_path / "out")[1]
    assert "resume=latest or start afresh" in train(tmp_path, *args, code=2).text
    other = write_shards(tmp_path / "other", shards=5, seed=1)
    refused = train(tmp_path, "save_steps=5", f"data_dir={other}", "resume=latest", code=66).text
    assert "added 1" in refused and "changed 4" in refused and "allow_change=true" in refused
    grown = train(tmp_path, *args, "resume=latest", "max_steps=12").text
    where = r"data: continues at sample 40, token 1,280, epoch 0, \d+\.\d%, shard part\d/tokenized.* offset \d+"
    assert re.search(where, grown) and "config: max_steps 10 -> 12" in grown
    idle = train(tmp_path, *args, "resume=latest", "max_steps=6", "init_from=elsewhere").text
    assert f"nothing to do: {newest(tmp_path).name}" in idle and "init_from=elsewhere is not used" in idle
    assert "at step 12, max_steps=6; raise max_steps" in idle
    logs = train(tmp_path / "b", *args, f"logging_dir={tmp_path}/logs", code=2).text
    assert f"has the logs of the run in {tmp_path}/out; give this run a folder of its own" in logs
    back = train(tmp_path, *args, f"resume={five}", "max_steps=6").text
    assert re.search(r"checkpoint-epoch\d-step12-files\d is ahead of it: abandoned, once this run has saved", back)
    flipped = newest(tmp_path) / "state.json"
    old = json.loads(
        flipped.read_bytes()
    )  # as if from before there was a shard_size, beside which its parallel cannot be
    now = Config(**{**old["config"], "parallel": "fsdp", "shard_size": 1, "max_steps": 12})
    assert old["config"].pop("shard_size") == 0
    said = messages.describe_resume(selection.Choice(flipped.parent, old, []), now, data.Dataset.open(now))
    assert "config: parallel ddp -> fsdp" in said and "(was " in said
    assert "step6" in str(flipped), "what was saved last"
    flipped.write_bytes(flipped.read_bytes().replace(b'"step": 6', b'"step": 7'))
    passed = train(tmp_path, *args, "resume=latest", "max_steps=12").text
    assert re.search(r"passed over checkpoint-epoch\d-step6-files\d: .*state.json", passed)


BUCKET = ["bucket_name=bucket", "checkpoint_bucket_path=runs/one", f"upload_deadline_seconds={GUARD}", "resume=latest"]


def test_an_empty_disk_continues_the_run(shards, tmp_path, server):
    """SIGKILL, all folders deleted, the same command: the lines and the final bits of a run that was left alone. Trace,
    clocks and curves of the first start came back with the checkpoint."""
    args = [f"data_dir={shards}", "max_steps=200", "save_steps=40"]
    calm = train(tmp_path / "calm", *args, nproc=2)
    env = {"STORAGE_EMULATOR_HOST": server.url}  # ranks are forked from a server that is older than the test
    run = Run([*args, *BUCKET], 2, tmp_path / "vanished", env)
    for logs in ("logs/events", "logs/trace"):
        server.wait_until(lambda logs=logs: any(logs in name for name in server.names()))
    run.kill()
    for folder in ("out", "logs"):
        shutil.rmtree(tmp_path / "vanished" / folder)
    again = train(tmp_path / "vanished", *args, *BUCKET, nproc=2, env=env)
    assert lines(again.text) == lines(calm.text)[-len(lines(again.text)) :]
    assert 0 < len(lines(again.text)) < 200
    found, wanted = steps(tmp_path / "vanished"), steps(tmp_path / "calm")
    assert found.items() <= wanted.items() and {1, 40, 200} <= found.keys()
    clocks = [line["began"] for line in trace(tmp_path / "vanished") if line.get("event") == "clock"]
    assert len({*clocks}) == len(list((tmp_path / "vanished/logs").glob("events.out.tfevents.*"))) == 2
    assert_same_tensors(newest(tmp_path / "calm"), newest(tmp_path / "vanished"))
    assert any("step200" in name for name in server.commits)


def test_saves_that_take_longer_than_save_seconds(shards, tmp_path, server):
    """Saves that are always overdue: the next one begins when the last is in the bucket, so that each comes there."""
    keys = ["max_steps=600", "save_seconds=1e-9", "save_total_limit=0", "bucket_total_limit=2"]
    train(tmp_path, f"data_dir={shards}", *keys, *BUCKET, env={"STORAGE_EMULATOR_HOST": server.url})
    saved = [line["step"] for line in trace(tmp_path) if line.get("event") == "checkpoint"]
    assert sorted(manifest.step_of(name) for name in server.commits) == saved and len(saved) > 1
