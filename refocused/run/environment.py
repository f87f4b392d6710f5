"""The launch environment: which process of which launch this is. Nothing else reads these variables."""

import contextlib
import functools
import os
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from configs import ConfigError

FIX = "torchrun sets these variables; without RANK this is one process"


@dataclass(frozen=True)
class Launch:
    """A process of a launch; without arguments, one that is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    nodes: int = 1
    address: tuple[str, int] | None = None  # where the processes meet; None: this one is alone
    torchrun: bool = False  # whether torchrun started it
    torchruns_store: bool = False  # whether that serves the address
    max_restarts: int = 0
    restarts: int = 0
    error_file: str = ""
    left_over: str = ""  # variables that mean nothing without RANK


def read(env: Mapping[str, str]) -> Launch:
    """What the variables say, if they are whole. Raises ConfigError."""
    if "RANK" not in env:
        usual = {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return Launch(left_over=", ".join(f"{k}={env[k]}" for k, v in usual.items() if env.get(k, v) != v))

    def text(name: str) -> str:
        if not (value := env.get(name, "")):
            raise ConfigError(f"RANK={env['RANK']} is set and {name} is {'empty' if name in env else 'not'}; {FIX}")
        return value

    def number(name: str, least: int, most: int) -> int:
        value = text(name)
        if not (value.isascii() and value.isdigit() and len(value) < 9 and least <= int(value) <= most):
            raise ConfigError(f"{name}={value} must be a whole number from {least} to {most}; {FIX}")
        return int(value)

    world = number("WORLD_SIZE", 1, 10**6)
    rank = number("RANK", 0, world - 1)
    local_rank, local_world = 0, 1  # a process for each node
    if world > 1 and ("LOCAL_RANK" in env or "LOCAL_WORLD_SIZE" in env):
        local_world = number("LOCAL_WORLD_SIZE", 1, world)
        local_rank = number("LOCAL_RANK", 0, local_world - 1)
    if local_rank > rank:
        raise ConfigError(
            f"RANK={rank} cannot have LOCAL_RANK={local_rank}: rank 0 is the first of its node, and ranks of a node are "
            "consecutive; CUDA_VISIBLE_DEVICES chooses a GPU"
        )
    return Launch(
        rank, world, local_rank, local_world,
        nodes=number("GROUP_WORLD_SIZE", 1, world) if "GROUP_WORLD_SIZE" in env else 1,
        address=(text("MASTER_ADDR"), number("MASTER_PORT", int(world > 1), 65535)),
        torchrun="TORCHELASTIC_RUN_ID" in env,
        torchruns_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        max_restarts=number("TORCHELASTIC_MAX_RESTARTS", 0, 10**6) if "TORCHELASTIC_MAX_RESTARTS" in env else 0,
        restarts=number("TORCHELASTIC_RESTART_COUNT", 0, 10**6) if "TORCHELASTIC_RESTART_COUNT" in env else 0,
        error_file=env.get("TORCHELASTIC_ERROR_FILE", ""),
    )  # fmt: skip


@functools.cache
def launch() -> Launch:
    """This process's. Raises ConfigError."""
    return read(os.environ)


def launch_or_alone() -> Launch:
    """The same for who must not fail: a process that leaves because the variables are wrong is alone."""
    with contextlib.suppress(ConfigError):
        return launch()
    return Launch()


def free_port() -> int:
    """For a store on this machine, below the ports that the system gives to connections, as those may be taken soon."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a process on this machine is told of its launch."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {key: str(value) for key, value in values.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
