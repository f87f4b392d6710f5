"""What a run says and refuses: log lines, curves, trace, spikes, steps walked past, profiles, out of memory."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards
from launch import TINY, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import assert_same_run, assert_same_tensors, forget, newest, steps, take, trace

import configs
import data
from configs import ConfigError, step_ranges
from refocused.checkpoint import selection
from refocused.run.logs import Logs
from refocused.run.messages import fitted, plan
from refocused.run.trace import Trace

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def logged_text(folder: Path) -> str:
    """train.log without its clock times, and without what stands there alone: the config file's key, complete saves."""
    lines = (folder / "logs" / "train.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    return "".join(f"{line[20:]}\n" for line in lines if not line[20:].startswith(("saved ", "  seed = 42 ")))


def test_a_resumed_run_has_one_curve(shards, tmp_path):
    """Console against train.log, log lines against the trace; TensorBoard's points after a resume: each step once.

    The clock of the second run is an hour behind: its event file is read after the first one's all the same.
    """
    args = [f"data_dir={shards}", "max_steps=12", "save_steps=4", "save_total_limit=0", "eval_steps=4"]
    args += ["logging_steps=2", "sample_tokens=20"]
    first = train(tmp_path, *args)
    line = r"^Step 6: loss=\d\.\d{4}, lr=\d\.\d\de-03 \| [\d.]+k? tok/s \| (save stall \d\.\d\ds \| )?\d+s left$"
    assert re.search(line, first.text, re.M), first.text
    assert logged_text(tmp_path) == first.text
    saved = re.findall(r" saved checkpoint-epoch0-step(\d+)-", (tmp_path / "logs" / "train.log").read_text())
    assert saved == ["4", "8", "12"]
    before = trace(tmp_path)
    logged = {line["step"]: line for line in before if "mean_loss" in line}
    assert sorted(logged) == [2, 4, 6, 8, 10, 12] and f"loss={logged[6]['mean_loss']:.4f}" in first.text
    assert logged[6]["mfu"] is None and logged[6]["tokens_per_second"] > 0

    forget(tmp_path, after=4)
    [curves_file] = (tmp_path / "logs").glob("events.*")
    clock = curves_file.name.split(".")[3]
    curves_file.rename(curves_file.with_name(curves_file.name.replace(clock, str(int(clock) + 3600))))
    second = train(tmp_path, *args, "resume=latest")
    assert "replayed 8 steps, 8 identical" in second.text
    assert logged_text(tmp_path) == first.text + second.text
    added = trace(tmp_path)[len(before) :]  # what was there is not written again
    assert {line["event"] for line in added} == {"resume", "clock"} and added[0]["checkpoint"].startswith("checkpoint-")
    events = [(line["event"], line["step"]) for line in before if line.get("event", "clock") != "clock"]
    assert events == [("start", 0), *((kind, step) for step in (4, 8, 12) for kind in ("eval", "checkpoint"))]

    curves = EventAccumulator(str(tmp_path / "logs"), size_guidance={"tensors": 0, "scalars": 0})
    curves.Reload()
    at = {name: [point.step for point in curves.Scalars(name)] for name in curves.Tags()["scalars"]}
    for name in ("loss/train", "optimizer/grad_norm", "speed/tokens_per_second", "memory/peak_gib"):
        assert at[name] == [2, 4, 6, 8, 10, 12], (name, at)
    assert at["loss/validation"] == [4, 8, 12] and min(at) == "loss/train"  # what TensorBoard opens on
    assert [p.value for p in curves.Scalars("loss/train")] == pytest.approx([x["mean_loss"] for x in logged.values()])
    settings, samples = (curves.Tensors(f"{name}/text_summary") for name in ("config", "sample"))
    assert [t.step for t in settings] == [1, 5] and b"max_steps = 12" in settings[0].tensor_proto.string_val[0]
    assert [t.step for t in samples] == [4, 8, 12]


def test_a_quiet_screen_that_is_never_blind(shards, tmp_path):
    """No step count, a moment's logging_seconds: a line per step, agreed by both ranks, of at most 100 columns; an hour's:
    one line at the end, of all steps; of what the config file set the screen is silent and train.log is not; the end
    says what the time went to."""
    args = [f"data_dir={shards}", "logging_steps=0", "logging_seconds=1e-9", "save_steps=2", "max_steps=5"]
    run = train(tmp_path, *args, nproc=2, config="weight_decay = 0.2")
    assert len(run.losses) == 5 and all(len(line) <= 100 for line in run.text.splitlines() if line.startswith("Step"))
    assert "weight_decay" not in run.text and "max_steps = 5  [command line]" in run.text
    assert "  weight_decay = 0.2  [" in logged_text(tmp_path)
    assert [line["step"] for line in trace(tmp_path) if "mean_loss" in line] == [1, 2, 3, 4, 5]
    assert re.search(r"^time      \d+\.\d% of \d+s became training", run.text, re.M)
    once = train(tmp_path / "b", *args, "logging_seconds=3600")
    losses = [line["loss"] for line in trace(tmp_path / "b") if "event" not in line]
    assert once.losses == [pytest.approx(sum(losses) / 5, abs=1e-4)]


def test_waits_behind_the_last_log_line_count(shards, tmp_path):
    """Data that comes late, and no log line: the run's clock says how long it was waited for."""
    late = "import time as _t\nimport data as _d\n_made = _d.Loader._assemble\n"
    late += "_d.Loader._assemble = lambda *args: (_t.sleep(0.1), _made(*args))[1]"
    train(tmp_path, f"data_dir={shards}", "logging_steps=0", config=late)
    assert [line for line in trace(tmp_path) if line.get("event") == "clock"][-1]["data_seconds"] > 0.2


def test_ranks_with_different_configs(shards, tmp_path):
    """Exit 2 on every rank, with the keys and both values."""
    config = "import os\nweight_decay = 0.1 * (1 + int(os.environ['RANK']))\nadam_beta2 = 1 - weight_decay / 10"
    text = train(tmp_path, f"data_dir={shards}", nproc=2, code=2, config=config).text
    assert "ranks 1 and 0 differ in weight_decay (0.2 and 0.1), adam_beta2 (0.98 and 0.99)" in text


def test_step_ranges():
    """Both ends count, from 1; what is no range is named."""
    assert [list(r) for r in step_ranges("skip_steps", "3-5, 9")] == [[3, 4, 5], [9]] and not step_ranges("profile", "")
    for wrong in ("5-3", "0-2", "3-", "1,,x"):
        with pytest.raises(ConfigError, match=f"profile={wrong}"):
            step_ranges("profile", wrong)


def test_spikes_are_skipped_alike_after_a_resume(tmp_path):
    """Every spike named with its shards; with skip, resumed in the middle against whole: the same bits; report against
    off: the same bits, so that watching changes nothing."""
    args = [f"data_dir={write_shards(tmp_path / 'data', tokens=9000)}", "max_steps=90", "save_steps=70"]
    args += ["save_total_limit=0", "learning_rate=1e-4"]
    dataset = data.Dataset.open(configs.load([*TINY, *args])[0])
    for step in (67, 80):  # 64 steps have to be known
        for path, begin in dataset.locate(dataset.sample_ids(8 * (step - 1), 8)):
            tokens = np.load(tmp_path / "data" / path)["input_ids"]
            tokens[begin : begin + 33] = 7
            np.savez(tmp_path / "data" / path, input_ids=tokens)
    train(tmp_path / "off", *args, nproc=2)
    train(tmp_path / "report", *args, "spikes=report", nproc=2)
    assert_same_run(tmp_path / "off", tmp_path / "report")
    skipping = [*args, "spikes=skip"]
    whole = train(tmp_path / "whole", *skipping, nproc=2)
    spikes = {line["step"]: line["verdict"] for line in trace(tmp_path / "whole") if "verdict" in line}
    a, b = steps(tmp_path / "off"), steps(tmp_path / "whole")
    # the first spike is not applied, so what follows differs
    assert list(spikes) == [67, 80] and [step for step in a if a[step] == b[step]] == [*range(1, 68)]
    assert "Step 80: loss=" in whole.text and "not applied. Read part" in whole.text
    report = json.loads((tmp_path / "whole" / "logs" / "bad-step-80.json").read_text())
    assert len(report["windows"]) == 8 and report["verdict"] == spikes[80]

    take(tmp_path / "whole", 70, tmp_path / "resumed")
    train(tmp_path / "resumed", *skipping, "resume=latest", nproc=2)
    assert steps(tmp_path / "resumed") == {step: bits for step, bits in b.items() if step > 70}
    assert_same_tensors(newest(tmp_path / "whole"), newest(tmp_path / "resumed"))


def test_steps_walked_past(shards, tmp_path):
    """skip_steps=4-5: weights and moments of step 5 are those of step 3, the data move on; resumed, the same bits."""
    args = [f"data_dir={shards}", "save_steps=1", "save_total_limit=0", "max_steps=8"]
    train(tmp_path / "plain", *args)
    run = train(tmp_path / "past", *args, "skip_steps=4-5", "logging_steps=2")
    assert "Step 4: skipped" in run.text and math.isfinite(run.losses[-1])
    plain, past = steps(tmp_path / "plain"), steps(tmp_path / "past")
    assert sorted(past) == [1, 2, 3, 6, 7, 8]
    assert all(past[s][2:] == plain[s][2:] for s in past)  # the same rate and samples
    assert_same_tensors(*(next((tmp_path / "past/out").glob(f"checkpoint-*-step{step}-*")) for step in (3, 5)))
    events = [(line["step"], line["samples"]) for line in trace(tmp_path / "past") if line.get("event") == "skip"]
    assert events == [(step, plain[step][3]) for step in (4, 5)]
    forget(tmp_path / "past", after=3)
    again = train(tmp_path / "past", *args, "skip_steps=4-5", "logging_steps=2", "resume=latest")
    assert "replayed 3 steps, 3 identical" in again.text and steps(tmp_path / "past") == past
    assert sum(line.get("event") == "skip" for line in trace(tmp_path / "past")) == 2
    forget(tmp_path / "past", after=3)
    without = train(tmp_path / "past", *args, "resume=latest", "deterministic=true").text
    # which is meant, as the config differs
    assert re.search(r"not the same run: step 4: was skipped, is run \(.*skip_steps 4-5 -> none.* changed\)", without)
    for _ in range(2):  # and once more with it: the trace's last word counts, so the second replay is the same run
        forget(tmp_path / "past", after=3)
        within = train(tmp_path / "past", *args, "resume=latest", "skip_steps=4-5").text
    assert "replayed 3 steps, 3 identical" in within


def test_a_branch_is_compared_with_itself(shards, tmp_path):
    """A run goes back with another rate and stops below where the first one had come: resumed, its steps are compared with
    its own, and what the first one wrote beyond is nobody's."""
    args = [f"data_dir={shards}", "save_steps=2", "save_total_limit=0", "lr_scheduler_type=constant"]
    train(tmp_path, *args, "max_steps=10")
    forget(tmp_path, after=2)
    branch = [*args, "learning_rate=2e-3", "deterministic=true", "resume=latest"]
    assert "not the same run: step 3: lr was 0.01, is 0.002" in train(tmp_path, *branch, "max_steps=6").text
    forget(tmp_path, after=4)
    assert "replayed 2 steps, 2 identical" in train(tmp_path, *branch, "max_steps=10").text


def test_a_branch_stands_whole_in_the_trace(tmp_path):
    """Of steps 5 to 10 the norm of 5 alone is another: run once more, all six are compared with this branch."""
    (tmp_path / "trace.jsonl").touch()
    found = []
    for first, norm in ((1, 1.0), (5, 2.0), (5, 2.0)):
        written = Trace(Logs(str(tmp_path), str(tmp_path)).file("trace.jsonl"), first - 1)
        for step in range(first, 11):
            figures = {"loss": 0.5, "grad_norm": norm if step == 5 else 1.0, "lr": 0.1}
            written.record(step, figures, np.array([step]), {})
        found.append(written.replayed(10, over=True))
    assert found[1] == (5, "step 5: grad_norm was 1, is 2") and found[2] == (6, None)


def test_every_falsified_line_is_found(shards, tmp_path):
    """Steps 3 to 6 once more, 5 and 6 of them skipped: what is the same is counted right, and any line that was changed
    is found, whether it is the last one before the skipped steps, of a skipped step, or before an earlier end. With
    deterministic=true and the same config that is exit 70, and the checkpoint stands."""
    args = [f"data_dir={shards}", "save_steps=2", "save_total_limit=0", "skip_steps=5-6", "deterministic=true"]
    train(tmp_path, *args, "max_steps=6")
    path = tmp_path / "logs" / "trace.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for step, last, code, said in (
        (None, 6, 0, "replayed 2 steps, 2 identical"),
        (4, 6, 70, "replayed 1 steps identically, then not the same run: step 4: samples was 0, is "),
        (6, 6, 70, "replayed 2 steps identically, then not the same run: step 6: samples was 0, is "),
        (3, 4, 0, "replayed 0 steps identically, then not the same run: step 3: "),
        (4, 3, 0, "replayed 1 steps, 1 identical"),
        ("3 as 9", 6, 0, "replayed 1 steps, 1 identical, 1 not in the trace"),
    ):
        forget(tmp_path, after=2)
        if step == "3 as 9":
            lines = [line | {"step": 9} if line["step"] == 3 else line for line in lines]
        changed = [line | {"samples": "0"} if line["step"] == step and "samples" in line else line for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in changed))
        text = train(tmp_path, *args, f"max_steps={last}", "resume=latest", code=code).text
        assert said in text and text.count("error: deterministic=true, but replayed") == (code == 70), (step, text)
        assert "Traceback" not in text and selection.names(tmp_path / "out")[-1].startswith("checkpoint-epoch0-step2-")


