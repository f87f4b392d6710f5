"""Memory and speed of the device against the plan; most of it are facts, for docs/gpu.md."""

import json
import re
from collections import Counter

import pytest
import torch
from card import COMMON, TELLING, UNSAVED, largest, trace
from conftest import ROOT

import configs
from refocused.run import gpus, memory, speed

NO_WAITS = """import torch as _torch, train as _train
_number, _again = iter(range(1, 10**6)), _train.optim.set_rate
def _watched(*args):
    if (step := next(_number)) in (3, {last}) and _torch.cuda.is_available():
        _torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")
    return _again(*args)
_train.optim.set_rate = _watched
"""


def planned(card, *keys: str) -> configs.Config:
    config = ROOT / "configs/production.py" if card.cuda else configs.DEMO
    return configs.load([str(config), *COMMON, *([] if card.cuda else [*card.base, "global_batch_size=0"]), *keys])[0]


@pytest.mark.parametrize("layout", ["8 none", "8 selective", "16 full"])
def test_plan_against_memory(card, run, say, layout):
    """What torch allocated and reserved and what the driver counts, against the plan."""
    B, level = layout.split()
    keys = [f"per_device_train_batch_size={B}", f"activation_checkpointing={level}", "parallel=ddp", "max_steps=3"]
    keys += ["gradient_accumulation_steps=1", "async_save=false", "compile_model=false"]
    done = run("plan", *keys, before=TELLING, production=True)
    wanted = memory.estimate(planned(card, *keys), 1).total
    found, reserved = largest(done, "memory_allocated"), largest(done, "memory_reserved")
    taken = max(map(int, re.findall(r"driver (\d+)", done.text)))  # the context, and libraries' own memory, too
    gib = [f"{size / 2**30:.2f} {what}" for size, what in
           ((wanted, "planned"), (found, "allocated"), (reserved, "reserved"), (taken, "taken of the GPU"))]  # fmt: skip
    say(", ".join(gib) + " GiB", "within 3 %")
    card.needs_cuda("a CPU process's memory is not what the plan counts")
    assert abs(found / wanted - 1) <= 0.03


@pytest.mark.parametrize("level, segments", [("selective", True), ("none", True), ("none", False)])
def test_two_ranks_of_24(card, start, say, level, segments):
    """configs/production.py's two ranks on this GPU, each with what a 4090 leaves to torch's allocator."""
    total = torch.cuda.get_device_properties(0).total_memory / 2**30 if card.cuda else 60.0
    if total < 60:
        pytest.skip(f"{total:.0f} GiB do not hold two cards of 24 GB")
    conf = f"expandable_segments:{segments}" + f",per_process_memory_fraction:{22.9 / total:.4f}" * card.cuda
    keys = [f"activation_checkpointing={level}", "max_steps=4", "parallel=fsdp", "async_save=false"]
    done = start("24", *keys, nproc=2, env={"PYTORCH_ALLOC_CONF": conf}, before=TELLING, production=True)
    codes, retries = done.wait(), re.findall(r"retries (\d+)", done.text) or ["?"]
    gib = largest(done, "memory_reserved") / 2**30 if codes == [0, 0] else 0.0
    say(f"exit {codes}, {retries[-1]} retries, {gib:.2f} GiB reserved", "exit 0" if level == "selective" else "")
    assert codes == [0, 0] or level != "selective"


@pytest.mark.parametrize("layout", ["4 8 none", "32 1 full"])
def test_offload(card, run, say, layout):
    B, accumulation, level = layout.split() if card.cuda else ("2", "2", "full")
    keys = ["parallel=fsdp", "cpu_offload=true", "max_steps=3", f"activation_checkpointing={level}"]
    keys += [f"per_device_train_batch_size={B}", f"gradient_accumulation_steps={accumulation}"]
    done = run("offload", *keys, before=UNSAVED, production=True)
    say(f"{1 / largest(done, 'steps_per_second'):.2f} s a step, {largest(done, 'memory_allocated') / 2**30:.2f} GiB")


def test_out_of_memory(card, run):
    card.needs_cuda("a CPU's memory is everyone's")
    text = run("oom", "per_device_train_batch_size=100000", code=70).text
    assert "per_device_train_batch_size=50000" in text and "planned GiB per process" in text


