"""Speed and memory: the plan against what runs use, what is recomputed and offloaded, compiled and communicated."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from launch import GUARD, TINY, Run, on_ranks, train
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import configs
import model as neox
from refocused import entry
from refocused.measure import steps
from refocused.run import gpus, memory, processes, strategy
from refocused.run.strategy import materialise


def test_plan_of_production():
    """The 1.4B model on two cards of 24 GB: exact sizes of what is sharded or sent, and it fits with 1.5 GiB to spare."""
    cfg, _ = configs.load([str(ROOT / "configs/production.py")])
    found = memory.estimate(cfg, 2)
    N = neox.num_parameters(cfg)[0]
    assert found.device["parameters"] == pytest.approx(4 * N / 2, rel=1e-3)
    assert found.device["optimizer"] == pytest.approx(8 * N / 2, rel=1e-3)
    # the sharded gradients of the step before are gone at the peak, but their blocks stay with the stream that scatters
    assert found.device["gradients"] == 0 and found.pools > found.total + 4 * N / 2
    assert found.needed / 2**30 + 1.5 < gpus.usable(24)


def test_depths_that_were_not_looked_at():
    """Memory by kind, pools and host memory from passes over two blocks and three, against a pass over all five."""
    keys = "num_hidden_layers=5 parallel=fsdp activation_checkpointing=full optimizer=muon".split()
    for chosen in (keys, keys[:1], [*keys[:2], "cpu_offload=true"]):
        cfg, _ = configs.load([*TINY, *MEDIUM, *chosen])
        assert memory.estimate(cfg, 2) == memory.measure(cfg, 2, "cuda")


MEDIUM = (
    "hidden_size=512 num_attention_heads=8 num_hidden_layers=4 intermediate_size=2048 vocab_size=20000 "
    "max_position_embeddings=512 sequence_length=512 per_device_train_batch_size=2 mixed_precision=bf16"
).split()


@pytest.mark.parametrize("nproc, layout, accumulation", [(1, "ddp", 1), (2, "ddp", 2), (2, "fsdp", 2)])
def test_plan_predicts_what_a_run_allocates(shards, tmp_path, nproc, layout, accumulation):
    """What the plan adds to what stays between steps, against the most that a real third step holds beyond that."""
    # in fp32 on a CPU that has no bf16 products: there it takes 20 times as long
    precision = [] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ["mixed_precision=no"]
    keys = [*MEDIUM, *precision, f"parallel={layout}", f"gradient_accumulation_steps={accumulation}", "max_steps=3"]
    keys += ["profile=3-3"]
    train(tmp_path, f"data_dir={shards}", *keys, nproc=nproc)
    [trace] = (tmp_path / "logs" / "profile").glob("*.json")  # counts from the profiler's start
    events = json.loads(trace.read_text())["traceEvents"]
    held = max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")
    cfg, _ = configs.load([*TINY, "global_batch_size=0", *keys])
    found = memory.estimate(cfg, nproc, "cpu")
    stays = ["parameters", "optimizer", *(["gradients"] if layout == "ddp" and nproc > 1 else [])]  # DDP's buckets
    assert found.total - sum(found.device[kind] for kind in stays) == pytest.approx(held, rel=0.02)


def test_step_command(tmp_path, device, record_property):
    """Contenders, each in its own process: a table with a row for each, in order. Toys on a CPU."""
    names, line = "muon,nanogpt,floor", "--size small --rounds 1 vocab_size=512 compile_model=false hidden_size=64 "
    line += "num_attention_heads=4 intermediate_size=256 num_hidden_layers=1 sequence_length=64"
    if device == "cuda":  # all are in memory at once: fewer layers
        names, line = "ours,transformers,nanogpt,floor", "--size large --rounds 3 num_hidden_layers=8"
    command = [sys.executable, str(ROOT / "bench.py"), "step", "--contenders", names, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GUARD, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ") and "tokens/s" not in line]
    assert [row[0] for row in rows] == [f"| {steps.NAMES[name]}" for name in names.split(",")]
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)
    record_property("value", "; ".join(f"{row[0][2:]} {row[1]}" for row in rows))


def test_a_spread_that_is_too_wide_is_said():
    """Rounds that differ by more than 15 percent: the table itself says so. No row is there twice, or of no process."""
    cfg, _ = configs.load([*TINY])
    rows = {"ours": {"seconds": [1.0, 1.1], "rate": 1.0, "memory": 1, "first": 1.0}}
    assert "Not to be trusted" not in steps.table("small", cfg, rows)
    rows["ours"]["seconds"] = [1.0, 1.3]
    for names in ("ours,ours", "ours-ddp-0"):
        assert bench.main(["step", "--contenders", names]) == 2
    assert "Not to be trusted: a spread of 26% is above 15%" in steps.table("small", cfg, rows)


def test_contender_that_dies(tmp_path):
    """A contender killed while the others have their turns: its exit code, and what that code most often means."""
    toy = ["hidden_size=64", "num_hidden_layers=1", "vocab_size=70000", "intermediate_size=256"]
    steps.write_inputs(tmp_path, steps.SIZES["small"], toy)
    contender = steps.start("floor", tmp_path, toy)
    assert contender.turn(1)["seconds"] > 0
    contender.processes[0].kill()
    with pytest.raises(steps.MeasureError, match=r"floor ended early with \[-9\]; -9 is a kill, most often") as died:
        contender.turn(1)
    assert entry.explain(died.value) == (1, f"error: {died.value}"), "a bug, by its exit code and words"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputation_changes_nothing(dropout):
    """Loss and gradients with every level of activation checkpointing, equal to those without, bit for bit."""
    base = configs.load([*TINY, f"hidden_dropout={dropout}", f"attention_dropout={dropout}"])[0]
    x = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))

    def gradients(kind: str) -> list[torch.Tensor]:
        model = neox.GPTNeoX(dataclasses.replace(base, activation_checkpointing=kind))
        materialise(model, 1)
        torch.manual_seed(1)
        loss = model(x, x)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    reference = gradients("none")
    for kind in ("activation", "selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(reference, gradients(kind), strict=True)), kind


@pytest.mark.parametrize("world", [1, 2])
def test_plan_of_offload(world):
    """With cpu_offload parameters, gradients and two moments are in host memory, and none of them on the device."""
    cfg, _ = configs.load([*TINY, *MEDIUM, "parallel=fsdp", "cpu_offload=true", "gradient_accumulation_steps=2"])
    found = memory.estimate(cfg, world)
    state = 16 * neox.num_parameters(cfg)[0]  # parameters, gradients and what is between them and a power of two
    assert state < (found.host - memory.PROCESS) * world < 1.6 * state
    assert not any(found.device[kind] for kind in ("parameters", "gradients", "unreduced", "optimizer"))


def test_offload(shards, tmp_path):
    """FSDP2 with parameters in host memory: the losses of FSDP2 without."""
    common = [f"data_dir={shards}", "gradient_accumulation_steps=2", "parallel=fsdp"]
    plain = train(tmp_path / "fsdp", *common, nproc=2).losses
    offloaded = train(tmp_path / "offload", *common, "cpu_offload=true", nproc=2).losses
    assert len(plain) == 10 and offloaded == pytest.approx(plain, rel=1e-6)


class Reductions(TorchDispatchMode):
    """Counts the collectives that carry gradients."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.startswith(("allreduce_.", "_reduce_scatter_base_."))
        return func(*args, **(kwargs or {}))


