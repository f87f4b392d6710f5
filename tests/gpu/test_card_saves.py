"""Saves, resumes and ends of runs on the device."""

import itertools
import random
import shutil
import signal
import time

import pytest
import torch
from card import losses, trace

import ckpt
import configs
from refocused.checkpoint import manifest, tensors
from refocused.checkpoint.saver import Saver
from refocused.checkpoint.weights import load as load_model
from refocused.run import processes

SLOWLY = """import time as _time
from refocused.run import optim as _optim
_rate = _optim.learning_rate
def _late(step, cfg):
    _time.sleep(0.1)
    return _rate(step, cfg)
_optim.learning_rate = _late
"""  # so that a kill meets a step
UNPINNED = """import torch as _torch, types as _types
_torch.cuda.cudart = lambda: _types.SimpleNamespace(cudaHostRegister=lambda *_: 2)
_pin = _torch.Tensor.pin_memory
def _small_ones(tensor):
    if tensor.nbytes > 1 << 20:
        raise _torch.AcceleratorError("CUDA error: out of memory")
    return _pin(tensor)
_torch.Tensor.pin_memory = _small_ones
"""  # in the words of torch 2.13
FAILING = """import os as _os, torch as _torch, data as _data
_next, _seen = _data.Loader.__next__, []
def _broken(loader):
    _seen.append(loader)
    if len(_seen) == 5 and _os.environ["RANK"] == "1":
        raise {error}("made up")
    return _next(loader)
_data.Loader.__next__ = _broken
"""


def bits(run) -> dict[int, tuple[str, str]]:
    return {line["step"]: (line["loss_hex"], line["grad_norm_hex"]) for line in trace(run)}


def difference(runs: dict[str, dict[int, tuple[str, str]]]) -> str:
    """The first step whose loss or gradient norm differs, as each run has it, which shows the odd one; or nothing.

    A resumed run has the killed run's steps up to its checkpoint: their bits say nothing of it.
    """
    for step in sorted(set().union(*runs.values())):
        found = {name: of[step] for name, of in runs.items() if step in of}
        if len(set(found.values())) > 1:
            return f", from step {step} on not the uninterrupted run's: {found}"
    return ""


def killed_and_resumed(run, start, name: str, *keys: str, cold: dict | None = None) -> tuple[str, bool]:
    """A run, and the same one killed at a random step and resumed: (its replay and the first step that is another one,
    whether the final weights are the same)."""
    keys = (*keys, "save_steps=4", "max_steps=12", "async_save=false")
    whole = run(f"{name}-whole", *keys)
    step = random.randint(5, 10)
    killed = start(name, *keys, before=SLOWLY)
    killed.wait_for(f"Step {step}: loss")
    killed.kill()
    runs = {"uninterrupted": bits(whole), "killed": bits(killed)}  # before a resume writes its steps over
    resumed = run(name, *keys, "resume=latest", env=cold)
    said = next((line for line in resumed.text.splitlines() if "replayed" in line), "nothing was replayed")
    said += difference({**runs, "resumed": bits(resumed)})
    ends = [ckpt.find(str(r.log.parent / "out")) for r in (whole, resumed)]
    first, second = (load_model(source).state_dict() for source in ends)
    same = all(torch.equal(first[key], second[key]) for key in first)
    same = same and ends[0].state.get("scaler") == ends[1].state.get("scaler")
    for r in (whole, resumed):  # those of all cases would fill a disk
        shutil.rmtree(r.log.parent / "out")
    return said, same


OPTIMIZERS = "adamw", "muon", "adamw adam_moments=bf16", "adamw mask_documents=true activation_checkpointing=full"
CASES = [
    f"parallel={parallel} mixed_precision={precision} optimizer={optimizer}"
    for parallel, precision, optimizer in itertools.product(("ddp", "fsdp"), ("bf16", "fp16", "no"), OPTIMIZERS)
    if (precision, optimizer) != ("fp16", "muon") and (precision == "bf16" or " " not in optimizer)
]


