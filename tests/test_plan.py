"""Predicted step times: operations counted by hand, depths that were not looked at, the search on made-up hardware."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT
from launch import GUARD, TINY

import bench
import configs
import model as neox
from configs import ConfigError
from refocused.measure import calibrate, cost, gpus, plan, planner, predictions, search
from refocused.measure.cost import Hardware, Op
from refocused.run import words

SMALL = (
    "hidden_size=128 num_attention_heads=4 intermediate_size=512 num_hidden_layers=5 vocab_size=1000 "
    "sequence_length=64 mixed_precision=bf16 compile_model=true global_batch_size=4 per_device_train_batch_size=1"
).split()


def small(*keys: str) -> configs.Config:
    return configs.load([*TINY, *SMALL, *keys])[0]


def test_seconds_by_hand():
    """A product, a kernel that moves bytes, a gather and an all-reduce on a machine of round numbers."""
    machine = Hardware("m", 1e12, 1e12, 1e9, link=1e9, network=4e9, node=4, launch=0.5, latency=0.25)
    assert machine.seconds(Op("products", 2e12, 1000)) == 2.5
    assert machine.seconds(Op("products", 2e9, 3_000_000_000)) == 3.5  # its bytes take longer
    assert machine.message("gather", 8_000_000_000, 4, 4) == 0.25 + 3 / 4 * 8
    assert machine.message("all-reduce", 8_000_000_000, 2, 2) == 0.25 + 2 / 2 * 8
    assert machine.message("gather", 8_000_000_000, 4, 8) == 0.25 + 3 / 4 * 8  # within a node of two
    assert machine.message("copies", 4_000_000_000, 2, 8, beside=4) == 0.25 + 4  # each of four has a quarter of 4 GB/s
    assert machine.message("gather", 1, 1, 1) == 0


def test_what_a_pass_counts():
    """A block's forward: four products of known FLOPs, causal attention, one gather of its parameters in bf16."""
    cfg = small("parallel=fsdp")
    work = planner.seen(cfg, 2).work
    N, C, T = cfg.sequence_length, cfg.hidden_size, cfg.sequence_length
    block = work.block["forward 0"]
    products = sorted(op.flops for op, n in block.items() for _ in range(n) if op.kind == "products")
    assert products == sorted(2 * N * C * n for n in (C, 3 * C, 4 * C, 4 * C))
    [attention] = [op for op in block if op.kind == "attention"]
    assert attention.flops == 2 * C * T * T  # q by k and weights by v, half of each
    backward = sum(op.flops * n for op, n in work.block["backward 0"].items() if op.kind == "products")
    assert backward == 2 * sum(products)
    [gather] = work.carried["forward 0"][1]
    parameters = (neox.num_parameters(cfg)[1] - 2 * C) // cfg.num_hidden_layers
    assert gather == cost.Message("gather", 2 * parameters)
    before, [again, reduce], after = work.carried["backward 1"]
    assert again == gather and reduce == cost.Message("reduce", 4 * parameters)
    assert [m.kind for m in (*before, *after)] == ["reduce", "reduce"]  # head first, embedding last


@pytest.mark.parametrize(
    "keys",
    [
        "parallel=ddp",
        "parallel=fsdp activation_checkpointing=full",
        "parallel=ddp optimizer=muon",
        "parallel=fsdp optimizer=muon",
    ],
)
def test_depths_that_were_not_looked_at(keys):
    """Work and memory from passes over two blocks and three, against a pass over all five."""
    cfg = small(*keys.split())
    seen, whole = planner.seen(cfg, 2), planner.estimate(cfg, 2)
    assert seen.needed == whole.needed
    for phase, ops in whole.meter.ops.items():
        found = seen.work.rest[phase].copy()
        for op, n in seen.work.block[phase].items():
            found[op] += n * cfg.num_hidden_layers
        for figure in ("flops", "bytes"):
            by_kind = [Counter(), Counter()]
            for kinds, counted in zip(by_kind, (found, ops), strict=True):
                for op, n in counted.items():
                    kinds[op.kind] += n * getattr(op, figure)
            assert dict(by_kind[0]) == pytest.approx(dict(by_kind[1]), rel=1e-6), (phase, figure)
    before, each, after = seen.work.carried.get("update", ([], [], []))  # Muon's matrices, sent as a whole
    assert [*before, *each, *after] == whole.meter.messages.get("update", []) and not each