def test_profile(shards, tmp_path):
    """profile=3-4 leaves a Chrome trace with the steps' matrix products; where it cannot be written, the run goes on."""
    keys = [f"data_dir={shards}", "max_steps=5", "profile=3-4"]
    run = train(tmp_path, *keys)
    path = tmp_path / "logs" / "profile" / "steps-3-4.pt.trace.json"
    assert f"profile of steps 3-4 in {path}" in run.text
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("aten::_fused_adamw_") == 4  # two steps, two groups
    (tmp_path / "b" / "logs").mkdir(parents=True)
    (tmp_path / "b" / "logs" / "profile").write_text("in the way")
    assert "no profile in" in train(tmp_path / "b", *keys).text


def test_out_of_memory_is_explained(shards, tmp_path):
    """A batch that the machine holds and the address space does not: exit 70 with the plan by kind and the keys that help."""
    limit = "import resource\n_ = resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))"
    keys = ["per_device_train_batch_size=20000", "hidden_size=512", "num_hidden_layers=1", "eval_files=0"]
    text = train(tmp_path, f"data_dir={shards}", *keys, config=limit, code=70).text
    assert re.search(r"planned GiB per process: parameters 0\.\d+, .*activations \d+", text), text
    assert "per_device_train_batch_size=10000 with gradient_accumulation_steps=2" in text and "cpu_offload=true" in text
    assert "Traceback" not in text and "out of memory" in (tmp_path / "logs" / "train.log").read_text()