@pytest.mark.parametrize("case", CASES)
def test_bitwise_resume(card, run, start, say, tmp_path, case):
    """Killed and resumed with deterministic=true: replay and final weights, bit for bit; one with an empty cache."""
    if not card.cuda and case != "parallel=fsdp mixed_precision=no optimizer=adamw":
        pytest.skip("on a CPU one case shows that the check works")
    keys = [*case.split(), "deterministic=true", f"compile_model={card.cuda}".lower()]
    cold = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cold")} if case == CASES[0] else None
    said, same = killed_and_resumed(run, start, "resume", *keys, cold=cold)
    say(f"{said}; weights {'the same' if same else 'others'}", "the same bits")
    assert same and "identical" in said and "identically" not in said and "not the uninterrupted" not in said


def test_loose_resume(card, run, start, say):
    """What is the same without deterministic=true."""
    card.needs_cuda("on a CPU the same as with deterministic=true")
    said, same = killed_and_resumed(run, start, "loose", "mixed_precision=bf16", "compile_model=true")
    say(f"{said}; weights {'the same' if same else 'others'}")


def test_asynchronous_saves(card, say, tmp_path):
    """The bytes on disk are those at the call, while the tensors go on changing; for how long save() takes."""
    processes.start(configs.load([str(configs.DEMO), *card.base])[0])
    size = (1 << 32) if card.cuda else (1 << 16)  # numbers: 17 GB
    tree = {f"model.{i}": torch.randn(size // 8, device=card.device) for i in range(8)}
    saver = Saver(tmp_path)
    saver.reserve(tree)
    stalls = []
    for step in range(1, 4):
        expected, name = {key: t.double().sum().item() for key, t in tree.items()}, manifest.name(0, step, 0)
        saver.save(name, tree, {"step": step})
        stalls.append(saver.stall_seconds)
        saver.before_update()
        for t in tree.values():
            t.add_(1.0)  # the steps that go on
        assert (error := saver.wait()) is None, error
        after = {key: torch.zeros(size // 8) for key in tree}
        tensors.load(tmp_path / name, after)
        assert {key: t.to(card.device).double().sum().item() for key, t in after.items()} == expected
        shutil.rmtree(tmp_path / name)
    saver.close()
    processes.stop()
    say(f"3 saves of {4 * size / 1e9:.2g} GB, stall {min(stalls):.3g} s", "equal numbers")


@pytest.mark.parametrize("keys", ["save_steps=4", "parallel=fsdp cpu_offload=true"])
def test_memory_that_cannot_be_pinned(card, run, keys):
    card.needs_cuda("a CPU pins nothing")
    assert "unpinned" in run("unpinned", *keys.split(), before=UNPINNED).text


def test_other_devices(card, run):
    """A checkpoint from the device to a CPU and back, 8 steps in one output_dir."""
    keys, hidden = ("save_steps=4", "parallel=fsdp"), {"CUDA_VISIBLE_DEVICES": ""}
    run("travel", *keys, "max_steps=4")
    run("travel", *keys, "max_steps=6", "resume=latest", env=hidden)
    assert len(losses(run("travel", *keys, "max_steps=8", "resume=latest", "parallel=ddp"))) == 8


def test_not_finite(run):
    run("not-finite", "learning_rate=1e30", "max_bad_steps=2", "max_steps=40", code=65)


@pytest.mark.parametrize("code, error", [(66, "_data.DataError"), (70, "_torch.OutOfMemoryError")])
def test_one_rank_fails(card, start, say, code, error):
    """Both ranks are gone within a minute; the one that failed says why."""
    running = start("fails", "max_steps=100000", nproc=2, before=FAILING.format(error=error))
    running.wait_for("Step 2: loss")
    begin = time.monotonic()
    codes = running.wait()
    seconds = time.monotonic() - begin
    say(f"exit {codes} after {seconds:.0f} s", f"[70, {code}] within 60 s")
    assert codes == [70, code] and (seconds < 60 or not card.cuda)


@pytest.mark.parametrize("moment", ["Step 2: loss", "Step 4: eval_loss", "ready in"])
def test_one_rank_is_told(start, run, moment):
    """A signal to one of two ranks: both leave with 75, and go on."""
    running = start("told", "max_steps=100000", "eval_steps=4", nproc=2)
    running.wait_for(moment)
    running.signal(signal.SIGTERM, rank=1)
    assert running.wait() == [75, 75]
    run("told", f"max_steps={len(losses(running)) + 2}", "resume=latest", nproc=2)


def test_clean_exits(card, run, say):
    for i in range(20 if card.cuda else 1):
        assert "destroy_process_group" not in run(f"exit-{i}", "max_steps=2", nproc=2).text
