"""Disks that lack something, and folders in which somebody else keeps things: nothing of theirs goes, and a run goes on."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from launch import GUARD, TINY, Run, last_step
from saves import save

from configs import ConfigError
from refocused import files, locks
from refocused.checkpoint import atomic, manifest, selection
from refocused.checkpoint.selection import choose
from refocused.run import preflight

OLD = ("metadata.json", "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl")  # Accelerate's


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    """odd(lacks, folder): the environment of a process for which the folder's disk lacks that."""
    library = tmp_path_factory.mktemp("odd") / "odd.so"
    build = ["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests/odd.c", "-ldl"]
    if not shutil.which("cc") or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux")
    subprocess.run(build, check=True)
    return lambda lacks, folder: {"LD_PRELOAD": str(library), "ODD": lacks, "ODD_DIR": str(folder)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def old_checkpoint(out: Path, step: int, number: int = 0) -> Path:
    """What the system that this one replaces saves, under a name that is also ours."""
    (folder := out / manifest.name(0, step, number)).mkdir(parents=True)
    for name in OLD:
        (folder / name).write_bytes(os.urandom(100))
    return folder


def run(args: list, env: dict[str, str] | None = None, code: int = 0) -> str:
    command, env = [sys.executable, *map(str, args)], os.environ | (env or {})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=GUARD)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_everything_on_a_disk_that_lacks_everything(odd, shards, tmp_path):
    """No locks, modes, maps, fsync or removal of folders: train, prune, resume, export, import, average and tokenize all
    succeed, and each lack is named once by a process."""
    env = odd("flock,dirsync,chmod,mmap,rmdir", tmp_path)
    keys = [*TINY, f"data_dir={shards}", f"output_dir={tmp_path}/out", f"logging_dir={tmp_path}/logs", "save_steps=2"]
    start = ["train.py", "configs/demo.py", *keys, "save_total_limit=1"]
    for more in ("max_steps=4",), ("max_steps=6", "resume=latest"):
        text = run([*start, *more], env)
        for what in ("no file locks", "no fsync of folders", "lets nobody change modes", "out/.* cannot be removed"):
            assert len(re.findall(f"^note: .*{what}", text, re.M)) == 1, (what, text)
    assert selection.names(tmp_path / "out") == [manifest.name(0, 6, 0)]
    run(["ckpt.py", "export", tmp_path / "out", tmp_path / "hf"], env)
    run(["ckpt.py", "import", tmp_path / "hf", tmp_path / "back"], env)
    run(["ckpt.py", "average", tmp_path / "out", tmp_path / "out", tmp_path / "mean"], env)
    (tmp_path / "a.txt").write_text("text " * 500)
    text = run(["data.py", "tokenize", tmp_path / "a.txt", tmp_path / "set", "--tokenizer", "byte"], env)
    assert "cannot map files" in text and list((tmp_path / "set").rglob("*.npz"))
    set_keys = [*start, f"data_dir={tmp_path}/set", f"output_dir={tmp_path}/other"]
    text = run([*set_keys, f"logging_dir={tmp_path}/other-logs", "max_steps=4", "eval_files=0"], env)
    assert "shards are read instead" in text and "done: 4 steps" in text


