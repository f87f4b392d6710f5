"""The fastest layouts that fit: how the same optimizer step can be laid out on a machine, by speed.py and memory.py."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

import model as neox
from configs import CHOICES, Config, ConfigError
from refocused.run import memory, speed
from refocused.run.speed import Machine, Step

SHOWN = 5


class Found(NamedTuple):
    """A layout with its step's time and the bytes that a process needs on its device and in host memory."""

    cfg: Config
    step: Step
    needed: float
    host: float


@dataclasses.dataclass
class Result:
    fastest: list[Found]  # that fit
    too_large: Found | None  # the fastest that the device is too small for, if it is faster
    starved: Found | None  # the fastest that only host memory is too small for
    looked: int  # layouts that were timed


def sequences(cfg: Config, world: int) -> int:
    """Per optimizer step and process, at the batch that the config is meant for. Raises ConfigError."""
    whole = cfg.global_batch_size or cfg.batch(cfg.num_processes or world)[1]
    if whole % world:
        raise ConfigError(f"{whole} sequences per step cannot be shared by {world} GPUs; set global_batch_size")
    return whole // world


def layouts(cfg: Config, world: int, node: int) -> Iterator[Config]:
    """Every way to make the config's step with `world` processes, `node` on each machine."""
    each = sequences(cfg, world)
    sizes = [node] if world > node else [s for s in (2, 4) if s < world and world % s == 0]
    offloads = cfg.mixed_precision != "fp16" and cfg.optimizer == "adamw"
    for B in (n for n in range(1, each + 1) if each % n == 0):
        for level in CHOICES["activation_checkpointing"]:
            plain: dict[str, Any] = dict(
                per_device_train_batch_size=B, num_processes=world, gradient_accumulation_steps=each // B,
                shard_size=0, cpu_offload=False, activation_checkpointing=level,
            )  # fmt: skip
            yield dataclasses.replace(cfg, parallel="ddp", **plain)
            ways: list[dict[str, Any]] = [{"shard_size": size} for size in (0, *sizes)] if world > 1 else []
            for way in ways + [{"cpu_offload": True}] * offloads:
                yield dataclasses.replace(cfg, parallel="fsdp", **(plain | way))


def search(cfg: Config, world: int, machine: Machine, device: float, host: float) -> Result:
    """The fastest layouts of the config's step that fit; device, host: bytes of a process's device and of a machine.

    All are timed, and memory is planned for the fastest until enough have been found that fit. Where bf16 moments make
    one fit they are taken.
    """
    timed = sorted(
        ((speed.step(c, world, machine).seconds, i, c) for i, c in enumerate(layouts(cfg, world, machine.node)))
    )
    parameters, halves = neox.num_parameters(cfg)[0], cfg.adam_moments == "fp32" and cfg.moments_fit_bf16
    fastest: list[Found] = []
    too_large: list[Found] = []
    starved: list[Found] = []
    full: dict[tuple, int] = {}  # the smallest micro-batch that did not fit, by all that else decides about memory

    def parts(c: Config) -> int:
        return (c.shard_size or world) if c.parallel == "fsdp" else 1

    def look(c: Config) -> Found:
        needed, on_host = memory.needed(c, world)
        found = Found(c, speed.step(c, world, machine), needed, on_host)
        over = on_host * min(world, machine.node) > host
        (too_large if needed > device else starved if over else fastest).append(found)
        return found

    # off a terminal there is no bar
    for _, _, c in tqdm(timed, desc="memory of the fastest layouts", unit="layout", leave=False, disable=None):
        moments = 4 if halves or cfg.adam_moments == "bf16" else 8  # bytes of a parameter's, at least
        if len(fastest) == SHOWN:
            break
        if not c.cpu_offload and (4 + moments) * parameters / parts(c) > device:
            continue  # weights and moments are the least that anyone keeps
        kind = c.parallel, c.shard_size, c.activation_checkpointing, c.cpu_offload, c.gradient_accumulation_steps > 1
        if c.per_device_train_batch_size >= full.get(kind, 1 << 30):
            continue  # a smaller one did not fit
        found = look(c)
        if found.needed <= device:
            continue
        if halves and not c.cpu_offload and found.needed - 4 * parameters / parts(c) <= device:
            look(dataclasses.replace(c, adam_moments="bf16"))
        else:
            full[kind] = c.per_device_train_batch_size
    fastest.sort(key=lambda f: f.step.seconds)
    larger = [f for f in too_large if fastest and f.step.seconds < fastest[0].step.seconds]
    too_small, too_lean = (min(some, key=lambda f: f.step.seconds, default=None) for some in (larger, starved))
    return Result(fastest, too_small, too_lean, len(timed))
