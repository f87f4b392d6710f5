"""Shards, samples, their order, and the loader: real files, compared with plain numpy."""

import contextlib
import dataclasses
import errno
import gc
import io
import json
import mmap
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import launch
import numpy as np
import pytest
import shards
import torch
from launch import GUARD

import data
from configs import Config, ConfigError
from data import Dataset, Loader, explain_change, permutation
from refocused.run import messages
from refocused.shards import shard as shard_module
from refocused.shards.find import find_files, find_sources
from refocused.shards.prepare import read_note, write_shard
from refocused.shards.shard import DataError, PackedShard, Shard
from refocused.shards.tokenizers import find

ROOT = Path(__file__).parent.parent
V, T = 50257, 16


def config(folder: Path, **changes) -> Config:
    return dataclasses.replace(Config(), data_dir=str(folder), sequence_length=T, vocab_size=V, seed=7, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards.write_mapped(tmp_path / "set", [400, 17, 333, 16, 900, 250])
    return tmp_path / "set"


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    return Dataset.open(config(folder))


# ---- shards


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4"])
@pytest.mark.parametrize("name", ["input_ids", "tokens", "arr_0"])
@pytest.mark.parametrize("shape", [(1000,), (20, 50)])
def test_shard_maps_what_numpy_wrote(tmp_path, dtype, name, shape):
    """A window read from a plain np.savez file against the array itself, for each dtype, name and rank."""
    array = np.random.default_rng(0).integers(0, V, shape).astype(dtype)
    np.savez(tmp_path / "a.npz", **{name: array} | {"other": np.arange(3)} if name != "arr_0" else {name: array})
    shard = Shard.open(tmp_path, "a.npz")
    assert shard.stream.dtype == dtype and (shard.stream == array.ravel()).all() and not shard.stream.flags.writeable
    assert shard.shape == shape
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert shard.crc32 == archive.getinfo(f"{name}.npy").CRC


PACKED = {
    "is compressed": lambda file: np.savez_compressed(file, input_ids=np.arange(99, dtype=np.int32)),
    "is padded": lambda file: np.savez(file, input_ids=np.ones((3, 4), "<i4"), sequence_lengths=np.array([1, 2, 4])),
    "holds int64": lambda file: np.savez(file, input_ids=np.arange(99)),
    "holds int32 .>i4": lambda file: np.savez(file, input_ids=np.arange(99, dtype=">i4")),
}


@pytest.mark.parametrize("why", PACKED)
def test_shards_that_cannot_be_mapped_say_how_to_prepare_them(tmp_path, why):
    """The bucket's format, compressed or not, and other integers, against an error of its kind that names the command."""
    PACKED[why](tmp_path / "a.npz")
    with pytest.raises(PackedShard, match=f"{why}.*data.py prepare"):
        Shard.open(tmp_path, "a.npz")


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


def test_permutation_is_uniform():
    """How often a position shows each sample over 6,000 seeds, against a chi-square bound."""
    n, seeds = 7, 6000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), permutation(seed, 0, n, np.arange(n))] += 1
    assert ((counts - seeds / n) ** 2 / (seeds / n)).sum() * (n - 1) / n < 36 + 4 * np.sqrt(2 * 36)


