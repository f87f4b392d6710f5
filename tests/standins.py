#!/usr/bin/env python3
"""srun, scontrol, sky, kubectl and gcloud, as deploy/ and docs/cloud.md call them: nodes are processes of this machine.

A link with the name of one of them is that program.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage


def srun(words: list[str]) -> int:
    """Two tasks with what SLURM sets; it hands SIGUSR1 on to them."""
    assert words.pop(0) == "--kill-on-bad-exit=0"
    told = {**os.environ, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    tasks = [subprocess.Popen(words, env={**told, "SLURM_PROCID": i, "SLURM_LOCALID": i}) for i in "01"]
    signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
    Path("srun.pid").write_text(str(os.getpid()))
    return max(task.wait() for task in tasks)


def scontrol(words: list[str]) -> None:
    """`show hostnames LIST` prints them; `requeue JOB` is noted."""
    print(words[-1], file=sys.stdout if words[0] == "show" else Path("queue").open("a"))


def nodes(name: str, commands: list[list[str]], told: dict, place: str = ".") -> list[int]:
    """The exit codes of a command for each node, whose processes all have NODE=name and number; a file says they began."""
    running = []
    for rank, command in enumerate(commands):
        more = {key: str(value).replace("RANK", str(rank)) for key, value in told.items()}
        folder = place.replace("RANK", str(rank))
        running.append(subprocess.Popen(command, cwd=folder, env={**os.environ, **more, "NODE": f"{name}{rank}"}))
    Path(name).touch()
    codes = [node.wait() for node in running]
    print(f"== {name}: {codes}", flush=True)
    return codes


def sky(words: list[str]) -> None:
    """Two machines of one GPU, until they end."""
    task = yaml.safe_load(Path(next(word for word in words if word.endswith(".yaml"))).read_text())
    told = {**task["envs"], **dict(word.split("=") for word in words if "=" in word), "SKYPILOT_NODE_RANK": "RANK"}
    told |= {"SKYPILOT_NUM_NODES": 2, "SKYPILOT_NUM_GPUS_PER_NODE": 1, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    for rank in "01":  # each has the working folder, and nothing that git would not have
        shutil.copytree(".", f"on{rank}", symlinks=True, ignore=shutil.ignore_patterns("data", "on?", "logs"))
    nodes("machines", [["bash", "-c", task["run"]]] * 2, told, "onRANK")


def kubectl(words: list[str]) -> bool:
    """The pods of a TrainJob, with one GPU and a new disk each; all start again, unless an exit code forbids it."""
    runtime, job = yaml.safe_load_all(sys.stdin)
    one, trainer = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"], job["spec"]["trainer"]
    told = {"NNODES": trainer["numNodes"], "NPROC_PER_NODE": 1, "NODE_RANK": "RANK", "MASTER_ADDR": "127.0.0.1"}
    told = {f"PET_{key}": value for key, value in {**told, "MASTER_PORT": os.environ["PORT"]}.items()}
    data, train = one["template"]["spec"]["initContainers"][0]["command"], trainer["command"] + trainer["args"]
    while True:
        disks = [tempfile.mkdtemp(dir=".") for _ in range(trainer["numNodes"])]
        for disk in disks:
            subprocess.run([word.replace("/mnt/run", disk) for word in data], check=True)
        codes = nodes("pods", [[word.replace("/mnt/run", disk) for word in train] for disk in disks], told)
        for disk in disks:
            shutil.rmtree(disk)
        if not any(codes) or set(codes) & {*one["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]}:
            return any(codes)


def gcloud(words: list[str]) -> None:
    """storage rsync -r, to or from a bucket."""
    *_, source, target = words
    up = target.startswith("gs://")
    name, _, prefix = (target if up else source)[5:].partition("/")
    bucket = storage.Client("none", AnonymousCredentials()).bucket(name)
    for path in filter(Path.is_file, Path(source).rglob("*") if up else ()):
        bucket.blob(f"{prefix}/{path.relative_to(source)}").upload_from_filename(path)
    for blob in () if up else bucket.list_blobs(prefix=f"{prefix}/"):
        (file := Path(target, blob.name.removeprefix(f"{prefix}/"))).parent.mkdir(parents=True, exist_ok=True)
        blob.download_to_filename(file)


if __name__ == "__main__":
    sys.exit(globals()[Path(sys.argv[0]).name](sys.argv[1:]))
