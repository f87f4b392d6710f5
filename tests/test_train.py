"""The loop: strategies and accumulation agree, it learns, and bad input is refused with the right code."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
import torch._inductor.config as inductor
from conftest import ROOT, write_shards
from launch import GUARD, on_ranks, program, train
from safetensors import safe_open

import configs
from refocused.measure import losses
from refocused.run import devices
from refocused.run.optim import learning_rate


def relative(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def test_strategies_and_accumulation_agree(shards, tmp_path):
    """One process, DDP 2, FSDP2 2, HSDP 2 x 2 and accumulation 1, 2, 4 of the same 8 sequences: the same 20 samples, losses
    and norms, and the same held-out losses of windows that do not fill the last block. A checkpoint of HSDP has each part
    once, and goes on under FSDP2."""
    common = [f"data_dir={shards}", "max_steps=20", "global_batch_size=8", "eval_steps=10", "eval_samples=7"]
    hsdp, saved = tmp_path / "hsdp/out", "checkpoint-epoch0-step10-files0"
    layouts = {
        "one": (1, "per_device_train_batch_size=8"),
        "one, accumulation 2": (1, "per_device_train_batch_size=4"),
        "one, accumulation 4": (1, "per_device_train_batch_size=2"),
        "ddp": (2, "per_device_train_batch_size=4"),
        "ddp, accumulation 2": (2, "per_device_train_batch_size=2"),
        "fsdp": (2, "per_device_train_batch_size=4", "parallel=fsdp"),
        "fsdp, accumulation 4": (2, "per_device_train_batch_size=1", "parallel=fsdp"),
        "fsdp, reduced twice": (2, "per_device_train_batch_size=2", "parallel=fsdp", "cpu_offload=true"),
        "fsdp, one process": (1, "per_device_train_batch_size=4", "parallel=fsdp"),
        "hsdp": (4, "per_device_train_batch_size=2", "parallel=fsdp", "shard_size=2", "save_steps=10"),
        "hsdp, then fsdp": (2, "per_device_train_batch_size=4", "parallel=fsdp", f"resume={hsdp / saved}"),
    }
    for name, (nproc, *args) in layouts.items():
        run = train(tmp_path / name, *common, *args, nproc=nproc)
        held_out = [float(x) for x in re.findall(r"eval_loss=([\d.]+)", run.text)]
        steps = losses.read(tmp_path / name / "logs")
        if name == "one":
            expected, expected_held_out = steps, held_out
        first = 11 if "then" in name else 1
        assert [*steps] == [*range(first, 21)] and len(expected_held_out) == 2
        assert held_out == pytest.approx(expected_held_out[-len(held_out) :], abs=2e-4), name
        for step, line in steps.items():
            assert line["samples"] == expected[step]["samples"], name
            assert line["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5), name
            assert line["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-4), name
    parts = []
    for file in (hsdp / saved).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            offsets = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            parts += [(key, *offsets[key]["saved_offsets"]) for key in opened.keys()]
    assert len(parts) == len(set(parts)) > 0


def test_tied_embeddings_and_bf16(shards, tmp_path):
    """One parameter of two modules, and in one group of FSDP2: as under DDP; bf16 under DDP (autocast) and FSDP2 (its own
    policy) stays close to fp32."""
    common = [f"data_dir={shards}", "max_steps=12", "tie_word_embeddings=true", "per_device_train_batch_size=4"]
    exact = train(tmp_path / "fp32", *common, nproc=2).losses
    for parallel, precision, bound in (("fsdp", "no", 1e-5), ("ddp", "bf16", 1e-2), ("fsdp", "bf16", 1e-2)):
        keys = [f"parallel={parallel}", f"mixed_precision={precision}"]
        run = train(tmp_path / f"{parallel} {precision}", *common, *keys, nproc=2)
        assert relative(exact, run.losses) < bound, run.text
        emulated = precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert ("this CPU has no bf16 matrix products" in run.text) == emulated, run.text


def test_learns_and_evaluates(shards, tmp_path):
    """On text with structure training and held-out loss fall well below the uniform ln(257), one batch is overfitted."""
    run = train(tmp_path / "learn", f"data_dir={shards}", "max_steps=60", "eval_steps=20", "logging_steps=20")
    held_out = [float(x) for x in re.findall(r"eval_loss=([\d.]+)", run.text)]
    assert len(held_out) == 3 and held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < math.log(257) - 1 and run.losses[-1] < run.losses[0]
    one = write_shards(tmp_path / "one", shards=1, tokens=4 * 32 + 1)
    run = train(tmp_path / "over", f"data_dir={one}", "eval_files=0", "max_steps=60", "lr_scheduler_type=constant")
    assert run.losses[-1] < 0.2


def test_compiled_equals_eager(shards, tmp_path):
    """FSDP2 in bf16 with compiled blocks and loss, at a length where attention goes in pieces, and the same uncompiled."""
    length = ["sequence_length=512", "max_position_embeddings=512", "per_device_train_batch_size=1"]
    common = [f"data_dir={shards}", *length, "max_steps=6", "parallel=fsdp", "mixed_precision=bf16", "eval_steps=3"]
    eager = train(tmp_path / "eager", *common).losses
    compiled = train(tmp_path / "compiled", *common, "compile_model=true").losses
    assert relative(eager, compiled) < 1e-2


def test_schedules():
    """Warm-up reaches the peak, every schedule ends at its floor, and each is continuous at its joints."""
    for kind, end in (("cosine", 1e-5), ("linear", 1e-5), ("constant", 1e-3), ("warmup_stable_decay", 1e-5)):
        steps = dict(warmup_steps=10, max_steps=100, decay_steps=30)
        cfg = configs.Config(lr_scheduler_type=kind, learning_rate=1e-3, min_learning_rate=1e-5, **steps)
        rates = [learning_rate(s, cfg) for s in range(101)]
        assert rates[0] == pytest.approx(1e-4) and rates[9] == rates[10] == pytest.approx(1e-3)
        assert rates[100] == pytest.approx(end)
        assert max(abs(a - b) for a, b in zip(rates[10:], rates[11:], strict=False)) < 5e-5
        if kind == "warmup_stable_decay":
            assert rates[70] == pytest.approx(1e-3) and rates[85] == pytest.approx((1e-3 + 1e-5) / 2)


def test_non_finite_steps_end_the_run(shards, tmp_path):
    """Weights that overflow: every step is refused, exit 65 after max_bad_steps, on both ranks. A fresh run beside that
    trace is another one, also with deterministic=true."""
    args = [f"data_dir={shards}", "initializer_range=1e38", "max_bad_steps=3", "max_steps=30"]
    run = train(tmp_path, *args, nproc=2, code=65)
    assert "nothing of them is saved (max_bad_steps=3)" in run.text.splitlines()[-1]
    fresh = train(tmp_path, f"data_dir={shards}", "max_steps=5", "deterministic=true").text
    assert "not the same run" in fresh and "done: 5 steps" in fresh


def deterministic(rank: int, value: bool) -> None:
    devices.tune(configs.Config(deterministic=value), torch.device("cpu"), 0, 1)
    names = [
        f"allow_{kind}_reduced_precision_reduction{more}" for kind in ("bf16", "fp16") for more in ("", "_split_k")
    ]
    on = [torch.are_deterministic_algorithms_enabled(), inductor.deterministic]
    off = [inductor.triton.autotune_pointwise, *(getattr(torch.backends.cuda.matmul, name) for name in names)]
    assert {*on} == {value} and {*off} == {not value} and not torch.backends.cudnn.benchmark, (on, off)


@pytest.mark.parametrize("value", [True, False])
def test_deterministic_sets(value):
    """What torch says of itself after deterministic=true, in a process of its own; without it, torch's defaults."""
    on_ranks(1, deterministic, value)


