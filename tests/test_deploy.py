"""deploy/: the files say what the exit codes mean, their keys exist, and the runs that they start are the same runs."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from conftest import ROOT
from fakegcs import FakeGCS
from huggingface_hub import ModelCard
from launch import GUARD, TINY, Launch, train, until
from shards import use_gpt2
from test_readme import blocks
from test_readme import copy as tree  # noqa: F401
from test_resume import newest, steps, tensors

import configs
from refocused.bucket import start
from refocused.run import exits, preflight, processes
from refocused.run.environment import free_port

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FINAL = sorted(exits.FINAL)
AGAIN = sorted({value for key, value in vars(exits).items() if key.isupper() and isinstance(value, int)} - {0, *FINAL})
SKY, KUBERNETES, SLURM = (ROOT / "deploy" / name for name in ("skypilot.yaml", "trainjob.yaml", "slurm.sh"))


def check_keys(words: list[str]) -> None:
    """The config file and the keys behind train.py are known and fit each other. Raises ConfigError."""
    configs.load(words[words.index("train.py") + 1 :])


def test_skypilot_says_what_exit_codes_mean():
    """Where SkyPilot's own schema lets all pass: the keys of job_recovery, the codes of exits.py, the keys of Config."""
    task = yaml.safe_load(SKY.read_text())
    recovery = task["resources"]["job_recovery"]
    assert recovery.keys() == {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
    assert recovery["recover_on_exit_codes"] == AGAIN
    told = {"NUM_NODES": "1", "NODE_RANK": "0", "NODE_IPS": "10.0.0.1", "NUM_GPUS_PER_NODE": "8"}
    known = {**task["envs"], **{f"SKYPILOT_{name}": value for name, value in told.items()}}
    check_keys(re.sub(r"\$(\w+)", lambda name: known[name[1]], task["run"].replace("\\\n", " ")).split())


def test_kubernetes_says_what_exit_codes_mean():
    """The codes of exits.py, and no other restart; shared memory; processes and GPUs; the keys of Config."""
    runtime, job = yaml.safe_load_all(KUBERNETES.read_text())
    spec, trainer = runtime["spec"]["template"]["spec"], job["spec"]["trainer"]
    one = spec["replicatedJobs"][0]["template"]["spec"]
    pod, final = one["template"]["spec"], {"operator": "In", "values": FINAL}
    assert one["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": final}]
    assert [rule["action"] for rule in spec["failurePolicy"]["rules"]] == ["FailJobSet"]
    assert (one["backoffLimit"], pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == (0, "Never", 300)
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    check_keys(trainer["command"] + trainer["args"])


@pytest.mark.slow
def test_skypilot_takes_the_file():
    """SkyPilot itself reads the task: `pip install skypilot[gcp]==0.14.1` in an environment of its own."""
    task = pytest.importorskip("sky").Task.from_yaml(str(SKY))
    [resources] = task.resources
    assert resources.use_spot and resources.job_recovery["recover_on_exit_codes"] == AGAIN
    assert task.num_nodes == 1 and task.envs.keys() == {"BUCKET", "RUN"}


@pytest.mark.slow
def test_kubeflow_takes_the_file():
    """Trainer's own models keep every field: `pip install kubeflow-trainer-api==2.3.0`."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    for document in yaml.safe_load_all(KUBERNETES.read_text()):
        assert getattr(models, f"TrainerV1alpha1{document['kind']}").from_dict(document).to_dict() == document


CONSTANT = "lr_scheduler_type=constant"


def is_the_calm_run(folder: Path, shards: Path, last: int) -> None:
    """Every step in the folder's trace, and each tensor of its last save, has the bits of an undisturbed run's."""
    train(folder / "calm", f"data_dir={shards}", CONSTANT, f"max_steps={last}", nproc=2)
    assert steps(folder) == steps(folder / "calm")
    x, y = tensors(newest(folder)), tensors(newest(folder / "calm"))
    assert x.keys() == y.keys() and [name for name in x if not (x[name] == y[name]).all()] == []


def test_pods_that_know_only_what_kubeflow_sets(shards, tmp_path):
    """Two launchers without flags, with PET_* alone: DDP over both; one is killed, both start again: the same bits."""

    def pods(port: int, *args: str) -> list[Launch]:
        pet = {"NNODES": 2, "NPROC_PER_NODE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            Launch(
                tmp_path, f"data_dir={shards}", "save_steps=10", CONSTANT, "resume=latest", *args,
                flags=(), log=tmp_path / f"pod{i}",
                **{f"PET_{key}": str(value) for key, value in {**pet, "NODE_RANK": i}.items()},
            )
            for i in range(2)
        ]  # fmt: skip

    pair = pods(free_port(), "max_steps=100000")
    pair[0].wait_for("^Step 20: ")
    pair[1].send(signal.SIGKILL)
    assert pair[0].process.wait(GUARD) == 70, pair[0].text
    end = max(steps(tmp_path)) + 5
    pair = pods(free_port(), f"max_steps={end}")
    assert [pod.process.wait(GUARD) for pod in pair] == [0, 0], pair[0].text + pair[1].text
    assert re.search(r"replayed (\d+) steps, \1 identical", pair[0].text), pair[0].text
    is_the_calm_run(tmp_path, shards, end)


def test_starts_are_counted_though_each_disk_is_new(tmp_path, server, monkeypatch):
    """Three machines that die before a new step: the fourth is refused. One new step, and the count begins again."""
    monkeypatch.setattr(exits, "at_leave", [])
    monkeypatch.setattr(processes.progress, "step", None)
    cfg = configs.Config(output_dir=str(tmp_path / "out"), bucket_name="bucket", checkpoint_bucket_path="runs/one")

    def begin() -> preflight.Starts:
        shutil.rmtree(cfg.output_dir, ignore_errors=True)
        Path(cfg.output_dir).mkdir()
        return preflight.Starts(cfg, start)

    begin(), begin()
    begin().ended(exits.INTERNAL, "a bug")
    with pytest.raises(preflight.CrashLoop, match="the last with: a bug.*logs/.starts in the bucket"):
        begin()
    server.fault("GET", "starts", status=403, times=1)  # a bucket that does not say counts nothing
    late = begin()
    processes.progress.step = 7
    late.note()
    assert begin().failed == 0
    assert json.loads(server.buckets["bucket"]["runs/one/logs/.starts"].data)["step"] == 7


def stand_ins(folder: Path, *names: str) -> str:
    """A PATH on which the programs of these names are those of standins.py."""
    (folder / "bin").mkdir()
    for name in names:
        (folder / "bin" / name).symlink_to(ROOT / "tests/standins.py")
    return f"{folder}/bin{os.pathsep}{os.environ['PATH']}"


def test_slurm(shards, tmp_path):
    """Two tasks with what SLURM sets. SIGUSR1: saved, 75, into the queue again; the next start is the same run and ends
    with 0. A mistake ends with 2 and is not started again."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    (tmp_path / "config.py").write_text("seed = 42")
    told = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "127.0.0.1", "PATH": stand_ins(tmp_path, "srun", "scontrol")}
    queue, log = tmp_path / "queue", tmp_path / "log"

    def job(*args: str) -> subprocess.Popen:
        command = [str(SLURM), "config.py", *TINY, f"data_dir={shards}", CONSTANT, *args]
        with log.open("wb") as out:
            return subprocess.Popen(
                [*command, "output_dir=out", "logging_dir=logs"], cwd=tmp_path, stdout=out, stderr=out,
                env={**os.environ, **told, "MASTER_PORT": str(free_port())},
            )  # fmt: skip

    first = job("max_steps=100000")
    until(lambda: "Step 9: " in log.read_text() or first.poll() is not None)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
    assert first.wait(GUARD) == 75 and queue.read_text() == "7\n", log.read_text()
    end = max(steps(tmp_path)) + 5
    assert job(f"max_steps={end}").wait(GUARD) == 0, log.read_text()
    assert job("max_steps=-1").wait(GUARD) == 2 and queue.read_text() == "7\n", log.read_text()
    is_the_calm_run(tmp_path, shards, end)


