"""Pictures and figures from traces."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from launch import train

import bench
from refocused.measure import report
from refocused.run.trace import goodput

PNG = b"\x89PNG\r\n\x1a\n"


def write(folder: Path, lines: list[dict], tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def step(n: int, loss: float | str = 2.0, **more) -> dict:
    return {"step": n, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, **more}


def test_every_step_counts_once_and_a_cut_line_is_none(tmp_path):
    """Steps run again differently after a resume replace the old ones with all that followed them; what a kill cut.

    JSON without a step and a line of zeros are skipped and counted; unknown keys and events do no harm.
    """
    lines = [step(1, more=[1]), {"no": 1}, *(step(n) for n in range(2, 9)), {"event": "unheard", "step": 2}]
    lines += [{"event": "checkpoint", "step": 4}, {"event": "eval", "step": 8, "loss": 3.0}]
    lines += [{"event": "resume", "step": 4}, step(6, 1.5, verdict="spike"), step(7, "nan")]
    lines += [{"event": "skip", "step": 8}]
    run = report.read(write(tmp_path, lines, '\0\0\n{"step": 8, "lo'))
    assert run.series["loss"].keys() == {1, 2, 3, 4, 5, 6, 7} and run.series["loss"][6] == 1.5
    assert run.marks == {"checkpoint": [4], "resume": [4], "eval": [], "spike": [6], "bad": [7], "skip": [8]}
    assert run.eval_loss == {} and run.skipped == 2
    run.eval_loss = {4: float("nan"), 8: 2.5}
    assert report.figures(run, 0)["best held-out loss"] == "2.5000 (step 8)"


def test_the_branch_is_followed(tmp_path):
    """To 8, back to 4 and on to 6, then on from 8 again: no step of the side branch, and the other way round from it.

    The side branch's step 5 was the same and not written again; a resume of which nothing is known yet hides nothing.
    """
    main = [step(n) for n in range(1, 5)] + [{"event": "checkpoint", "step": 4, "name": "four"}]
    main += [step(n) for n in range(5, 9)] + [{"event": "checkpoint", "step": 8, "name": "eight"}]
    side = [{"event": "resume", "step": 4, "checkpoint": "four"}, step(6, 9.0)]
    side += [{"event": "checkpoint", "step": 6, "name": "six"}]

    def losses(*more: dict) -> dict[int, float]:
        return report.read(write(tmp_path / "run", [*main, *side, *more])).series["loss"]

    assert losses() == {**dict.fromkeys(range(1, 6), 2.0), 6: 9.0}
    back = {"event": "resume", "step": 8, "checkpoint": "eight"}
    assert losses(back, step(9, 3.0)) == {**dict.fromkeys(range(1, 9), 2.0), 9: 3.0}
    on = {"event": "resume", "step": 6, "checkpoint": "six"}
    assert losses(back, step(9, 3.0), on, step(7, 8.0)) == {**dict.fromkeys(range(1, 6), 2.0), 6: 9.0, 7: 8.0}
    again = [{"event": "resume", "step": 4, "checkpoint": "four"}, {"event": "clock", "step": 4}]
    assert losses(*again) == {**dict.fromkeys(range(1, 6), 2.0), 6: 9.0}
    assert losses(*again, {"event": "clock", "step": 5}) == dict.fromkeys(range(1, 6), 2.0)


def clock(began: float, start: int, last: int, seconds: float, **lost: float) -> dict:
    parts = ("startup", "compile", "data", "save", "eval", "end")
    spent = {f"{key}_seconds": lost.get(key, 0.0) for key in parts}
    return {"event": "clock", "step": last, "from": start, "began": began, "run_seconds": seconds, **spent}


def test_where_the_time_went(tmp_path, capsys):
    """Two runs, the second begun 100 s after the first's last word and 50 of its 150 steps run again: every second has
    one cause, they add up to what was paid, and a price makes dollars of them. What lies between a run that was done
    and the next is paid by nobody."""
    clocks = [clock(1000.0, 0, 50, 60.0, startup=10), clock(1000.0, 0, 100, 130.0, startup=10, compile=20)]
    clocks += [clock(1230.0, 50, 200, 310.0, startup=10, data=5, save=2, eval=3, end=1, compile=4)]
    folder = write(tmp_path / "run", [step(1), *clocks, {"event": "clock", "step": 9, "began": "damaged"}])
    seconds = report.read(folder).seconds
    busy = 310 - 10 - 5 - 2 - 3 - 1 - 4
    assert seconds["gap_seconds"] == 100 and seconds["replay_seconds"] == pytest.approx(busy / 3)
    assert seconds["train_seconds"] == pytest.approx(100 + busy * 2 / 3)
    assert seconds["paid_seconds"] == 130 + 100 + 310
    assert sum(value for key, value in seconds.items() if key != "paid_seconds") == pytest.approx(540)
    done = [clocks[0], clocks[1] | {"done": True}, clocks[2]]
    assert goodput(done) == seconds | {"gap_seconds": 0, "paid_seconds": 440}
    assert report.main([str(folder), "--price", "36"]) == 0
    assert "became training; lost: between runs 1m40s ($1.00), steps run again 1m35s" in capsys.readouterr().out


def test_bins_keep_the_mean_and_the_range():
    """10,000 steps in 500 points: the first one against the 20 steps it stands for; what is not finite is left out."""
    points = report.bins({n: float(n) for n in range(10_000)} | {3: float("nan")})
    assert len(points) == 500 and points[0][2:] == (0.0, 20.0) and points[-1][3] == 9999.0


def test_picture_and_figures_of_a_resumed_run(shards, tmp_path, capsys):
    """A real run, stopped and resumed, beside a written one: marks as the run made them, one PNG, the figures of both."""
    for last in (7, 10):
        keys = ["eval_steps=4", "save_steps=3", "resume=latest", "lr_scheduler_type=constant", f"max_steps={last}"]
        train(tmp_path / "a", f"data_dir={shards}", *keys)
    (tmp_path / "b").mkdir()
    logs = [tmp_path / "a" / "logs", write(tmp_path / "b" / "logs", [step(1), step(2)])]
    run = report.read(logs[0])
    assert list(run.series["loss"]) == list(range(1, 11)) and len(run.series["tokens_per_second"]) == 10
    assert run.marks["checkpoint"] == [3, 6, 7, 9, 10] and run.marks["resume"] == [7] and 8 in run.eval_loss
    out = tmp_path / "out"
    assert report.main([*map(str, logs), f"out={out}"]) == 0
    assert (out / "report.png").read_bytes().startswith(PNG)
    said = capsys.readouterr().out
    shown = r"a/logs\n  steps: 1 to 10\n(  .*\n)+  resume: 1 \(step 7\)\n(  .*\n)*b/logs\n  steps: 1 to 2\n"
    assert re.search(shown, said) and "became training" in said


def test_configs_are_compared(tmp_path):
    """Two runs and one of an older trace: the keys that differ, with both values, and no other key."""
    configs = [{"learning_rate": 1e-3, "seed": seed, "output_dir": str(seed)} for seed in (1, 2)]
    begins = [{"event": "start", "step": 0, **more} for more in ({"config": configs[0]}, {"config": configs[1]}, {})]
    runs = [report.read(write(tmp_path / str(i), [begin, step(1)])) for i, begin in enumerate(begins)]
    report.label(runs)
    assert report.differences(runs) == ["seed: 1 (0), 2 (1)"]


def test_what_a_user_can_get_wrong(tmp_path, capsys):
    """No argument; no trace, one a folder deeper, one without a step; a folder that cannot be written; a report.png of
    somebody, which is then as it was. A report's own is replaced."""
    with pytest.raises(SystemExit, match="2"):
        report.main([])
    folder, mine = write(tmp_path / "run", [step(1)]), write(tmp_path / "mine", [step(1)]) / "report.png"
    mine.write_bytes(PNG + b"mine")
    for args, code, words in (
        ([tmp_path / "none"], 66, "name the logging_dir of a run"),
        ([tmp_path], 66, f"{mine.parent}, {folder}"),
        ([write(tmp_path / "empty", [], '{"st')], 66, "has no whole line of a step yet"),
        ([folder, f"out={folder / 'trace.jsonl'}"], 2, "cannot be written"),
        ([mine.parent], 2, f"{mine} was not written by"),
    ):
        assert bench.main(["report", *map(str, args)]) == code and words in capsys.readouterr().err
    assert mine.read_bytes() == PNG + b"mine"
    assert [bench.main(["report", str(folder)]) for _ in range(2)] == [0, 0]


def test_without_matplotlib(tmp_path):
    """Where it is not installed: one line with the command that installs it, exit 2."""
    folder = write(tmp_path / "run", [step(1)])
    program = "import sys, bench; sys.modules['matplotlib'] = None; sys.exit(bench.main(['report', *sys.argv[1:]]))"
    done = subprocess.run([sys.executable, "-c", program, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr and done.stderr.count("\n") == 1
