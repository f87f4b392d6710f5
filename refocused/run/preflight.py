"""What a run is refused for before it is built: ranks that differ, another run's checkpoint, too little memory or disk,
several starts in a row without a new step."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch

from configs import KEYS, MODEL, OPTIMIZER, Config, ConfigError, check_same_model
from model import num_parameters
from refocused import files
from refocused.checkpoint import manifest
from refocused.entry import ROOT
from refocused.run import exits, processes
from refocused.run.optim import checkpoint_bytes
from refocused.run.processes import Env

PLACES = ("data_dir", "cache_dir", "tokenizer", "output_dir", "logging_dir")  # each node has its own
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # a container's, of both versions
WRITING = threading.Lock()


@functools.cache
def sources() -> str:
    """A hash of the code that trains."""
    paths = [*(ROOT / name for name in ("train.py", "model.py", "data.py", "ckpt.py")), *ROOT.glob("refocused/**/*.py")]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def git(*words: str) -> str:
    """What git says of this repository, "" where there is none."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a disk that does not answer
        return ""


def made_by(env: Env) -> dict[str, str | int | None]:
    """What a checkpoint remembers of the run that made it; asked once, at the start."""
    head = git("rev-parse", "--verify", "--quiet", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": head + "-dirty" * bool(changed) if head else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": env.device.type,
        "world_size": env.world_size,
    }


def check_ranks(cfg: Config, fingerprint: str, tokenizer: str | None) -> None:
    """Raises ConfigError, on every rank alike, unless all have the same config, shards and tokenizer, torch and code."""
    mine = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in PLACES}
    mine |= {"the shards in data_dir": fingerprint, "the tokenizer": tokenizer}
    mine["the version of torch"] = torch.__version__
    mine["the code (a hash of train.py, model.py and the like)"] = sources()
    everyone = processes.gather(mine, processes.host_group)
    for rank, theirs in enumerate(everyone):
        if differing := [key for key in mine if theirs[key] != everyone[0][key]]:
            shown = ", ".join(f"{key} ({theirs[key]} and {everyone[0][key]})" for key in differing[:3])
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ConfigError(f"ranks {rank} and 0 differ in {shown}{more}; start all with the same command and data")


def check_same_run(state: dict[str, Any], cfg: Config, global_batch: int) -> None:
    """Raise ConfigError unless model, optimizer and, if it is not allowed to change, sequences per step are a checkpoint's."""
    way = "go on with {needed}, or begin a new run: name another output_dir and logging_dir"
    check_same_model("the checkpoint", state["config"], cfg, MODEL + OPTIMIZER, way)
    was = Config(**{key: value for key, value in state["config"].items() if key in KEYS})
    before = state.get("global_batch") or was.batch(state["run"]["world_size"])[1]
    if before != global_batch and not cfg.allow_change:
        raise ConfigError(
            f"the checkpoint's steps have {before} sequences, this run's would have {global_batch}: keep them with "
            f"global_batch_size={before}, or set allow_change=true to go on with {global_batch}"
        )


def host_bytes(cfg: Config, env: Env) -> dict[str, float]:
    """What this machine's processes keep in its memory at least: {for what: bytes}."""
    gpu, size = env.device.type == "cuda", checkpoint_bytes(cfg)
    share = env.local_world_size / env.world_size  # of what is saved
    copies = env.local_world_size / (1 if cfg.parallel == "ddp" else cfg.shard_size or env.world_size)  # of the model
    kept = {"full": 1, "none": 8}.get(cfg.activation_checkpointing, 4)  # tensors of hidden_size per block, at least
    tokens = cfg.per_device_train_batch_size * cfg.sequence_length * env.local_world_size
    width = 4 if cfg.mixed_precision == "no" else 2
    activations = tokens * cfg.num_hidden_layers * kept * cfg.hidden_size * width
    return {
        "weights, gradients and moments": copies * (size + 4 * num_parameters(cfg)[0]) * (cfg.cpu_offload or not gpu),
        "the copy that a save is written from (async_save=false needs none)": share * size * cfg.saves_behind,
        f"the activations of per_device_train_batch_size={cfg.per_device_train_batch_size}": activations * (not gpu),
    }


def memory() -> float:
    """Bytes of memory that this machine, or the container, has."""
    found = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # the other version; "max"
            found.append(float(Path(path).read_text()))
    return min(found)


def check_memory(cfg: Config, env: Env) -> None:
    """Raises ConfigError if this machine has less memory than is needed: the kernel would kill the run."""
    needs, have = host_bytes(cfg, env), memory()
    if (total := sum(needs.values())) > have:
        way = "a machine with GPUs, or a smaller hidden_size, num_hidden_layers or batch"
        raise ConfigError(
            f"the run needs at least {total / 2**30:.1f} GiB of this machine's memory and it has {have / 2**30:.1f}: "
            f"{' and '.join(f'{size / 2**30:.1f} GiB for {what}' for what, size in needs.items() if size)}; it takes "
            f"{'another machine' if env.device.type == 'cuda' else way}"
        )


