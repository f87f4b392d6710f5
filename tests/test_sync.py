"""Checkpoints between a folder and a bucket that is a real HTTP server; the checkpoints here hold random bytes."""

import dataclasses
import functools
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from launch import GUARD, until
from saves import config, save

import ckpt
from configs import ConfigError
from refocused import locks
from refocused.bucket import gcs, history, remote, start, sync
from refocused.checkpoint import atomic, manifest, selection


@pytest.fixture
def place(server):
    return remote.Place(gcs.Bucket("bucket", patience=GUARD, timeout=2), "run")


def steps(place) -> list[int]:
    return [manifest.step_of(r.name) for r in place.checkpoints(place.objects()) if not r.problem]


def local_steps(folder: Path) -> list[int]:
    return [manifest.step_of(name) for name in selection.names(folder)]


def find(cfg) -> selection.Choice | None:
    """What a start would bring from the bucket."""
    choice = start.choose(cfg)
    return choice if choice.path and not choice.state else None


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(place, folder: Path, *steps: int, **settings) -> list[Path]:
    """Complete checkpoints, in the folder and in the bucket."""
    made = [save(folder, step, **settings) for step in steps]
    assert all([remote.publish(place, path) for path in made])
    return made


def lose(server, *words: str) -> None:
    """An object whose name has these words goes from the bucket, behind the back of all."""
    server.remove("bucket", next(name for name in server.names() if all(word in name for word in words)))
    server.violations.clear()


URL = "gs://bucket/run"


@pytest.fixture
def command(capsys):
    """command(*argv, code): what `python ckpt.py ARGV` says, which ends with that code."""

    def run(*argv, code: int = 0) -> str:
        capsys.readouterr()
        assert ckpt.main([*map(str, argv)]) == code
        return "".join(capsys.readouterr())

    return run


def each_save(syncer, folder: Path, *steps: int):
    """Save at each step, and wait until it is in the bucket."""
    for step in steps:
        save(folder, step)
        assert syncer.flush(GUARD), syncer.failure
        yield step


def test_publishes_newest_first_and_prunes(server, place, tmp_path):
    """Of eight waiting checkpoints the newest goes first and only those that are retained go at all, here and there."""
    for step in range(10, 90, 10):
        save(tmp_path, step)
    syncer = sync.Syncer(config(tmp_path, bucket_total_limit=2, save_total_limit=3, keep_every=40))
    assert syncer.close(GUARD) and syncer.status == "" and server.commits[0] == manifest.name(0, 80, 1)
    assert steps(place) == [80, 70, 40] and local_steps(tmp_path) == [80, 70, 60, 40]
    assert not [n for n in server.names("run/") if f"step{10}-" in n or f"step{20}-" in n]


def test_prunes_as_it_goes_but_not_the_resumed_one(server, place, tmp_path):
    """bucket_total_limit=2 holds after each save; the checkpoint that the run was resumed from stays there."""
    [ten] = published(place, tmp_path, 10)
    syncer = sync.Syncer(config(tmp_path, bucket_total_limit=2, save_total_limit=1), ten.name)
    for step in each_save(syncer, tmp_path, 20, 30, 40, 50):
        assert steps(place) == sorted({step, max(step - 10, 10), 10}, reverse=True)
        assert local_steps(tmp_path) == [step]
    assert syncer.close(GUARD)


