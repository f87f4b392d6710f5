"""The trainer and a bucket: an empty disk continues the same run, failures never stop it, nothing half-sent is trusted."""

import json
import random
import shutil
import time

import pytest
from launch import GUARD, Run, train
from test_resume import lines, newest, steps, tensors
from test_sync import WatchedGCS

from refocused.checkpoint import manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
BUCKET = ["bucket_name=bucket", "checkpoint_bucket_path=runs/one", f"upload_deadline_seconds={GUARD}", "resume=latest"]


@pytest.fixture
def server():
    with WatchedGCS() as running:
        yield running
    assert running.violations == []


def environment(server) -> dict[str, str]:
    return {"STORAGE_EMULATOR_HOST": server.url}


def test_an_empty_disk_continues_the_run(shards, tmp_path, server):
    """SIGKILL, all folders deleted, the same command: the lines and the final bits of a run that was left alone. Trace,
    clocks and curves of the first start came back with the checkpoint."""
    args = [f"data_dir={shards}", "max_steps=200", "save_steps=40"]
    calm = train(tmp_path / "calm", *args, nproc=2)
    run = Run([*args, *BUCKET], 2, tmp_path / "vanished", environment(server))
    server.wait_until(lambda: any("logs/events" in name for name in server.names()))
    server.wait_until(lambda: any("logs/trace" in name for name in server.names()))
    run.kill()
    shutil.rmtree(tmp_path / "vanished" / "out")
    shutil.rmtree(tmp_path / "vanished" / "logs")
    again = train(tmp_path / "vanished", *args, *BUCKET, nproc=2, env=environment(server))
    assert lines(again.text) == lines(calm.text)[-len(lines(again.text)) :]
    assert 0 < len(lines(again.text)) < 200
    found, wanted = steps(tmp_path / "vanished"), steps(tmp_path / "calm")
    assert found.items() <= wanted.items() and {1, 40, 200} <= found.keys()
    logs = tmp_path / "vanished" / "logs"
    clocks = [
        line
        for line in map(json.loads, (logs / "trace.jsonl").read_text().splitlines())
        if line.get("event") == "clock"
    ]
    assert len({line["began"] for line in clocks}) == 2 == len(list(logs.glob("events.out.tfevents.*")))
    x, y = tensors(newest(tmp_path / "calm")), tensors(newest(tmp_path / "vanished"))
    assert [name for name in x if not (x[name] == y[name]).all()] == []
    assert any("step200" in name for name in server.commits)


@pytest.mark.parametrize("kills, seed", [(5, 3), pytest.param(20, None, marks=pytest.mark.slow)])
def test_killed_while_uploading(shards, tmp_path, server, kills, seed):
    """SIGKILLs at random moments with random faults armed, the disk deleted each time: no checkpoint ever counts as complete
    in the bucket that is not, and the run ends with the bits of an undisturbed one."""
    rng = random.Random(seed or time.time_ns())
    args = [f"data_dir={shards}", "max_steps=40", "save_steps=4"]
    begin = time.monotonic()
    train(tmp_path / "calm", *args)
    duration = 2 * (time.monotonic() - begin)
    for _ in range(kills):
        for _ in range(3):
            kind = rng.choice([{"status": 503}, {"reset": True}, {"status": 429}, {"lost": True}])
            server.fault(rng.choice(["POST", "PUT", "GET"]), "", **kind)
        run = Run([*args, *BUCKET], 1, tmp_path / "storm", environment(server))
        time.sleep(rng.uniform(0.3, 1) * duration)  # a random moment is the point
        run.kill()
        shutil.rmtree(tmp_path / "storm" / "out", ignore_errors=True)
    train(tmp_path / "storm", *args, *BUCKET, env=environment(server))
    found, wanted = steps(tmp_path / "storm"), steps(tmp_path / "calm")
    assert all(found[s] == wanted[s] for s in found) and 40 in found
    x, y = tensors(newest(tmp_path / "calm")), tensors(newest(tmp_path / "storm"))
    assert [name for name in x if not (x[name] == y[name]).all()] == []


def test_a_bucket_that_refuses_writes(shards, tmp_path, server):
    """403 on every write: training goes on, the reason is printed, the exit code is 74 and the disk has the checkpoint."""
    server.fault("POST", "upload", status=403, times=10**6)
    run = train(tmp_path, f"data_dir={shards}", "save_steps=5", *BUCKET, env=environment(server), code=74)
    assert "Step 10: " in run.text and "403" in run.text and "not in the bucket" in run.text
    manifest.verify(newest(tmp_path))


def test_saves_that_take_longer_than_save_seconds(shards, tmp_path, server):
    """Saves that are always overdue: the next one begins when the last is in the bucket, so that each comes there."""
    keys = ["max_steps=600", "save_seconds=1e-9", "save_total_limit=0", "bucket_total_limit=2"]
    train(tmp_path, f"data_dir={shards}", *keys, *BUCKET, env=environment(server))
    trace = map(json.loads, (tmp_path / "logs" / "trace.jsonl").read_text().splitlines())
    saved = [line["step"] for line in trace if line.get("event") == "checkpoint"]
    assert sorted(manifest.parse(name).step for name in server.commits) == saved and len(saved) > 1
