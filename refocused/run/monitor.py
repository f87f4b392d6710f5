"""What a run says as it goes: the log lines, the curves, and the figures of the trace."""

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

import configs
import model as neox
from configs import Config
from refocused.run import goodput, processes, strategy
from refocused.run.board import Board
from refocused.run.evaluate import Score
from refocused.run.logs import LOG, TRACE, Logs, console, mute, stamped
from refocused.run.trace import Diverged, Trace
from refocused.run.words import count, duration, fitted, suspect
from refocused.shards.shard import DataError

WIDTH = 100  # columns of a step's line
SLOW = 0.8  # of the expected speed
CLOCK_SECONDS = 60.0  # at most so often a log line brings a clock into the trace
# keys that no figure of a step depends on, besides those about output, checkpoints and the bucket
HARMLESS = (
    "data_dir",
    "cache_dir",
    "tokenizer",
    "eval_files",
    "eval_samples",
    "dataloader_num_workers",
    "num_processes",
)


class Monitor:
    """Collects each step's figures on rank 0 and turns them into lines, curves and the state that a resume needs."""

    def __init__(self, cfg: Config, env: processes.Env, peak: float | None):
        """peak: the dense FLOP/s of this device, None where unknown. Rank 0 has called check_folder."""
        self.cfg, self.env, self.peak = cfg, env, peak
        age = goodput.age()
        self.began, self.born = time.time() - age, time.perf_counter() - age
        self.spent = dict.fromkeys(("startup_seconds", "compile_seconds", "data_seconds", "save_seconds"), 0.0)
        self.spent |= {"eval_seconds": 0.0, "end_seconds": 0.0}
        self.trace: Trace | None = None
        self.board: Board | None = None
        self.bar = tqdm(disable=True)
        self.settings = ""
        self.samples = cfg.sample_tokens and cfg.parallel != "fsdp"  # where rank 0 has the whole model
        self.logs = Logs(cfg) if env.main else None
        self.log = self.logs.file(LOG) if self.logs else None
        # seconds per step by the plan, and who knows them, sooner or later; what the look at the hardware has found
        self.expected: float | None = None
        self.expectation: Callable[[], float | None] = lambda: None
        self.sniffed, self.slow = "", 0  # windows in a row that were slower than expected

    def plan(self, plan: str, changes: str) -> None:
        """The plan and what the command line set on the screen; every key that something set in train.log."""
        self.settings = f"{plan}\n{changes}"
        here = [line for line in changes.splitlines() if "[command line]" in line]
        self.say("\n".join([plan, *here]), log=self.settings)

    def ready(self, seconds: float) -> None:
        """Compilation and warm-up are over; they took so long."""
        self.spent["compile_seconds"] = seconds
        self.say(f"ready in {seconds:.1f} s of compilation and warm-up")

    def expect(self) -> None:
        """Say what a step should take, once that is known."""
        if not self.expected and (seconds := self.expectation()):
            self.expected, tokens = seconds, self.tokens_per_step / seconds
            self.say(f"expects   {seconds:.3g} s per step, {count(tokens)} tok/s, MFU {self.mfu(tokens) or 0:.1%}")

    def mfu(self, tokens: float) -> float | None:
        """At so many tokens/s."""
        return tokens * neox.flops_per_token(self.cfg) / (self.env.world_size * self.peak) if self.peak else None

    def start(self, step: int, tokens_per_step: int, state: dict[str, Any], checkpoint: str | None) -> None:
        """Just before the loop: go on from a checkpoint's state, {} for a fresh run."""
        self.tokens_per_step = tokens_per_step
        self.best = state.get("best_loss", math.inf)
        self.loss = state.get("loss")  # of the last log line
        self.recent = state.get("recent_losses", [])  # since the last line, so that a resume prints the same mean
        self.eval_loss = state.get("eval_loss")
        self.norm, self.stall, self.retries = math.nan, 0.0, 0
        config = dataclasses.asdict(self.cfg)
        changed = configs.difference(state["config"], config) if state else []
        same_place = not state or state["run"]["world_size"] == self.env.world_size
        # elsewhere a difference is meant: in a fresh run beside an old trace, with another config or world size
        self.strict = self.cfg.deterministic and bool(state) and same_place and {k for k, *_ in changed} <= {"resume"}
        idle = {
            key
            for name, keys in configs.describe()
            if name.startswith(("output", "check", "bucket"))
            for key, _ in keys
        }
        self.causes = [
            f"{key} {old or 'none'} -> {new or 'none'}"
            for key, old, new in changed
            if key not in idle and key not in HARMLESS
        ]
        if not same_place:
            self.causes.append(f"processes {state['run']['world_size']} -> {self.env.world_size}")
        self.held: tuple[int, dict[str, float], np.ndarray, dict[str, Any]] | None = None  # a step's line, see step()
        self.first = self.at = step  # where this run began, and the last step that it knows of
        if self.logs:
            try:
                self.trace = Trace(self.logs.file(TRACE), step)
            except OSError as error:
                self.say(f"{self.logs.folder / TRACE} cannot be read, so nothing is compared with it: {error}")
            if self.trace:
                if self.trace.unreadable:
                    self.say(f"{self.trace.file.path}: {self.trace.unreadable} lines unreadable, not compared")
                kind = "resume" if checkpoint else "start"
                began = {"event": kind, "step": step, "checkpoint": checkpoint, "time": int(time.time())}
                self.trace.write(began | {"config": config})
            self.board = Board(self.logs, step)
            self.board.text(step + 1, "config", self.settings)
            self.bar = tqdm(total=self.cfg.max_steps, initial=step, disable=None, unit="step", dynamic_ncols=True)
        self.begin, self.begin_step, self.waited = time.perf_counter(), step, 0.0
        self.spent["startup_seconds"] = self.begin - self.born - self.spent["compile_seconds"]
        self.clock()

    def say(self, text: str | None, file: TextIO | None = None, log: str | None = None) -> None:
        """A line on rank 0's console and in train.log, there as `log` if given; nothing for an empty text."""
        if self.log and text:
            file = file or sys.stdout
            shown = fitted(text, shutil.get_terminal_size().columns) if file.isatty() else text
            self.log.write(stamped(log or text))  # first: what was seen is in the files, whenever the machine goes
            with console():
                self.bar.write(shown, file=file)
                file.flush()

    def overdue(self) -> bool:
        """On rank 0: logging_seconds have passed since the last log line."""
        return self.env.main and 0 < self.cfg.logging_seconds < time.perf_counter() - self.begin

    def clock(self) -> None:
        """Note in the trace what the time of this run went to, up to the last step that is known."""
        self.touched = self.clocked = time.perf_counter()
        if self.trace:
            line: dict[str, Any] = {
                "event": "clock",
                "step": self.at,
                "from": self.first,
                "began": round(self.began, 1),
            }
            seconds = {"run_seconds": self.touched - self.born, **self.spent}
            line |= {key: round(value, 3) for key, value in seconds.items()}
            self.trace.write(line)
            self.trace.clocks[str(line["began"])] = line

    def goodput(self) -> str:
        """At the end, everything saved: the share of the time of all runs so far that became training, in words."""
        self.spent["end_seconds"] = time.perf_counter() - self.touched
        self.clock()
        return f"time      {goodput.sentence(goodput.goodput(self.trace.clocks.values()))}" if self.trace else ""

    def step(
        self,
        step: int,
        loss: float,
        norm: float,
        lr: float,
        ids: np.ndarray,
        verdict: str | None,
        locate: Callable[[np.ndarray], list[tuple[str, int]]],
        logs: bool,
    ) -> None:
        """Note one finished step; of one with a verdict, say and write down which text it was made of.

        locate(ids) are the windows' (shard, offset); logs: line() follows, whose figures stand in the same line of the
        trace. Raises Diverged with deterministic=true where a replay differs.
        """
        extra = {"verdict": verdict} if verdict else {}
        if self.cfg.logging_steps or self.cfg.logging_seconds:
            self.recent.append(loss)
        self.norm, self.at, self.touched = norm, step, time.perf_counter()
        with console():
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self.bar.update(step - self.bar.n)
        self.held = (step, {"loss": loss, "grad_norm": norm, "lr": lr}, ids, extra)
        if not logs:
            self.record()
            self.prove(step)
        if verdict:
            self.report(step, loss, norm, verdict, locate(ids))

    def report(self, step: int, loss: float, norm: float, verdict: str, windows: list[tuple[str, int]]) -> None:
        path = Path(self.cfg.logging_dir, f"bad-step-{step}.json")
        first = ", ".join(f"{shard} at {offset}" for shard, offset in windows[:3])
        if self.logs:
            figures = {"step": step, "loss": str(loss), "grad_norm": str(norm), "verdict": verdict}
            places = [{"shard": shard, "offset": offset} for shard, offset in windows]
            self.logs.put(path.name, json.dumps({**figures, "windows": places}, indent=1).encode())
        self.say(
            f"Step {step}: loss={loss:.4f}, grad norm={norm:.4f}: {verdict}. Read {first}, ...; all windows in {path}"
        )

    def record(self, **figures: Any) -> None:
        """Write the line that is held, if any."""
        if self.held and self.trace:
            step, proven, ids, extra = self.held
            self.trace.record(step, proven, ids, extra | figures)
        self.held = None

    def prove(self, step: int) -> None:
        """Say when a replay has come to its end, and how."""
        if not self.trace or not (found := self.trace.replayed(step)):
            return
        same, difference = found
        if not difference:
            self.say(f"replayed {same} steps, {same} identical")
            return
        meant = f" ({', '.join(self.causes[:3])} changed)" if self.causes else ""
        proof = f"replayed {same} steps identically, then not the same run: {difference}{meant}"
        self.say(proof)
        if self.strict:
            raise Diverged(f"deterministic=true, but {proof}; the checkpoint that it started from stands")

    def skipped(self, step: int, ids: np.ndarray) -> None:
        """Note a step that was walked past."""
        if self.trace:
            self.trace.skipped(step, ids)
        self.say(f"Step {step}: skipped, as skip_steps says")
        self.at, self.touched = step, time.perf_counter()
        with console():
            self.bar.update(step - self.bar.n)
        self.prove(step)

    def line(self, step: int, lr: float, waited: float, status: str = "") -> None:
        """The log line of the steps since the last one: mean loss, speed as seen on the wall.

        waited: seconds that the loader has been waited for so far; status: what else there is to say, such as uploads.
        """
        if self.logs:
            self.logs.again()
        if not self.recent:  # every step was skipped
            return
        self.expect()
        loss = self.loss = math.fsum(self.recent) / len(self.recent)
        self.recent = []
        self.best = min(self.best, loss)
        now = time.perf_counter()
        seconds, rate = now - self.begin, (step - self.begin_step) / (now - self.begin)
        tokens = rate * self.tokens_per_step
        mfu, share = self.mfu(tokens), self.expected and self.expected * rate
        memory, reserved, retries = processes.peak_memory(self.env), None, strategy.alloc_retries()
        if self.env.device.type == "cuda":
            reserved = torch.accelerator.max_memory_reserved()
        self.spent["data_seconds"] += waited - self.waited
        wait_share, left = (waited - self.waited) / seconds, (self.cfg.max_steps - step) / rate
        self.begin, self.begin_step, self.waited = now, step, waited
        parts = [
            f"Step {step}: loss={loss:.4f}, lr={lr:.2e}",
            f"{count(tokens)} tok/s",
            f"MFU {mfu:.1%}" if mfu is not None else "",
            f"{share:.0%} of the plan" if share else "",
            f"save stall {self.stall:.2f}s" if self.stall >= 0.01 else "",
            f"{retries - self.retries} allocator retries" if retries > self.retries else "",
            f"{duration(left)} left",
        ]
        self.record(
            mean_loss=loss,
            best=self.best,
            steps_per_second=rate,
            tokens_per_second=tokens,
            mfu=mfu,
            data_wait_share=wait_share,
            memory_allocated=memory,
            memory_reserved=reserved,
            alloc_retries=retries,
            save_stall_seconds=self.stall,
            status=status,
            seconds_left=left,
            time=int(time.time()),
        )
        text = " | ".join(part for part in parts if part)
        if not status or len(text) + len(status) + 3 <= WIDTH:
            self.say(" | ".join(filter(None, (text, status))))
        else:
            self.say(f"{text}\n  {status}")
        if share:
            lost = {"data": wait_share, "save": self.stall / seconds, "retries": retries - self.retries}
            self.slow = self.slow + 1 if share < SLOW else 0
            if self.slow == 2:  # one alone has the first steps of a process in it, or a profile
                self.say(
                    f"note      slower than expected; {suspect(1 - share, lost, self.sniffed, self.env.world_size)}"
                )
        self.prove(step)
        if self.board:
            values = {
                "loss/train": loss,
                "optimizer/learning_rate": lr,
                "optimizer/grad_norm": self.norm,
                "speed/steps_per_second": rate,
                "speed/tokens_per_second": tokens,
                "speed/mfu": mfu,
                "speed/data_wait_share": wait_share,
                "speed/save_stall_seconds": self.stall,
                "memory/peak_gib": memory / 2**30,
                "memory/reserved_gib": reserved and reserved / 2**30,
            }
            self.board.scalars(step, values)
        self.stall, self.retries = 0.0, retries
        if now - self.clocked > CLOCK_SECONDS:
            self.clock()

    def evaluated(self, step: int, score: Score, begin: float, write: Callable[[], str]) -> None:
        """Note a held-out score and the text that write() makes; the time since `begin` does not count as training."""
        self.eval_loss = loss = score.mean
        bits_per_byte = score.bits_per_byte
        spent = time.perf_counter() - begin
        perplexity = math.exp(min(loss, 700))
        parts = [
            f"Step {step}: eval_loss={loss:.4f}, perplexity={perplexity:.2f}",
            f"{bits_per_byte:.4f} bits per byte" if bits_per_byte is not None else "",
            "documents apart" if self.cfg.mask_documents else "",
            f"{spent:.1f} s",
        ]
        # TensorBoard purges curves after a resume but not texts, so a replay must not write them again
        new = not self.trace or self.trace.event("eval", step, loss=loss, eval_seconds=spent)
        self.say(" | ".join(part for part in parts if part))
        if self.board:
            self.board.scalars(step, {"loss/validation": loss, "loss/validation_perplexity": perplexity})
            self.board.scalars(step, {"loss/validation_bits_per_byte": bits_per_byte})
            if new and self.samples:
                try:
                    self.board.text(step, "sample", write())
                except DataError as error:
                    self.say(f"no text samples: {error}")
                    self.samples = False
        self.touched = time.perf_counter()
        self.begin += self.touched - begin
        self.spent["eval_seconds"] += self.touched - begin

    def histograms(self, step: int, model: torch.nn.Module) -> None:
        """At every histogram_steps: finite weights and clipped gradients of a model that is whole."""
        every = self.cfg.histogram_steps
        if self.board and every and step % every == 0 and self.cfg.parallel != "fsdp":
            for name, p in strategy.raw(model).named_parameters():
                self.board.histogram(step, f"weights/{name}", p.detach())
                if p.grad is not None:
                    self.board.histogram(step, f"gradients/{name}", p.grad)

    def saved(self, step: int, name: str, stall: float) -> None:
        """Note a save that has begun and held training up for `stall` seconds."""
        self.stall += stall
        self.spent["save_seconds"] += stall
        if self.logs:
            self.logs.again()
        if self.trace:
            self.trace.event("checkpoint", step, name=name, stall_seconds=stall)
        self.clock()
        if self.trace:
            self.trace.file.sync()  # a run resumed from here has what it is compared with

    def state(self) -> dict[str, Any]:
        return {
            "best_loss": self.best,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "recent_losses": self.recent,
        }

    def close(self) -> None:
        with console():
            self.bar.close()
        self.record()
        if self.logs:
            self.logs.close()
        mute()  # what a full disk has left in a stream would fail at exit
