"""Two hosts without a shared disk (network namespaces where they can be made), checkpoints through the bucket."""

import contextlib
import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
from fakegcs import FakeGCS
from launch import GUARD, Launch, train, until
from saves import save
from test_resume import newest, steps, tensors

from refocused.bucket import gcs
from refocused.bucket.remote import Place, fetch
from refocused.checkpoint import manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@contextlib.contextmanager
def two_hosts():
    """(prefixes that run a command on host 0 and 1, their addresses, the address of this side); joined by a bridge."""
    tag = f"t{os.getpid() % 10**6}"
    net = f"10.77.{os.getpid() % 256}"  # two suites on one machine are not in each other's way
    ip = shutil.which("ip") if os.geteuid() == 0 else None
    names = [f"{tag}n0", f"{tag}n1"]

    def run(*words: str) -> bool:
        return subprocess.run([ip, *words], capture_output=True).returncode == 0

    def make() -> bool:
        done = run("link", "add", tag, "type", "bridge") and run("addr", "add", f"{net}.254/24", "dev", tag)
        done = done and run("link", "set", tag, "up")
        for i, name in enumerate(names):
            done = done and run("netns", "add", name)
            done = done and run("link", "add", f"{tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            done = done and run("link", "set", f"{tag}v{i}", "master", tag, "up")
            done = done and run("-n", name, "addr", "add", f"{net}.{i + 1}/24", "dev", "eth0")
            done = done and run("-n", name, "link", "set", "eth0", "up") and run("-n", name, "link", "set", "lo", "up")
        return done

    try:
        if ip and make():
            yield [[ip, "netns", "exec", name] for name in names], [f"{net}.1", f"{net}.2"], f"{net}.254"
        else:  # two agents on one host, each with its own directory
            yield [[], []], ["127.0.0.1", "127.0.0.1"], "127.0.0.1"
    finally:
        for name in names if ip else []:
            run("netns", "del", name)
        if ip:
            run("link", "del", tag)


def finish(hosts: list[Launch], what=lambda: False) -> None:
    """Until it happened, or both have ended well."""
    until(lambda: what() or any(host.process.poll() not in (None, 0) for host in hosts) or all(h.over() for h in hosts))
    assert what() or all(host.process.poll() == 0 for host in hosts), "\n\n".join(host.text for host in hosts)


def test_a_host_dies_and_the_run_goes_on_exactly(shards, tmp_path, monkeypatch):
    """FSDP2 over two hosts; one is killed and loses its disk, both start again: the bits of an undisturbed run."""
    with two_hosts() as (prefixes, addresses, here), FakeGCS(host=here) as server:
        args = [f"data_dir={shards}", "save_steps=40", "parallel=fsdp", "lr_scheduler_type=constant", "logging_steps=5"]
        bucket = ["save_total_limit=2", "bucket_name=bucket", "resume=latest", f"upload_deadline_seconds={GUARD}"]
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)

        def start(port: int, max_steps: int) -> list[Launch]:
            """A launcher with one rank, and a folder of its own, on each host."""

            def host(i: int) -> Launch:
                keys = [*args, *bucket, "checkpoint_bucket_path=run", f"max_steps={max_steps}"]
                flags = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--local_addr={addresses[i]}"]
                flags += [f"--rdzv_endpoint={addresses[0]}:{port}", f"--rdzv_conf=is_host={int(i == 0)}"]
                interface = "eth0" if prefixes[i] else "lo"
                return Launch(
                    tmp_path / str(i), *keys, "output_dir=out", "logging_dir=logs", flags=flags, prefix=prefixes[i],
                    cwd=tmp_path / str(i), STORAGE_EMULATOR_HOST=server.url, GLOO_SOCKET_IFNAME=interface, OMP_NUM_THREADS="1",
                )  # fmt: skip

            return [host(0), host(1)]

        pair = start(29611, 100_000)
        finish(pair, lambda: server.commits)
        pair[1].send(signal.SIGKILL)
        assert pair[0].process.wait(timeout=GUARD) == 70  # the survivor ends too, and says so
        assert "launch: rank 0 ended with 70: error: rank 0 on" in pair[0].text
        pair[0].send(signal.SIGKILL)
        shutil.rmtree(tmp_path / "1" / "out")
        place = Place(gcs.Bucket("bucket"), "run")
        # host 0 has all of the checkpoint, so only host 1 needs it; on host 1 an earlier save was killed, and each host
        # has its part of a save that lost the rest with the other one's disk
        fetch(place, place.checkpoints(place.objects())[0].name, tmp_path / "0" / "out")
        left = tmp_path / "1" / "out" / ".tmp-0123456789abcdef-checkpoint-epoch0-step39-files0"
        left.mkdir(parents=True)
        for i, generation in enumerate((20, 30)):
            (save(tmp_path / f"{i}/out", 1000 + i, generation=generation) / "state.json").unlink()
        end = max(steps(tmp_path / "0")) + 10
        pair = start(29612, end)
        finish(pair)
        log = pair[0].text
        assert re.search(r"replayed \d+ steps", log) and "not the same run" not in log
        assert server.violations == [] and not left.exists()
        [last] = [remote.name for remote in place.checkpoints(place.objects()) if remote.manifest["step"] == end]
        whole = fetch(place, last, tmp_path / "whole")
    train(tmp_path / "calm", *args, f"max_steps={end}", nproc=2)
    assert steps(tmp_path / "0") == steps(tmp_path / "calm")
    x, y = tensors(whole), tensors(newest(tmp_path / "calm"))
    assert x.keys() == y.keys() and [name for name in x if not torch.equal(x[name], y[name])] == []


