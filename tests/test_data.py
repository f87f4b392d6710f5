"""Shards, samples, their order, and the loader: real files, compared with plain numpy."""

import contextlib
import errno
import gc
import itertools
import json
import mmap
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import launch
import numpy as np
import pytest
import shards
import torch
from conftest import ROOT
from launch import GUARD
from shards import config, content, data_py_process, write_tokens

from configs import ConfigError
from data import Dataset, Loader, explain_change, permutation
from refocused.run import messages
from refocused.shards import shard as shard_module
from refocused.shards.find import find_files, find_sources
from refocused.shards.prepare import read_note
from refocused.shards.shard import DataError, Shard
from refocused.shards.tokenizers import find

V, T = 50257, 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards.write_mapped(tmp_path / "set", [400, 17, 333, 16, 900, 250])
    return tmp_path / "set"


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    return Dataset.open(config(folder))


# ---- order


def test_golden_order():
    """The permutation against values written down: a change would silently alter every resumed run."""
    assert permutation(42, 0, 10, np.arange(10)).tolist() == [9, 1, 5, 3, 7, 0, 8, 4, 6, 2]
    some = permutation(42, 3, 49_999_999, np.array([0, 1, 2, 25_000_000, 49_999_998])).tolist()
    assert some == [32031122, 38542445, 39165530, 11561185, 10268151]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(n):
    """All positions of an epoch against all samples, once each; epochs and seeds differ in order."""
    epochs = [permutation(seed, epoch, n, np.arange(n)) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(n))
    if n >= 64:
        assert (epochs[0] != epochs[1]).any() and (epochs[0] != epochs[2]).any() and (np.diff(epochs[0]) != 1).any()


def paths_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.npz"))


def windows_of(folder: Path, paths: list[str]) -> list[list[int]]:
    """All windows in order, the plain way."""
    streams = [np.load(folder / path)["input_ids"].astype(int).tolist() for path in paths]
    return [tokens[i : i + T + 1] for tokens in streams for i in range(0, len(tokens) - T, T)]