def test_search_on_made_up_hardware():
    """No limit of the link: nothing is computed twice. 1 GB/s: the least is sent. Little memory: what fits remains."""
    cfg = small("global_batch_size=2")
    fast = Hardware("fast link", 1e13, 1e13, 1e12, link=1e18, launch=0.0, latency=0.0, peak=2e13)
    plenty = 1 << 50
    result = search.search(cfg, 2, fast, plenty, plenty)
    best = result.fastest[0]
    assert best.cfg.activation_checkpointing == "none" and len(result.fastest) == search.SHOWN
    assert [f.cost.seconds for f in result.fastest] == sorted(f.cost.seconds for f in result.fastest)
    slow = search.search(cfg, 2, dataclasses.replace(fast, link=1e9), plenty, plenty)
    everything = [cost.step(planner.seen(search.like(c), 2).work, c, 2, fast) for c in search.layouts(cfg, 2, 8)]
    assert slow.fastest[0].cost.sent == min(c.sent for c in everything)
    assert slow.fastest[0].cost.seconds > best.cost.seconds
    limit = min(f.needed for f in result.fastest) - 1  # none of the five fits any longer
    tight = search.search(cfg, 2, fast, limit, plenty)
    assert tight.fastest and all(f.needed <= limit for f in tight.fastest)
    assert tight.too_large and tight.too_large.needed > limit
    assert not search.search(cfg, 2, fast, 1.0, plenty).fastest
    assert "bound by" in plan.bottleneck(slow, 2)
    for found in (*result.fastest, *slow.fastest, *tight.fastest):  # each is the same step, and its command says so
        assert found.cfg.batch(2)[1] == 2
        line = plan.command("configs/test.py", [], cfg, found.cfg, 2, 8).split("configs/test.py ")[-1]
        given = [word for word in line.split() if "=" in word and not word.startswith("--")]
        assert small("global_batch_size=2", *given) == found.cfg


def test_what_the_command_refuses_and_says(capsys):
    """An unknown GPU, a search without one, a time that is none; a search's table, commands and what a budget buys."""
    config = str(ROOT / "configs/production.py")
    keys = [word for word in SMALL if "global" not in word] + [
        "gradient_accumulation_steps=1",
        "max_position_embeddings=64",
    ]
    assert bench.main(["plan", config, "--gpu", "RTX 4091", *keys]) == 2
    assert "is none of RTX 3080" in capsys.readouterr().err
    assert bench.main(["plan", config, "--search", "--gpus", "1", *keys]) == 2
    assert "need --gpu" in capsys.readouterr().err
    nonsense = [
        "--deadline soon",
        "--deadline 0h",
        "--gpus -2",
        "--gpus 0",
        "--per-node 0",
        "--budget nan",
        "--price -1",
    ]
    for option, value in map(str.split, nonsense):
        with pytest.raises(SystemExit):
            bench.main(["plan", config, option, value])
        assert f"argument {option}" in capsys.readouterr().err
    assert bench.main(["plan", config, "--calibrate", "--link", "5", *keys]) == 2
    assert "--calibrate measures what" in capsys.readouterr().err
    words = ["num_processes=1", "--gpus", "1", "--gpu", "L4", "--search", "--budget", "100", "--deadline", "2d", *keys]
    assert bench.main(["plan", config, *words]) == 0
    out = capsys.readouterr().out
    assert "layouts of the same step that fit 22.0 GiB" in out and "1: python train.py" in out
    assert re.search(r"48 h buys 48\.0 h = [\d,]+ steps", out)  # less than $100 at 0.45 an hour buys


