"""Averaged checkpoints: the mean of every weight from any layouts, a checkpoint like an imported one; the decay branch."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from launch import train
from test_export import CFG, IDX, logits, save
from test_resume import newest, tensors

import ckpt
from configs import ConfigError
from refocused.checkpoint import huggingface, manifest, selection
from refocused.checkpoint import tensors as files
from refocused.checkpoint.weights import load as load_model
from refocused.commands import average, export

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def averaged(*argv) -> int:
    return average.main([str(arg) for arg in argv])


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """Steps 2, 4 and 6 of a run, each saved by another layout."""
    folder = tmp_path_factory.mktemp("run")
    common = [f"data_dir={shards}", "global_batch_size=8", "save_total_limit=0", "resume=latest"]
    for steps, nproc, parallel in ((2, 1, "ddp"), (4, 2, "fsdp"), (6, 2, "ddp")):
        train(folder, *common, f"max_steps={steps}", f"parallel={parallel}", nproc=nproc)
    return folder / "out"


def test_mean_of_layouts(run, shards, tmp_path, monkeypatch):
    """Means of checkpoints saved by one process, FSDP2 2 and DDP 2, one of them twice, against sums of their tensors.

    In files of a few kB, so several; no optimizer state; it verifies, exports, starts a run, and is no run to resume.
    """
    monkeypatch.setattr(files, "FILE_BYTES", 20_000)
    paths = [run / name for name in reversed(selection.names(run))]
    parts = [{key: t for key, t in tensors(path).items() if key.startswith("model.")} for path in paths]
    for name, weights in (("out-1", [1, 1, 1]), ("out-2", [1, 0, 2])):
        out = tmp_path / name
        named = [path for path, weight in zip(paths, weights, strict=True) for _ in range(weight)]
        assert averaged(*named, out) == 0
        found = tensors(out / paths[-1].name)
        assert found.keys() == parts[0].keys()
        for key, t in found.items():
            expected = sum(part[key].double() * w for part, w in zip(parts, weights, strict=True)) / 3
            assert torch.equal(t, expected.float()), key
    assert len(list((tmp_path / "out-1").rglob("*.safetensors"))) > 3
    source = ckpt.find(str(out))
    assert source.state["step"] == 6 and source.cfg.tokenizer == "byte" and len(source.state["averaged"]) == 3
    assert export.main([str(out), str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    exported = huggingface.source(tmp_path / "hf")
    assert torch.equal(*(logits(load_model(place), IDX) for place in (exported, source)))
    assert "weights only" in train(tmp_path / "next", f"data_dir={shards}", f"init_from={out}", "max_steps=2").text
    assert "init_from=" in train(tmp_path / "not", f"data_dir={shards}", f"resume={source.path}", code=66).text


def test_refused(run, tmp_path):
    """One checkpoint, other models, a folder in use: each said in one sentence, nothing left. Models that were trained in
    another way have a mean."""
    path = run / selection.names(run)[0]
    other = save(tmp_path / "other", dataclasses.replace(CFG, rotary_pct=0.5))
    dropout = save(tmp_path / "dropout", dataclasses.replace(CFG, rotary_pct=0.5, attention_dropout=0.1))
    assert averaged(other, dropout, tmp_path / "mixed") == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    for argv, words in (
        ([path, tmp_path / "out"], "at least two"),
        ([path, path, tmp_path / "full"], "not empty"),
        ([path, other, tmp_path / "out"], "is of another model or optimizer: hidden_size 32 -> 64, .*have no mean"),
    ):
        with pytest.raises(ConfigError, match=words):
            averaged(*argv)
    assert not list(tmp_path.glob("out/*"))


def test_a_damaged_newest_is_named(run, tmp_path, capsys):
    """A folder whose newest checkpoint is damaged stands for the one before it, and that is said."""
    folder = shutil.copytree(run, tmp_path / "out")
    last, before = selection.names(folder)[:2]
    (folder / last / manifest.STATE).write_text("{}")
    assert ckpt.find(str(folder)).path == folder / before
    assert f"passed over {last}: " in capsys.readouterr().err


def test_decay_branch(shards, tmp_path):
    """The recipe of docs/training.md: a checkpoint of a run at its full rate is decayed in a folder of its own.

    The branch goes on from the trunk's step with a falling rate and leaves the trunk as it was; both can be averaged.
    """
    stable = [f"data_dir={shards}", "lr_scheduler_type=warmup_stable_decay", "save_steps=6", "save_total_limit=0"]
    trunk = train(tmp_path / "trunk", *stable, "max_steps=8")
    assert re.findall(r"lr=([\d.e+-]+)", trunk.text)[1:] == ["1.00e-02"] * 7
    six = next((tmp_path / "trunk/out").glob("*-step6-*"))
    before = tensors(six)
    branch = train(tmp_path / "branch", *stable, f"resume={six}", "max_steps=10", "decay_steps=4")
    rates = [float(rate) for rate in re.findall(r"lr=([\d.e+-]+)", branch.text)]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3]) and "step 6 of 10" in branch.text
    assert all(torch.equal(t, before[key]) for key, t in tensors(six).items())
    assert ckpt.find(str(tmp_path / "branch/out")).state["step"] == 10
    assert averaged(six, newest(tmp_path / "branch"), tmp_path / "mean") == 0
    assert ckpt.find(str(tmp_path / "mean")).trained_on == ckpt.find(str(six)).trained_on != None  # noqa: E711
