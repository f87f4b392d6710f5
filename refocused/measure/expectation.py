"""How fast a run should be, worked out beside its start."""

import concurrent.futures
import multiprocessing

from configs import Config
from refocused.measure import cost, gpus, planner
from refocused.measure.cost import Hardware
from refocused.run.processes import Env


def predict(cfg: Config, world: int, machine: Hardware) -> float:
    """Seconds of a step."""
    return cost.step(planner.seen(cfg, world).work, cfg, world, machine).seconds


class Expectation:
    """Seconds of this run's step by the plan, made in a process of its own: this one has a real group and memory.

    On rank 0, and where the GPU is known.
    """

    def __init__(self, cfg: Config, env: Env):
        gpu = gpus.find(env.device_name) if env.main else None
        self.future = None
        if gpu:
            machine = Hardware.of(env.device_name, gpu, node=env.local_world_size)
            self.pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            self.future = self.pool.submit(predict, cfg, env.world_size, machine)

    def seconds(self) -> float | None:
        """None where there is none, for whatever reason: it is no part of the run."""
        try:
            return self.future.result(timeout=120) if self.future else None
        except Exception:
            return None
        finally:
            if self.future:
                self.pool.shutdown(wait=False, cancel_futures=True)