def test_an_epoch_visits_every_window_once(dataset):
    """The ids of steps that span two epochs against the set of all windows; the two orders differ."""
    n, G = dataset.num_samples, 5
    ids = np.concatenate([dataset.sample_ids(k * G, G) for k in range(-(-2 * n // G))])
    first, second = ids[:n].tolist(), ids[n : 2 * n].tolist()
    assert sorted(first) == sorted(second) == list(range(n)) and first != second
    straddling = dataset.sample_ids(n - 2, 4 * n)  # more than a whole epoch in one batch
    assert straddling.tolist() == np.concatenate([dataset.sample_ids(p, 1) for p in range(n - 2, 5 * n - 2)]).tolist()


def windows_of(folder: Path, paths: list[str]) -> list[list[int]]:
    """All windows in order, the plain way."""
    found = []
    for path in paths:
        tokens = np.load(folder / path)["input_ids"].astype(int).ravel().tolist()
        found += [tokens[i : i + T + 1] for i in range(0, len(tokens) - T, T)]
    return found


def test_gather_and_locate(folder, dataset):
    """Every window by id against slices of np.load; held-out windows come from the last file alone."""
    paths = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.npz"))
    expected = windows_of(folder, paths[:-1])
    assert dataset.num_samples == len(expected) and dataset.num_tokens == len(expected) * T
    assert dataset.gather(np.arange(dataset.num_samples)).tolist() == expected
    held_out = windows_of(folder, paths[-1:])
    assert dataset.num_eval_samples == len(held_out)
    assert dataset.gather(dataset.eval_ids(10**6)).tolist() == held_out
    few = dataset.eval_ids(3)
    assert len(few) == 3 and len(set(few.tolist())) == 3
    for id_, (path, start) in zip(range(len(expected)), dataset.locate(np.arange(len(expected))), strict=True):
        assert np.load(folder / path)["input_ids"][start : start + T + 1].tolist() == expected[id_]


@pytest.mark.parametrize("lengths", [[1000], [400, 1000, 16], [16, 1000], [16, 1000, 3, 3]])
def test_the_last_long_shard_holds_out_its_tail(tmp_path, lengths):
    """A single shard, no window in the held-out shards, or none in the others: the windows trained on and those held out
    against all in order, nothing shared and nothing lost; what is divided beside others is said."""
    shards.write_mapped(tmp_path, lengths, parts=1)
    dataset = Dataset.open(config(tmp_path, eval_files=max(1, len(lengths) - 2)))
    everything = windows_of(tmp_path, sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.npz")))
    assert dataset.num_eval_samples == 3 and dataset.num_samples == len(everything) - 3
    assert dataset.gather(np.arange(len(everything))).tolist() == everything
    long = f"part_0/tokenized_cleaned_00{lengths.index(1000)}.npz"
    assert [f"the last 5% of {long} are held out" in text for text in dataset.notes[-1:]] == [True] * (len(lengths) > 1)
    assert Dataset.open(config(tmp_path, eval_files=0)).num_samples == len(everything)
    moving = Dataset.open(config(tmp_path, shift_windows=True))
    read = [start for path, start in moving.locate(moving.sample_ids(0, 50 * moving.num_samples)) if path == long]
    assert max(read) + T <= min(start for _, start in moving.locate(moving.eval_ids(9)))


def test_max_files_and_position(folder, dataset):
    """max_files=3 against the first three paths, the third held out; where a run stands after so many samples."""
    first = Dataset.open(config(folder, max_files=3))
    paths = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.npz"))
    assert [s.path for s in first.shards] == paths[:2] and [s.path for s in first.eval_shards] == paths[2:3]
    n = dataset.num_samples
    assert dataset.position(0)["epoch"] == 0 and dataset.position(n)["epoch"] == 1
    at = dataset.position(n + n // 2)
    assert at["epoch"] == 1 and at["epoch_fraction"] == (n // 2) / n and at["files"] == (n // 2) * 5 // n
    assert [(at["next_shard"], at["next_offset"])] == dataset.locate(dataset.sample_ids(n + n // 2, 1))


# ---- the fingerprint


def test_fingerprint_and_what_changed(folder, dataset):
    """Fingerprints of a set before and after adding, removing and changing a shard; the message names all three."""
    again = Dataset.open(config(folder, eval_files=2))
    assert again.fingerprint == dataset.fingerprint and len(dataset.fingerprint) == 64
    assert explain_change(dataset.manifest, again.manifest) == ""
    (folder / "part_0/tokenized_cleaned_000.npz").unlink()
    write_shard(folder / "part_1/tokenized_cleaned_004.npz", np.dtype("<u2"), [np.zeros(900)], {})
    write_shard(folder / "new/tokenized_cleaned_9.npz", np.dtype("<u2"), [np.zeros(90)], {})
    changed = Dataset.open(config(folder))
    message = explain_change(dataset.manifest, changed.manifest)
    assert changed.fingerprint != dataset.fingerprint
    assert "added 1: new/tokenized_cleaned_9.npz" in message
    assert "removed 1: part_0/tokenized_cleaned_000.npz" in message
    assert "changed 1: part_1/tokenized_cleaned_004.npz (crc32 " in message


def test_what_another_set_means_for_a_resume(tmp_path):
    """A grown set, a shrunk one and another eval_files, allowed: where the run begins, what was held out and what is now."""
    shards.write_mapped(tmp_path, [400, 400, 400], seed=1, parts=1)
    before = Dataset.open(config(tmp_path))
    keys = {key: getattr(config(tmp_path), key) for key in ("seed", "sequence_length", "eval_files")}
    state = {"data": {"manifest": before.manifest}, "config": keys, "samples_seen": 60}
    assert before.check_same(state, config(tmp_path)) == []
    write_shard(tmp_path / "part_0/tokenized_cleaned_9.npz", np.dtype("<u2"), [np.arange(400)], {})
    cfg = config(tmp_path, allow_change=True)
    assert Dataset.open(cfg).check_same(state, cfg) == [
        f"data or order are other ones: this run begins {60 / 72:.1%} into epoch 0 of them, and reads what comes before that "
        "only in the next epoch",
        "held out before and trained on now: part_0/tokenized_cleaned_002.npz",
        "eval_loss before and after are of different text",
    ]
    cfg = config(tmp_path, allow_change=True, max_files=2)
    lines = Dataset.open(cfg).check_same(state, cfg)
    assert (
        "60.0%" not in lines[0] and lines[1] == "trained on before and held out now: part_0/tokenized_cleaned_001.npz"
    )
    state["data"]["manifest"] = [
        *before.manifest[:2],
        before.manifest[2] | {"tokens": 5},
    ]  # the tail of 001 was held out
    cfg = config(tmp_path, allow_change=True)
    assert "held out before and trained on now: part_0/tokenized_cleaned_001.npz" in Dataset.open(cfg).check_same(
        state, cfg
    )


# ---- the tokenizer


def test_shards_of_another_tokenizer(tmp_path):
    """Shards that say which tokenizer made them, one file among older ones without: another is refused, before any wait,
    with both names and the way out; one that is renamed, or moved, is the same."""
    shards.write_mapped(tmp_path / "set", [400, 900])
    note = {"tokenizer": "byte"}
    write_shard(tmp_path / "set/tokenized_cleaned_new.npz", np.dtype("<u2"), [np.zeros(500)], note)
    with pytest.raises(DataError) as caught:
        Dataset.open(config(tmp_path / "set"))
    for text in ("1 of 3 shards", "tokenized_cleaned_new.npz, were made with byte, this run has tokenizer=gpt2"):
        assert text in str(caught.value)
    for text in ("set tokenizer=byte vocab_size=257,", "allow_change=true"):
        assert text in str(caught.value)
    for keys in ({"tokenizer": "byte"}, {"tokenizer": None}, {"allow_change": True}):
        assert Dataset.open(config(tmp_path / "set", **keys)).num_samples
    for name, texts in (("a", ["some text"]), ("b", ["other text"])):
        (tmp_path / name).mkdir()
        shards.own_tokenizer(tmp_path / name, texts, 300)
    ours = find(str(tmp_path / "a/tokenizer.json"))
    note = {"tokenizer": ours.identity, "tokenizer_name": ours.name}
    write_shard(tmp_path / "set/tokenized_cleaned_new.npz", np.dtype("<u2"), [np.zeros(500)], note)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    dataset = Dataset.open(config(tmp_path / "set", tokenizer=str(tmp_path / "copy")))
    assert dataset.tokenizer == ours.identity and ours.identity.endswith(", end-of-text 0")
    for other in ("gpt2", str(tmp_path / "b")):
        with pytest.raises(DataError, match=r"were made with a/tokenizer.json \(sha256:.*set tokenizer= to its path"):
            Dataset.open(config(tmp_path / "set", tokenizer=other))

    keys = {key: getattr(config(tmp_path), key) for key in ("seed", "sequence_length", "eval_files")}

    def state(**data) -> dict:
        data["manifest"] = dataset.manifest
        return {"data": data, "config": {**keys, "tokenizer": "a path"}, "samples_seen": 0}

    ours_now = config(tmp_path / "set", tokenizer=str(tmp_path / "copy"))
    dataset.check_same(state(tokenizer=dataset.tokenizer), ours_now)
    dataset.check_same(state(tokenizer=None), ours_now)
    for other in (state(tokenizer="byte"), state()):  # the last: from before there was a note, by the config's name
        with pytest.raises(DataError, match="(?s)tokenizer (byte|a path) -> sha256:.*allow_change"):
            dataset.check_same(other, ours_now)
        dataset.check_same(other, dataclasses.replace(ours_now, allow_change=True))


def test_tokenizers_that_are_none(tmp_path):
    """A name with a typo, a folder without the file, a file that is none or does not say what ends a text."""
    (tmp_path / "tokenizer.json").write_text("{}")
    vocab = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 0, "content": "a"}]}
    shards.write_mapped(tmp_path / "set", [400])
    cases = {
        "~nobody-of-that-name/x" + "x" * 300: "no folder that has one",
        "gpt": "tokenizer=gpt is none of gpt2, byte,.*did you mean gpt2",
        f"{tmp_path}/set": "no folder that has one.*each checkpoint of a run keeps a copy",
        f"{tmp_path}": "tokenizer.json is no tokenizer.json: KeyError",
    }
    for name, text in cases.items():
        with pytest.raises(ConfigError, match=text):
            Dataset.open(config(tmp_path / "set", tokenizer=name))
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocab))
    with pytest.raises(ConfigError, match=r'does not say which token ends a text.*special tokens: a.*"eos_token"'):
        Dataset.open(config(tmp_path / "set", tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    assert find(f"{tmp_path}/tokenizer.json").end == 1
    code = "import sys; sys.modules['tokenizers'] = None; from refocused.shards.tokenizers import find; "
    out = subprocess.run(
        [sys.executable, "-c", code + f"t = find({str(tmp_path)!r}); print(t.end, t.size); t.encode('a')"],
        cwd=ROOT, capture_output=True, text=True, timeout=GUARD,
    )  # fmt: skip
    assert out.stdout == "1 2\n" and re.search("needs one more package: .*pip install tokenizers", out.stderr), (
        out.stderr
    )


# ---- bad sets


def test_missing_and_empty_folders(tmp_path):
    """A folder that is not there, one without shards, one with short shards only, against their messages."""
    with pytest.raises(DataError, match="nowhere is no folder; `python .*data.py tokenize TEXTS .*nowhere` makes"):
        Dataset.open(config(tmp_path / "nowhere"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/notes.txt").touch()
    with pytest.raises(DataError, match="no file named like tokenized_file_pattern=tokenized_cleaned"):
        Dataset.open(config(tmp_path))
    write_shard(tmp_path / "sub/train.npz", np.dtype("<u2"), [np.zeros(900)], {})
    with pytest.raises(DataError, match=r"but 1 others: tokenized_file_pattern=\*.npz reads sub/train.npz"):
        Dataset.open(config(tmp_path))
    shards.write_mapped(tmp_path, [16, 5])
    with pytest.raises(DataError, match="sequence_length\\+1=17 tokens: the longest of all 2 has 16"):
        Dataset.open(config(tmp_path))
    for i, lengths in enumerate(([17], [17, 16], [16, 17])):
        shards.write_mapped(tmp_path / f"{i}", lengths)
        only = f"all 1 windows of sequence_length.1=17 tokens in {len(lengths)} shards are held out"
        with pytest.raises(DataError, match=only):
            Dataset.open(config(tmp_path / f"{i}"))
        shutil.rmtree(tmp_path / f"{i}")
    with pytest.raises(DataError, match="eval_files=2 holds out all of 2 shards"):
        Dataset.open(config(tmp_path, eval_files=2))


def in_child(work, *args, user: int | None = None) -> tuple:
    """What work(*args) returns, or its DataError's message, and its stderr, in a process of its own, and not as root."""

    def child(send):
        if user and os.getuid() == 0:
            os.setuid(user)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                result = work(*args)
            except DataError as error:
                result = str(error)
        send.send((result, said.getvalue()))

    receive, send = multiprocessing.Pipe(False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(send,))
    process.start()
    assert receive.poll(GUARD)
    result = receive.recv()
    process.join()
    return result


def test_unreadable_folders():
    """One's own folder without permission against an error with its name; another user's is left out with a word."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        shards.write_mapped(Path(name), [100, 100])
        (Path(name) / "lost+found").mkdir(mode=0)
        os.chmod(Path(name, "part_1"), 0)
        theirs = in_child(find_files, name, user=65534)
        os.chown(Path(name, "part_1"), 65534, 65534) if os.getuid() == 0 else None
        own = in_child(find_files, name, user=65534)
        os.chmod(Path(name, "part_1"), 0o755)
    assert own[0] == f"cannot read the folder {name}/part_1: Permission denied"
    if os.getuid() == 0:
        assert theirs[0] == ["part_0/tokenized_cleaned_000.npz"]
        assert theirs[1] == f"left out {name}/part_1, another user's: Permission denied\n"


def test_a_walk_meets_each_file_once(tmp_path):
    """Links upwards, in circles, to a disk elsewhere, twice to one folder; hidden things; a cache: against the files."""
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    shards.write_mapped(folder, [100, 100, 100])
    shards.write_mapped(elsewhere, [100])
    shards.write_mapped(folder / ".Trash-1000/files", [100])
    shards.write_mapped(folder / "lost+found", [100])
    shards.write_mapped(folder / "cache/x-1", [100])
    (folder / "part_0/._tokenized_cleaned_000.npz").write_bytes(b"a Mac was here")
    goals = {"latest": ".", "b": ".", "part_1/up": "../..", "a0": "part_2", "z": elsewhere, "y": elsewhere}
    for link, goal in goals.items():
        (folder / link).symlink_to(goal)
    plain = [f"part_{i}/tokenized_cleaned_00{i}.npz" for i in range(3)]
    beyond = "part_1/up/elsewhere/part_0/tokenized_cleaned_000.npz"  # the upward link leads there, too, and later
    expected = sorted([*plain, "y/part_0/tokenized_cleaned_000.npz"])
    assert beyond not in expected
    found = Dataset.open(config(folder, cache_dir=str(folder / "cache"), eval_files=0)).shards
    assert [shard.path for shard in found] == expected


def test_what_is_no_regular_file(tmp_path, capsys):
    """A FIFO and a socket named like shards or texts, and in the cache: left out with a word, and nothing waits for them."""
    shards.write_mapped(tmp_path / "set", [400, 400])
    os.mkfifo(tmp_path / "set/part_0/tokenized_cleaned_9.npz")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        os.rename(tmp_path / "s", tmp_path / "set/tokenized_cleaned_8.npz")
    assert len(Dataset.open(config(tmp_path / "set")).manifest) == 2
    said, left_out = capsys.readouterr().err, f"left out {tmp_path}/set/part_0/tokenized_cleaned_9.npz: no regular file"
    assert left_out in said and "cleaned_8.npz: no" in said
    os.mkfifo(tmp_path / "out.npz")
    assert read_note(tmp_path / "out.npz") == {}
    with pytest.raises(DataError, match="out.npz is no regular file and no folder"):
        find_sources(tmp_path / "out.npz")


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
    assert (read.shards[0].stream[:] == mapped.shards[0].stream).all() and read.notes == mapped.notes
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


def test_names_that_are_not_utf8(tmp_path):
    """A set with a file name of any bytes against its fingerprint, verify's table and a run of two steps on it."""
    shards.write_mapped(tmp_path / "set", [400, 400], vocab_size=257)
    os.rename(
        tmp_path / "set/part_0/tokenized_cleaned_000.npz", bytes(tmp_path) + b"/set/part_0/tokenized_cleaned_\xff.npz"
    )
    dataset = Dataset.open(config(tmp_path / "set"))
    assert len(dataset.fingerprint) == 64 and json.loads(json.dumps(dataset.manifest)) == dataset.manifest
    launch.train(tmp_path, f"data_dir={tmp_path}/set", "max_steps=2", "save_steps=1")
    command = [sys.executable, str(ROOT / "data.py"), "verify", str(tmp_path / "set"), "--tokenizer", "byte"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=GUARD, env=os.environ | {"LC_ALL": "C"})
    assert out.returncode == 0 and "\\udcff.npz" in out.stdout, out


def test_too_many_open_files(tmp_path):
    """More shards than a process may have files, against an error that names the limit and the way out."""
    shards.write_mapped(tmp_path, [100] * 60)

    def open_few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
        return Dataset.open(config(tmp_path)).num_samples

    message, _ = in_child(open_few)
    assert "Too many open files; `ulimit -n`" in message and "tokenized_cleaned_0" in message
    gc.collect()  # what earlier tests left open
    before = len(os.listdir("/proc/self/fd"))
    dataset = Dataset.open(config(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before + 60  # one each, until they are garbage
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_fails_for_a_moment(tmp_path, monkeypatch):
    """Two stale handles of a network disk against a shard that opens; the third time, and another error, are said."""
    shards.write_mapped(tmp_path, [100])
    path, errors, real = "part_0/tokenized_cleaned_000.npz", [], os.pread

    def flaky(*args):
        if errors:
            raise OSError(errors.pop(), "the disk says no")
        return real(*args)

    monkeypatch.setattr(os, "pread", flaky)
    monkeypatch.setattr(shard_module, "PAUSES", (0.0, 0.0))
    errors[:] = [errno.ESTALE, errno.EIO]
    assert Shard.open(tmp_path, path).num_tokens == 100 and not errors
    for errors[:] in ([errno.EIO] * 3, [errno.EACCES]):
        with pytest.raises(DataError, match="cannot read .*tokenized_cleaned_000.npz: the disk says no"):
            Shard.open(tmp_path, path)


@pytest.mark.parametrize("dtype,bad", [("<u2", 60000), ("<i4", -1), ("<u4", 2**32 - 1)])
def test_an_id_outside_the_vocabulary(tmp_path, dtype, bad):
    """One bad id against an error with the file, the id and its token offset, and only when its window is read."""
    tokens = np.zeros(200, np.int64)
    tokens[101] = bad
    write_shard(tmp_path / "tokenized_cleaned_0.npz", np.dtype(dtype), [tokens.astype(dtype)], {})
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
    with pytest.raises(DataError, match="part_1/tokenized_cleaned_004.npz (changed|was there)"):
        dataset.gather(np.array(ids[-1:]))
    loader = Loader(dataset, 0, 1000, 4, micro_batch=4, workers=2)
    with pytest.raises(DataError, match="part_1/tokenized_cleaned_004.npz (changed|was there)"):
        list(loader)
    loader.close()


def test_a_file_that_only_has_another_time(file_and_ids, dataset, monkeypatch):
    """Touched, then copied anew: the same windows, each time after one reading of the whole file and not two."""
    file, ids = file_and_ids
    before, readings, real = dataset.gather(ids), [], Shard.has_its_checksum
    monkeypatch.setattr(Shard, "has_its_checksum", lambda shard: readings.append(shard.path) or real(shard))
    os.utime(file, ns=(1, 1))
    for _ in range(3):
        assert (dataset.gather(ids) == before).all()
    shutil.copy(file, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)
    for _ in range(3):
        assert (dataset.gather(ids) == before).all()
    assert readings == ["part_1/tokenized_cleaned_004.npz"] * 2


def test_a_file_cut_short_while_it_is_read(tmp_path):
    """A page past the end touched in a thread, between the check and the read: the signal is named, with the line."""
    shards.write_mapped(tmp_path, [100_000] * 2)
    code = f"""
import faulthandler, os, threading
from data import Dataset
from configs import Config
faulthandler.enable()  # as train.py does
dataset = Dataset.open(Config(data_dir={str(tmp_path)!r}, sequence_length=17))
os.truncate({str(tmp_path / "part_0/tokenized_cleaned_000.npz")!r}, 5000)
dataset.shards[0].check_unchanged = lambda: None  # as if it was cut just behind the check
threading.Thread(target=lambda: dataset.gather([dataset.num_samples - 1])).start()
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=GUARD)
    assert out.returncode == -signal.SIGBUS and "Fatal Python error: Bus error" in out.stderr, out
    assert "data.py" in out.stderr and "in gather" in out.stderr


# ---- the loader


def global_batches(dataset: Dataset, G: int, W: int, A: int, steps: range, workers: int) -> list[list]:
    """[(ids, x, y)] per step, put together from the loaders of all ranks."""
    B = G // W // A
    loaders = [Loader(dataset, steps.start, steps.stop, G, rank, W, B, A, workers) for rank in range(W)]
    found = []
    for batches in zip(*loaders, strict=True):
        micro = [pair for batch in batches for pair in batch.micro]
        assert all(x.shape == (B, T) and x.dtype == torch.int64 and x.is_contiguous() for x, _ in micro)
        assert len(batches[0].micro) == A and all((batch.ids == batches[0].ids).all() for batch in batches)
        x, y = (torch.cat([pair[i] for pair in micro]).tolist() for i in range(2))
        found.append((batches[0].step, batches[0].ids.tolist(), x, y))
    for loader in loaders:
        loader.close()
    return found


def test_batches_do_not_depend_on_the_layout(dataset):
    """Ids and tokens of global batches across an epoch border for world 1, 2, 4, 8, accumulation 1, 2, 4, workers."""
    G = 32
    border = dataset.num_samples // G
    steps = range(border - 1, border + 3)
    plain = []
    for k in steps:
        ids = dataset.sample_ids(k * G, G)
        windows = dataset.gather(ids)
        plain.append((k, ids.tolist(), windows[:, :-1].tolist(), windows[:, 1:].tolist()))
    for W in (1, 2, 4, 8):
        for A in (1, 2, 4):
            assert global_batches(dataset, G, W, A, steps, workers=1 + W % 3) == plain


def test_loader_starts_at_any_step(dataset):
    """The batches from step k on against the tail of those from step 0; after the batch size changed, by samples."""
    whole = global_batches(dataset, 4, 1, 1, range(30), 2)
    for k in (1, 13, 29):
        assert global_batches(dataset, 4, 1, 1, range(k, 30), 3) == whole[k:]
    loader = Loader(dataset, 10, 12, 8, micro_batch=8, first_sample=40)
    assert [batch.ids.tolist() for batch in loader] == [dataset.sample_ids(p, 8).tolist() for p in (40, 48)]


def test_loader_reads_ahead_boundedly_and_reports(dataset):
    """How far a loader got before anything is taken, and the time its consumer waited."""
    loader = Loader(dataset, 0, 10**9, 4, micro_batch=4, workers=2)
    next(loader)
    assert len(loader._ahead) == 4 and loader.wait_seconds > 0
    loader.close()


# ---- scale


def test_51_billion_tokens_open_by_their_headers(tmp_path):
    """774 sparse shards of 66 million tokens: bytes read to open, memory, open files, the epochs they make."""
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


# ---- tokenizers


def test_byte_tokenizer():
    """Text through the byte encoding against its UTF-8 bytes and back; end-of-text is id 256 of 257."""
    encoding, text = find("byte").known, "naïve\n\n<|endoftext|> Ω"
    assert encoding.encode_ordinary(text) == list(text.encode()) and encoding.decode(list(text.encode())) == text
    assert encoding.eot_token == 256 and encoding.n_vocab == 257


def test_gpt2_vocabulary_that_cannot_be_had(tmp_path):
    """tiktoken with an empty cache and a dead proxy, against one error that names the way out."""
    code = "from refocused.shards import tokenizers; tokenizers.find('gpt2').known"
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=GUARD)
    assert "DataError: tiktoken cannot fetch the gpt2 vocabulary" in out.stderr and "TIKTOKEN_CACHE_DIR" in out.stderr


# ---- the demo's set


def test_demo(tmp_path, capsys):
    """Two builds of the demo's set against each other; an intact one is kept, a damaged one or another folder is refused;
    what a killed one left goes."""

    def demo(name: str) -> str:
        code = data.main(["demo", str(tmp_path / name)])
        return f"{code} {''.join(capsys.readouterr())}"

    (tmp_path / ".tmp-0123456789abcdef-a" / "text").mkdir(parents=True)
    assert "7 shards" in demo("a") and "7 shards" in demo("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    files = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert "intact" in demo("a")
    dataset = Dataset.open(config(tmp_path / "a", max_files=-1, tokenizer="byte"))
    assert [s.path for s in dataset.eval_shards] == ["validation/00/tokenized_cleaned_validation_00.npz"]
    assert 5e6 < dataset.num_tokens < 5e7 and dataset.gather(np.arange(100)).max() <= 256

    victim = max(files, key=lambda path: len(files[path]))
    damaged = bytearray(files[victim])
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "a" / victim).write_bytes(damaged)
    assert "a was damaged or changed; remove it" in demo("a") and (tmp_path / "a" / victim).read_bytes() == damaged
    (tmp_path / "c").mkdir()
    (tmp_path / "c/thesis.txt").write_text("important")
    assert demo("c").startswith("66 error:") and (tmp_path / "c/thesis.txt").exists()
