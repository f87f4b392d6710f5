#!/usr/bin/env python3
"""srun, scontrol, sky, kubectl, gcloud, docker and hf, as deploy/ and docs/cloud.md call them: nodes are processes here.

A link with the name of one of them is that program.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


def srun(words: list[str]) -> int:
    """Two tasks with what SLURM sets; it hands SIGUSR1 on to them."""
    assert words.pop(0) == "--kill-on-bad-exit=0"
    told = {**os.environ, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    tasks = [subprocess.Popen(words, env={**told, "SLURM_PROCID": i, "SLURM_LOCALID": i}) for i in "01"]
    signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
    Path("srun.pid").write_text(str(os.getpid()))
    return max(task.wait() for task in tasks)


def scontrol(words: list[str]) -> None:
    if words[0] == "show":
        print(words[2])
    else:
        Path("queue").open("a").write(f"{' '.join(words)}\n")


def nodes(name: str, commands: list[list[str]], told: dict) -> list[int]:
    """The exit codes of a command for each node, whose processes all have NODE=name and number; a file says they began."""
    running = []
    for rank, command in enumerate(commands):
        more = {key: str(value).replace("RANK", str(rank)) for key, value in told.items()}
        running.append(subprocess.Popen(command, env={**os.environ, **more, "NODE": f"{name}{rank}"}))
    Path(name).touch()
    codes = [node.wait() for node in running]
    print(f"== {name}: {codes}", flush=True)
    return codes


def sky(words: list[str]) -> None:
    """Two machines of one GPU, until they end."""
    import yaml

    task = yaml.safe_load(Path(next(word for word in words if word.endswith(".yaml"))).read_text())
    told = {**task["envs"], **dict(word.split("=") for word in words if "=" in word), "SKYPILOT_NODE_RANK": "RANK"}
    told |= {"SKYPILOT_NUM_NODES": 2, "SKYPILOT_NUM_GPUS_PER_NODE": 1, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    nodes("machines", [["bash", "-c", task["run"]]] * 2, told)


def kubectl(words: list[str]) -> bool:
    """The pods of a TrainJob, with one GPU and a new disk each; all start again, unless an exit code forbids it."""
    import yaml

    runtime, job = yaml.safe_load_all(sys.stdin)
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    one, trainer = node["template"]["spec"], job["spec"]["trainer"]
    [data] = one["template"]["spec"]["initContainers"]
    told = {"NNODES": trainer["numNodes"], "NPROC_PER_NODE": 1, "NODE_RANK": "RANK", "MASTER_ADDR": "127.0.0.1"}
    told = {f"PET_{key}": value for key, value in {**told, "MASTER_PORT": os.environ["PORT"]}.items()}
    while True:
        disks = [tempfile.mkdtemp(dir=".") for _ in range(trainer["numNodes"])]
        for disk in disks:
            subprocess.run([word.replace("/mnt/run", disk) for word in data["command"]], check=True)
        command = trainer["command"] + trainer["args"]
        codes = nodes("pods", [[word.replace("/mnt/run", disk) for word in command] for disk in disks], told)
        for disk in disks:
            shutil.rmtree(disk)
        if not any(codes) or set(codes) & {*one["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]}:
            return any(codes)


def gcloud(words: list[str]) -> None:
    """storage rsync -r, to or from a bucket."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    *_, source, target = words
    bucket, _, prefix = (target if target.startswith("gs://") else source)[5:].partition("/")
    client = storage.Client("none", AnonymousCredentials())
    if target.startswith("gs://"):
        for path in filter(Path.is_file, Path(source).rglob("*")):
            client.bucket(bucket).blob(f"{prefix}/{path.relative_to(source)}").upload_from_filename(path)
    else:
        for blob in client.list_blobs(bucket, prefix=f"{prefix}/"):
            file = Path(target, blob.name.removeprefix(f"{prefix}/"))
            file.parent.mkdir(parents=True, exist_ok=True)
            blob.download_to_filename(file)


def docker(words: list[str]) -> None:
    assert words[0] in ("build", "push")


def hf(words: list[str]) -> None:
    assert {"README.md", "config.json", "model.safetensors"} <= {path.name for path in Path(words[-1]).iterdir()}


if __name__ == "__main__":
    sys.exit(globals()[Path(sys.argv[0]).name](sys.argv[1:]))