def test_allocator_retries_are_said(shards, tmp_path):
    """Where torch's allocator has had to give back its cache and try again, the log line says how often since the last."""
    config = "from refocused.run import strategy\n_ = setattr(strategy, 'alloc_retries', iter((2, 2, 5)).__next__)"
    run = train(tmp_path, f"data_dir={shards}", "max_steps=3", config=config)
    assert re.findall(r"^Step (\d): loss.* (\d) allocator retries \| ", run.text, re.M) == [("1", "2"), ("3", "3")]
    assert [line["alloc_retries"] for line in trace(tmp_path) if "alloc_retries" in line] == [2, 2, 5]


def test_lines_fit_the_terminal():
    """At 80 columns: no line is longer, the plan's go on below their text, words stay whole, and so do commands."""
    long = plan(configs.load([])[0], 2, "a folder with a long name " * 4, "here")
    resume = f"resume    checkpoint-epoch0-step500-files0 (saved last), step 500\n{'':10}data: {'at x ' * 20}"
    stopped = "stopped at step 101, 1.4 s after the signal; resume=latest continues from checkpoint-epoch0-step1"
    for text in (long, resume, stopped):
        shown = fitted(text, 80)
        assert max(map(len, shown.splitlines())) < 80 and shown.split() == text.split()
        assert len(shown.splitlines()) > len(text.splitlines()) and fitted(text, 1000) == text
    assert "\n          " in fitted(long, 80) and "\n            " in fitted(resume, 80)
    for command in (f"error: `{'a b ' * 40}`", f"  {'a b ' * 40}"):
        assert fitted(command, 80) == command
