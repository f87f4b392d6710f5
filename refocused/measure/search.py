"""The fastest layouts that fit: how the same optimizer step can be laid out on a machine, timed by cost.py."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import model as neox
from configs import CHOICES, Config, ConfigError
from refocused.measure import cost, planner
from refocused.measure.cost import Cost, Hardware, Work

SHOWN = 5


class Found(NamedTuple):
    """A layout with its step's time and the bytes that a process needs on its device and in host memory."""

    cfg: Config
    cost: Cost
    needed: float
    host: float
    work: Work


@dataclasses.dataclass
class Result:
    fastest: list[Found]  # that fit
    too_large: Found | None  # the fastest of those that the device is too small for, if it is faster
    starved: Found | None  # the fastest of those that only host memory is too small for
    machine: Hardware  # that they were timed on
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
        batch: dict[str, Any] = dict(
            per_device_train_batch_size=B, num_processes=world, gradient_accumulation_steps=each // B
        )
        for level in CHOICES["activation_checkpointing"]:
            plain: dict[str, Any] = dict(shard_size=0, cpu_offload=False, activation_checkpointing=level)
            yield dataclasses.replace(cfg, parallel="ddp", **batch, **plain)
            ways: list[dict[str, Any]] = [{"shard_size": size} for size in (0, *sizes)] if world > 1 else []
            for way in ways + [{"cpu_offload": True}] * offloads:
                yield dataclasses.replace(cfg, parallel="fsdp", **batch, **(plain | way))


def like(cfg: Config) -> Config:
    """The layout whose passes tell this one's operations: they differ in what is sent, and where it lies."""
    accumulation = min(2, cfg.gradient_accumulation_steps)
    return dataclasses.replace(
        cfg, shard_size=0, cpu_offload=False, num_processes=0, global_batch_size=0,
        gradient_accumulation_steps=accumulation, resume=None,
    )  # fmt: skip


def search(
    cfg: Config,
    world: int,
    machine: Hardware,
    memory: float,
    host_memory: float,
    workers: int = 0,
    device: str = "cuda",
    measure: Callable[[set[tuple]], Hardware] | None = None,
) -> Result:
    """The fastest layouts of the config's step that fit; memory, host_memory: bytes of a device and of a machine.

    Passes are made for each kind of computation; of what differs in communication alone only the fastest are looked
    at, until enough have been found that fit. Where bf16 moments make one fit they are taken. workers: processes
    beside this one; device: its kind. measure: the machine, once it is known which products the layouts are made of.
    """
    candidates = list(layouts(cfg, world, machine.node))
    models = list(dict.fromkeys(map(like, candidates)))
    parameters = neox.num_parameters(cfg)[0]
    moments = 4 if cfg.adam_moments == "bf16" else 8  # bytes of a parameter's
    halves = moments == 8 and cfg.moments_fit_bf16
    fastest: list[Found] = []
    too_large: list[Found] = []
    starved: list[Found] = []
    with planner.Passes(world, workers, device) as passes:
        known = dict(zip(models, passes.all(models), strict=True))
        if measure:
            machine = measure(set().union(*(s.work.shapes() for s in known.values())))

        def look(some: list[Config]) -> list[Found]:
            looked = zip(some, passes.all([own(c) for c in some]), strict=True)
            found = [Found(c, cost.step(s.work, c, world, machine), s.needed, s.host, s.work) for c, s in looked]
            for f in found:
                on_host = f.host * min(world, machine.node)
                (too_large if f.needed > memory else starved if on_host > host_memory else fastest).append(f)
            return found

        def can_fit(c: Config) -> bool:  # weights and moments are the least that anyone keeps
            parts = (c.shard_size or world) if c.parallel == "fsdp" else 1
            return c.cpu_offload or (4 + (4 if halves else moments)) * parameters / parts <= memory

        timed = [(cost.step(known[like(c)].work, c, world, machine).seconds, c) for c in candidates if can_fit(c)]
        order = [c for _, c in sorted(timed, key=lambda pair: pair[0])]
        while order and len(fastest) < SHOWN:
            some, order = order[: passes.width], order[passes.width :]
            large = [f for f in look(some) if f.needed > memory and halves and not f.cfg.cpu_offload]
            saved = [4 * parameters / ((f.cfg.shard_size or world) if f.cfg.parallel == "fsdp" else 1) for f in large]
            near = [f.cfg for f, less in zip(large, saved, strict=True) if f.needed - less <= memory]
            look([dataclasses.replace(c, adam_moments="bf16") for c in near])
    fastest = sorted(fastest, key=lambda f: f.cost.seconds)[:SHOWN]
    larger = [f for f in too_large if fastest and f.cost.seconds < fastest[0].cost.seconds]
    too_small, too_lean = (min(some, key=lambda f: f.cost.seconds, default=None) for some in (larger, starved))
    return Result(fastest, too_small, too_lean, machine, len(candidates))


def own(cfg: Config) -> Config:
    """The same layout as `like` names them, so that no pass is made twice."""
    return dataclasses.replace(
        like(cfg), shard_size=cfg.shard_size, cpu_offload=cfg.cpu_offload,
    )  # fmt: skip
