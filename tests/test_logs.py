"""What happens to the logs does not happen to the run: full disks, folders that go, damaged lines, closed streams."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, small_disk
from launch import GUARD, TINY, Run, last_step, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import forget, trace

from configs import ConfigError
from refocused import locks
from refocused.measure import losses, report
from refocused.run import logs
from refocused.run.logs import check_folder

DAMAGED = (b"NaN", b"1e999", b"-1e999", b"9" * 400, b"-5", b'"x"', b"null", b"[]", b"{}", b"true")


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    return filler


def test_a_full_disk_ends_no_run(shards, tmp_path):
    """The disk of the logs fills up and is freed again, twice: said once each, steps go on, no half line anywhere; a
    start on a full disk is refused."""
    logs = tmp_path / "logs"
    with small_disk(logs, "8m") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        run = Run([f"data_dir={shards}", "max_steps=100000"], 1, tmp_path)
        run.wait_for(r"Step 3: ")
        for times in (1, 2):
            filler = fill(logs)
            run.wait_for(rf"(?s)(logs are not written: .*No space left.*){{{times}}}")
            run.wait_for(rf"Step {last_step(run.text) + 20}: ")
            filler.unlink()
            run.wait_for(rf"(?s)(can be written again.*){{{times}}}")
        here = last_step(run.text)
        run.wait_for(rf"Step {here + 2}: ")
        run.signal(signal.SIGTERM)
        assert run.wait() == [75] and "Traceback" not in run.text
        assert run.text.count("logs are not written") == 2
        assert {line["step"] for line in trace(tmp_path)} >= {1, 2, 3, here}
        assert all(re.match(r"\d{4}-.* \S", line) for line in (logs / "train.log").read_text().splitlines())
        fill(logs)
        assert "cannot be written" in train(tmp_path, f"data_dir={shards}", "resume=latest", code=2).text


def test_a_folder_that_goes_ends_no_run(shards, tmp_path):
    """logging_dir removed, a plain file in its place, that removed too: the run goes on and its logs begin anew."""
    run = Run([f"data_dir={shards}", "max_steps=100000"], 1, tmp_path)
    run.wait_for(r"Step 3: ")
    shutil.move(tmp_path / "logs", tmp_path / "gone")
    (tmp_path / "logs").write_text("in the way")
    run.wait_for(r"logs are not written: ")
    (tmp_path / "logs").unlink()
    run.wait_for(r"can be written again")
    here = last_step(run.text)
    run.wait_for(rf"Step {here + 3}: ")
    refused = train(tmp_path / "other", f"data_dir={shards}", f"logging_dir={tmp_path}/logs", code=2).text
    assert f"is in use by the run in {tmp_path}/out" in refused  # the new folder is its own again
    run.signal(signal.SIGTERM)
    run.wait_for(r"\nstopping after this step; again to quit now\n")
    assert run.wait() == [75] and "Traceback" not in run.text
    steps = [line["step"] for line in trace(tmp_path) if "event" not in line]
    assert steps == list(range(steps[0], steps[-1] + 1)) and here in steps and steps[0] > 3
    curves = EventAccumulator(str(tmp_path / "logs"))
    curves.Reload()
    assert [p.step for p in curves.Scalars("loss/train")][-1] == steps[-1]


def test_a_screen_without_room_ends_no_run(shards, tmp_path):
    """A stdout that says that its disk is full, from the first line to the flush at exit: exit 0 and a whole train.log."""
    full = "import os\n_ = os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    run = train(tmp_path, f"data_dir={shards}", config=full)
    assert "done: 10 steps" in (tmp_path / "logs" / "train.log").read_text() and "done" not in run.text


def test_unreadable_lines_are_counted_and_skipped(shards, tmp_path):
    """Zeros, text, other JSON, no whole step, bytes that are no UTF-8, JSON too deep: the resume compares the others.

    Clocks with figures that are none: the time that the run says is of the others.
    """
    args = [f"data_dir={shards}", "save_steps=4", "max_steps=8", "deterministic=true"]
    train(tmp_path, *args)
    forget(tmp_path, after=4)
    path = tmp_path / "logs" / "trace.jsonl"
    good = path.read_bytes().splitlines()
    bad = b'mine|{"note": 1}|{"step": "5"}|{"step": true}|[5]||{"step": 7, "event": ["eval"]}|{"step": -1}'.split(b"|")
    bad += [b"\0\0\0\0garbage", b'{"step": "\xff"}', b"\xff\xfe", b'{"step": %s}' % (b"9" * 400)]
    bad += [b'{"step": 6, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"]
    clock = next(line for line in good if b'"clock"' in line)
    for key, value in itertools.product(("run_seconds", "began", "save_seconds"), DAMAGED):
        good.append(re.sub(rb'"%s": [\d.]+' % key.encode(), b'"%s": %s' % (key.encode(), value), clock))
        good.append(b'{"step": 9, "loss": %s, "grad_norm": %s}' % (value, value))
    good.append(re.sub(rb'"step": \d+', b'"step": %d' % 2**53, clock))
    path.write_bytes(b"\n".join([*good[:5], *bad, *good[5:]]) + b'\n{"step": 9')
    text = train(tmp_path, *args, "resume=latest").text
    assert re.search(r"^time      \d+\.\d% of \d+s became training", text, re.M), text
    assert f"{len(bad)} lines unreadable, not compared" in text and "replayed 4 steps, 4 identical" in text
    assert losses.main([str(tmp_path / "logs"), str(path)]) == 0
    assert report.read(tmp_path / "logs").skipped == len(bad)
    assert report.main([str(tmp_path / "logs"), f"out={tmp_path}/report", "--price", "1"]) == 0


def test_two_live_runs_never_share_a_folder(shards, tmp_path):
    """Before either has a checkpoint, whichever comes second is refused; one that is gone without one has no claim."""
    shared = [f"data_dir={shards}", "max_steps=100000", f"logging_dir={tmp_path}/logs"]
    for first, second in (("a", "b"), ("b", "a")):
        run = Run(shared, 1, tmp_path / first)
        run.wait_for(r"Step 2: ")
        text = train(tmp_path / second, *shared, code=2).text
        assert f"logging_dir={tmp_path}/logs is in use by the run in {tmp_path}/{first}/out" in text
        run.kill()


def test_a_folder_that_another_run_has_taken(tmp_path):
    """.lock is removed and another run comes: however often it is tried, no byte goes into its log until it has gone."""
    check_folder(str(folder := tmp_path / "logs"), str(tmp_path / "out"))
    mine = logs.Logs(str(folder), str(tmp_path / "out"))
    mine.log("before")
    (folder / ".lock").unlink()
    other = locks.Lock(folder / ".lock")
    before = (folder / "train.log").read_bytes()
    for _ in range(3):
        mine.retry()
        mine.log("meanwhile")
    assert (folder / "train.log").read_bytes() == before
    other.release()
    mine.retry()
    mine.log("afterwards")
    assert (folder / "train.log").read_text().endswith(" afterwards\n")
    logs.release()


def test_planted_links_are_not_followed(tmp_path):
    """Links under the names of our files: refused, and what they point at stays as it was."""
    for name in (".output_dir", "train.log", "trace.jsonl"):
        target = tmp_path / f"precious{name}"
        target.write_text("precious")
        folder = tmp_path / f"logs{name}"
        folder.mkdir()
        (folder / name).symlink_to(target)
        with pytest.raises(ConfigError, match="cannot be written: .*symbolic link"):
            check_folder(str(folder), str(tmp_path / "out"))
        assert target.read_text() == "precious"


def test_a_run_without_a_stdout(shards, tmp_path):
    """Its paths are accented and its stderr is ASCII: exit 0 and a whole train.log."""
    (tmp_path / "é.py").write_text("seed = 42  # é\n", encoding="utf-8")
    places = ["output_dir=é/out", "logging_dir=é/logs", f"data_dir={shards}", "max_steps=2"]
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, str(ROOT / "train.py"), "é.py", *TINY, *places]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, timeout=GUARD)
    assert done.returncode == 0, done.stderr.decode()
    assert "done: 2 steps" in (tmp_path / "é" / "logs" / "train.log").read_text(encoding="utf-8")
