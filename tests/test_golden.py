"""The demo's first losses and gradient norms in six layouts against those kept in tests/golden/, bit for bit.

python tests/test_golden.py    # writes tests/golden/ anew, where numbers change on purpose
"""

import json
import platform
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from launch import Run

import data
from configs import Config, ConfigError
from refocused.measure import losses

GOLDEN = ROOT / "tests" / "golden"
LAYOUTS = {  # one thread each: more of them wait for each other on a busy machine, and add up in another order
    f"{name}-{precision}": (processes, [f"parallel={parallel}", f"mixed_precision={precision}", "cpu_threads=1"])
    for precision in ("no", "bf16")
    for name, processes, parallel in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp"))
}


def made_on() -> dict[str, str]:
    """What decides the bits of a sum on a CPU: who made it, its vector extensions, and the kernels."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else platform.processor()
    found = [str(re.search(r"vendor_id\s*: (\w+)|$", text)[1]), torch.backends.cpu.get_cpu_capability()]
    found += [name for name in ("avx512_bf16", "amx_bf16") if re.search(rf"\b{name}\b", text)]
    return {"cpu": " ".join(found), "torch": torch.__version__}


def fingerprint(demo: Path) -> str:
    return data.Dataset.open(Config(data_dir=str(demo), tokenizer="byte", vocab_size=257)).fingerprint


def run(layout: str, steps: int, data_dir: Path, folder: Path) -> dict[int, dict]:
    """The demo's first steps, as its trace has them."""
    nproc, args = LAYOUTS[layout]
    args = [*args, f"data_dir={data_dir}", "resume=none", "eval_steps=0", "logging_steps=1"]
    run = Run(args, nproc, folder / layout, config="from configs.demo import *", base=[])
    run.wait_for(rf"Step {steps}: ")
    run.kill()
    return {step: line for step, line in losses.read(folder / layout / "logs").items() if step <= steps}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_first_steps_are_the_golden_ones(precision, tmp_path):
    """20 steps of each layout: the golden bits; on another kind of CPU to 1e-3, and 5 where it takes bf16 apart."""
    assert data.main(["demo", str(tmp_path / "demo")]) == 0
    demo, here = fingerprint(tmp_path / "demo"), made_on()
    count = 20 if precision == "no" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else 5
    for layout in (name for name in LAYOUTS if name.endswith(f"-{precision}")):
        file = GOLDEN / f"{layout}.jsonl"
        made, golden = json.loads(file.open().readline()), losses.read(file)
        if demo != made["data"]:
            pytest.skip("the demo's text, from this Python's library, is another")
        found = run(layout, count, tmp_path / "demo", tmp_path)
        if here.items() <= made.items():
            assert losses.compare(golden, found) == (count, None), layout
        for step in range(1, count + 1):
            assert found[step]["samples"] == golden[step]["samples"], f"{layout}: step {step}"
            mine, theirs = (float.fromhex(steps[step]["loss_hex"]) for steps in (found, golden))
            assert mine == pytest.approx(theirs, rel=1e-3), f"{layout} on {here}, golden on {made}: step {step}"


def test_two_traces_and_the_first_step_that_differs(tmp_path, capsys):
    """A golden file with itself, and with a copy in which one norm has another last bit: step, figure, both values."""
    file, copy = GOLDEN / "one-no.jsonl", tmp_path / "trace.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    norm = float.fromhex(lines[7]["grad_norm_hex"])
    lines[7]["grad_norm_hex"] = (norm * (1 + 2**-50)).hex()
    copy.write_text("\n".join(map(json.dumps, lines)))
    assert losses.main([str(file), str(file)]) == 0 and capsys.readouterr().out == "200 steps, 200 identical\n"
    assert losses.main([str(file), str(tmp_path)]) == 1
    assert capsys.readouterr().out == f"step 7: grad_norm {norm!r} and {norm * (1 + 2**-50)!r}\n"


def test_two_commits(shards, tmp_path, monkeypatch, capsys):
    """The demo of HEAD beside itself, each in a worktree that is gone afterwards; what is no commit, or cannot run."""
    worktrees = ["git", "-C", str(ROOT), "worktree", "list"]
    if subprocess.run(worktrees, capture_output=True).returncode:
        pytest.skip("this folder is no git repository")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tiny = [f"data_dir={shards}", "hidden_size=32", "num_hidden_layers=1", "cpu_threads=1", "eval_samples=8"]
    assert losses.main(["HEAD", "HEAD", "--steps", "3", "--nproc", "1", *tiny]) == 0
    assert capsys.readouterr().out == "3 steps, 3 identical\n"
    with pytest.raises(ConfigError, match="git worktree no-such-commit: "):
        losses.of_commit("no-such-commit", 1, 1, [])
    with pytest.raises(ConfigError, match="does not run at HEAD: .*hidden_size=7"):
        losses.of_commit("HEAD", 1, 1, ["hidden_size=7"])
    assert str(tmp_path) not in subprocess.run(worktrees, capture_output=True, text=True).stdout
    assert list(tmp_path.iterdir()) == []


def write(folder: Path) -> None:
    """tests/golden/ anew: 200 steps of each layout on data/demo."""
    made = {"event": "made", "step": 0, **made_on(), "data": fingerprint(ROOT / "data/demo")}
    for layout in LAYOUTS:
        lines = [made]
        for _, line in sorted(run(layout, 200, ROOT / "data/demo", folder).items()):
            lines.append({key: line[key] for key in ("step", "loss_hex", "grad_norm_hex", "samples")})
        (GOLDEN / f"{layout}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
