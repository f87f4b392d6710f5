"""The rates of this machine's processes, at work side by side: `./setup.sh --check` and `bench.py plan --calibrate`."""

import json
import os
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist

from configs import Config
from refocused import entry
from refocused.run import gpus, hardware, processes, speed


class MeasureError(ValueError):
    """A process that is measured has ended early."""

    exit_code = 1


def measure_rank(nbytes: int = 1 << 26) -> None:
    """One of the processes of `measured`: rank 0 prints the slowest one's rates, while all are at work."""
    env = processes.start(Config())
    found = hardware.gpu(env.device, *(() if env.device.type != "cpu" else (1024, nbytes)))
    if env.world_size > 1:
        block = torch.ones(nbytes // 4, device=env.device)
        dist.barrier()
        passes = 2 * (env.world_size - 1) / env.world_size
        found["all-reduce"] = passes * nbytes / hardware.seconds(env.device, lambda: dist.all_reduce(block), 5) / 1e9
    rows = processes.gather(found)
    processes.stop()
    if env.main:
        print(json.dumps({key: min(row[key] for row in rows) for key in found} | {"name": env.device_name}))


def measured(world: int) -> dict[str, Any]:
    """The rates of `world` processes on this machine, and the device's name. Raises MeasureError."""
    launch = ["-m", "refocused.run.launch", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    command = [sys.executable, *launch, "-m", "refocused.measure.calibrate", "--rates"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(entry.ROOT)})
    if done.returncode:
        raise MeasureError(f"a process of the calibration failed: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine(world: int) -> speed.Machine:
    """This machine as the plan wants it. Raises MeasureError."""
    found = measured(world)
    gpu, link = gpus.find(found["name"]), 1e9 * found.get("all-reduce", 1e3)
    return speed.Machine(
        found["name"], 1e12 * found["product"] * speed.REACHED, 1e9 * found["memory"], link, node=world,
        overlaps=found["name"] != "CPU", peak=gpu and gpu.peak,
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """What setup.sh prints: a line of rates, then one for each GPU that is slow. --rates: see measure_rank."""
    if argv == ["--rates"]:
        measure_rank()
        return 0
    count = torch.cuda.device_count()
    devices = [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    rows = [hardware.gpu(device) if count else hardware.gpu(device, n=1024) for device in devices]
    name = torch.cuda.get_device_name(0) if count else "CPU"
    first, *complaints = hardware.describe(rows, [str(device) for device in devices], name)
    if count > 1:
        try:
            first += f", all-reduce {measured(count)['all-reduce']:.3g} GB/s"
        except MeasureError as error:
            complaints.append(f"the all-reduce between the GPUs could not be measured: {error}")
    print(f"{first} ({name})", *complaints, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main, sys.argv[1:]))