def test_what_a_search_says_it_is_for(capsys):
    """Links given by hand count in every table; a batch that other micro-batches can make; host memory that is missing."""
    config = str(ROOT / "configs/production.py")
    keys = [word for word in SMALL if "global" not in word] + ["max_position_embeddings=64"]

    def seconds(*words: str) -> float:
        assert bench.main(["plan", config, "--gpus", "2", "--gpu", "RTX 4090", *words, *keys]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 x RTX 4090"))
        return float(row.split("|")[4])

    assert seconds("--link", "0.01") > 2 * seconds("--link", "100")
    out = "out/my run"
    words = ["--gpus", "4", "--gpu", "RTX 3080", "--search", f"output_dir={out}"]
    assert bench.main(["plan", config, *words, *keys, "per_device_train_batch_size=4", "global_batch_size=8"]) == 0
    said = capsys.readouterr().out
    assert "(fsdp, 2 x 1, selective)" in said and f"'output_dir={out}'" in said
    cfg = small("global_batch_size=2")
    machine = Hardware("m", 1e13, 1e13, 1e12)
    least = min(planner.seen(search.own(c), 2).needed for c in search.layouts(cfg, 2, 8) if not c.cpu_offload)
    found = search.search(cfg, 2, machine, least - 1, 0.0)
    assert not found.fastest and found.starved and "with --host-memory" in plan.missing(found, 2)


def test_a_calibrated_search():
    """The products of every layout that is compared are measured."""
    cfg, asked = small("global_batch_size=4", "num_hidden_layers=2"), []

    def measure(shapes: set) -> Hardware:
        asked.append(shapes)
        return Hardware("m", 1e13, 1e13, 1e12, peak=1e13)

    result = search.search(cfg, 2, Hardware("own", 1, 1, 1), 1 << 50, 1 << 50, measure=measure)
    works = [planner.seen(search.like(c), 2).work for c in search.layouts(cfg, 2, 8)]
    assert asked == [set().union(*(work.shapes() for work in works))] and result.machine.name == "m"
    assert len(asked[0]) > len(works[0].shapes())


def test_a_calibration_of_three():
    """Rates of all kinds of messages, in parts that three ranks do not share evenly; copies are no faster than all-reduces."""
    machine = calibrate.calibrate(small(), 3, [])
    assert {"gather", "reduce", "all-reduce"} <= machine.speeds.keys() and min(machine.speeds.values()) > 0
    assert machine.message("copies", 1 << 30, 3, 3) == machine.message("all-reduce", 1 << 30, 3, 3) > 0


def test_names_and_sizes():
    """Devices as torch names them, to the table's lines; a card of unknown size loses a fiftieth."""
    for device, line in {
        "NVIDIA A100-SXM4-40GB": "A100 40GB", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA A100 80GB PCIe": "A100 PCIe",
        "NVIDIA L40S": "L40S", "NVIDIA L4": "L4", "NVIDIA A10G": "A10G", "NVIDIA RTX A6000": "A6000",
        "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 NVL": "H100 NVL",
        "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB", "NVIDIA H200 NVL": "H200 NVL", "NVIDIA H200": "H200",
    }.items():  # fmt: skip
        assert gpus.find(device) is gpus.GPUS[line], device
    others = ("NVIDIA GeForce RTX 3080 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D")
    for device in (*others, "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):  # other chips, or a slice: no figures are better
        assert gpus.find(device) is None, device
    assert gpus.find("CPU") is None and gpus.usable(24) == 23.6 and gpus.usable(100) == 98
    with pytest.raises(ConfigError, match="is none of RTX 3080"):
        gpus.named("TPU")


def test_the_table_of_predictions():
    """Largest error and rank correlation of three layouts, by hand."""
    text, worst, rank = predictions.table(list(predictions.LAYOUTS[:3]), [1.0, 2.0, 3.0], [1.0, 4.0, 3.0])
    assert worst == 0.5 and rank == 0.5 and "| 0.50 |" in text


def test_a_run_says_what_it_expects(shards, tmp_path):
    """A CPU taken for an H100: the run says what it expects, how far it is from it, and whom it suspects, once."""
    code = (
        "import sys; from refocused.measure import gpus; gpus.GPUS['cpu'] = gpus.GPUS['H100']\n"
        "import train\nif __name__ == '__main__': sys.exit(train.main(sys.argv[1:]))"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    keys = [*TINY, f"data_dir={shards}", f"output_dir={tmp_path}/out", f"logging_dir={tmp_path}/logs"]
    keys += ["max_steps=10000000", "logging_steps=100", f"stop_after_minutes={GUARD / 60}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, str(script), *keys], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in run.stdout:  # the plan is made beside the run, and known when it is
        lines.append(line)
        if sum("of the plan" in line for line in lines) == 3:
            run.send_signal(signal.SIGTERM)
            break
    text = "".join([*lines, *run.stdout])
    assert run.wait() == 75, text
    before, expects, after = re.split(
        r"^(expects   [\d.e-]+ s per step, [\d.]+[kM]? tok/s, MFU \d.*)\n", text, flags=re.M
    )
    assert "of the plan" not in before and len(re.findall(r"^Step \d+: .* \| \d+% of the plan", after, re.M)) >= 3
    assert text.count("slower than expected; ") == 1


def test_suspects():
    """Each cause by its sign; with none of them, the link of several GPUs or the clock of one."""
    quiet = {"data": 0.01, "save": 0.0, "retries": 0.0}
    assert "clock" in words.suspect(0.4, quiet, "", 1) and "link" in words.suspect(0.4, quiet, "", 2)
    assert "data" in words.suspect(0.4, quiet | {"data": 0.3}, "", 2)
    assert "3 times" in words.suspect(0.4, quiet | {"retries": 3}, "", 2)
    assert "saves" in words.suspect(0.4, quiet | {"save": 0.2}, "", 2)
    sniffed = "measured  ...\nnote      rank 1 is slow: product 300 TFLOP/s, the others 700"
    assert words.suspect(0.4, quiet, sniffed, 2).startswith("rank 1 is slow: product")
    sniffed = "note      the disk of out on n2 is slow: written 90 MB/s, the others 900"  # no step waits for it
    assert "3 times" in words.suspect(0.4, quiet | {"retries": 3}, sniffed, 2)
