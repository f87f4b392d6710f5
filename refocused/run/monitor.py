"""What a run says as it goes: the log lines, TensorBoard, and the figures of the trace."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

import configs
import model as neox
from configs import Config, ConfigError
from refocused.checkpoint import manifest
from refocused.run import processes, strategy
from refocused.run.trace import Diverged, Trace
from refocused.run.words import count, duration
from refocused.shards.shard import DataError


def check_folder(logging_dir: str, output_dir: str) -> None:
    """Raise ConfigError now if the logs could not be written later, or are those of another run that still exists."""
    note, mine = Path(logging_dir, ".output_dir"), os.path.realpath(output_dir)
    try:
        Path(logging_dir).mkdir(parents=True, exist_ok=True)
        for name in ("train.log", "trace.jsonl"):
            Path(logging_dir, name).open("a").close()
        other = note.read_text() if note.exists() else mine
        if other == mine or not manifest.names(other):  # one that never came to a checkpoint has no claim
            note.write_text(mine)
            return
    except OSError as error:
        raise ConfigError(f"logging_dir={logging_dir} cannot be written: {error}; choose another folder") from error
    raise ConfigError(
        f"logging_dir={logging_dir} has the logs of the run in {other}; give this run a folder of its own"
    )


def complain(cfg: Config, text: str) -> None:
    """The last words of a run that failed: to stderr, and into train.log where there is one that is its own."""
    with console():
        print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        if Path(cfg.logging_dir, ".output_dir").read_text() == os.path.realpath(cfg.output_dir):
            with Path(cfg.logging_dir, "train.log").open("a") as log:
                log.write(text + "\n")


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Writing to a terminal that was closed, or a pipe that nobody reads, ends the output and not the run."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(nowhere)


class Monitor:
    """Collects each step's figures on rank 0 and turns them into lines, curves and the state that a resume needs."""

    def __init__(self, cfg: Config, env: processes.Env, peak: float | None):
        """peak: the dense FLOP/s of this device, None where unknown."""
        self.cfg, self.env, self.peak = cfg, env, peak
        self.trace = self.board = self.log = None
        self.bar = tqdm(disable=True)
        self.samples = cfg.sample_tokens and cfg.parallel != "fsdp"  # where rank 0 has the whole model
        if env.main:
            self.log = Path(cfg.logging_dir, "train.log").open("a", buffering=1)

    def start(self, step: int, tokens_per_step: int, state: dict, checkpoint: str | None, settings: str) -> None:
        """Just before the loop: go on from a checkpoint's state, {} for a fresh run; settings is text for TensorBoard."""
        self.tokens_per_step = tokens_per_step
        self.best = state.get("best_loss", math.inf)
        self.history = state.get("history", [])  # [step, loss, learning rate] of every log line
        self.recent = state.get("recent_losses", [])  # since the last line, so that a resume prints the same mean
        self.eval_loss = state.get("eval_loss")
        self.norm, self.stall = math.nan, 0.0
        changed = (
            [key for key, *_ in configs.difference(state["config"], dataclasses.asdict(self.cfg))] if state else []
        )
        same_place = not state or state["run"]["world_size"] == self.env.world_size
        # elsewhere a difference is meant: in a fresh run beside an old trace, with another config or world size
        self.strict = self.cfg.deterministic and bool(state) and same_place and set(changed) <= {"resume"}
        self.held: tuple | None = None  # a logging step's line of the trace, waiting for its figures
        if self.env.main:
            from torch.utils.tensorboard import SummaryWriter

            self.trace = Trace(Path(self.cfg.logging_dir, "trace.jsonl"), step)
            self.trace.event("resume" if checkpoint else "start", step, checkpoint=checkpoint, time=int(time.time()))
            self.board = SummaryWriter(self.cfg.logging_dir, purge_step=step + 1)  # hides what a kill left beyond it
            self.board.add_text("config", "".join(f"    {line}\n" for line in settings.splitlines()), step + 1)
            self.bar = tqdm(total=self.cfg.max_steps, initial=step, disable=None, unit="step", dynamic_ncols=True)
        self.begin, self.begin_step, self.waited = time.perf_counter(), step, 0.0

    def say(self, text: str, file: TextIO | None = None) -> None:
        """A line on rank 0's console and in train.log; nothing for an empty text."""
        if self.log:
            file = file or sys.stdout
            with console():
                self.bar.write(text, file=file)
                file.flush()
            self.log.write(text + "\n")

    def step(
        self, step: int, loss: float, norm: float, lr: float, ids: np.ndarray, verdict: str | None, locate: Callable
    ) -> None:
        """Note one finished step; of one with a verdict, say and write down which text it was made of.

        locate(ids) are the windows' (shard, offset). Raises Diverged with deterministic=true where a replay differs.
        """
        extra = {"verdict": verdict} if verdict else {}
        self.recent.append(loss)
        self.norm = norm
        with console():
            self.bar.update(step - self.bar.n)
        self.held = (step, {"loss": loss, "grad_norm": norm, "lr": lr}, ids, extra)
        if not self.cfg.logging_steps or step % self.cfg.logging_steps:
            self.record()
        if verdict:
            self.report(step, loss, norm, verdict, locate(ids))

    def report(self, step: int, loss: float, norm: float, verdict: str, windows: list[tuple[str, int]]) -> None:
        path = Path(self.cfg.logging_dir, f"bad-step-{step}.json")
        first = ", ".join(f"{shard} at {offset}" for shard, offset in windows[:3])
        self.say(
            f"Step {step}: loss={loss:.4f}, grad norm={norm:.4f}: {verdict}. Read {first}, ...; all windows in {path}"
        )
        if self.env.main:
            figures = {"step": step, "loss": str(loss), "grad_norm": str(norm), "verdict": verdict}
            places = [{"shard": shard, "offset": offset} for shard, offset in windows]
            path.write_text(json.dumps({**figures, "windows": places}, indent=1))

    def record(self, **figures: Any) -> None:
        """Write the line that is held, if any, and say when a replay has come to its end."""
        if self.held and self.trace:
            step, proven, ids, extra = self.held
            self.trace.record(step, proven, ids, extra | figures)
            self.prove(step)
        self.held = None

    def prove(self, step: int) -> None:
        if proof := self.trace.replayed(step):
            self.say(proof)
            if self.strict and self.trace.first_difference:
                raise Diverged(f"deterministic=true, but {proof}; the checkpoint that it started from stands")

    def skipped(self, step: int, ids: np.ndarray) -> None:
        """Note a step that was walked past."""
        self.say(f"Step {step}: skipped, as skip_steps says")
        if self.trace:
            with console():
                self.bar.update(step - self.bar.n)
            self.trace.skipped(step, ids)
            self.prove(step)

    def line(self, step: int, lr: float, waited: float, status: str = "") -> None:
        """The log line of the steps since the last one: mean loss, speed as seen on the wall.

        waited: seconds that the loader has been waited for so far; status: what else there is to say, such as uploads.
        """
        if not self.recent:  # every step was skipped
            return
        loss = math.fsum(self.recent) / len(self.recent)
        self.recent = []
        self.best = min(self.best, loss)
        self.history.append([step, loss, lr])
        now = time.perf_counter()
        seconds, rate = now - self.begin, (step - self.begin_step) / (now - self.begin)
        tokens = rate * self.tokens_per_step
        mfu = tokens * neox.flops_per_token(self.cfg) / (self.env.world_size * self.peak) if self.peak else None
        memory, reserved = processes.peak_memory(self.env), None
        if self.env.device.type == "cuda":
            reserved = torch.accelerator.max_memory_reserved()
        wait_share, left = (waited - self.waited) / seconds, (self.cfg.max_steps - step) / rate
        self.begin, self.begin_step, self.waited = now, step, waited
        parts = [
            f"Step {step}: loss={loss:.4f}, lr={lr:.2e}, best={self.best:.4f}",
            f"{rate:.3g} steps/sec",
            f"{count(tokens)} tok/s",
            f"MFU {'n/a' if mfu is None else f'{mfu:.1%}'}",
            f"grad {self.norm:.3f}",
            f"data wait {wait_share:.1%}",
            f"{memory / 2**30:.2f}{f'/{reserved / 2**30:.2f}' if reserved else ''} GiB",
            f"save stall {self.stall:.2f}s" if self.stall else "",
            status,
            f"{duration(left)} left",
        ]
        self.say(" | ".join(part for part in parts if part))
        self.record(
            mean_loss=loss,
            best=self.best,
            steps_per_second=rate,
            tokens_per_second=tokens,
            mfu=mfu,
            data_wait_share=wait_share,
            memory_allocated=memory,
            memory_reserved=reserved,
            save_stall_seconds=self.stall,
            status=status,
            seconds_left=left,
            time=int(time.time()),
        )
        self.scalars(
            step,
            {
                "train/loss": loss,
                "train/learning_rate": lr,
                "train/grad_norm": self.norm,
                "perf/steps_per_second": rate,
                "perf/tokens_per_second": tokens,
                "perf/mfu": mfu,
                "perf/data_wait_share": wait_share,
                "perf/memory_gib": memory / 2**30,
                "perf/reserved_gib": reserved and reserved / 2**30,
                "ckpt/stall_seconds": self.stall,
            },
        )
        self.stall = 0.0

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        if self.board:
            for name, value in values.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)

    def evaluated(self, step: int, loss: float, begin: float, write: Callable[[], str]) -> None:
        """Note a held-out loss and the text that write() makes; the time since `begin` does not count as training."""
        self.eval_loss = loss
        spent = time.perf_counter() - begin
        self.say(f"Step {step}: eval_loss={loss:.4f}, perplexity={math.exp(min(loss, 700)):.2f} | {spent:.1f} s")
        if self.board:
            self.scalars(step, {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))})
            # TensorBoard purges curves after a resume but not texts, so a replay must not write them again
            if self.trace.event("eval", step, loss=loss, eval_seconds=spent) and self.samples:
                try:
                    text = write()
                except DataError as error:
                    self.say(f"no text samples: {error}")
                    self.samples = False
                else:
                    self.board.add_text("sample", "".join(f"    {line}\n" for line in text.splitlines()), step)
                self.board.flush()
        self.begin += time.perf_counter() - begin

    def histograms(self, step: int, model: torch.nn.Module) -> None:
        """Weights and clipped gradients of a model that is whole, as far as TensorBoard's bins reach."""
        if self.board and self.cfg.parallel != "fsdp":
            for name, p in strategy.raw(model).named_parameters():
                for kind, values in (("weights", p.detach()), ("gradients", p.grad)):
                    if len(inside := values[values.abs() < 1e20]):  # NaN is not; an empty histogram is an error
                        self.board.add_histogram(f"{kind}/{name}", inside, step)

    def saved(self, step: int, name: str, stall: float) -> None:
        """Note a save that has begun and held training up for `stall` seconds."""
        self.stall += stall
        if self.trace:
            self.trace.event("checkpoint", step, name=name, stall_seconds=stall)
            self.board.flush()  # a run resumed from here has the curves up to here

    def state(self) -> dict:
        return {
            "best_loss": self.best,
            "loss": self.history[-1][1] if self.history else None,
            "eval_loss": self.eval_loss,
            "history": self.history,
            "recent_losses": self.recent,
        }

    def close(self) -> None:
        with console():
            self.bar.close()
        if self.board:
            self.record()
            self.board.close()
            self.trace.close()
        if self.log:
            self.log.close()