NODES = "rank = os.environ['RANK']\nos.environ['LOCAL_RANK'] = '0'\n"  # each rank of a launch is a node of its own
BUCKET = ["bucket_name=bucket", "checkpoint_bucket_path=run"]


def test_a_node_that_may_not_write(shards, tmp_path, monkeypatch):
    """Two nodes, and the bucket refuses one of them: it says why, training goes on, 74, and so do rank 0's last words.

    Mended, the same command brings the parts of what was saved together in the bucket and goes on from there.
    """
    before = (
        f"{NODES}os.chdir(os.path.join({str(tmp_path)!r}, rank))\n"
        "os.environ['STORAGE_EMULATOR_HOST'] = os.environ['BUCKET' + rank]"
    )
    with FakeGCS() as server, FakeGCS() as door:
        door.buckets, door.generations = server.buckets, server.generations  # the same bucket, by another address
        door.fault("POST", "upload", status=403, times=10**6)
        for i, url in enumerate((server.url, door.url)):
            (tmp_path / str(i)).mkdir()
            monkeypatch.setenv(f"BUCKET{i}", url)
        keys = [f"data_dir={shards}", "output_dir=out", "logging_dir=logs", *BUCKET, "resume=latest"]
        run = Launch(tmp_path, *keys, "upload_deadline_seconds=10", before=before)
        assert run.process.wait(GUARD) == 74, run.text
        why = "cannot write .*shard-00001.*: 403, the account may not do this"
        assert re.search(f"^note: on .*: {why}", run.text, re.M) and re.search(
            f"not in the bucket: .*{why}", run.text
        ), run.text
        assert server.commits == []
        door.faults.clear()
        run = Launch(tmp_path, *keys, "max_steps=12", f"upload_deadline_seconds={GUARD}", before=before)
        assert run.process.wait(GUARD) == 0 and "each node has a part of" in run.text, run.text
        assert "passed over" not in run.text
        assert [manifest.step_of(name) for name in door.commits + server.commits] == [10, 12] and not server.violations


def test_nodes_that_share_a_disk_send_each_file_once(shards, tmp_path, server):
    """Two nodes with one output_dir: three checkpoints are in the bucket, each of their files was sent one time."""
    keys = ["save_steps=4", "save_total_limit=1", f"upload_deadline_seconds={GUARD}", "max_failed_starts=3"]
    run = Launch(tmp_path, f"data_dir={shards}", *BUCKET, *keys, before=NODES)
    assert run.process.wait(GUARD) == 0, run.text
    assert len(server.commits) == 3
    assert any(name.endswith("logs/.starts") for name in server.stored)  # counted there for the next machine
    sent = [name for name in server.stored if "/logs/" not in name]
    assert sorted(sent) == sorted(set(sent)), "the owner's note, manifests and files"


def test_disks_of_their_own_need_a_bucket(shards, tmp_path):
    """Two nodes, each with an output_dir of its own and no bucket: refused with 2, as no checkpoint could be loaded."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    before = f"{NODES}os.chdir(os.path.join({str(tmp_path)!r}, rank))"
    run = Launch(tmp_path, f"data_dir={shards}", "output_dir=out", "logging_dir=logs", before=before)
    assert run.process.wait(GUARD) == 2 and "output_dir=out is not on one disk for host" in run.text, run.text
