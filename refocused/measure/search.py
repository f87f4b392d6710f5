"""The fastest layouts that fit: how the same optimizer step can be laid out on a machine, by speed.py and memory.py."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

import model as neox
from configs import CHOICES, MOST_TOKENS, Config, ConfigError
from refocused.run import memory, speed
from refocused.run.speed import Machine, Step

SHOWN = 5


class Found(NamedTuple):
    cfg: Config
    step: Step
    needed: float  # bytes of a process on its device
    host: float  # and in host memory


@dataclasses.dataclass
class Result:
    fastest: list[Found]  # that fit
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
    largest = min(each, MOST_TOKENS // cfg.sequence_length)
    for B in (n for n in range(1, largest + 1) if each % n == 0):
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

    Memory is planned for the fastest until enough have been found. Where bf16 moments make one fit they are taken.
    """
    steps = [(c, speed.step(c, world, machine)) for c in layouts(cfg, world, machine.node)]
    steps.sort(key=lambda pair: pair[1].seconds)
    parameters, halves = neox.num_parameters(cfg)[0], cfg.adam_moments == "fp32" and cfg.moments_fit_bf16
    moments = 4 if halves or cfg.adam_moments == "bf16" else 8  # bytes of a parameter's, at least
    found: list[Found] = []

    def look(c: Config, step: Step) -> Found:
        memory_of = memory.estimate(c, world)
        found.append(Found(c, step, memory_of.needed, memory_of.host))
        return found[-1]

    full: dict[tuple, int] = {}  # the smallest micro-batch that did not fit, by all else that decides about memory

    def fits(f: Found) -> bool:
        return f.needed <= device and f.host * min(world, machine.node) <= host

    # off a terminal there is no bar
    for c, step in tqdm(steps, desc="memory of the fastest layouts", unit="layout", leave=False, disable=None):
        if sum(map(fits, found)) >= SHOWN:
            break
        own = parameters / ((c.shard_size or world) if c.parallel == "fsdp" else 1)
        if not c.cpu_offload and (4 + moments) * own > device:
            continue  # weights and moments are the least that anyone keeps
        kind = c.parallel, c.shard_size, c.activation_checkpointing, c.cpu_offload, c.gradient_accumulation_steps > 1
        if c.per_device_train_batch_size >= full.get(kind, 1 << 30):
            continue  # a smaller one did not fit
        if (needed := look(c, step).needed) <= device:
            continue
        if halves and not c.cpu_offload and needed - 4 * own <= device:
            c = dataclasses.replace(c, adam_moments="bf16")
            look(c, speed.step(c, world, machine))
        else:
            full[kind] = c.per_device_train_batch_size
    found.sort(key=lambda f: f.step.seconds)
    fastest = [f for f in found if fits(f)]
    starved = (f for f in found if f.needed <= device and not fits(f))
    return Result(fastest, next(starved, None), len(steps))
