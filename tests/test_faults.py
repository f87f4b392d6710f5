"""Nothing lost: what goes wrong while training, and which checkpoints are there afterwards."""

import importlib
import itertools
import json
import math
import os
import pickle
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from conftest import bad_shard, write_shards
from launch import GUARD, Run, last_step, stopped_at, train
from test_resume import newest, steps

import refocused
from configs import Config
from refocused import locks
from refocused.checkpoint import manifest, selection
from refocused.run import messages
from refocused.run.guard import Guard

BLOWN = ["learning_rate=1e38", "max_grad_norm=0", "resume=latest"]


def saved(folder) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    out = folder / "out"
    return sorted(manifest.verify(out / name)["step"] for name in selection.names(out))


@pytest.fixture
def refusing(server):
    """Keys and environment of a bucket that may be read and not written."""
    server.fault("POST", "upload", status=403, times=10**6)
    keys = ["bucket_name=bucket", "checkpoint_bucket_path=run", f"upload_deadline_seconds={GUARD}"]
    return keys, {"STORAGE_EMULATOR_HOST": server.url}


SAVES = ["", "parallel=fsdp", "async_save=false save_steps=1", "max_steps=21", "save_steps=1 keep_every=1"]


@pytest.mark.parametrize("keys", SAVES)
def test_a_blown_up_model_costs_no_checkpoint(shards, tmp_path, keys, refusing):
    """An update with a finite loss ruins the weights: nothing of them is saved, nothing older is pruned, exit 65 names
    the checkpoint that stands, and that nothing came to the bucket; with a sane rate the run goes on from there."""
    bucket, env = refusing if "keep_every" in keys else ([], None)
    base = [f"data_dir={shards}", "save_steps=2", "save_total_limit=3"]
    train(tmp_path, *base, "max_steps=20", nproc=2)
    before = saved(tmp_path)
    run = train(tmp_path, *base, "max_steps=60", *BLOWN, *keys.split(), *bucket, nproc=2, code=65, env=env)
    last = run.text.splitlines()[-1]
    assert ("403" in last and "not in the bucket" in last) == bool(bucket) and "saved in" not in last, last
    assert saved(tmp_path)[-1] in (20, 21) and set(before) & set(saved(tmp_path)), run.text
    assert f"{newest(tmp_path).name} from before them stands" in run.text
    mended = train(tmp_path, *base, "max_steps=24", "learning_rate=1e-3", "resume=latest", nproc=2)
    assert "done: 24 steps" in mended.text and saved(tmp_path)[-1] == 24


INFINITE = """
from refocused.run import processes

_real, _calls = processes.all_reduce, iter(range(1, 1000))
processes.all_reduce = lambda value, *op: _real(value, *op) + (float("inf") if next(_calls) in {6, 7, 8} else 0.0)
"""


def test_a_streak_that_passes_costs_no_save(shards, tmp_path):
    """The all-reduced losses of steps 6 to 8 are infinite, as after a fault of one GPU, then all is well: the save that
    was due at 6 is made at 9, the next ones in time. A run goes on from it, whose last log line had a mean with them."""
    keys = [f"data_dir={shards}", "save_steps=3", "save_total_limit=0", "max_steps=15", "logging_steps=4"]
    text = train(tmp_path, *keys, config=INFINITE).text
    assert text.count("not applied") == 3 and len(re.findall(r"Step \d+: loss=[\d.]+, lr=", text)) == 4
    assert saved(tmp_path) == [3, 9, 12, 15]
    [ninth] = [name for name in selection.names(tmp_path / "out") if manifest.step_of(name) == 9]
    again = train(tmp_path, *keys, f"resume={ninth}").text
    assert "replayed 6 steps, 6 identical" in again
    mean = re.search(r"Step 12: loss=\S+", text)[0]
    assert mean in again, "the loss of step 9 is in its checkpoint"


def test_a_stop_among_steps_that_pass_is_a_stop(shards, tmp_path):
    """SIGTERM at the second of three steps whose loss is infinite: nothing of them is saved, and a restart goes on."""
    told = INFINITE + "\nimport os\n_count, _all = iter(range(1, 1000)), processes.all_reduce\n"
    told += "processes.all_reduce = lambda *args: (next(_count) == 7 and os.kill(os.getpid(), 15), _all(*args))[1]"
    keys = [f"data_dir={shards}", "save_steps=3", "max_steps=5000"]
    run = train(tmp_path, *keys, config=told, code=75)
    assert "not finite and nothing of them is saved" in (last := run.text.splitlines()[-1]) and "also: a signal" in last
    assert (
        f"done: {last_step(run.text) + 9} steps"
        in train(tmp_path, *keys[:2], f"max_steps={last_step(run.text) + 9}", "resume=latest").text
    )


