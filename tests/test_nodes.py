"""Two nodes, each with its own disk and checkpoints in the bucket, or with one disk that both share."""

import re
import shutil
import signal

import pytest
from fakegcs import FakeGCS
from launch import GUARD, Launch, train, until
from saves import save
from test_resume import assert_same_tensors, newest, steps

from refocused.bucket import gcs
from refocused.bucket.remote import Place, fetch
from refocused.checkpoint import manifest
from refocused.run.environment import free_port

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


NODES = "rank = os.environ['RANK']\nos.environ['LOCAL_RANK'] = '0'\n"  # each rank of a launch is a node of its own
# and has a folder of its own beside the script
APART = f"{NODES}folder = os.path.join(os.path.dirname(__file__), rank)\nos.makedirs(folder, exist_ok=True)\nos.chdir(folder)\n"
BUCKET = ["bucket_name=bucket", "checkpoint_bucket_path=run"]


def finish(hosts: list[Launch], what=lambda: False) -> None:
    """Until it happened, or both have ended well."""
    until(lambda: what() or any(host.process.poll() not in (None, 0) for host in hosts) or all(h.over() for h in hosts))
    assert what() or all(host.process.poll() == 0 for host in hosts), "\n\n".join(host.text for host in hosts)


def test_a_host_dies_and_the_run_goes_on_exactly(shards, tmp_path, server):
    """FSDP2 over two hosts; one is killed and loses its disk, both start again: the bits of an undisturbed run."""
    args = [f"data_dir={shards}", "save_steps=40", "parallel=fsdp", "lr_scheduler_type=constant", "logging_steps=5"]
    bucket = ["save_total_limit=2", "resume=latest", f"upload_deadline_seconds={GUARD}", *BUCKET]

    def start(max_steps: int) -> list[Launch]:
        """A launcher with one rank, and a folder of its own, on each host."""
        port, hosts = free_port(), []
        for i in range(2):
            flags = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--local_addr=127.0.0.{i + 1}"]
            flags += [f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_conf=is_host={int(i == 0)}"]
            hosts.append(Launch(tmp_path / str(i), *args, *bucket, f"max_steps={max_steps}", flags=flags))
        return hosts

    pair = start(100_000)
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
    pair = start(end)
    finish(pair)
    assert re.search(r"replayed \d+ steps", pair[0].text) and "not the same run" not in pair[0].text
    assert not left.exists()
    [last] = [remote.name for remote in place.checkpoints(place.objects()) if remote.manifest["step"] == end]
    whole = fetch(place, last, tmp_path / "whole")
    train(tmp_path / "calm", *args, f"max_steps={end}", nproc=2)
    assert steps(tmp_path / "0") == steps(tmp_path / "calm")
    assert_same_tensors(whole, newest(tmp_path / "calm"))


def test_a_node_that_may_not_write(shards, tmp_path):
    """Two nodes, and the bucket refuses one of them: it says why, training goes on, 74, and so do rank 0's last words.

    Mended, the same command brings the parts of what was saved together in the bucket and goes on from there.
    """
    before = f"{APART}os.environ['STORAGE_EMULATOR_HOST'] = os.environ['BUCKET' + rank]"
    with FakeGCS() as server, FakeGCS() as door:
        door.buckets, door.generations = server.buckets, server.generations  # the same bucket, by another address
        door.fault("POST", "upload", status=403, times=10**6)
        urls = {"BUCKET0": server.url, "BUCKET1": door.url}
        keys = [f"data_dir={shards}", "output_dir=out", "logging_dir=logs", *BUCKET, "resume=latest"]
        run = Launch(tmp_path, *keys, "upload_deadline_seconds=10", before=before, **urls)
        assert run.process.wait(GUARD) == 74, run.text
        why = "cannot write .*shard-00001.*: 403, the account may not do this"
        for said in (f"^note: on .*: {why}", f"not in the bucket: .*{why}"):
            assert re.search(said, run.text, re.M), run.text
        assert server.commits == []
        door.faults.clear()
        run = Launch(tmp_path, *keys, "max_steps=12", f"upload_deadline_seconds={GUARD}", before=before, **urls)
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
    run = Launch(tmp_path, f"data_dir={shards}", "output_dir=out", "logging_dir=logs", before=APART)
    assert run.process.wait(GUARD) == 2 and "output_dir=out is not on one disk for host" in run.text, run.text
