"""What a run is refused for before anything is built or compiled: memory, disk, another model than the one to go on from."""

import contextlib
import os
import shutil

import pytest
import torch
from conftest import ROOT
from launch import TINY, train
from saves import save

import configs
import model as neox
from refocused.run import devices, optim, preflight, processes


def env(device: str = "cpu", world: int = 1, local: int = 0, threads: int = 1) -> processes.Env:
    return processes.Env(0, world, 0, local or world, torch.device(device), threads)


def config(*keys: str) -> configs.Config:
    return configs.load([str(ROOT / "configs/demo.py"), *TINY, "global_batch_size=0", *keys])[0]


def test_memory_that_a_layout_takes(monkeypatch, tmp_path):
    """By hand, in bytes per parameter: 16 for a whole model, 12 for the copy of all that a save writes; a container's."""
    N = neox.num_parameters(config())[0]

    def per_parameter(e: processes.Env, *keys: str) -> tuple[float, ...]:
        return tuple(size / N for size in [*preflight.host_bytes(config(*keys), e).values()][:2])

    assert per_parameter(env()) == (16, 12) and per_parameter(env(), "async_save=false") == (16, 0)
    assert per_parameter(env(world=2)) == (32, 12) and per_parameter(env(world=2), "parallel=fsdp") == (16, 12)
    assert per_parameter(env(world=4, local=2), "parallel=fsdp", "shard_size=2") == (16, 6)
    assert per_parameter(env("cuda", world=8, local=4)) == (0, 6)
    assert per_parameter(env("cuda"), "parallel=fsdp", "cpu_offload=true") == (16, 0)
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    for limits, least, most in ((("absent", "none"), 1 << 28, 1 << 60), (("none", "limit"), 1e6, 1e6)):
        monkeypatch.setattr(preflight, "LIMITS", [tmp_path / name for name in limits])
        assert least <= preflight.memory() <= most
    words = r"needs at least 38.4 GiB .* has 0.0: 21.1 GiB .*and 15.8 GiB .*async_save.* and 1.5 GiB"
    with pytest.raises(configs.ConfigError, match=words):
        preflight.check_memory(configs.load([str(ROOT / "configs/production.py")])[0], env())


def test_cores_that_a_container_may_use(monkeypatch, tmp_path):
    """Of 64: all without a quota, of both versions of control groups, and at least one."""
    monkeypatch.setattr(devices, "QUOTAS", ((tmp_path / "absent", None), (tmp_path / "quota", tmp_path / "period")))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    quotas = (("max 100000", "", 64), ("50000 100000", "", 1), ("-1", "100000", 64), ("850000", "100000", 8))
    for words, period, cores in quotas:
        (tmp_path / "quota").write_text(words)
        (tmp_path / "period").write_text(period)
        assert devices.cores(1) == cores and devices.cores(4) == max(1, cores // 4)


def test_refused_before_anything_is_built(shards, tmp_path):
    """A model larger than any memory, more checkpoints than the disk holds, another optimizer or shape than the
    checkpoint's, an init_from of another shape: exit 2, what to change in one line, and nothing was compiled."""
    data, out = f"data_dir={shards}", tmp_path / "first/out"
    train(tmp_path / "first", data, "max_steps=2")
    fits = int(shutil.disk_usage(tmp_path).free / optim.checkpoint_bytes(config()))
    many = ["save_steps=1", f"save_total_limit={2 * fits}", f"max_steps={3 * fits}"]
    for name, keys, words in (
        ("huge", ["hidden_size=65536", "num_hidden_layers=100"], "GiB of this machine's memory and it has "),
        ("huge", ["per_device_train_batch_size=500000", "num_hidden_layers=999"], "GiB for the activations of per_d"),
        ("many", many, f"(save_total_limit={2 * fits}, and the one that is written)"),
        ("start", [f"init_from={out}", "hidden_size=64"], "optimizer: hidden_size 32 -> 64; go on with hid"),
        ("first", ["optimizer=muon"], "optimizer adamw -> muon; go on with optimizer=adamw, or begin a new run"),
        ("first", ["rotary_pct=0.5", "hidden_act=relu"], "go on with rotary_pct=0.25 hidden_act=gelu, or begin"),
    ):
        more = ["resume=latest", "max_steps=4"] * (name == "first")
        run = train(tmp_path / name, data, *more, *keys, "compile_model=true", code=2)
        assert words in run.text and "compiling" not in run.text, run.text
        assert len([line for line in run.text.splitlines() if line.startswith("error: ")]) == 1, run.text
    assert "set save_total_limit=" in train(tmp_path / "many", data, *many, code=2, nproc=2).text
    assert len(list(out.glob("checkpoint-*"))) == 1


def test_checkpoints_that_will_come(monkeypatch, tmp_path):
    """How many a run will keep, and one more while it is written: not more than steps are left, saves by the clock too.
    Those that are there make room, but for what keep_every keeps."""
    for name, old in (("passing", (3, 5)), ("kept", (4, 8))):
        for step in old:
            save(tmp_path / name, step, size=100)
    free = int(3.5 * optim.checkpoint_bytes(config()) * 1.01) + (1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # of three and a half
    clock = ("save_seconds=60", "save_steps=0")
    forever = ("save_steps=2", "max_steps=7", "save_total_limit=2", "keep_every=4")
    for keys, fits in (
        (("save_steps=2", "max_steps=20", "save_total_limit=2"), True),
        (("save_steps=2", "max_steps=20", "save_total_limit=3"), False),
        (("save_steps=2", "max_steps=6", "save_total_limit=9"), True),
        ((*clock, "max_steps=1000", "save_total_limit=3"), False),
        ((*clock, "max_steps=3", "save_total_limit=3"), True),
        ((*clock, "max_steps=1000", "save_total_limit=2"), True),
        ((*forever, f"output_dir={tmp_path}/passing"), True),
        ((*forever, f"output_dir={tmp_path}/kept"), False),
    ):
        words = "4 checkpoints of .* will be in output_dir"
        with contextlib.nullcontext() if fits else pytest.raises(configs.ConfigError, match=words):
            preflight.check_disk(config(f"output_dir={tmp_path}", *keys), 0)


def test_a_busy_machine_is_pointed_out(monkeypatch):
    """A load above the cores is said where threads would spin for it: not of one thread, nor where they sleep."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    cores = os.cpu_count() or 1
    cases = ((5, 2, "", True), (0.5, 2, "", False), (5, 1, "", False), (5, 2, "passive", False))
    for load, threads, policy, said in cases:
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load * cores, 0.0, 0.0))
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        assert ("OMP_WAIT_POLICY=PASSIVE" in processes.busy_note(torch.device("cpu"), threads)) == said