def test_gather_locate_and_position(folder, dataset):
    """Every window by id against slices of np.load; held-out windows come from the last file alone. Where a run stands
    after so many samples; max_files=3 is the first three paths, the third held out."""
    paths, n = paths_in(folder), dataset.num_samples
    expected, held_out = windows_of(folder, paths[:-1]), windows_of(folder, paths[-1:])
    assert n == len(expected) and dataset.num_tokens == n * T and dataset.num_eval_samples == len(held_out)
    assert dataset.gather(np.arange(n)).tolist() == expected
    assert dataset.gather(dataset.eval_ids(10**6)).tolist() == held_out and len({*dataset.eval_ids(3).tolist()}) == 3
    for window, (path, start) in zip(expected, dataset.locate(np.arange(n)), strict=True):
        assert np.load(folder / path)["input_ids"][start : start + T + 1].tolist() == window
    assert dataset.position(0)["epoch"] == 0 and dataset.position(n)["epoch"] == 1
    [(path, offset)] = dataset.locate(dataset.sample_ids(n + n // 2, 1))
    at = {"epoch": 1, "epoch_fraction": (n // 2) / n, "files": (n // 2) * 5 // n}
    assert dataset.position(n + n // 2) == at | {"next_shard": path, "next_offset": offset}
    first = Dataset.open(config(folder, max_files=3))
    assert [[s.path for s in some] for some in (first.shards, first.eval_shards)] == [paths[:2], paths[2:3]]


@pytest.mark.parametrize("lengths", [[1000], [400, 1000, 16], [16, 1000], [16, 1000, 3, 3]])
def test_the_last_long_shard_holds_out_its_tail(tmp_path, lengths):
    """A single shard, no window in the held-out shards, or none in the others: the windows trained on and those held out
    against all in order, nothing shared and nothing lost; what is divided beside others is said."""
    shards.write_mapped(tmp_path, lengths, parts=1)
    dataset = Dataset.open(config(tmp_path, eval_files=max(1, len(lengths) - 2)))
    everything = windows_of(tmp_path, paths_in(tmp_path))
    assert dataset.num_eval_samples == 3 and dataset.num_samples == len(everything) - 3
    assert dataset.gather(np.arange(len(everything))).tolist() == everything
    long = f"part_0/tokenized_cleaned_00{lengths.index(1000)}.npz"
    assert [f"the last 5% of {long} are held out" in text for text in dataset.notes[-1:]] == [True] * (len(lengths) > 1)
    assert Dataset.open(config(tmp_path, eval_files=0)).num_samples == len(everything)
    moving = Dataset.open(config(tmp_path, shift_windows=True))
    read = [start for path, start in moving.locate(moving.sample_ids(0, 50 * moving.num_samples)) if path == long]
    assert max(read) + T <= min(start for _, start in moving.locate(moving.eval_ids(9)))


# ---- another set


def test_fingerprint_and_what_changed(folder, dataset):
    """Fingerprints of a set before and after adding, removing and changing a shard; the message names all three."""
    again = Dataset.open(config(folder, eval_files=2))
    assert again.fingerprint == dataset.fingerprint and len(dataset.fingerprint) == 64
    assert explain_change(dataset.manifest, again.manifest) == ""
    (folder / "part_0/tokenized_cleaned_000.npz").unlink()
    write_tokens(folder / "part_1/tokenized_cleaned_004.npz", np.zeros(900))
    write_tokens(folder / "new/tokenized_cleaned_9.npz", np.zeros(90))
    changed = Dataset.open(config(folder))
    assert changed.fingerprint != dataset.fingerprint
    assert explain_change(dataset.manifest, changed.manifest).startswith(
        "added 1: new/tokenized_cleaned_9.npz\nremoved 1: part_0/tokenized_cleaned_000.npz\n"
        "changed 1: part_1/tokenized_cleaned_004.npz (crc32 "
    )


def state_of(dataset: Dataset, samples_seen: int = 0, **more) -> dict:
    """As a checkpoint keeps it."""
    keys = {"seed": 7, "sequence_length": T, "eval_files": 1, "tokenizer": "a path"}
    return {"data": {"manifest": dataset.manifest, **more}, "config": keys, "samples_seen": samples_seen}


def test_what_another_set_means_for_a_resume(tmp_path):
    """A grown set, a shrunk one and another eval_files, allowed: where the run begins, what was held out and what is now."""
    shards.write_mapped(tmp_path, [400, 400, 400], seed=1, parts=1)
    before = Dataset.open(config(tmp_path))
    state = state_of(before, 60, tokenizer="gpt2")
    assert before.check_same(state, config(tmp_path)) == []
    write_tokens(tmp_path / "part_0/tokenized_cleaned_9.npz", np.arange(400))

    def lines(**keys) -> list[str]:
        cfg = config(tmp_path, allow_change=True, **keys)
        return Dataset.open(cfg).check_same(state, cfg)

    assert lines() == [
        f"data or order are other ones: this run begins {60 / 72:.1%} into epoch 0 of them, and reads what comes before that "
        "only in the next epoch",
        "held out before and trained on now: part_0/tokenized_cleaned_002.npz",
        "eval_loss before and after are of different text",
    ]
    fewer = lines(max_files=2)
    assert (
        "60.0%" not in fewer[0] and fewer[1] == "trained on before and held out now: part_0/tokenized_cleaned_001.npz"
    )
    state["data"]["manifest"] = [
        *before.manifest[:2],
        {**before.manifest[2], "tokens": 5},
    ]  # the tail of 001 was held out
    assert "held out before and trained on now: part_0/tokenized_cleaned_001.npz" in lines()


# ---- the tokenizer


def test_shards_of_another_tokenizer(tmp_path):
    """Shards that say which tokenizer made them, one file among older ones without: another is refused, before any wait,
    with both names and the way out; one that is renamed, or moved, is the same. So is a checkpoint's."""
    folder, new = tmp_path / "set", tmp_path / "set/tokenized_cleaned_new.npz"
    shards.write_mapped(folder, [400, 900])
    write_tokens(new, np.zeros(500), tokenizer="byte")
    refused = (
        "1 of 3 .*cleaned_new.npz, were made with byte, this run has tokenizer=gpt2.*set tokenizer=byte vocab_size=257,"
    )
    with pytest.raises(DataError, match=f"{refused}.*allow_change=true"):
        Dataset.open(config(folder))
    for keys in ({"tokenizer": "byte"}, {"tokenizer": None}, {"allow_change": True}):
        assert Dataset.open(config(folder, **keys)).num_samples
    for name, texts in (("a", ["some text"]), ("b", ["other text"])):
        shards.own_tokenizer(tmp_path / name, texts, 300)
    ours = find(str(tmp_path / "a/tokenizer.json"))
    write_tokens(new, np.zeros(500), tokenizer=ours.identity, tokenizer_name=ours.name)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    cfg = config(folder, tokenizer=str(tmp_path / "copy"))
    dataset = Dataset.open(cfg)
    assert dataset.tokenizer == ours.identity and ours.identity.endswith(", end-of-text 0")
    for other in ("gpt2", str(tmp_path / "b")):
        with pytest.raises(DataError, match=r"were made with a/tokenizer.json \(sha256:.*set tokenizer= to its path"):
            Dataset.open(config(folder, tokenizer=other))

    for same in (dataset.tokenizer, None):
        dataset.check_same(state_of(dataset, tokenizer=same), cfg)
    for other in ({"tokenizer": "byte"}, {}):  # the last: from before there was a note, by the config's name
        with pytest.raises(DataError, match="(?s)tokenizer (byte|a path) -> sha256:.*allow_change"):
            dataset.check_same(state_of(dataset, **other), cfg)
        dataset.check_same(state_of(dataset, **other), config(folder, tokenizer=cfg.tokenizer, allow_change=True))


def test_tokenizers_that_are_none(tmp_path, monkeypatch):
    """A name with a typo, a folder without the file, a file that is none or does not say what ends a text."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "set").mkdir()
    for name, text in {
        "~nobody-of-that-name/x" + "x" * 300: "no folder that has one",
        "gpt": "tokenizer=gpt is none of gpt2, byte,.*did you mean gpt2",
        f"{tmp_path}/set": "no folder that has one.*each checkpoint of a run keeps a copy",
        f"{tmp_path}": "tokenizer.json is no tokenizer.json: KeyError",
    }.items():
        with pytest.raises(ConfigError, match=text):
            find(name)
    shards.plain_tokenizer(tmp_path, {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}, 0, "a")
    with pytest.raises(ConfigError, match=r'does not say which token ends a text.*special tokens: a.*"eos_token"'):
        find(str(tmp_path)).end  # noqa: B018
    find.cache_clear()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    assert ((known := find(str(tmp_path))).end, known.size) == (1, 2)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="needs one more package: .*pip install tokenizers"):
        known.encode("a")


def test_gpt2_vocabulary_that_cannot_be_had(tmp_path, monkeypatch):
    """tiktoken with an empty cache and a dead proxy, against one error that names the way out."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="tiktoken cannot fetch the p50k_base vocabulary.*TIKTOKEN_CACHE_DIR"):
        find("p50k_base").known  # noqa: B018


# ---- bad sets


def test_missing_and_empty_folders(tmp_path):
    """A folder that is not there, one without shards, one with short shards only, against their messages."""

    def refused(folder: str, message: str, **keys) -> None:
        with pytest.raises(DataError, match=message):
            Dataset.open(config(tmp_path / folder, **keys))

    refused("no where", "no where is no folder; `python .*data.py tokenize TEXTS '.*no where' --tokenizer gpt2` makes")
    refused("no where", "data.py demo '.*no where'` makes it, or .* --tokenizer byte` makes it of", tokenizer="byte")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").touch()
    refused("a", "no file named like tokenized_file_pattern=tokenized_cleaned")
    write_tokens(tmp_path / "a/train.npz", np.zeros(900))
    refused("a", r"but 1 others: tokenized_file_pattern=\*.npz reads train.npz")
    shards.write_mapped(tmp_path / "a", [16, 5])
    refused("a", r"sequence_length\+1=17 tokens: the longest of all 2 has 16")
    refused("a", "eval_files=2 holds out all of 2 shards", eval_files=2)
    for i, lengths in enumerate(([17], [17, 16], [16, 17])):
        shards.write_mapped(tmp_path / f"{i}", lengths)
        only = f"all 1 windows of sequence_length.1=17 tokens in {len(lengths)} shards are held out"
        refused(f"{i}", only)


@contextlib.contextmanager
def as_nobody():
    """With root's rights put aside, where root runs the tests."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_unreadable_folders(capsys):
    """One's own folder without permission against an error with its name; another user's is left out with a word."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        shards.write_mapped(Path(name), [100, 100])
        Path(name, "lost+found").mkdir(mode=0)
        (closed := Path(name, "part_1")).chmod(0)
        if os.geteuid() == 0:
            with as_nobody():
                assert find_files(name) == ["part_0/tokenized_cleaned_000.npz"]
            assert capsys.readouterr().err == f"left out {closed}, another user's: Permission denied\n"
            os.chown(closed, 65534, 65534)
        with as_nobody(), pytest.raises(DataError, match=f"cannot read the folder {closed}: Permission denied"):
            find_files(name)
        closed.chmod(0o755)


def test_a_walk_meets_each_file_once(tmp_path, capsys):
    """Links upwards, in circles, to a disk elsewhere, twice to one folder; hidden things; a cache: against the files.

    A FIFO and a socket named like shards, texts or a cache's are left out with a word, and nothing waits for them.
    """
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    shards.write_mapped(folder, [100, 100, 100])
    for other in (elsewhere, folder / ".Trash-1000/files", folder / "lost+found", folder / "cache/x-1"):
        shards.write_mapped(other, [100])
    (folder / "part_0/._tokenized_cleaned_000.npz").write_bytes(b"a Mac was here")
    goals = {"latest": ".", "b": ".", "part_1/up": "../..", "a0": "part_2", "z": elsewhere, "y": elsewhere}
    for link, goal in goals.items():
        (folder / link).symlink_to(goal)
    os.mkfifo(fifo := folder / "part_0/tokenized_cleaned_9.npz")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        os.rename(tmp_path / "s", folder / "tokenized_cleaned_8.npz")
    found = Dataset.open(config(folder, cache_dir=str(folder / "cache"), eval_files=0)).shards
    # not as part_1/up/elsewhere, where an upward link leads, too, and later
    plain = [f"part_{i}/tokenized_cleaned_00{i}.npz" for i in range(3)]
    assert [shard.path for shard in found] == [*plain, "y/part_0/tokenized_cleaned_000.npz"]
    said = capsys.readouterr().err
    assert f"left out {fifo}: no regular file" in said and "cleaned_8.npz: no regular file" in said
    assert read_note(fifo) == {}
    with pytest.raises(DataError, match="cleaned_9.npz is no regular file and no folder"):
        find_sources(fifo)


def test_a_disk_that_cannot_map(tmp_path, monkeypatch, capsys):
    """Windows of a set that is read, not mapped, against those of the map; a word, once; a file that ends early."""
    shards.write_mapped(tmp_path, [400, 900])
    mapped = Dataset.open(config(tmp_path))

    def refuse(*args, **more):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refuse)
    read = Dataset.open(config(tmp_path))
    ids = np.arange(mapped.num_samples)
    assert (read.gather(ids) == mapped.gather(ids)).all() and read.fingerprint == mapped.fingerprint
    assert capsys.readouterr().err.count("cannot map files (No such device): shards are read instead") == 1
    read.shards[0].check_unchanged = lambda: None
    os.truncate(read.shards[0].file, 500)
    with pytest.raises(DataError, match="ends early: .* tokens are missing"):
        read.gather(ids)


def test_what_is_odd_is_said_in_the_plan(tmp_path):
    """Short shards, copies, and a copy of the held-out shard among those trained on, against the plan's notes."""
    shards.write_mapped(tmp_path, [400, 16, 333, 5, 900])
    assert Dataset.open(config(tmp_path, eval_files=0, max_files=1)).notes == []
    shutil.copy(tmp_path / "part_1/tokenized_cleaned_004.npz", tmp_path / "part_2/tokenized_cleaned_999.npz")
    cfg = config(tmp_path)
    plan = messages.plan(cfg, 1, Dataset.open(cfg), "here")
    short = "part_0/tokenized_cleaned_003.npz, part_1/tokenized_cleaned_001.npz"
    assert f"note      2 of 6 shards have fewer than sequence_length+1=17 tokens and are never read: {short}" in plan
    twin = (
        "part_2/tokenized_cleaned_999.npz = part_1/tokenized_cleaned_004.npz (one is held out, the other is trained on)"
    )
    assert f"note      1 of 6 shards are copies of others: {twin}" in plan


def test_names_that_are_not_utf8(tmp_path, data_py):
    """A set with a file name of any bytes against its fingerprint, verify's table and a run of two steps on it."""
    shards.write_mapped(tmp_path / "set", [400, 400], vocab_size=257)
    shard = tmp_path / "set/part_0/tokenized_cleaned_000.npz"
    os.rename(shard, os.fsencode(shard).replace(b"000", b"\xff"))
    dataset = Dataset.open(config(tmp_path / "set"))
    assert len(dataset.fingerprint) == 64 and json.loads(json.dumps(dataset.manifest)) == dataset.manifest
    launch.train(tmp_path, f"data_dir={tmp_path}/set", "max_steps=2", "save_steps=1")
    code, out, _ = data_py("verify", tmp_path / "set", "--tokenizer", "byte")
    assert code == 0 and "\\udcff.npz" in out


def test_too_many_open_files(tmp_path):
    """More shards than a process may have files, against an error that names the limit and the way out.

    One is open for each shard, until they are garbage.
    """
    shards.write_mapped(tmp_path, [100] * 60)
    few = (resource.RLIMIT_NOFILE, (50, 50))
    process = data_py_process("bench", tmp_path, preexec_fn=lambda: resource.setrlimit(*few))
    _, said = process.communicate(timeout=GUARD)
    assert process.returncode == 66 and re.search("cleaned_0.*Too many open files; `ulimit -n`", said), said
    gc.collect()  # what earlier tests left open
    before = len(os.listdir("/proc/self/fd"))
    dataset = Dataset.open(config(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before + 60
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_fails_for_a_moment(tmp_path, monkeypatch):
    """Two stale handles of a network disk against a shard that opens; the third time, and another error, are said."""
    shards.write_mapped(tmp_path, [100])
    path, errors, real = "part_0/tokenized_cleaned_000.npz", [errno.ESTALE, errno.EIO], os.pread

    def flaky(*args):
        if errors:
            raise OSError(errors.pop(), "the disk says no")
        return real(*args)

    monkeypatch.setattr(os, "pread", flaky)
    monkeypatch.setattr(shard_module, "PAUSES", (0.0, 0.0))
    assert Shard.open(tmp_path, path).num_tokens == 100 and not errors
    for errors[:] in ([errno.EIO] * 3, [errno.EACCES]):
        with pytest.raises(DataError, match="cannot read .*tokenized_cleaned_000.npz: the disk says no"):
            Shard.open(tmp_path, path)


@pytest.mark.parametrize("dtype,bad", [("<u2", 60000), ("<i4", -1), ("<u4", 2**32 - 1)])
def test_an_id_outside_the_vocabulary(tmp_path, dtype, bad):
    """One bad id against an error with the file, the id and its token offset, and only when its window is read."""
    write_tokens(tmp_path / "tokenized_cleaned_0.npz", np.where(np.arange(200) == 101, bad, 0).astype(dtype), dtype)
    dataset = Dataset.open(config(tmp_path, eval_files=0))
    assert len(dataset.gather(np.array([0, 1, 2]))) == 3
    with pytest.raises(DataError, match=f"tokenized_cleaned_0.npz has id {bad} at token 101; vocab_size=50257"):
        dataset.gather(np.arange(dataset.num_samples))


CHANGES = {
    "rewritten": lambda file: file.write_bytes((old := file.read_bytes())[:-900] + bytes(100) + old[-800:]),
    "removed": Path.unlink,
    "cut": lambda file: os.truncate(file, 500),
    "grown": lambda file: os.truncate(file, 10**6),
}


@pytest.fixture
def file_and_ids(folder, dataset) -> tuple[Path, list[int]]:
    """A file that was opened, and the ids of its windows."""
    file = folder / "part_1/tokenized_cleaned_004.npz"
    return file, [i for i, (path, _) in enumerate(dataset.locate(range(dataset.num_samples))) if path in str(file)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_training(file_and_ids, dataset, change):
    """Reading after a file was replaced, removed, cut or grown, against an error that names it, in the loader too."""
    file, ids = file_and_ids
    dataset.gather(np.array(ids))
    CHANGES[change](file)
    loader = Loader(dataset, 0, 1000, 4, micro_batch=4, workers=2)
    for read in (lambda: dataset.gather(np.array(ids[-1:])), lambda: list(loader)):
        with pytest.raises(DataError, match="part_1/tokenized_cleaned_004.npz (changed|was there)"):
            read()
    loader.close()


def test_a_file_that_only_has_another_time(file_and_ids, dataset, monkeypatch):
    """Touched, then copied anew: the same windows, each time after one reading of the whole file and not two."""
    file, ids = file_and_ids
    before, readings, real = dataset.gather(ids), [], Shard.has_its_checksum
    monkeypatch.setattr(Shard, "has_its_checksum", lambda shard: readings.append(shard.path) or real(shard))
    for change in (lambda: os.utime(file, ns=(1, 1)), lambda: os.replace(shutil.copy(file, f"{file}.new"), file)):
        change()
        for _ in range(3):
            assert (dataset.gather(ids) == before).all()
    assert readings == ["part_1/tokenized_cleaned_004.npz"] * 2


def test_a_file_cut_short_while_it_is_read(tmp_path):
    """A run that touches a page past the end, between the check and the read: the signal is named, with the line."""
    shards.write_mapped(tmp_path / "set", [100_000] * 2, vocab_size=257)
    cut = (
        "from refocused.shards.shard import Shard\nShard.check_unchanged = lambda shard: os.truncate(shard.file, 5000)"
    )
    run = launch.Launch(tmp_path, f"data_dir={tmp_path}/set", before=cut, module="")
    assert run.process.wait(GUARD) == -signal.SIGBUS and "Fatal Python error: Bus error" in run.text, run.text
    assert re.search(r'data.py", line \d+ in gather', run.text)


# ---- the loader


def test_batches_do_not_depend_on_the_layout(dataset):
    """Batches of all ranks put together, across an epoch's end, against the windows of their ids.

    For world 1, 2, 4, 8, accumulation 1, 2, 4 and several workers; after the batch size changed, by samples.
    """
    G, first = 32, dataset.num_samples // 32 - 1
    for W, A in itertools.product((1, 2, 4, 8), (1, 2, 4)):
        loaders = [Loader(dataset, first, first + 4, G, rank, W, G // W // A, A, 1 + W % 3) for rank in range(W)]
        for step, batches in enumerate(zip(*loaders, strict=True), first):
            ids = dataset.sample_ids(step * G, G)
            windows = torch.tensor(dataset.gather(ids))
            for batch in batches:
                assert (batch.step, len(batch.micro), batch.ids.tolist()) == (step, A, ids.tolist())
            x, y = (torch.cat([pair[i] for batch in batches for pair in batch.micro]) for i in range(2))
            assert x.equal(windows[:, :-1]) and y.equal(windows[:, 1:])
        assert step == first + 3
        for loader in loaders:
            loader.close()
    loader = Loader(dataset, 10, 10**9, 8, micro_batch=8, workers=2, first_sample=40)
    assert [next(loader).ids.tolist() for _ in range(2)] == [dataset.sample_ids(p, 8).tolist() for p in (40, 48)]
    assert len(loader._ahead) == 4 and loader.wait_seconds > 0, (
        "it reads so many steps ahead, and says how long it took"
    )
    loader.close()


def test_bench_runs(tmp_path, data_py):
    """The bench command on a small set against the line it promises; no speed is asserted."""
    shards.write_mapped(tmp_path, [200_000] * 2)
    code, out, _ = data_py("bench", tmp_path, "--sequence_length", 128, "--workers", 1, "--seconds", 0.1)
    assert code == 0 and re.fullmatch(r"[\d.]+M tok/s by 1 workers from 2 shards\n", out), out


def test_51_billion_tokens_open_by_their_headers(tmp_path):
    """774 shards of 66 million tokens: bytes read to open, memory, open files, the epochs they make."""
    shards.write_sparse_set(tmp_path, 774, 66_150_000)
    code = f"""
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(700, hard), hard))
from configs import Config
from data import Dataset

def figures(file, *names):
    found = dict(line.split()[:2] for line in open(file) if len(line.split()) > 1)
    return [int(found[name + ":"]) for name in names]

[before] = figures("/proc/self/io", "rchar")
dataset = Dataset.open(Config(data_dir={str(tmp_path)!r}))
[after] = figures("/proc/self/io", "rchar")
fingerprint, (mapped,) = dataset.fingerprint, figures("/proc/self/status", "RssFile")
places = range(0, 3 * dataset.num_samples, dataset.num_samples // 300)
for samples in places:
    dataset.gather(dataset.sample_ids(samples, 16))
anonymous, file = figures("/proc/self/status", "RssAnon", "RssFile")
print(after - before, anonymous, (file - mapped) / (16 * len(places)), dataset.num_tokens)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=GUARD)
    assert out.returncode == 0, out.stderr
    read, anonymous, per_window, tokens = map(float, out.stdout.split())
    assert read < 774 * 100_000 and anonymous < 300_000 and per_window <= 16
    assert f"{25_000 * 32_768 / tokens:.3f}" == "0.016" and 3.02 <= 590_625 * 262_144 / tokens <= 3.04


# ---- the demo's set


def test_demo(tmp_path, data_py):
    """Two builds of the demo's set against each other; an intact one is kept, another folder refused (as a changed set is:
    test_files_of_somebody_where_a_command_writes); what a killed one left goes."""
    (tmp_path / ".tmp-0123456789abcdef-a" / "text").mkdir(parents=True)
    for name in ("a", "b"):
        assert "7 shards" in data_py("demo", tmp_path / name)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert content(tmp_path / "a") == content(tmp_path / "b") and "intact" in data_py("demo", tmp_path / "a")[1]
    dataset = Dataset.open(config(tmp_path / "a", tokenizer="byte"))
    assert [s.path for s in dataset.eval_shards] == ["validation/00/tokenized_cleaned_validation_00.npz"]
    assert 5e6 < dataset.num_tokens < 5e7 and dataset.gather(np.arange(100)).max() <= 256
    (tmp_path / "c").mkdir()
    (tmp_path / "c/thesis.txt").write_text("important")
    assert data_py("demo", tmp_path / "c")[0] == 66 and (tmp_path / "c/thesis.txt").exists()