@pytest.mark.parametrize("skip, there", [(0, []), (6, [30])])
def test_what_waits_for_the_bucket_stays_on_the_disk(server, place, tmp_path, skip, there):
    """While all uploads fail, or all but the newest's, save_total_limit=1 deletes nothing that the bucket is to keep; once
    it works again, one is left."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    # the first six are OWNER.json, the newest one's four files and its manifest
    fault = server.fault("POST|PUT", "upload", skip=skip, status=503, times=10**6)
    syncer = sync.Syncer(config(tmp_path, save_total_limit=1, bucket_total_limit=2))
    server.wait_until(lambda: fault.hits > 2)
    assert steps(place) == there and set(local_steps(tmp_path)) >= {30, 20, 30 if there else 10}
    server.faults.clear()
    assert syncer.close(GUARD) and steps(place) == [30, 20] and local_steps(tmp_path) == [30]


def test_the_last_scan_starts_after_close(server, place, tmp_path):
    """A checkpoint that is completed just before close() is in the bucket when close() says so, 15 times of 15."""
    for step in range(10, 160, 10):
        syncer = sync.Syncer(config(tmp_path, save_total_limit=2, bucket_total_limit=1))
        save(tmp_path, step, size=1000)
        assert syncer.close(GUARD), syncer.failure
        assert steps(place) == [step]


def test_clocks_do_not_order_saves(server, place, tmp_path, monkeypatch):
    """From 80 back to 30 on a machine whose clock was a day ahead and is put right: all that is saved then reaches the
    bucket, counts as the newest in both places, survives the next start, and pushes out what was abandoned."""
    tomorrow = time.time() + 86400
    with monkeypatch.context() as clock:
        clock.setattr(time, "time", lambda: tomorrow)
        for step in range(10, 90, 10):
            save(tmp_path, step)
    before = sync.Syncer(config(tmp_path, save_total_limit=0, bucket_total_limit=0))
    assert before.close(GUARD) and steps(place)[0] == 80
    limits = {"save_total_limit": 3, "bucket_total_limit": 4, "resume": "latest"}
    syncer = sync.Syncer(config(tmp_path, **limits), manifest.name(0, 30, 1))
    for step in each_save(syncer, tmp_path, 40, 50, 55):
        assert steps(place)[0] == local_steps(tmp_path)[0] == step
    assert syncer.close(GUARD)
    assert local_steps(tmp_path) == [55, 50, 40] and steps(place) == [55, 50, 40, 30]
    again = sync.Syncer(config(tmp_path, **limits), manifest.name(0, 55, 1))
    assert again.close(GUARD) and local_steps(tmp_path) == [55, 50, 40]
    assert find(config(tmp_path / "c", resume="latest")).name == manifest.name(0, 55, 1)


def test_delete_forbidden(server, place, tmp_path, capsys):
    """403 on every DELETE: each save counts as uploaded, the disk is pruned, and why is said once."""
    server.fault("DELETE", "", status=403, times=10**6)
    syncer = sync.Syncer(config(tmp_path, save_total_limit=1, bucket_total_limit=1))
    for step in each_save(syncer, tmp_path, 10, 20, 30):
        assert local_steps(tmp_path) == [step] and syncer.status == ""
    replaced = save(tmp_path, 30)
    assert syncer.close(GUARD) and steps(place) == [30, 20, 10] and not syncer.status
    assert content(remote.fetch(place, replaced.name, tmp_path / "c")) == content(replaced)
    said = capsys.readouterr().err
    assert said.count("old checkpoints stay in the bucket: cannot delete") == said.count("403") == 1


def test_verify_reads_the_bucket(server, place, tmp_path, command):
    """verify of a bucket finds a byte that is wrong there although size and CRC-32C are as listed; list does not read."""
    twenty = published(place, tmp_path, 10, 20)[1]
    assert command("verify", URL).count("verified") == 2
    name = next(n for n in server.names() if "step20" in n and "shard" in n)
    told = manifest.read_manifest(twenty)
    told["files"][Path(name).name]["sha256"] = "0" * 64
    server.put(f"run/{twenty.name}/{manifest.MANIFEST}", manifest.encode_manifest(told))
    command("list", URL)
    assert f"{name} is damaged: its SHA-256 differs" in command("verify", f"{URL}/{twenty.name}", code=66)


def test_prune_damaged(server, place, tmp_path, command):
    """A damaged checkpoint that is newer than the newest complete one, or that keep_every keeps, goes only if asked for; an
    older one at once. One whose manifest cannot be read is not known to be ours, and is named and left by all."""
    published(place, tmp_path, 10, 20, 30, 40)
    for step in (10, 20, 40):
        lose(server, f"step{step}-", "shard")
    unreadable = f"run/{manifest.name(0, 50, 1)}/{manifest.MANIFEST}"
    server.put(unreadable, b"{")
    for keys, left, gone in (
        ("--keep-every=10", [50, 40, 30, 20, 10], 0),
        ("--keep-every=20", [50, 40, 30, 20], 1),
        ("--damaged", [50, 30], 2),
    ):
        said = command("prune", URL, keys)
        assert [manifest.step_of(r.name) for r in place.checkpoints(place.objects())] == left
        assert said.count("deleted") == gone and f"left {URL}/{manifest.name(0, 50, 1)}: " in said
    with pytest.raises(gcs.Conflict, match="left as it is"):
        remote.publish(place, save(tmp_path, 50), replace=True)
    assert server.data(unreadable) == b"{"
    assert "there is no bucket gs://nowhere" in command("list", "gs://nowhere/run", code=66)
    server.violations.clear()


def test_what_others_put_there_stays(server, place, tmp_path, command, capsys):
    """Another system's checkpoints, sharded and whole, under names of ours, and files that somebody put beside and into ours:
    every byte is there after saves, prunes by the run and by hand, a resume and a pull. prune and list name them."""
    old = {f"{manifest.name(0, step, 0)}/{file}": os.urandom(99) for step in (10, 1250) for file in (
        "metadata.json", "model.safetensors", "optimizer.bin", "optimizer_0/__0_0.distcp", "0123456789abcdef/notes.txt"
    )}  # fmt: skip
    old |= {f"{manifest.name(0, 20, 1)}/NOTES.txt": b"mine", "logs/trace.jsonl": b'{"step": 1}\n', "OWNER.txt": b"me"}
    for path, data in old.items():
        server.put(f"run/{path}", data).updated = "2020-01-01T00:00:00Z"
    latest = config(tmp_path / "a", resume="latest")
    with pytest.raises(manifest.CheckpointError, match="of this trainer, but another system's: .* more; take"):
        find(latest)
    assert find(config(tmp_path / "a")) is None, "a fresh run may begin beside them"
    Path(latest.logging_dir).mkdir()
    Path(latest.logging_dir, "trace.jsonl").write_text('{"step": 1, "another": "run"}\n')
    syncer = sync.Syncer(config(tmp_path / "a", save_total_limit=1, bucket_total_limit=1))
    for step in (10, 20, 30, 40):
        folder = save(tmp_path / "a", step)
        into = f"run/{folder.name}/{manifest.read_manifest(folder)['save_id']}/mine"
        old[into.removeprefix("run/")] = server.put(into, b"put in").data
        assert syncer.flush(GUARD), syncer.failure
    assert syncer.close(GUARD) and steps(place) == [40]
    assert "logs/trace.jsonl is not how" in capsys.readouterr().err
    elsewhere = config(tmp_path / "b", resume="latest")
    assert start.pull(elsewhere, find(elsewhere))
    said = command("prune", URL, "--keep", "1", "--damaged")
    assert "deleted" not in said and f"left {URL}/{manifest.name(0, 1250, 0)}/" in said
    assert f"{manifest.name(0, 1250, 0)}/0123456789abcdef/notes.txt: no save of this" in command("list", URL, code=66)
    assert {path: server.data(f"run/{path}") for path in old} == old
    with pytest.raises(SystemExit, match="2"):  # the newest is never deleted
        command("prune", URL, "--keep", "-1")
    another = save(tmp_path / "c", 40)
    held = content(another)
    assert "is complete and another save" in command("pull", f"{URL}/{another.name}", another.parent, code=66)
    assert content(another) == held
    server.put("run/OWNER.json", b"[]")
    save(tmp_path / "a", 50)
    refused = sync.Syncer(config(tmp_path / "a"))
    assert not refused.close(GUARD) and "OWNER.json is no note of this trainer" in refused.status


def test_trace_and_curves_follow_a_checkpoint(server, place, tmp_path):
    """They are in the bucket once a checkpoint is, grow there, and come to a logging_dir that has none, also where that was
    broken off; to no other. Of a line that is being written nothing goes; a server that refuses them fails no upload."""
    cfg, event = config(tmp_path / "a"), f"events.out.tfevents.{17 * 10**8}.host.1"
    logs = Path(cfg.logging_dir)
    logs.mkdir()
    (logs / event).write_bytes(b"\0\1")
    (logs / "train.log").write_text("stays here\n")
    syncer = sync.Syncer(cfg)
    for step in (10, 20):
        with open(logs / "trace.jsonl", "a") as file:
            file.write(f'{{"step": {step}}}\n')
        save(tmp_path / "a", step)
        want = (logs / "trace.jsonl").read_bytes()
        trace = lambda: getattr(server.buckets["bucket"].get("run/logs/trace.jsonl"), "data", b"")  # noqa: E731
        server.wait_until(lambda want=want, trace=trace: trace() == want)
    with open(logs / "trace.jsonl", "a") as file:
        file.write('{"step": 3')
    save(tmp_path / "a", 30)
    assert syncer.close(GUARD) and not syncer.status
    want = {"trace.jsonl": b'{"step": 10}\n{"step": 20}\n', event: b"\0\1"}
    assert {n.removeprefix("run/logs/"): server.data(n) for n in server.names("run/logs/")} == want
    for there, brought in (({}, want), ({event: b"\0\1", "trace.jsonl": b""}, want), ({"trace.jsonl": b"x\n"}, {})):
        new = config(tmp_path / "b")
        shutil.rmtree(new.logging_dir, ignore_errors=True)
        Path(new.logging_dir).mkdir()
        for name, data in there.items():
            Path(new.logging_dir, name).write_bytes(data)
        assert bool(history.fetch(new)) == bool(brought)
        assert content(Path(new.logging_dir)) == {**there, **brought}
    server.fault("POST|PUT|GET", "", status=403, times=10**6)
    assert "stay in the bucket: " in history.fetch(config(tmp_path / "c"))


def test_a_bucket_that_is_too_slow(server, tmp_path):
    """close() returns False once its time is up, with the reason; nothing half-done is listed, and the disk keeps it."""
    server.fault("POST|PUT", "upload.*(multipart|upload_id)", rate=100_000, skip=1, times=10**6)
    save(tmp_path, 10, size=3_000_000)
    syncer = sync.Syncer(config(tmp_path))
    assert not syncer.close(1.5) and "was not finished after 1.5 s" in syncer.status and local_steps(tmp_path) == [10]
    assert not server.commits


def test_two_trainers_on_one_prefix(server, place, tmp_path):
    """The run that started last goes on, the other one is refused and says by whom; every checkpoint is of one save."""
    a, b = tmp_path / "a", tmp_path / "b"
    first = sync.Syncer(config(a))
    save(a, 10)
    assert first.flush(GUARD)
    second = sync.Syncer(config(b))
    assert second.flush(GUARD)
    saved = {step: (save(a, step), save(b, step)) for step in (20, 30)}
    assert second.flush(GUARD) and not first.flush(GUARD)
    assert f"another run (host {os.uname().nodename}, pid {os.getpid()}) took gs://bucket/run over" in first.status
    assert steps(place) == [30, 20, 10]
    for step, (_, theirs) in saved.items():
        assert content(remote.fetch(place, manifest.name(0, step, 1), tmp_path / "c")) == content(theirs)
    assert second.close(GUARD) and not first.close(1)


def test_of_two_saves_of_a_step_the_later_stands(server, place, tmp_path):
    """One that is saved again after a fall-back takes the old one's place at once, whose data goes. A machine whose disk
    holds an older one leaves it alone, and publishes what it saves then."""
    a, b = tmp_path / "a", tmp_path / "b"
    save(a, 10)
    old = manifest.read_manifest(save(a, 20))
    first = sync.Syncer(config(a))
    assert first.flush(GUARD)
    new = save(a, 20)
    assert first.close(GUARD) and not [n for n in server.names() if old["save_id"] in n]
    save(b, 20, generation=1)
    second = sync.Syncer(config(b))
    save(b, 30, generation=9)
    assert second.close(GUARD) and steps(place) == [30, 20, 10]
    assert content(remote.fetch(place, new.name, tmp_path / "c")) == content(new)


def save_in_parts(folder: Path, step: int, nodes: str = "ab", **settings) -> str:
    """A checkpoint of which each of two nodes has one of two data files; `nodes` says on whose disk its part is left."""
    whole = save(folder / "whole", step, files=2, **settings)
    for i, node in enumerate("ab"):
        if node in nodes:
            coming = folder / node / f".tmp-{whole.name}"
            shutil.copytree(whole, coming)
            (coming / f"shard-00000-{1 - i:05d}.safetensors").unlink()
            os.rename(coming, folder / node / whole.name)
    return whole.name


def two_syncers(folder: Path, **settings) -> tuple[sync.Syncer, sync.Syncer]:
    return sync.Syncer(config(folder / "a", **settings)), sync.Syncer(config(folder / "b", **settings), leader=False)


@pytest.mark.parametrize("left", "ab")
def test_what_one_node_alone_has_is_not_waited_for(left, server, place, tmp_path):
    """The leader's disk, or the other node's, holds its part of an earlier run's save and no one the rest: once a newer
    save is in the bucket, both are done."""
    save_in_parts(tmp_path, 10, left)
    leader, other = two_syncers(tmp_path)
    save_in_parts(tmp_path, 20)
    assert leader.close(GUARD) and other.close(GUARD) and steps(place) == [20]


def test_what_all_nodes_have_arrives(server, place, tmp_path):
    """Two saves in parts wait while the bucket fails: those that keep_every keeps come there, though later ones are
    there first, and each disk is pruned."""
    fault = server.fault("POST|PUT", "upload", status=503, times=10**6)
    leader, other = two_syncers(tmp_path, save_total_limit=1, keep_every=20)
    for step in (10, 20):
        save_in_parts(tmp_path, step)
    server.wait_until(lambda: fault.hits > 2)
    server.faults.clear()
    for step in (30, 40):
        assert leader.flush(GUARD) and other.flush(GUARD)
        save_in_parts(tmp_path, step)
    assert leader.close(GUARD) and other.close(GUARD) and {20, 30, 40} <= {*steps(place)}
    until(lambda: not {10, 30} & {*local_steps(tmp_path / "a"), *local_steps(tmp_path / "b")})


def test_a_part_that_came_during_an_upload_stays(tmp_path):
    """Of the parts on a disk, none of which is a checkpoint by itself, those go that are older than what arrived."""
    names = [save_in_parts(tmp_path, step, "a") for step in (10, 20, 30)]
    atomic.prune(tmp_path / "a", names[1], 1, 0)
    assert local_steps(tmp_path / "a") == [30, 20]


def test_a_superseded_run_keeps_its_part(server, place, tmp_path):
    """Another run has taken the prefix over and saved more: the leader says so and its part stays on its disk."""
    leader = sync.Syncer(config(tmp_path / "a"))
    assert leader.flush(GUARD)
    save(tmp_path / "z", 50, generation=9)
    assert sync.Syncer(config(tmp_path / "z")).close(GUARD)
    save_in_parts(tmp_path, 10, "a")
    assert not leader.close(GUARD) and "took gs://bucket/run over" in leader.failure
    assert local_steps(tmp_path / "a") == [10]


def bring_together(folder: Path, *nodes: str, **keys) -> str:
    """As the first processes of these nodes would."""
    configs = [config(folder / node, **{"resume": "latest", **keys}) for node in nodes]
    return start.bring_together(configs[0], lambda function, _, *args: [function(cfg, *args) for cfg in configs])


def test_parts_are_brought_together(server, place, tmp_path):
    """What two nodes have in parts is sent, whatever node is the first now; not what is damaged, older than the bucket's,
    or was to go to another place."""
    save(tmp_path / "whole", 50)
    assert not bring_together(tmp_path, "new", "whole") and not server.requests  # without parts nothing is listed
    ten = save_in_parts(tmp_path, 10)
    assert not bring_together(tmp_path, "a", "new") and steps(place) == []
    assert "sent to the bucket" in bring_together(tmp_path, "new", "a", "b", resume=f"a/{ten}") and steps(place) == [10]
    assert not bring_together(tmp_path, "new", "a", "b")
    shard = tmp_path / "a" / save_in_parts(tmp_path, 20) / "shard-00000-00000.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert "in vain: " in bring_together(tmp_path, "a", "b") and steps(place) == [10]
    save_in_parts(tmp_path, 30, state={"config": {"checkpoint_bucket_path": "another"}})
    bring_together(tmp_path, "a", "b")
    assert steps(place) == [10]
    published(place, tmp_path / "c", 5, generation=9)
    save_in_parts(tmp_path, 40)
    assert not bring_together(tmp_path, "a", "b") and {*steps(place)} == {5, 10}


def run_saves(folder: Path, count: int, size: int) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tests/saves.py"), str(folder), "run", str(count), str(size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


FAULTS = [
    dict(status=503), dict(status=429), dict(reset=True), dict(lost=True), dict(cut=50_000), dict(status=410),
    dict(corrupt=True), dict(keep=256 << 10), dict(status=500),
]  # fmt: skip


@pytest.mark.parametrize("kills, size", [(4, 400_000), pytest.param(20, 20_000_000, marks=pytest.mark.slow)])
def test_killed_while_publishing(server, place, tmp_path, kills, size):
    """SIGKILLs at random moments under random faults: no manifest ever speaks for what is not there, and the next run
    catches up. The large files go up in several chunks."""
    rng, folder = random.Random(11), tmp_path / "a"
    for _ in range(kills):
        for what in rng.sample(FAULTS, 2):
            server.fault("PUT|POST", "upload_id|multipart", skip=rng.randrange(8), **what)
        goal = len(server.requests) + rng.randrange(5, 40)
        process = run_saves(folder, 1000, size)
        server.wait_until(lambda g=goal, p=process: len(server.requests) >= g or p.poll() is not None)
        process.kill()
        process.communicate()
        for name in server.names():
            if name.endswith(manifest.MANIFEST):  # every one that is listed can be had
                assert manifest.verify(remote.fetch(place, name.split("/")[-2], tmp_path / "fetched"))
        shutil.rmtree(tmp_path / "fetched", ignore_errors=True)
    server.faults.clear()
    process = run_saves(folder, 2, size)
    out, err = process.communicate(timeout=GUARD)
    assert process.returncode == 0, out + err
    last = local_steps(folder)
    assert steps(place) == last and len(last) == 2
    newest = manifest.name(0, last[0], 1)
    assert content(remote.fetch(place, newest, tmp_path / "c")) == content(folder / newest)


PULL = "import resource, sys; from refocused.bucket import start; from tests.saves import config; "
PULL += "c = config(sys.argv[1], resume='latest'); {}start.pull(c, start.choose(c))"


def test_a_pull_that_is_broken_off(server, place, tmp_path):
    """By a disk that takes no more, which one line says, and by three SIGKILLs: what came is never taken for a checkpoint,
    and the next pull goes on and ends complete."""
    [here] = published(place, tmp_path / "a", 10, size=3_000_000)
    server.fault("GET", "alt=media.*shard|shard.*alt=media", rate=2_000_000, times=1000)
    started = lambda: server.count("GET", "shard.*alt=media")  # noqa: E731

    def pull(before: str = "") -> subprocess.Popen:
        command = [sys.executable, "-c", PULL.format(before), str(tmp_path / "b")]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    said = pull("resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000,) * 2); ").communicate()[1]
    assert "BucketError" in said and ".part: File too large" in said
    for kill in (2, 2, 1):
        goal, process = started() + kill, pull()
        server.wait_until(lambda g=goal, p=process: started() >= g or p.poll() is not None)
        process.kill()
        process.communicate()
        assert selection.names(tmp_path / "b") == []
    pull().communicate()
    assert content(tmp_path / "b" / here.name) == content(here)


def test_two_nodes_pull_into_one_folder(server, place, tmp_path):
    """The second waits for the first and finds the checkpoint there; by hand it is told that one is under way."""
    [here] = published(place, tmp_path / "a", 10)
    cfg = config(tmp_path / "b", resume="latest")
    with ThreadPoolExecutor() as pool:
        with locks.filling(tmp_path / "b"):
            pulled = pool.submit(start.pull, cfg, find(cfg))
            with pytest.raises(TimeoutError):
                pulled.result(timeout=0.5)
            with pytest.raises(locks.Taken, match=f"is in use by host .*, pid {os.getpid()}; "):
                remote.fetch(place, here.name, tmp_path / "b")
        assert content(pulled.result(timeout=GUARD)) == content(here)
    before = server.count("GET", "alt=media.*shard|shard.*alt=media")
    assert remote.fetch(place, here.name, tmp_path / "b") == tmp_path / "b" / here.name
    assert server.count("GET", "alt=media.*shard|shard.*alt=media") == before


def test_every_node_has_the_checkpoint_that_is_loaded(place, tmp_path):
    """One that is missing, damaged or another save on a node comes from the bucket; without one that is an error."""
    [here] = published(place, tmp_path / "a", 10)
    save_id = manifest.read_manifest(here)["save_id"]
    cfg, there = config(tmp_path / "b"), tmp_path / "b" / here.name
    damage = (
        lambda: (there / "shard-00000-00001.safetensors").write_bytes(b"0" * 300_000),
        lambda: save(there.parent, 10),
    )
    for left in (f".pull-{'ab' * 8}-{here.name}", ".pull-notes"):  # of an older save's pull, and somebody's
        (there.parent / left).mkdir(parents=True)
    for spoil in (lambda: None, *damage):
        spoil()
        selection.bring(selection.Choice(there, {}, [], save_id), functools.partial(start.pull, cfg))
        assert content(there) == content(here)
    assert [path.name for path in there.parent.glob(".pull-*")] == [".pull-notes"]
    with pytest.raises(manifest.CheckpointError, match="was replaced by another save in the meantime"):
        remote.fetch(place, here.name, tmp_path / "e", "ab" * 8)
    other = manifest.read_manifest(save(tmp_path / "c", 10))["save_id"]
    for folder, what in (("c", f"is save {other}"), ("d", "is no directory")):
        with pytest.raises(manifest.CheckpointError, match=f"lacks the checkpoint that rank 0 loads, .*{what}"):
            selection.bring(selection.Choice(tmp_path / folder / here.name, {}, [], save_id))


def test_find(server, place, tmp_path):
    """What resume needs from the bucket, in each case of where the newest, damaged, missing and named ones are."""
    cfg = lambda resume: config(tmp_path / "a", resume=resume)  # noqa: E731
    assert find(cfg("latest")) is None and find(cfg(None)) is None
    ten, twenty = published(place, tmp_path / "b", 10, 20)
    thirty = save(tmp_path / "b", 30)
    with pytest.raises(ValueError, match="already has 2 checkpoints, the last one .*step20.*resume=latest"):
        find(cfg(None))
    assert find(cfg("latest")).name == twenty.name and find(cfg(ten.name)).name == ten.name
    for nowhere in ("checkpoint-x", str(tmp_path / "a" / "checkpoint-x")):
        with pytest.raises(manifest.CheckpointError, match=f"checkpoint-x: no such .*{twenty.name}, {ten.name}"):
            find(cfg(nowhere))
    with pytest.raises(ConfigError, match="has 2 checkpoints, .* begin another run there"):
        find(cfg(str(ten)))  # its saves would be later than those of the run that it leaves
    assert find(dataclasses.replace(cfg(str(ten)), checkpoint_bucket_path="branch")) is None
    start.pull(cfg("latest"), find(cfg("latest")))
    assert find(cfg("latest")) is None  # as good on disk
    with pytest.raises(ConfigError, match="output_dir=.* already has 1 checkpoint, the last one"):
        find(cfg(None))
    shutil.copytree(thirty, tmp_path / "a" / thirty.name)
    assert find(cfg("latest")) is None  # the one on disk is newer
    for name in (thirty.name, twenty.name):
        (tmp_path / "a" / name / "state.json").write_text("{}")
    found = find(cfg("latest"))  # both damaged here, one of them good there
    assert found.name == twenty.name and [name for name, _ in found.passed_over] == [thirty.name]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path / "link", os.path.relpath(tmp_path / "a")):  # as by its name alone
        assert find(cfg(f"{folder}/{twenty.name}")).path == tmp_path / "a" / twenty.name
    assert content(start.pull(cfg("latest"), find(cfg("latest")))) == content(twenty)
    remote.publish(place, thirty)
    lose(server, thirty.name, "state.json")
    shutil.rmtree(tmp_path / "a" / thirty.name)
    assert find(cfg("latest")) is None  # 30 is named as damaged there, 20 on disk is good
    shutil.rmtree(tmp_path / "a")
    found = find(cfg("latest"))
    assert found.name == twenty.name and "state.json is missing" in found.passed_over[0][1]
    lose(server, ten.name, "shard")
    lose(server, twenty.name, "shard")
    with pytest.raises(manifest.CheckpointError, match="no checkpoint in .* can be loaded"):
        find(cfg("latest"))


def test_hostile_manifests(server, place, tmp_path):
    """A manifest that is no JSON, is of another name, or names files outside is listed as damaged and never fetched."""
    good = manifest.read_manifest(save(tmp_path, 10))
    outside = [{"files": {**good["files"], file: good["files"][manifest.STATE]}} for file in ("../../x", "/etc/x")]
    for at, change in enumerate([*outside, {"save_id": "../.."}, {"name": good["name"]}, None]):
        name = manifest.name(0, 10 * (at + 2), 1)
        told = manifest.encode_manifest({**good, "name": name, "step": 10 * (at + 2), **(change or {})})
        server.put(f"run/{name}/{manifest.MANIFEST}", told if change else b"{")
    remotes = place.checkpoints(place.objects())
    assert len(remotes) == 5 and all(r.problem and not r.manifest for r in remotes)
    for damaged in remotes:
        with pytest.raises(manifest.CheckpointError):
            remote.fetch(place, damaged.name, tmp_path / "c")
    with pytest.raises(manifest.CheckpointError, match="no checkpoint in .* can be loaded"):
        find(config(tmp_path / "c", resume="latest"))


def test_command_line(server, place, tmp_path, command):
    """push, list, pull, verify and prune do what they say; list names the damaged one and why, with exit code 66. A folder
    that is not there has no rows beside a bucket; alone it is an error."""
    a, b = tmp_path / "a", tmp_path / "b"
    ten, twenty, thirty = (save(a, step) for step in (10, 20, 30))
    for folder in (ten, twenty, thirty):
        assert f"{URL}/{folder.name}" in command("push", folder, URL)
    assert command("list", a).split()[:6] == ["name", "step", "tokens", "loss", "size", "age"]
    lines = command("list", a, URL).splitlines()
    assert len(lines) == 7 and sum(URL in line for line in lines) == 3
    assert lines[1].split()[1:4] == ["30", "15,360", "1.5000"] and lines[1].endswith("complete")
    assert "step10" in command("list", b, URL) and "is not a directory" in command("list", b, code=66)
    command("pull", URL, b)
    assert local_steps(b) == [30]
    command("pull", f"{URL}/{ten.name}", b)
    assert command("verify", b).count("verified") == 2 and "verified" in command("verify", b / ten.name)
    for save_id, fields in (("0" * 16, {"updated": "2020-01-01T00:00:00Z"}), ("1" * 16, {})):
        orphan = server.put(place.name(thirty.name, save_id, "shard-00000-00000.safetensors"), b"orphan")
        vars(orphan).update(fields)
    assert command("prune", URL, "--keep", "2").count("deleted") == 2 and steps(place) == [30, 20]
    assert [n for n in server.names() if "1" * 16 in n] and not [n for n in server.names() if "0" * 16 in n]
    lose(server, twenty.name, "state.json")
    assert "state.json is missing" in command("list", URL, code=66)


@pytest.mark.parametrize("file", ["MANIFEST", "state.json", "shard"])
def test_pruned_between_listing_and_reading(server, place, tmp_path, capsys, file):
    """A checkpoint that a run deletes while `list` or `verify` reads it is in no row, and no error."""
    gone, stays = published(place, tmp_path / "a", 10, 20)
    fault = server.fault("GET", f"{gone.name}.*{file}.*alt=media|alt=media.*{gone.name}.*{file}", stall=1)
    with ThreadPoolExecutor() as pool:
        listed = pool.submit(ckpt.main, ["verify" if file == "shard" else "list", "gs://bucket/run"])
        server.wait_until(lambda: fault.hits)
        [old] = [r for r in place.checkpoints(place.objects()) if r.name == gone.name]
        remote.delete(place, old, place.objects())
        assert listed.result(GUARD) == 0
    out = capsys.readouterr().out
    assert stays.name in out and gone.name not in out
