"""Whether a machine has room for a run, asked before minutes go into building it: its memory, the disk of its saves."""

import contextlib
import math
import os
from pathlib import Path

from configs import Config, ConfigError
from model import num_parameters
from refocused import files
from refocused.checkpoint import manifest
from refocused.run import processes
from refocused.run.optim import checkpoint_bytes
from refocused.run.processes import Env

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # a container's, of both versions


def host_bytes(cfg: Config, env: Env) -> tuple[float, float]:
    """What the processes of this machine keep in its memory at least: (weights, gradients and moments where they are not
    on a GPU, the copy that a save behind training is written from)."""
    here = env.device.type != "cuda" or cfg.cpu_offload
    share = env.local_world_size / (cfg.shard_size or env.world_size)  # of one model; ddp's saves are shared out too
    copies = env.local_world_size if cfg.parallel == "ddp" else share
    held = copies * (checkpoint_bytes(cfg) + 4 * num_parameters(cfg)[0]) if here else 0.0
    return held, share * checkpoint_bytes(cfg) * cfg.saves_behind


def activation_bytes(cfg: Config, env: Env) -> float:
    """What the processes of this machine hold at least of a micro-step's activations, where they have no GPU."""
    if env.device.type == "cuda":
        return 0.0
    kept = {"full": 1, "none": 8}.get(cfg.activation_checkpointing, 4)  # tensors of hidden_size per block, at least
    tokens = cfg.per_device_train_batch_size * cfg.sequence_length * env.local_world_size
    return tokens * cfg.num_hidden_layers * kept * cfg.hidden_size * (4 if cfg.mixed_precision == "no" else 2)


def memory() -> float:
    """Bytes of memory that this machine, or the container, has."""
    found = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # the other version; "max"
            found.append(float(Path(path).read_text()))
    return min(found)


def check_memory(cfg: Config, env: Env) -> None:
    """Raise ConfigError where less memory is here than is needed at least: the kernel would end the run without a word."""
    (held, copy), batch, have = host_bytes(cfg, env), activation_bytes(cfg, env), memory()
    if held + copy + batch <= have:
        return
    needs = [f"{held / 2**30:.1f} GiB for weights, gradients and moments" if held else ""]
    needs += [
        f"{copy / 2**30:.1f} GiB for the copy that a save is written from (async_save=false needs none)" * (copy > 0),
        f"{batch / 2**30:.1f} GiB for the activations of per_device_train_batch_size={cfg.per_device_train_batch_size}"
        * (batch > 0),
    ]
    ways = (
        "another machine"
        if env.device.type == "cuda"
        else "a machine with GPUs, or a smaller hidden_size, num_hidden_layers or batch"
    )
    needed = (held + copy + batch) / 2**30
    raise ConfigError(
        f"the run needs at least {needed:.1f} GiB of this machine's memory and it has {have / 2**30:.1f}: "
        f"{' and '.join(filter(None, needs))}; it takes {ways}"
    )


def kept_forever(cfg: Config, step: int) -> int:
    """Of the saves after a step, those that keep_every keeps besides the last save_total_limit."""
    return max(0, cfg.max_steps // cfg.keep_every - step // cfg.keep_every) if cfg.keep_every else 0


def check_disk(cfg: Config, step: int) -> None:
    """Raise ConfigError unless output_dir's disk holds what a run from this step on will keep there, and one more: the
    oldest goes once the newest is complete."""
    size, there = checkpoint_bytes(cfg), len(manifest.read_manifests(cfg.output_dir)[0])
    free = files.free(cfg.output_dir)
    left = max(0, cfg.max_steps - step)
    saves = math.ceil(left / cfg.save_steps) if cfg.save_steps else min(1, left)
    if limit := cfg.save_total_limit:
        most = limit + 1 + kept_forever(cfg, step) - there
        saves = max(1, min(left if cfg.save_seconds else saves, most)) if saves else 0
    if saves and (lack := files.too_small(cfg.output_dir, saves * size)):
        fits = int(free / size / 1.01) + there - 1
        fewer = f", set save_total_limit={fits}" if 0 < fits < (limit or saves) and not cfg.keep_every else ""
        raise ConfigError(
            f"{saves} checkpoint{'s' * (saves > 1)} of {size / 1e9:.3g} GB will come to lie in output_dir={cfg.output_dir} "
            f"besides the {there} that are there (save_total_limit={limit}, and the one that is written), and {lack}: "
            f"free some, choose another output_dir{fewer}"
        )


def check(cfg: Config, env: Env, step: int) -> None:
    """Both, of a run from this step on; the same on every rank. Collective. Raises ConfigError."""
    processes.on_each_node(env, check_memory, cfg, env)
    processes.on_rank_0(check_disk, cfg, step)
