"""What a run reports as it goes: the log lines, the curves, and the figures of the trace."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import configs
import model as neox
from configs import Config
from refocused import files
from refocused.checkpoint import manifest
from refocused.checkpoint.selection import Choice
from refocused.run import devices, gpus, processes, strategy
from refocused.run.evaluate import Score
from refocused.run.logs import TRACE, Logs, TensorBoard, console, mute
from refocused.run.messages import count, duration
from refocused.run.trace import Diverged, Trace, goodput, sentence
from refocused.shards.shard import DataError

WIDTH = 100  # columns of a step's line
CLOCK_SECONDS = 60.0  # at most so often a log line brings a clock into the trace
# keys that no figure of a step depends on, besides those about output, checkpoints and the bucket
HARMLESS = "data_dir cache_dir tokenizer eval_files eval_samples dataloader_num_workers num_processes".split()
SPEEDS = ("steps_per_second", "tokens_per_second", "mfu", "data_wait_share", "save_stall_seconds")


def differences(before: dict[str, Any], cfg: Config, world_size: int) -> tuple[list[str], bool]:
    """The reasons why a replay may differ from the steps of the checkpoint's run, and whether a difference is an error.

    It is an error with deterministic=true and that run's config and world size. before: its state.json, {} for a fresh run.
    """
    if not before:  # a fresh run beside an old trace is meant to be another
        return [], False
    changed = configs.difference(before["config"], dataclasses.asdict(cfg))
    groups = (keys for name, keys in configs.describe() if name.startswith(("output", "check", "bucket")))
    harmless = {*HARMLESS, *(key for keys in groups for key, _ in keys)}
    causes = [f"{key} {old or 'none'} -> {new or 'none'}" for key, old, new in changed if key not in harmless]
    if (processes_before := before["run"]["world_size"]) != world_size:
        causes.append(f"processes {processes_before} -> {world_size}")
    same = processes_before == world_size and {key for key, *_ in changed} <= {"resume"}
    return causes, cfg.deterministic and same


@dataclasses.dataclass
class LoopState:
    """What the loop carries from one step to the next, besides tensors. Each checkpoint's state.json has it."""

    step: int = 0
    samples_seen: int = 0
    tokens: int = 0
    loss: float | None = None  # mean of the last log line
    best_loss: float = math.inf  # of the log lines
    eval_loss: float | None = None
    recent_losses: list[float] = dataclasses.field(default_factory=list)  # since the last log line: its mean goes on
    evaluation_owed: bool = False  # a stop came before the evaluation that was due at this step
    spike_window: list[list[float]] | None = None
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "LoopState":
        """From a checkpoint's state.json; {} for a fresh run."""
        state = cls(**{f.name: saved[f.name] for f in dataclasses.fields(cls) if f.name in saved})
        state.recent_losses = [loss for loss in state.recent_losses if type(loss) is float]
        return state

    def saved(self, cfg: Config, dataset, made: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """A checkpoint's name and state.json, with the data.Dataset's position; made: preflight.made_by's."""
        data = {key: getattr(dataset, key) for key in ("fingerprint", "manifest", "tokenizer")}
        at = dataset.position(self.samples_seen)
        return manifest.name(at["epoch"], self.step, at["files"]), dataclasses.asdict(self) | {
            "global_batch": cfg.batch(made["world_size"])[1],
            "data": data | {"position": at},
            "config": dataclasses.asdict(cfg),
            "run": made,
        }


class Monitor:
    """Turns each step's figures into lines, curves and the trace. On other ranks than 0 it keeps the state alone."""

    def __init__(
        self, cfg: Config, env: processes.Env, logs: Logs, state: LoopState, start: Choice, compile_seconds: float,
        settings: str = "",
    ):  # fmt: skip
        """Just before the loop, which goes on from `state`. settings: the plan and every key that something set."""
        self.env, self.logs, self.log, self.state = env, logs, logs.log, state
        self.tokens_per_step = cfg.batch(env.world_size)[1] * cfg.sequence_length
        self.max_steps, self.logging_seconds = cfg.max_steps, cfg.logging_seconds
        self.averages = bool(cfg.logging_steps or cfg.logging_seconds)
        self.samples = cfg.sample_tokens and cfg.parallel != "fsdp"  # where rank 0 has the whole model
        gpu = gpus.find(env.device_name)
        self.flops_per_token, self.peak = neox.flops_per_token(cfg), gpu and gpu.peak
        self.norm, self.stall, self.retries = math.nan, 0.0, 0
        self.unwritten: tuple[int, dict[str, float], np.ndarray, dict[str, Any]] | None = None  # a step's line
        self.first = self.at = state.step  # where this run began, and the last step that it knows of
        self.causes, self.strict = differences(start.state, cfg, env.world_size)
        self.profiler = self.trace = self.curves = None
        if env.main:
            self.trace = self.open_trace(start.name, dataclasses.asdict(cfg))
            self.curves = TensorBoard(logs, state.step)
            self.curves.text(state.step + 1, "config", settings)
        if env.main and cfg.profile:
            from refocused.run.profiler import Profiler

            self.profiler = Profiler(cfg, env.device)
        quiet = None if env.main else True  # None: unless this is a terminal
        self.bar = tqdm(total=cfg.max_steps, initial=state.step, disable=quiet, unit="step", dynamic_ncols=True)
        age = processes.age()
        self.began, self.born = time.time() - age, time.perf_counter() - age
        # of the log line that comes next: its begin, the step and the waited seconds before it
        self.begin, self.begin_step, self.waited = time.perf_counter(), state.step, 0.0
        self.last_sign = self.last_clock = self.begin
        self.spent = dict.fromkeys(("data_seconds", "save_seconds", "eval_seconds", "end_seconds"), 0.0)
        self.spent |= {"startup_seconds": age - compile_seconds, "compile_seconds": compile_seconds}
        self.clock()
        self.expected: float | None = None  # seconds of a step, of a GPU in the table
        if gpu:
            from refocused.run.speed import Machine, step

            machine = Machine.of(env.device_name, gpu, node=env.local_world_size)
            self.expected = step(cfg, env.world_size, machine).seconds
            tokens = self.tokens_per_step / self.expected
            mfu = f"MFU {self.mfu(tokens) or 0:.1%}"
            self.log(f"expects   {self.expected:.3g} s per step, {count(tokens)} tok/s, {mfu}")

    def open_trace(self, checkpoint: str | None, config: dict[str, Any]) -> Trace | None:
        try:
            trace = Trace(self.logs.file(TRACE), self.state.step, self.max_steps)
        except OSError as error:
            self.log(f"{self.logs.folder / TRACE} cannot be read, so nothing is compared with it: {error}")
            return None
        if trace.unreadable:
            self.log(f"{trace.file.path}: {trace.unreadable} lines unreadable, not compared")
        kind, now = "resume" if checkpoint else "start", int(time.time())
        trace.write({"event": kind, "step": self.state.step, "checkpoint": checkpoint, "time": now, "config": config})
        return trace

    def mfu(self, tokens: float) -> float | None:
        """At so many tokens/s."""
        return tokens * self.flops_per_token / (self.env.world_size * self.peak) if self.peak else None

    def line_is_late(self) -> bool:
        """On rank 0: logging_seconds have passed since the last log line."""
        return self.env.main and 0 < self.logging_seconds < time.perf_counter() - self.begin

    def has_evaluation(self) -> bool:
        """On rank 0: whether the evaluation that the checkpoint owes was made by a run since, as the trace says."""
        if not self.trace or self.trace.evaluation is None:
            return False
        self.state.eval_loss = self.trace.evaluation
        return True

    def clock(self, done: bool = False) -> None:
        """Record in the trace how this run spent its time, up to the last step that is known."""
        self.last_sign = self.last_clock = time.perf_counter()
        if self.trace:
            seconds = {"run_seconds": self.last_sign - self.born, **self.spent}
            line: dict[str, Any] = {
                "event": "clock",
                "step": self.at,
                "from": self.first,
                "began": round(self.began, 1),
            }
            line |= {key: round(value, 3) for key, value in seconds.items()} | ({"done": True} if done else {})
            self.trace.write(line)
            self.trace.clocks[str(line["began"])] = line

    def before_step(self, step: int) -> None:
        if self.profiler:
            self.log(self.profiler.at(step))

    def step(
        self, step: int, figures: list[float], lr: float, ids: np.ndarray, status: str | None,
        locate: Callable[[np.ndarray], list[tuple[str, int]]], logs: bool,
    ) -> None:  # fmt: skip
        """Record a finished step. If it has a status, log which windows of which shards it was made of.

        figures begin with loss and gradient norm; locate(ids) are the windows' (shard, offset); logs: log_line() follows
        and adds its figures to the same line of the trace. Raises Diverged, see prove().
        """
        loss, self.norm = figures[:2]
        if self.averages:
            self.state.recent_losses.append(loss)
        with console():
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        extra = {"verdict": status} if status else {}
        self.unwritten = (step, {"loss": loss, "grad_norm": self.norm, "lr": lr}, ids, extra)
        if not logs:
            self.record()
        self.advance(step, proves=not logs)
        if status and self.env.main:
            name, windows = f"bad-step-{step}.json", locate(ids)
            report: dict[str, Any] = {"step": step, "loss": str(loss), "grad_norm": str(self.norm), "verdict": status}
            report["windows"] = [{"shard": shard, "offset": offset} for shard, offset in windows]
            with contextlib.suppress(OSError):  # the next line of the log will tell
                if not self.logs.lost:
                    files.write(self.logs.folder / name, json.dumps(report, indent=1).encode())
            first = ", ".join(f"{shard} at {offset}" for shard, offset in windows[:3])
            read = f"Read {first}, ...; all windows in {self.logs.folder / name}"
            self.log(f"Step {step}: loss={loss:.4f}, grad norm={self.norm:.4f}: {status}. {read}")

    def skipped(self, step: int, ids: np.ndarray) -> None:
        """Record a step that skip_steps names."""
        if self.trace:
            self.trace.skipped(step, ids)
        self.log(f"Step {step}: skipped, as skip_steps says")
        self.advance(step)

    def advance(self, step: int, proves: bool = True) -> None:
        self.at, self.last_sign = step, time.perf_counter()
        with console():
            self.bar.update(step - self.bar.n)
        if proves:
            self.prove(step)

    def record(self, **figures: Any) -> None:
        """Write the trace's line that is kept back, if any."""
        if self.unwritten and self.trace:
            step, compared, ids, extra = self.unwritten
            self.trace.record(step, compared, ids, extra | figures)
        self.unwritten = None

    def prove(self, step: int, over: bool = False) -> None:
        """Log the result of a replay once it has ended. over: no step follows.

        Raises Diverged with deterministic=true if the replay differs.
        """
        if not self.trace or not (found := self.trace.replayed(step, over)):
            return
        same, difference = found
        if not difference:
            lost = f", {self.trace.missing} not in the trace" if self.trace.missing else ""
            self.log(f"replayed {same} steps, {same} identical{lost}")
            return
        meant = f" ({', '.join(self.causes[:3])} changed)" if self.causes else ""
        proof = f"replayed {same} steps identically, then not the same run: {difference}{meant}"
        self.log(proof)
        if self.strict:
            raise Diverged(f"deterministic=true, but {proof}; the checkpoint that it started from stands")

    def log_line(self, step: int, lr: float, waited: float, status: str = "") -> None:
        """The log line of the steps since the last one: mean loss, speed in wall-clock time.

        waited: seconds so far that training waited for the loader; status: of uploads, at the end of the line.
        """
        self.logs.retry()
        if not self.state.recent_losses:  # every step was skipped
            return
        finite = [x for x in self.state.recent_losses if math.isfinite(x)]  # the others have lines of their own
        loss = self.state.loss = math.fsum(finite) / len(finite) if finite else math.nan
        self.state.recent_losses = []
        self.state.best_loss = min(self.state.best_loss, loss)
        now = time.perf_counter()
        seconds, rate = now - self.begin, (step - self.begin_step) / (now - self.begin)
        tokens, left = rate * self.tokens_per_step, (self.max_steps - step) / rate
        mfu, share = self.mfu(tokens), self.expected and self.expected * rate
        memory, retries = devices.peak_memory(self.env.device), strategy.alloc_retries()
        reserved = torch.accelerator.max_memory_reserved() if self.env.device.type == "cuda" else None
        retried, data_seconds = retries - self.retries, waited - self.waited
        speeds = dict(zip(SPEEDS, (rate, tokens, mfu, data_seconds / seconds, self.stall), strict=True))
        self.record(
            mean_loss=loss, best=self.state.best_loss, **speeds, memory_allocated=memory, memory_reserved=reserved,
            alloc_retries=retries, status=status, seconds_left=left, time=int(time.time()),
        )  # fmt: skip
        parts = [f"Step {step}: loss={loss:.4f}, lr={lr:.2e}", f"{count(tokens)} tok/s"]
        parts += [f"MFU {mfu:.1%}"] if mfu is not None else []
        parts += [f"{share:.0%} of the plan"] if share else []
        parts += [f"save stall {self.stall:.2f}s"] if self.stall >= 0.01 else []
        parts += [f"{retried} allocator retries"] if retried > 0 else []
        text = " | ".join([*parts, f"{duration(left)} left"])
        between = " | " if len(text) + len(status) + 3 <= WIDTH else "\n  "
        self.log(f"{text}{between}{status}" if status else text)
        self.prove(step)
        if self.curves:
            curves: dict[str, float | None] = {
                "loss/train": loss,
                "optimizer/learning_rate": lr,
                "optimizer/grad_norm": self.norm,
            }
            curves |= {f"speed/{name}": value for name, value in speeds.items()}
            curves |= {"memory/peak_gib": memory / 2**30, "memory/reserved_gib": reserved and reserved / 2**30}
            self.curves.scalars(step, curves)
        self.begin, self.begin_step, self.waited, self.stall, self.retries = now, step, waited, 0.0, retries
        self.spent["data_seconds"] += data_seconds
        if now - self.last_clock > CLOCK_SECONDS:
            self.clock()

    def evaluated(self, step: int, score: Score, begin: float, model: neox.GPTNeoX, cfg: Config) -> None:
        """Record a held-out score and a sample of text. The time since `begin` does not count as training."""
        self.state.eval_loss = loss = score.mean
        spent, perplexity, per_byte = time.perf_counter() - begin, math.exp(min(loss, 700)), score.bits_per_byte
        # TensorBoard purges curves after a resume but not texts, so a replay must not write them again
        new = not self.trace or self.trace.event("eval", step, loss=loss, eval_seconds=spent)
        parts = [f"Step {step}: eval_loss={loss:.4f}, perplexity={perplexity:.2f}"]
        parts += [f"{per_byte:.4f} bits per byte"] if per_byte is not None else []
        parts += ["documents apart"] if cfg.mask_documents else []
        self.log(" | ".join([*parts, f"{spent:.1f} s"]))
        if self.curves:
            curves: dict[str, float | None] = {"loss/validation": loss, "loss/validation_perplexity": perplexity}
            self.curves.scalars(step, curves | {"loss/validation_bits_per_byte": per_byte})
            if new and self.samples:
                from refocused.run import generation

                try:
                    self.curves.text(step, "sample", generation.open_ended(model, cfg))
                except DataError as error:
                    self.log(f"no text samples: {error}")
                    self.samples = False
        self.last_sign = time.perf_counter()
        self.begin += self.last_sign - begin
        self.spent["eval_seconds"] += self.last_sign - begin

    def saved(self, step: int, name: str, stall: float) -> None:
        """Record a save that has begun. Training stood still for `stall` seconds."""
        self.stall += stall
        self.spent["save_seconds"] += stall
        self.logs.retry()
        if self.trace:
            self.trace.event("checkpoint", step, name=name, stall_seconds=stall)
        self.clock()
        if self.trace:
            self.trace.file.sync()  # a run resumed from here has what it is compared with

    def finish(self, done: bool, waited: float) -> None:
        """Everything is saved: the profile, and the share of the time of all runs so far that became training."""
        if self.profiler:
            self.log(self.profiler.close())
        self.spent["data_seconds"] += waited - self.waited  # since the last log line
        self.spent["end_seconds"] = time.perf_counter() - self.last_sign
        self.clock(done)
        if self.trace:
            self.log(f"time      {sentence(goodput(self.trace.clocks.values()))}")

    def close(self) -> None:
        with console():
            self.bar.close()
        self.record()
        self.logs.close()
        mute()  # what a full disk has left in a stream would fail at exit
