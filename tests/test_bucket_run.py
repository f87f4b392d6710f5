"""The trainer and a bucket: an empty disk continues the same run, and saves do not overtake their uploads."""

import shutil

import pytest
from launch import GUARD, Run, train
from test_resume import assert_same_tensors, lines, newest, steps, trace

from refocused.checkpoint import manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
BUCKET = ["bucket_name=bucket", "checkpoint_bucket_path=runs/one", f"upload_deadline_seconds={GUARD}", "resume=latest"]


def environment(server) -> dict[str, str]:
    return {"STORAGE_EMULATOR_HOST": server.url}  # ranks are forked from a server that is older than the test


def test_an_empty_disk_continues_the_run(shards, tmp_path, server):
    """SIGKILL, all folders deleted, the same command: the lines and the final bits of a run that was left alone. Trace,
    clocks and curves of the first start came back with the checkpoint."""
    args = [f"data_dir={shards}", "max_steps=200", "save_steps=40"]
    calm = train(tmp_path / "calm", *args, nproc=2)
    run = Run([*args, *BUCKET], 2, tmp_path / "vanished", environment(server))
    for logs in ("logs/events", "logs/trace"):
        server.wait_until(lambda logs=logs: any(logs in name for name in server.names()))
    run.kill()
    for folder in ("out", "logs"):
        shutil.rmtree(tmp_path / "vanished" / folder)
    again = train(tmp_path / "vanished", *args, *BUCKET, nproc=2, env=environment(server))
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
    train(tmp_path, f"data_dir={shards}", *keys, *BUCKET, env=environment(server))
    saved = [line["step"] for line in trace(tmp_path) if line.get("event") == "checkpoint"]
    assert sorted(manifest.parse(name).step for name in server.commits) == saved and len(saved) > 1