def kept_forever(cfg: Config, step: int) -> int:
    """Saves after a step that keep_every keeps besides the last save_total_limit."""
    return max(0, cfg.max_steps // cfg.keep_every - step // cfg.keep_every) if cfg.keep_every else 0


def check_disk(cfg: Config, step: int) -> None:
    """Raises ConfigError unless output_dir's disk holds what a run from this step on will keep there, and one more:
    the oldest goes once the newest is complete."""
    steps = [m["step"] for m in manifest.read_manifests(cfg.output_dir)[0]]
    size, there = checkpoint_bytes(cfg), len(steps)
    left = max(0, cfg.max_steps - step)
    saves = math.ceil(left / cfg.save_steps) if cfg.save_steps else min(1, left)
    if limit := cfg.save_total_limit:
        passing = sum(not cfg.keep_every or old % cfg.keep_every > 0 for old in steps)  # those that will go
        most = limit + 1 + kept_forever(cfg, step) - passing
        saves = max(1, min(left if cfg.save_seconds else saves, most)) if saves else 0
    if saves and (lack := files.too_small(cfg.output_dir, saves * size)):
        fits = int(files.free(cfg.output_dir) / size / 1.01) + there - 1
        fewer = f", set save_total_limit={fits}" if 0 < fits < (limit or saves) and not cfg.keep_every else ""
        raise ConfigError(
            f"{saves} checkpoint{'s' * (saves > 1)} of {size / 1e9:.3g} GB will be in output_dir={cfg.output_dir} "
            f"besides the {there} that are there (save_total_limit={limit}, and the one that is written), and {lack}: "
            f"free some, choose another output_dir{fewer}"
        )


def check_room(cfg: Config, env: Env, step: int) -> None:
    """check_memory and check_disk, of a run from this step on; the same on every rank. Collective. Raises ConfigError."""
    processes.on_each_node(env, check_memory, cfg, env)
    processes.on_rank_0(check_disk, cfg, step)


def measure_devices(cfg: Config, env: Env) -> str:
    """With check_hardware, lines for the plan: the rates of this run's GPUs, and which of them is slow. Collective."""
    if not cfg.check_hardware or env.device.type != "cuda":
        return ""
    from refocused.run import hardware

    return hardware.measure_devices(env)


class CrashLoop(ValueError):
    """The last starts ended without a new step, and nothing has changed since then."""

    exit_code = exits.CRASH_LOOP
    same_on_all_ranks = True


class Starts:
    """Counts the starts in a row without a new step: on rank 0, in output_dir and, for the next machine, in the bucket.

    Not counted: a start that ended well, with 2 or 66, or by a signal; one of another config or other code.
    A checkpoint counts as progress, because a run that fell back repeats steps that were made before.
    """

    CALM = (exits.DONE, exits.MISTAKE, exits.NO_DATA, exits.STOPPED)

    def __init__(self, cfg: Config, bucket: Any = None):
        """bucket: refocused.bucket.start, where the run has one. Raises CrashLoop, BucketError."""
        self.cfg, self.bucket = cfg, bucket if cfg.max_failed_starts else None
        self.path = Path(os.path.realpath(cfg.output_dir), ".starts")
        key = hashlib.sha256(f"{vars(cfg)}{sources()}{torch.__version__}".encode()).hexdigest()
        self.state: dict[str, Any] = {"of": key, "failed": 0, "step": 0, "saved": 0, "reason": ""}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            before = self.path.read_bytes() if self.path.is_file() else self.bucket and self.bucket.read_starts(cfg)
            before = json.loads(before or b"0")
            if isinstance(before, dict) and before.get("of") == key:
                self.state |= {k: v for k, v in before.items() if type(v) is type(self.state.get(k))}
        there = self.bucket.generation(cfg, self.state["saved"]) if self.bucket else 0  # one that is away is counted
        saved = max(manifest.generation(cfg.output_dir), there)
        if saved < self.state["saved"]:  # its checkpoints were removed, and its steps are new again
            self.state["step"] = 0
        if saved != self.state["saved"]:
            self.state |= {"failed": 0, "saved": saved}
        self.failed = self.state["failed"]
        if cfg.max_failed_starts and self.failed >= cfg.max_failed_starts:
            reason = str(self.state["reason"]).strip().splitlines() or ["killed, or out of host memory, no message"]
            raise CrashLoop(
                f"{self.failed} starts in a row ended without a new step, the last with: {reason[-1]}; fix that, or "
                f"change the config, or remove {self.path}{' and logs/.starts in the bucket' * bool(self.bucket)}"
            )
        self.write(failed=self.failed + 1, reason="")
        exits.at_leave.append(self.ended)

    def write(self, **changes: Any) -> None:
        """Replace the file. If the disk refuses, training goes on uncounted."""
        news = any(self.state[key] != changes.get(key, self.state[key]) for key in ("failed", "reason"))
        with WRITING, contextlib.suppress(OSError):
            self.state |= changes
            files.write(self.path, json.dumps(self.state).encode())
        if self.bucket and news:
            self.bucket.write_starts(self.cfg, json.dumps(self.state).encode())

    def note(self) -> None:
        """Called regularly: clears the count once there is a new step."""
        if (step := processes.progress.step) is not None and step > self.state["step"]:
            self.failed = 0
            self.write(failed=0, step=step, reason="")

    def ended(self, code: int, message: str) -> None:
        """Called as the process leaves."""
        self.note()
        if code in self.CALM or code >= 128:
            self.write(failed=self.failed)
        elif self.state["failed"]:
            self.write(reason=message)


def count_start(cfg: Config, bucket: Any) -> Starts | None:
    """The count, on rank 0. A crash loop is raised on every rank. Collective."""
    made: list[Starts] = []
    processes.on_rank_0(lambda: made.append(Starts(cfg, bucket)))  # not returned: it would be sent to all ranks
    return made[0] if made else None