def test_fp16_has_a_scaler_or_a_clear_no(shards, tmp_path):
    """Where the CPU has fp16 products the loss falls; where it does not, exit code 2 says so."""
    able = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    run = train(tmp_path, f"data_dir={shards}", "mixed_precision=fp16", "max_steps=20", code=0 if able else 2)
    assert run.losses[-1] < run.losses[0] if able else "fp16" in run.text


def test_bad_input(shards, tmp_path):
    """What a user can get wrong: exit code and a message with the value and the rule. An empty folder, shards too short
    for a window, a truncated file: 66, named before training."""
    (tmp_path / "empty").mkdir()
    short = write_shards(tmp_path / "short", tokens=20)
    cut = write_shards(tmp_path / "cut")
    victim = next(cut.rglob("*_02.npz"))
    victim.write_bytes(victim.read_bytes()[:2000])
    for args, code, words in (
        (["data_dir=/nowhere"], 66, "/nowhere"),
        (["global_batch_size=6"], 2, "nearest: 4 and 8"),
        (["vocab_size=100"], 66, "vocab_size=100"),
        (["resume=nothing"], 66, "has no checkpoints"),
        ([f"data_dir={tmp_path}/empty"], 66, "tokenized_cleaned_*.npz"),
        ([f"data_dir={short}"], 66, "sequence_length+1=33"),
        ([f"data_dir={cut}"], 66, victim.name),
        (["parallel=fsdp", "shard_size=3"], 2, "sizes that do: 1"),
    ):
        assert words in train(tmp_path / "run", f"data_dir={shards}", *args, code=code).text


def test_show_prints_the_plan_and_help_every_key(tmp_path):
    """--show: the production model's parameters, batch as a product, and tokens in all; --help: every key."""
    production = str(ROOT / "configs/production.py")
    codes, out, _ = program(tmp_path, "train", production, "--show")
    words = ("1.414B parameters (1.209B without", "32,768 tokens per step = 4 x 4 x 2 x 1024", "819.2M tokens")
    assert [word for word in words if word not in out] == []
    assert re.search(r"max_steps = 25000  \[.*configs/production.py\]", out) and "note" not in out and codes == [0]
    _, out, _ = program(tmp_path, "train", production, "vocab_size=1000", "--show")
    assert "tokenizer=gpt2 has 50,257 ids, vocab_size=1,000: not the one of these shards" in out
    help_ = [sys.executable, "train.py", "--help"]
    out = subprocess.run(help_, cwd=ROOT, capture_output=True, text=True, timeout=GUARD).stdout
    assert [key for key in configs.KEYS if not re.search(rf"^  {key} .*\w", out, re.M)] == []
