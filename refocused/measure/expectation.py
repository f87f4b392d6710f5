"""How fast a run should be, worked out beside it."""

import contextlib
import multiprocessing
from multiprocessing.connection import Connection

from configs import Config
from refocused.measure import cost, gpus, planner
from refocused.measure.cost import Hardware
from refocused.run.processes import Env


def predict(cfg: Config, world: int, machine: Hardware, answer: Connection) -> None:
    """Sends the seconds of a step, unless the run is over before they are known."""
    seconds = cost.step(planner.seen(cfg, world).work, cfg, world, machine).seconds
    with contextlib.suppress(BrokenPipeError):
        answer.send(seconds)


class Expectation:
    """Seconds of this run's step by the plan, made in a process of its own: this one has a real group and memory.

    On rank 0, and where the GPU is known. Nobody waits for it: it takes as long as a cold compilation, and a warm one
    is over in seconds.
    """

    def __init__(self, cfg: Config, env: Env):
        self.answer: Connection | None = None
        if gpu := gpus.find(env.device_name) if env.main else None:
            machine = Hardware.of(env.device_name, gpu, node=env.local_world_size)
            context = multiprocessing.get_context("spawn")
            self.answer, theirs = context.Pipe(duplex=False)
            context.Process(target=predict, args=(cfg, env.world_size, machine, theirs), daemon=True).start()
            theirs.close()

    def seconds(self) -> float | None:
        """None where it is not known yet, or never will be: it is no part of the run."""
        if not self.answer or not self.answer.poll():
            return None
        try:
            return self.answer.recv()
        except EOFError:  # it failed, and has said why
            return None
        finally:
            self.answer = None