BAD_BATCHES = """
import data as _data
import model as _model

_sums, _assemble, _forward = set(), _data.Loader._assemble, _model.GPTNeoX.forward

def _noted(self, step, ids):
    batch = _assemble(self, step, ids)
    if step + 1 in (5, 6):
        _sums.update(int(x.sum()) for x, _ in batch.micro)
    return batch

_data.Loader._assemble = _noted
_model.GPTNeoX.forward = lambda self, x, *more: _forward(self, x, *more) * (float("nan") if int(x.sum()) in _sums else 1)
"""


@pytest.mark.parametrize("keys", ["save_steps=0", "save_steps=5 async_save=false"])
def test_a_save_is_not_judged_by_a_batch_that_is_skipped(shards, tmp_path, keys):
    """Two batches have no finite loss with any weights: a run that ends in them has saved nothing, one that skips them has."""
    args = [f"data_dir={shards}", "max_steps=6", *keys.split()]
    train(tmp_path / "in", *args, config=BAD_BATCHES, code=65)
    assert saved(tmp_path / "in") == []
    train(tmp_path / "past", *args, "skip_steps=5-6", config=BAD_BATCHES)
    assert saved(tmp_path / "past") == [5, 6][-1 - ("5" in keys) :]
    train(tmp_path / "none", *args, "skip_steps=1-6", config=BAD_BATCHES)  # the weights are the first ones
    assert saved(tmp_path / "none")[-1] == 6


LATE = """
import time as _time
from refocused.checkpoint import saver as _saver

_write = _saver.write

def _late(folder, *more):
    if "step3-" not in folder.name:
        return _write(folder, *more)
    _time.sleep(5)
    raise OSError(28, "No space left on device")

_saver.write = _late
"""


def test_a_save_that_failed_is_not_the_next_ones_failure(shards, tmp_path):
    """The save before the last fails while the last waits for it: that is told, and the run has ended well."""
    text = train(tmp_path, f"data_dir={shards}", "save_steps=3", "max_steps=4", config=LATE).text
    clocks = [line for line in map(json.loads, (tmp_path / "logs/trace.jsonl").open()) if line.get("event") == "clock"]
    assert clocks[-1]["save_seconds"] > 0.1, "the time that the last save waited was a save's"
    assert "saving checkpoint-epoch0-step3-files" in text and "No space left" in text and saved(tmp_path) == [4]


def test_gradients_that_never_become_finite():
    """Under fp16 a scale that is halved mends them; for ever it does not. An overflow is no spike that was applied."""
    health = Guard(Config(spikes="report"), torch.device("cpu"), True, None)
    found = [health.status(2.0, math.inf, 0.1, math.inf) for _ in range(60)]
    assert found[0] is None and health.too_many_bad_steps and found.index("not applied") == 40


def test_saves_that_fail_cost_no_step(shards, tmp_path):
    """No file may grow to the size of a save's: each is told at a step behind it and training goes on, but for the last,
    which ends it with 70. The checkpoint before them stands, and nothing is left of them."""
    keys = [f"data_dir={shards}", "save_steps=3"]
    train(tmp_path, *keys, "max_steps=3", nproc=2)
    limit = "import resource\n_no = resource.RLIM_INFINITY\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, _no))"
    text = train(tmp_path, *keys, "max_steps=12", "resume=latest", nproc=2, config=limit, code=70).text
    assert text.count("File too large") > 2 and text.count("training goes on, the checkpoint before it stands") == 2
    assert "ended at step 12, but saving checkpoint-epoch0-step12" in text.splitlines()[-1], text
    assert saved(tmp_path) == [3] and not list((tmp_path / "out").glob(".tmp-*"))


@pytest.mark.parametrize("nproc", [1, 2])
def test_data_trouble_costs_no_step(tmp_path, nproc, refusing):
    """A shard replaced in the middle of a run, by one with ids that the model does not have: exit 66 with the shard's
    name, saved at the last step that was whole; with the shard put back the run goes on from there. A bucket that
    cannot be written changes neither code nor name, and is said too."""
    data = write_shards(tmp_path / "data")
    args = [f"data_dir={data}", "max_steps=4000", "save_steps=0"]
    bucket, env = refusing if nproc == 1 else ([], None)
    run = Run([*args, *bucket], nproc, tmp_path, env)
    run.wait_for(r"Step 20: ")
    shard = sorted(data.rglob("*.npz"))[1]
    with bad_shard(shard):
        assert set(run.wait()) == {66}, run.text
    assert shard.name in run.text and ("not in the bucket: " in run.text.splitlines()[-1]) == bool(bucket)
    step = stopped_at(run.text)
    assert step >= 20 and max(steps(tmp_path)) == step == manifest.step_of(newest(tmp_path).name)
    again = train(tmp_path, f"data_dir={data}", f"max_steps={step + 3}", "resume=latest", nproc=nproc)
    assert f"done: {step + 3:,} steps" in again.text


