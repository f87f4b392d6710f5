"""Pictures from traces, and the layout with copies and shards that several nodes use."""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT
from launch import GUARD, train
from safetensors import safe_open

from refocused.measure import report

PNG = b"\x89PNG\r\n\x1a\n"


def trace(folder: Path) -> dict[int, dict]:
    """The step lines of a run, without its events."""
    lines = [json.loads(line) for line in (folder / "logs" / "trace.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "event" not in line}


def write(folder: Path, lines: list[dict], tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def step(n: int, loss: float | str = 2.0, **more) -> dict:
    return {"step": n, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, **more}


def test_every_step_counts_once_and_a_cut_line_is_none(tmp_path):
    """Steps run again differently after a resume replace the old ones with all that followed them; what a kill cut."""
    lines = [step(n) for n in range(1, 9)]
    lines += [{"event": "checkpoint", "step": 4}, {"event": "eval", "step": 8, "loss": 3.0}]
    lines += [
        {"event": "resume", "step": 4},
        step(6, 1.5, verdict="spike"),
        step(7, "nan"),
        {"event": "skip", "step": 8},
    ]
    run = report.read(write(tmp_path, lines, '{"step": 8, "lo'))
    assert run.series["loss"].keys() == {1, 2, 3, 4, 5, 6, 7} and run.series["loss"][6] == 1.5
    assert run.marks == {"checkpoint": [4], "resume": [4], "eval": [], "spike": [6], "bad": [7], "skip": [8]}
    assert run.eval_loss == {} and run.skipped == 0


def test_damaged_and_foreign_lines_are_counted(tmp_path):
    """A line of zeros in the middle and JSON without a step: skipped and said; unknown keys and events do no harm."""
    folder = write(tmp_path, [step(1), {"no": 1}, step(2, more=[1]), {"event": "unheard", "step": 2}], "\0\0\n")
    run = report.read(folder)
    assert run.skipped == 2 and list(run.series["loss"]) == [1, 2]


def test_bins_keep_the_mean_and_the_range():
    """10,000 steps in 500 points: the first one against the 20 steps it stands for; what is not finite is left out."""
    points = report.bins({n: float(n) for n in range(10_000)} | {3: float("nan")})
    assert len(points) == 500 and points[0][2:] == (0.0, 20.0) and points[-1][3] == 9999.0


def test_picture_and_page_of_a_resumed_run(shards, tmp_path):
    """A real run, stopped and resumed, beside a written one: marks as the run made them, one PNG, one page with it inside."""
    pytest.importorskip("matplotlib")
    args = [f"data_dir={shards}", "eval_steps=4", "save_steps=3", "resume=latest", "sample_tokens=0"]
    train(tmp_path / "a", *args, "max_steps=7", "warmup_steps=0", "lr_scheduler_type=constant")
    train(tmp_path / "a", *args, "max_steps=10", "warmup_steps=0", "lr_scheduler_type=constant")
    (tmp_path / "b").mkdir()
    logs = [tmp_path / "a" / "logs", write(tmp_path / "b" / "logs", [step(1), step(2)])]
    run = report.read(logs[0])
    assert list(run.series["loss"]) == list(range(1, 11)) and len(run.series["tokens_per_second"]) == 10
    assert run.marks["checkpoint"] == [3, 6, 7, 9, 10] and run.marks["resume"] == [7] and 8 in run.eval_loss
    out = tmp_path / "out"
    assert report.main([*map(str, logs), f"out={out}"]) == 0
    page = (out / "report.html").read_text()
    assert (out / "report.png").read_bytes().startswith(PNG) and "data:image/png;base64," in page
    assert re.search(r"<th>resumes</th><td>1 \(step 7\)</td><td>0</td>", page)
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_what_a_user_can_get_wrong(tmp_path, capsys):
    """No argument, no trace, a trace one folder deeper, a trace without a step, a folder that cannot be written."""
    pytest.importorskip("matplotlib")
    assert report.main([]) == 2
    assert report.main([str(tmp_path / "none")]) == 66
    folder = write(tmp_path / "run", [step(1)])
    assert report.main([str(tmp_path)]) == 66 and f"there is one in {folder}" in capsys.readouterr().err
    assert report.main([str(folder), f"out={folder / 'trace.jsonl'}"]) == 2
    assert report.main([str(write(tmp_path / "empty", [], '{"st'))]) == 66


def test_without_matplotlib(tmp_path):
    """In an environment that has nothing installed: one line with the command that installs it, exit 2."""
    venv.create(tmp_path / "bare", with_pip=False)
    folder = write(tmp_path / "run", [step(1)])
    bare = [str(tmp_path / "bare" / "bin" / "python"), str(ROOT / "refocused/measure/report.py"), str(folder)]
    done = subprocess.run(bare, capture_output=True, text=True, env={}, timeout=GUARD)
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr and done.stderr.count("\n") == 1
    assert sys.prefix != str(tmp_path / "bare")


def test_copies_of_shards(shards, tmp_path):
    """fsdp with shard_size=2 over 4 ranks against ddp over 4; its checkpoint, each part once, goes on under fsdp 2."""
    common = [f"data_dir={shards}", "global_batch_size=8", "per_device_train_batch_size=1", "save_steps=5"]
    train(tmp_path / "ddp", *common, nproc=4)
    train(tmp_path / "copies", *common, "parallel=fsdp", "shard_size=2", nproc=4)
    whole, copies = trace(tmp_path / "ddp"), trace(tmp_path / "copies")
    for n in range(1, 11):
        assert copies[n]["samples"] == whole[n]["samples"]
        assert copies[n]["loss"] == pytest.approx(whole[n]["loss"], rel=1e-5)
        assert copies[n]["grad_norm"] == pytest.approx(whole[n]["grad_norm"], rel=1e-4)

    [saved] = (tmp_path / "copies" / "out").glob("checkpoint-*-step5-*")
    parts = []
    for file in saved.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            offsets = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            parts += [(key, *offsets[key]["saved_offsets"]) for key in opened.keys()]
    assert len(parts) == len(set(parts)) > 0

    train(tmp_path / "two", *common, "parallel=fsdp", f"resume={saved}", nproc=2)
    for n, line in trace(tmp_path / "two").items():
        assert n > 5 and line["loss"] == pytest.approx(whole[n]["loss"], rel=1e-5)


def test_shard_size_must_divide(shards, tmp_path):
    """3 of 4 processes, or without fsdp: exit 2, with the sizes that do."""
    args = [f"data_dir={shards}", "shard_size=3"]
    assert "sizes that do: 1, 2" in train(tmp_path / "a", *args, "parallel=fsdp", nproc=2, code=2).text
    assert "needs parallel=fsdp" in train(tmp_path / "b", *args, code=2).text