def test_steady(card, run, say):
    """Memory in the first quarter and at the end."""
    lines = trace(run("steady", f"max_steps={300 if card.cuda else 20}", "mixed_precision=bf16"))
    key = "memory_reserved" if card.cuda else "memory_allocated"
    early, late = (lines[i].get(key) or 0 for i in (len(lines) // 4, -1))
    say(f"{early / 2**20:.0f} MiB, at the end {late / 2**20:.0f}", "2 % more at most")
    assert late <= 1.02 * early


@pytest.mark.parametrize("kind", ["optimizer=adamw", "optimizer=muon mixed_precision=bf16"])
def test_no_host_waits(card, run, kind):
    """No host wait for the device from the third step to the last but one."""
    steps = 53 if card.cuda else 6
    run("sync", *kind.split(), f"max_steps={steps}", "logging_steps=0", before=NO_WAITS.format(last=steps - 1))
    card.needs_cuda("a CPU has nothing to wait for")


LAYOUTS = (
    "8 x 4 none",
    "8 x 1 none",
    "16 x 2 none",
    "16 x 2 none mask_documents=true",
    "32 x 1 none",
    "32 x 1 selective",
)
KERNELS = {
    "attention": "flash|fmha|attention|sdpa",
    "products": "gemm|cutlass|nvjet|xmma|addmm|::mm|matmul",
    "optimizer": "adam|multi_tensor|foreach",
    "communication": "nccl|c10d|gloo",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_speed(card, run, say, layout, tmp_path):
    """tokens/s and MFU of the last log line, when compilation and warm-up are over, against the plan; in the first layout
    where the device's time goes and what a cold compilation takes. The level is that of the run's own config."""
    if not card.cuda and layout != LAYOUTS[0]:
        pytest.skip("on a CPU one layout shows that the check works")
    B, _, accumulation, level, *more = layout.split() if card.cuda else ("2", "x", "2", "none")
    keys = [f"per_device_train_batch_size={B}", f"gradient_accumulation_steps={accumulation}", "parallel=ddp", *more]
    keys += [f"activation_checkpointing={level}", "max_steps=12", "logging_steps=4", "async_save=false"]
    first = layout == LAYOUTS[0]
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cold")} if first else {}
    done = run("speed", *keys, *["profile=6-7"] * first, env=env, before=UNSAVED, production=True)
    line = trace(done)[-1]
    begun = json.loads((tmp_path / "speed/logs/trace.jsonl").read_text().splitlines()[0])["config"]
    name = torch.cuda.get_device_name() if card.cuda else "H100"
    gpu, cfg, seconds = gpus.find(name), planned(card, *keys), 1 / line["steps_per_second"]
    mfu = "n/a" if line["mfu"] is None else f"{line['mfu']:.1%}"
    text = (
        f"{begun['activation_checkpointing']}: {line['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, {seconds:.3f} s, "
    )
    text += f"{(line['memory_allocated'] or 0) / 2**30:.2f} GiB, data wait {line['data_wait_share']:.2%}"
    ratio = 1.0
    if gpu:
        ratio = speed.step(cfg, 1, speed.Machine.of(name, gpu)).seconds / seconds
        text += f", planned {ratio * seconds:.3f} s"
    if first:
        text += f", {re.search(r'ready in [0-9.]+ s', done.text)[0]} with no kernel cached; "
        spent: Counter[str] = Counter()
        [profile] = (tmp_path / "speed/logs/profile").glob("*.json")
        for event in json.loads(profile.read_text())["traceEvents"]:
            if event.get("cat") == ("kernel" if card.cuda else "cpu_op") and "dur" in event:
                kinds = (kind for kind, pattern in KERNELS.items() if re.search(pattern, event["name"].lower()))
                spent[next(kinds, "element-wise")] += event["dur"]
        text += ", ".join(f"{kind} {time / spent.total():.0%}" for kind, time in spent.most_common())
    say(text, "the plan within 20 %" if gpu and card.cuda else "")
    assert not card.cuda or abs(ratio - 1) <= 0.2


@pytest.mark.parametrize("env", [{}, {"REFOCUSED_COPY_AT_ONCE": "1"}], ids=["beside a step", "at once"])
def test_dip(card, run, say, env):
    """Seconds of training that one asynchronous save of the whole model costs: its stall, and ten slower steps; copied
    on a stream of its own, or while training waits."""
    keys = f"parallel=ddp per_device_train_batch_size={8 if card.cuda else 1} gradient_accumulation_steps=1"
    lines = trace(
        run("dip", *keys.split(), "max_steps=31", "save_steps=20", "save_total_limit=1", env=env, production=True)
    )
    seconds = {line["step"]: 1 / line["steps_per_second"] for line in lines}
    stall = max(line["save_stall_seconds"] for line in lines[:-1])
    usual = sorted(seconds[step] for step in range(10, 20))[5]
    slower = sum(seconds[step] - usual for step in range(21, 31))
    say(f"stall {stall:.3g} s, ten steps after it {slower:.3g} s longer than ten usual ones of {usual:.3g} s")