@pytest.mark.parametrize("lacks", ["", "flock"])
def test_a_second_run(odd, tmp_path, lacks):
    """Another process of this machine is kept out while the first lives, and not after it was killed; so it is where
    flock is refused. There another machine's or container's owner is only named."""
    code = (
        "import sys; from refocused.checkpoint import atomic; atomic.lock(sys.argv[1]); print('has it', flush=True); "
    )
    command = [sys.executable, "-c", code + "sys.stdin.read()", str(tmp_path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | odd(lacks, tmp_path), text=True, **pipes)

    first = start()
    try:
        assert first.stdout.readline() == "has it\n"
        assert f"is in use by {locks._machine()}, pid {first.pid}; " in start().communicate()[1]
    finally:
        first.kill()
    assert ("Lustre: -o flock" in first.communicate()[1]) == bool(lacks)
    assert start().communicate()[0] == "has it\n"
    # this process lives: its pid in another container, which has the same host name, says nothing here
    container = locks._machine()[:-9] + "00000000)"
    for owner in ("host elsewhere, pid 1", f"{container}, pid {os.getpid()}"):
        (tmp_path / ".lock").write_text(f"{owner}\n{locks.began(os.getpid())} 00\n")
        out, said = start().communicate()
        assert out == "has it\n" and (f"was last used by {owner}" in said) == bool(lacks)


def test_a_disk_that_renames_no_folders(odd, tmp_path):
    """No checkpoint could appear there: the start says so in words."""
    code = f"from refocused.checkpoint import atomic; atomic.lock({str(tmp_path)!r})"
    said = run(["-c", code], odd("rename", tmp_path), 1)
    assert f"output_dir={tmp_path} cannot be written: its disk does not rename files and folders (Function not" in said


def test_another_systems_checkpoints(tmp_path):
    """Folders of the same names, temporary names and notes beside ours through 20 saves, prunes and starts, one of them
    where ours is to be saved: every byte of theirs is there, none is counted as ours, each is named."""
    theirs = [old_checkpoint(tmp_path, step) for step in (1, 1250, 10000)]
    for name in (".tmp-mine", ".old-checkpoint-epoch0-step3-files1", "checkpoint-epoch0-step5-files1.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"x")
    (old_checkpoint(tmp_path, 7, 1) / "note").write_text("mine")
    (tmp_path / manifest.name(0, 9, 1)).write_bytes(b"a file")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="cannot read: damaged, or another program's.*ckpt.py import FOLDER"):
        choose(tmp_path, None)
    with pytest.raises(manifest.CheckpointError, match=f"(?s)no checkpoint in .*{theirs[1].name} has no MANIFEST.json"):
        choose(tmp_path, "latest")
    atomic.lock(tmp_path)
    for step in range(2, 22):
        newest = save(tmp_path, step).name  # where the name is taken, at 7 and 9, theirs moves aside
        if step == 11:
            (tmp_path / newest / "NOTES.txt").write_text("look at this one")
        atomic.prune(tmp_path, newest, 2, 10)
        atomic.recover(tmp_path)
        assert choose(tmp_path, "latest").name == newest
    steps = sorted(m["step"] for m in manifest.read_manifests(tmp_path)[0])
    assert steps == [10, 11, 19, 20, 21]  # 11 has a note in it
    assert (tmp_path / manifest.name(0, 11, 1) / "NOTES.txt").read_text() == "look at this one"
    moved = {re.sub(r"^(checkpoint-[^/]+)\.before-[0-9a-f]+", r"\1", name): b for name, b in contents(tmp_path).items()}
    assert before.items() <= moved.items() and len(list(tmp_path.glob("*.before-*"))) == 2
    assert list(tmp_path.glob("*.before-*/note"))


def test_files_of_somebody_where_a_command_writes(shards, tmp_path):
    """A user's file, folder or unfinished line under a name that a run, prepare, tokenize, demo, export, pull or the logs
    would take: the command refuses or goes around it, and every byte is there afterwards."""
    out, logs, made, texts = (tmp_path / name for name in ("out", "logs", "made", "texts"))
    theirs = {
        out / ".tmp-deadbeef-mynotes/n.txt": b"notes",
        logs / "trace.jsonl": b'{"my": "log"}',
        tmp_path / "noted/.output_dir": b"where my outputs are",
        made / "a.npz": b"not a shard",
        made / "tokenized_cleaned_00001.npz": b"mine",
        tmp_path / ".making-hf/photos/a.jpg": b"photo",
        tmp_path / ".making-hf/.filling": b"host x, pid 1\n",
        tmp_path / "locked/.lock": b"another program's\n",
        tmp_path / "weights.pt": b"theirs",
    }
    for path, content in theirs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    texts.mkdir()
    (texts / "a.txt").write_text("once upon a time")
    np.savez_compressed(texts / "a.npz", input_ids=np.ones((2, 8), np.int32))
    (tmp_path / "config.py").write_text("seed = 1")
    train = ["train.py", tmp_path / "config.py", *TINY, f"data_dir={shards}", "warmup_steps=1"]
    own = [*train, f"output_dir={out}", f"logging_dir={logs}"]
    run([*own, "max_steps=1"])
    run([*own, "max_steps=2", "resume=latest"])
    run([*train, f"output_dir={tmp_path}/locked", f"logging_dir={tmp_path}/other"], code=2)
    said = run([*train, f"output_dir={tmp_path}/new", f"logging_dir={tmp_path}/noted"], code=2)
    assert f"{tmp_path}/noted/.output_dir is not of this program; move it away" in said
    said = run(["data.py", "prepare", texts, made, "--vocab_size", "9", "--end_of_text", "8"], code=66)
    assert "a.npz was not made by this command, and stays" in said
    said = run(["data.py", "tokenize", texts / "a.txt", made, "--tokenizer", "byte"], code=66)
    assert "tokenized_cleaned_00001.npz was not made from these sources and stays" in said
    run(["ckpt.py", "export", out, tmp_path / "weights.pt", "--torch"], code=2)
    run(["ckpt.py", "export", out, tmp_path / "hf"])
    for path, content in theirs.items():
        assert path.name == ".filling" or path.read_bytes().startswith(content), path
    demo = tmp_path / "demo"
    run(["data.py", "demo", demo])
    (shard := sorted(demo.rglob("*.npz"))[0]).write_bytes(b"replaced by somebody")
    assert "demo was damaged or changed; remove it" in run(["data.py", "demo", demo], code=66)
    assert shard.read_bytes() == b"replaced by somebody"


def test_what_cannot_be_read_for_a_moment_stays(odd, shards, tmp_path):
    """One EIO for state.json of the newest checkpoint, right behind its commit: it is there, and so is the one before."""
    env = odd("eio", tmp_path) | {"ODD_EIO": f"/{manifest.name(0, 6, 0)}/"}
    keys = [*TINY, f"data_dir={shards}", f"output_dir={tmp_path}/out", f"logging_dir={tmp_path}/logs", "save_steps=2"]
    run(["train.py", "configs/demo.py", *keys, "save_total_limit=2", "max_steps=6"], env)
    kept = {manifest.step_of(n) for n in selection.names(tmp_path / "out")}
    assert {4, 6} <= kept, kept


def test_a_link_that_is_turned(shards, tmp_path):
    """output_dir is a link that leads to another run's folder in mid-run: what is there stays, ours goes where it did."""
    (tmp_path / "a").mkdir()
    for step in (1, 2, 3):
        save(tmp_path / "b", step)
    before = contents(tmp_path / "b")
    (link := tmp_path / "link").symlink_to(tmp_path / "a")
    keys = [f"data_dir={shards}", f"output_dir={link}", "max_steps=100000", "save_steps=20", "save_total_limit=1"]
    running = Run(keys, 1, tmp_path / "run")
    running.wait_for("Step 25: ")
    (tmp_path / "new").symlink_to(tmp_path / "b")
    os.replace(tmp_path / "new", link)
    step = last_step(running.text)
    running.wait_for(f"Step {step + 60}: ")
    running.signal(15)
    assert running.wait() == [75], running.text
    assert contents(tmp_path / "b") == before
    assert manifest.step_of(selection.names(tmp_path / "a")[0]) > step


def test_a_damaged_save_is_never_committed(tmp_path):
    """A state or a manifest that could not be read again fails the save, and the checkpoint before it stands."""
    folder = tmp_path / ".tmp-0123456789abcdef-x"
    folder.mkdir()
    final = tmp_path / manifest.name(0, 1, 1)
    with pytest.raises(manifest.CheckpointError, match="has no config"):
        state = b'{"data": {}, "step": 1, "samples_seen": 1, "tokens": 1, "run": {}}'
        atomic.commit(folder, final, "ab" * 8, {}, {manifest.STATE: state}, 1)
    told = {"format": 1, "name": final.name, "save_id": "../x", "step": 1, "generation": 1, "time": 1, "files": {}}
    with pytest.raises(manifest.CheckpointError, match="save_id"):
        atomic.put(folder, final, "ab" * 8, manifest.encode_manifest(told))
    assert not final.exists()


def test_long_names_and_silent_disks(tmp_path, monkeypatch):
    """A name as long as a disk takes is written aside under a shorter one; a disk that names no size is no full one."""
    for name in ("x" * 255, "ü" * 127):
        files.write(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1" and len(os.fsencode(files.beside(tmp_path / name).name)) < 143
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    assert files.too_small(tmp_path, 1 << 60) == "" and preflight.files.free(tmp_path) == np.inf
