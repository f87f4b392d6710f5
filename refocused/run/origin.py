"""Where a figure or a checkpoint was made: commit, versions, processor."""

import datetime
import platform
import re
import subprocess
from pathlib import Path

import torch

from refocused.run.processes import Env


def git(*words: str) -> str:
    """What git says of this repository, "" where there is none."""
    try:
        run = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
        return run.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a disk that does not answer
        return ""


def commit() -> str | None:
    """The commit of the code that runs, with "-dirty" where a file of it was changed since."""
    dirty = "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no"))
    return f"{head}{dirty}" if (head := git("rev-parse", "--verify", "--quiet", "HEAD")) else None


def of_run(env: Env) -> dict[str, str | int | None]:
    """What a checkpoint remembers of the place that it was made in; asked once, at the start."""
    return {
        "git_commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(env.device.type),
        "world_size": env.world_size,
    }


def hardware() -> str:
    """Processor or GPU, versions, date and commit: what a figure means nothing without."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        match = re.search(r"model name\s*: (.+)", info)
        extras = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if f" {flag}" in info]
        name = f"{match[1] if match else platform.processor() or platform.machine()}, "
        name += f"{torch.get_num_threads()} cores" + (f" ({extras[0]})" if extras else "")
    where = git("rev-parse", "--short", "HEAD") or "unknown"
    dirty = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{name}; torch {torch.__version__}; {datetime.date.today()}; commit {where}{dirty}"