SMALL = """from configs.demo import *
hidden_size, num_hidden_layers, intermediate_size, sequence_length, parallel, tokenizer = 32, 2, 64, 32, "fsdp", "gpt2"
vocab_size, max_steps, save_steps, eval_steps, logging_steps, cpu_threads = 50257, 120, 10, 60, 10, 1
max_position_embeddings, eval_samples, logging_dir, output_dir = 64, 8, "logs/production_8gpu", "checkpoints/production_8gpu"
data_dir, per_device_train_batch_size = "data/tokenized", 1
"""


def vanish(node: bytes) -> None:
    """SIGKILL to all processes that have this in their environment."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if node in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.slow
def test_a_week_on_spot_machines(tree, tmp_path, monkeypatch):  # noqa: F811
    """docs/cloud.md from top to bottom: parquet in a bucket, two machines of SkyPilot, of which one is killed, two pods
    on new disks, of which one is killed, and their restart; evaluation, export and card. Every replayed step is the same."""
    path = stand_ins(tmp_path, "sky", "kubectl", "gcloud")
    for name in ("docker", "hf"):
        (tmp_path / "bin" / name).symlink_to(shutil.which("true"))
    (tree / "configs/production_8gpu.py").write_text(SMALL)
    for file in (SKY, KUBERNETES):
        text = file.read_text().replace("batch_size=256", "batch_size=8").replace("shard_size=8", "shard_size=1")
        (tree / "deploy" / file.name).write_text(text.replace("29500", str(free_port())))
    monkeypatch.setenv("PORT", str(free_port()))
    use_gpt2(tmp_path, monkeypatch)
    script = "\n".join(["set -ex", *blocks("docs/cloud.md")]).replace("BUCKET=my-bucket", "BUCKET=bucket")
    texts = [f"The document {i} says {i * i}. " * 30 for i in range(600)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with FakeGCS() as server, (tmp_path / "log").open("w") as log:
        server.put("text/a.parquet", (tmp_path / "a.parquet").read_bytes())
        page = subprocess.Popen(
            ["bash", "-c", script], cwd=tree, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "PATH": path, "STORAGE_EMULATOR_HOST": server.url},
        )  # fmt: skip
        for name in ("machines", "pods"):
            until((tree / name).exists)
            before = len(server.commits)
            until(lambda before=before: len(server.commits) > before + 1 or page.poll() is not None)
            assert page.poll() is None, (tmp_path / "log").read_text()
            vanish(f"NODE={name}1".encode())
        assert page.wait(GUARD) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert len(re.findall(r"replayed (\d+) steps, \1 identical", said)) >= 2 and "not the same run" not in said, said
    assert ModelCard.load(tree / "exported/week/README.md").data.license == "other"