def test_the_order_of_causes():
    """2, 65, 66 and 78 before all others, then what failed first; each cause is said, and a run without any is done."""
    found = {
        "not_finite": (65, 65, "not finite"),
        "unreadable": ("shard a", 66, "shard a"),
        "failure": ("saving b", 70, "saving b"),
        "missing": ("403", 74, "not in the bucket: 403"),
        "stopped": (1.0, 75, "signal"),
    }
    assert messages.ending(Config(), 7, "last")[0] == 0
    for some in itertools.chain.from_iterable(itertools.combinations(found, n) for n in range(1, len(found) + 1)):
        code, text = messages.ending(Config(), 7, "last", **{key: found[key][0] for key in some})
        assert code == found[some[0]][1] and all(found[key][2] in text for key in some), (some, text)
        assert "saved in" not in text or some[0] == "missing", text


def test_every_error_reaches_the_other_ranks():
    """Pickled, as rank 0 sends it: the same type, text and attributes, whatever its constructor takes."""
    for module in pkgutil.walk_packages(refocused.__path__, "refocused."):
        importlib.import_module(module.name)
    kinds = [ValueError]
    for kind in kinds:  # which grows
        kinds += kind.__subclasses__()
    ours = [kind for kind in kinds if hasattr(kind, "exit_code")]
    assert locks.Taken in ours
    for kind in ours:
        takes = kind.__init__.__code__.co_argcount - 1 if "__init__" in vars(kind) else 1
        error = kind(*[Path("a/b")] * takes)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


def test_batch_and_tokens_go_on(shards, tmp_path):
    """Two processes where there was one, without global_batch_size: refused with both ways out, and both work; the tokens
    seen are the sum of what was seen, also with shorter sequences. No step: no checkpoint, and none to go on from."""
    data = f"data_dir={shards}"
    text = train(tmp_path / "nothing", data, "max_steps=0").text
    assert "done: 0 steps, and no checkpoint: max_steps=0 trains nothing" in text and "Next:" not in text
    train(tmp_path, data, "max_steps=4")
    text = train(tmp_path, data, "max_steps=8", "resume=latest", nproc=2, code=2).text
    assert "global_batch_size=4" in text and "allow_change=true" in text
    seen = 4 * 4 * 32
    for nproc, last, tokens, *keys in (
        (2, 6, 2 * 4 * 32, "global_batch_size=4", "per_device_train_batch_size=2"),
        (2, 8, 2 * 8 * 32, "allow_change=true"),
        (1, 10, 2 * 4 * 16, "allow_change=true", "sequence_length=16"),
    ):
        train(tmp_path, data, f"max_steps={last}", "resume=latest", *keys, nproc=nproc)
        seen += tokens
        assert manifest.read(newest(tmp_path))[1]["tokens"] == seen


SLOW_DISK = """
import time
from refocused.checkpoint import atomic
from refocused.run.processes import progress

_commit = atomic.commit
def _slow(*arguments):
    goal, end = min(progress.step + 20, 200), time.monotonic() + 20
    while progress.step < goal and time.monotonic() < end:
        time.sleep(0.001)
    print("TRAINED ON" if progress.step >= goal else "TRAINING WAITED", flush=True)
    _commit(*arguments)
atomic.commit = _slow
"""


def test_saves_that_take_longer_than_save_seconds(shards, tmp_path):
    """Saves that are always overdue, each as long as 20 steps: one after the other, and training waits for none."""
    text = train(tmp_path, f"data_dir={shards}", "save_seconds=1e-9", "max_steps=200", config=SLOW_DISK).text
    assert "TRAINING WAITED" not in text and 3 <= text.count("TRAINED ON") <= 11, text


def test_git_is_asked_once(shards, tmp_path):
    """However many saves there are; what they note is the commit at the start, and that a file was changed since."""
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/asked\n[ $1 = status ] && echo ' M train.py' || echo c0ffee\n")
    git.chmod(0o755)
    train(tmp_path, f"data_dir={shards}", "save_steps=1", env={"PATH": f"{git.parent}:{os.environ['PATH']}"})
    assert manifest.read(newest(tmp_path))[1]["run"]["git_commit"] == "c0ffee-dirty"
    assert sorted((tmp_path / "asked").read_text().split()) == ["rev-parse", "status"]
