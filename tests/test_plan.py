"""Predicted step times: formulas against counts of the real model and against measured runs; the search, the command."""

import dataclasses
import re

import pytest
import torch
from conftest import ROOT
from launch import TINY, train
from torch.utils.flop_counter import FlopCounterMode

import bench
import configs
import model as neox
from refocused.measure import plan, search
from refocused.run import gpus, memory, speed
from refocused.run.speed import Machine

SMALL = (
    "hidden_size=128 num_attention_heads=4 intermediate_size=512 num_hidden_layers=5 vocab_size=1000 "
    "sequence_length=64 mixed_precision=bf16 compile_model=true global_batch_size=4 per_device_train_batch_size=1"
).split()
PRODUCTION = str(ROOT / "configs/production.py")
KEYS = [word for word in SMALL if "global" not in word] + ["max_position_embeddings=64"]


def small(*keys: str) -> configs.Config:
    return configs.load([*TINY, *SMALL, *keys])[0]


@pytest.mark.parametrize("level", configs.CHOICES["activation_checkpointing"])
def test_flops_are_the_models(level):
    """The products of a step on a machine of 1 FLOP/s, against what a backward of the real model multiplies."""
    cfg = small(f"activation_checkpointing={level}", "global_batch_size=1")
    model = neox.GPTNeoX(cfg)
    x = torch.zeros(1, cfg.sequence_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    counted = counter.get_flop_counts()["Global"]  # a CPU's attention is not in it
    assert speed.step(cfg, 1, Machine("m", 1.0, 1.0)).parts["products"] == sum(counted.values())


def rows() -> list[list[str]]:
    """The speeds of docs/gpu.md."""
    lines = re.findall(r"^\| (\d+ x \d+.*) \|$", (ROOT / "docs/gpu.md").read_text(), re.M)
    assert len(lines) == 5  # a page without its table would test nothing
    return [[cell.strip(" `") for cell in line.split("|")] for line in lines]


@pytest.mark.parametrize("row", rows(), ids=" ".join)
def test_measured_rows_are_predicted(row):
    """Each row of docs/gpu.md: its step within 10 percent of the formulas, and the page shows what these give now."""
    sizes, *more = row[0].split(", `")
    B, accumulation = sizes.split(" x ")
    keys = [f"per_device_train_batch_size={B}", f"gradient_accumulation_steps={accumulation}", *more]
    cfg, _ = configs.load([PRODUCTION, "parallel=ddp", f"activation_checkpointing={row[1]}", *keys])
    seconds = speed.step(cfg, 1, Machine.of("H200", gpus.GPUS["H200"])).seconds
    assert abs(seconds / float(row[4]) - 1) < 0.1
    assert float(row[5]) == round(seconds, 3) and float(row[6]) == pytest.approx(seconds / float(row[4]), abs=0.01)


def test_messages_by_hand():
    """Rings on a machine of round numbers; what a slow link adds to a step, and a fast one does not."""
    machine = Machine("m", 1e12, 1e9, link=1e9, network=4e9, node=4)
    late = speed.LATENCY
    assert machine.ring(8e9, 4, 4) == late + 3 / 4 * 8
    assert machine.ring(8e9, 4, 8) == late + 3 / 4 * 8  # within a node
    assert machine.ring(4e9, 2, 8, beside=4) == late + 1 / 2 * 4 / 1  # each of four rings has a quarter of 4 GB/s
    assert machine.ring(1, 1, 1) == 0
    assert speed.exposed_sums([1.0, 2.0, 4.0], L=3, backward=5.0, overlaps=True) == 1 + 2  # embedding and last block
    assert speed.exposed_sums([1.0, 6.0, 4.0], L=3, backward=5.0, overlaps=True) == 1 + 3 * 6 - 3 * 5 + 5
    assert speed.exposed_sums([1.0, 6.0, 4.0], L=3, backward=5.0, overlaps=False) == 1 + 18 + 4
    cfg, _ = configs.load([PRODUCTION])
    N, embedding = neox.num_parameters(cfg)[0], cfg.vocab_size * cfg.hidden_size
    found = speed.step(cfg, 2, Machine.of("m", gpus.GPUS["RTX 4090"]))
    # each micro-step gathers in bf16, for backward without head and embedding; reduced in fp32, once; half is sent
    assert found.sent == pytest.approx((4 * 2 * (2 * N - 2 * embedding) + 4 * N) / 2, rel=1e-3)
    slow = speed.step(cfg, 2, Machine.of("m", gpus.GPUS["RTX 4090"], link=0.1))
    assert slow.parts == found.parts and slow.seconds == pytest.approx(found.sent / 0.1e9, rel=0.1)


def test_search_on_made_up_hardware(monkeypatch):
    """No limit of the link: nothing is computed twice. 1 MB/s: the least is sent. Little memory: what fits remains. Each
    layout is the same step, and the command that is printed for it says so."""
    monkeypatch.setattr(speed, "LATENCY", 0.0)
    cfg, plenty = small("global_batch_size=2"), 1 << 50
    fast = Machine("fast link", 1e13, 1e12, link=1e18, peak=2e13)
    every = list(search.layouts(cfg, 2, 8))
    found = search.search(cfg, 2, fast, plenty, plenty).fastest
    assert found[0].cfg.activation_checkpointing == "none" and len(found) == search.SHOWN
    assert found == sorted(found, key=lambda f: f.step.seconds)
    slow = search.search(cfg, 2, dataclasses.replace(fast, link=1e6), plenty, plenty)
    assert slow.fastest[0].step.sent == min(speed.step(c, 2, fast).sent for c in every)
    assert "bound by the link" in plan.bottleneck(slow, 2)
    limit = min(f.needed for f in found) - 1  # none of the five fits any longer
    tight = search.search(cfg, 2, fast, limit, plenty)
    assert tight.fastest and all(f.needed <= limit for f in tight.fastest)
    table = plan.fastest_table(tight, cfg, 2, fast, 1.0).splitlines()
    assert len(table) == 2 + len(tight.fastest) and max(map(len, table)) <= plan.WIDTH
    for layout in (*found, *slow.fastest, *tight.fastest):
        assert layout.cfg.batch(2)[1] == 2
        line = plan.command("configs/test.py", [], cfg, layout.cfg, 2, 8).split("configs/test.py ")[-1]
        given = [word for word in line.split() if "=" in word and not word.startswith("--")]
        assert small("global_batch_size=2", *given) == layout.cfg
    least = min(memory.estimate(c, 2).needed for c in every if not c.cpu_offload)
    starved = search.search(cfg, 2, fast, least - 1, 0.0)
    assert not starved.fastest and starved.starved.needed <= least - 1
    large = search.layouts(small("global_batch_size=524288"), 1, 8)  # at once it is more than a micro-step may have
    assert max(c.per_device_train_batch_size for c in large) * cfg.sequence_length == configs.MOST_TOKENS


def test_what_the_command_refuses_and_says(capsys):
    """An unknown GPU, a search without one, a time that is none; a search's table, commands and what a budget buys."""
    keys = [*KEYS, "gradient_accumulation_steps=1"]
    for line, sentence in (("--gpu TPU", "is none of RTX 3060"), ("--search --gpus 1", "need --gpu"),
                           ("--calibrate --link 5", "--calibrate measures what")):  # fmt: skip
        assert bench.main(["plan", PRODUCTION, *line.split(), *keys]) == 2
        assert sentence in capsys.readouterr().err
    nonsense = "--deadline soon --deadline 0h --gpus 0 --budget nan --price -1".split()
    for option, value in zip(nonsense[::2], nonsense[1::2], strict=True):
        with pytest.raises(SystemExit):
            bench.main(["plan", PRODUCTION, option, value])
        assert f"argument {option}" in capsys.readouterr().err
    searched = "num_processes=1 --gpus 1 --gpu L4 --search --budget 100 --deadline 2d".split()
    assert bench.main(["plan", PRODUCTION, *searched, *keys]) == 0
    out = capsys.readouterr().out
    assert "layouts of the same step that fit 22.0 GiB" in out and "1: python train.py" in out
    assert " max_steps=3600" in plan.affordable(small("max_steps=0", "warmup_steps=0"), 1, 1.0, "it", 1.0, None)
    assert re.search(r"In 48\.0 h, for \$22, layout 1 makes [\d,]+\s+steps", out)  # less than $100 at 0.45 an hour buys


def test_the_answer_comes_first(capsys):
    """One sentence, the card's row marked, tables of at most 100 columns, no warning; links given by hand count in it."""

    def said(*more: str) -> list[str]:
        assert bench.main(["plan", PRODUCTION, "--gpus", "2", "--gpu", "RTX 4090", *more]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        return said.out.splitlines()

    lines = said()
    assert re.fullmatch(
        r"fits: 20\.7 of 23\.6 GiB on each of 2 x RTX 4090; [\d.]+ s per step, [\d.]+ hours, \$\d+", lines[0]
    )
    [marked] = [line for line in lines if line.startswith("| > |")]
    assert "2 x RTX 4090 | 24 | yes" in marked
    assert all(len(line) <= plan.WIDTH for line in lines if "`" not in line)  # a command stays whole
    assert said("per_device_train_batch_size=16")[0].startswith("does not fit as configured: ")

    def seconds(link: str) -> float:
        return float(re.search(r"; ([\d.]+) s per step", said("--link", link, *KEYS)[0])[1])

    assert seconds("0.01") > 2 * seconds("100")
    searched = ["--search", "output_dir=out/my run", *KEYS, "per_device_train_batch_size=4", "global_batch_size=8"]
    assert any("'output_dir=out/my run'" in line for line in said(*searched))


def test_a_calibrated_plan(capsys):
    """Rates of two real processes at work side by side, and a plan by them; no card is in the table of a CPU."""
    assert bench.main(["plan", PRODUCTION, "--gpus", "2", "--calibrate", *KEYS]) == 0
    out = capsys.readouterr().out
    assert re.match(r"fits: .* of .* GiB on each of 2 x CPU process; [\d.e-]+ s per step", out)
    assert re.search(r"measured here: products [\d.]+ TFLOP/s, memory [\d.]+ GB/s,\s+link [\d.]+ GB/s", out)


def test_names_and_sizes():
    """Devices as torch names them, to the table's lines; a card of unknown size loses a fiftieth."""
    for device, line in {
        "NVIDIA A100-SXM4-40GB": "A100 40GB", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA A100 80GB PCIe": "A100 PCIe",
        "NVIDIA L40S": "L40S", "NVIDIA L4": "L4", "NVIDIA A10G": "A10G", "NVIDIA RTX A6000": "A6000",
        "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 NVL": "H100 NVL",
        "Tesla V100-SXM2-32GB": "V100 32GB", "Tesla T4": "T4", "NVIDIA GeForce RTX 4060 Ti": "RTX 4060 Ti",
        "NVIDIA GB200": "GB200", "NVIDIA B300 SXM6 AC": "B300", "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000", "NVIDIA H200 NVL": "H200 NVL", "NVIDIA H200": "H200",
    }.items():  # fmt: skip
        assert gpus.find(device) is gpus.GPUS[line], device
    # other chips, or a slice: no figures are better
    others = "RTX 3080 Ti", "RTX 4060", "RTX 4090 Laptop GPU", "RTX 4090 D", "H100 80GB HBM3 MIG 1g.10gb"
    for device in (*(f"NVIDIA {name}" for name in others), "CPU"):
        assert gpus.find(device) is None, device
    assert gpus.usable(24) == 23.6 and gpus.usable(100) == 98


def test_a_run_says_what_it_expects(shards, tmp_path):
    """A CPU taken for an H100: the run says what it expects and how far it is from it."""
    taken = "from refocused.run import gpus as _gpus\n_gpus.GPUS['cpu'] = _gpus.GPUS['H100']\n"
    said = train(tmp_path, f"data_dir={shards}", "max_steps=30", "logging_steps=10", config=taken).text
    assert len(re.findall(r"^expects   [\d.e-]+ s per step, [\d.]+[kM]? tok/s, MFU \d.*\n", said, re.M)) == 1
    assert len(re.findall(r"^Step \d+: .* \| \d+% of the plan", said, re.M)) == 3