def send_once(rank: int, layout: str) -> None:
    cfg, _ = configs.load([*TINY, f"parallel={layout}"])
    env, x, sent = processes.start(cfg), torch.zeros(2, 32, dtype=torch.int64), []
    model = strategy.build(cfg, env)
    strategy.warm_up(model, cfg, env)
    always = dataclasses.replace(cfg, cpu_offload=layout == "fsdp")
    for accumulation, how in ((1, cfg), (4, cfg), (4, always)):
        with Reductions() as seen:
            for micro_step in range(accumulation):
                strategy.sync_gradients(model, how, last=micro_step == accumulation - 1)
                model(x, x).backward()
        sent.append(seen.count)
    processes.stop()
    assert sent[0] == sent[1] > 0 and sent[2] == sent[0] * (4 if layout == "fsdp" else 1), sent


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_gradients_are_sent_once_per_optimizer_step(layout):
    """Collectives that carry gradients, with accumulation 1 and 4, on two real processes: as many. With cpu_offload, whose
    gradients are in host memory, four times as many."""
    on_ranks(2, send_once, layout)


@pytest.mark.parametrize(
    "parallel, level", itertools.product(("ddp", "fsdp"), configs.CHOICES["activation_checkpointing"])
)
def test_compiles_once_for_any_depth(shards, tmp_path, device, parallel, level):
    """Blocks compiled through training, accumulation and evaluation: nothing is compiled again after step 2."""
    if device == "cpu" and (parallel, level) != ("ddp", "none"):
        pytest.skip("on a CPU one layout: compiling takes minutes")
    keys = "compile_model=true mixed_precision=bf16 num_hidden_layers=3 gradient_accumulation_steps=2 eval_steps=2"
    keys = [*keys.split(), f"parallel={parallel}", f"activation_checkpointing={level}", f"data_dir={shards}"]
    before = "import torch as _torch\n_torch._logging.set_logs(recompiles=True)\n"
    run = Run([*keys, "max_steps=6"], 1, tmp_path, {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}, before)
    assert run.wait() == [0], run.text
    before, _, after = run.text.partition("Step 2: eval_loss")
    assert "Step 6: eval_loss" in after and "Recompiling" not in after
    assert before.count("Recompiling") <= 2  # the block and the kernel's shape once more for evaluation
