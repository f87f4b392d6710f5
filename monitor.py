"""What a run says: the plan before the first step, a log line, TensorBoard scalars and trace.jsonl."""

import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import model as neox
import parallel
from configs import Config


def count(n: float) -> str:
    """1414647808 -> 1.415B"""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.4g}{unit}"
    return f"{n:g}"


def plan(cfg: Config, world_size: int, dataset, where: str) -> str:
    """The run in a few aligned lines. dataset: a data.Dataset, or the reason why there is none."""
    parameters, body = neox.num_parameters(cfg)
    accumulation, global_batch = cfg.batch(world_size)
    tokens = global_batch * cfg.sequence_length
    product = f"{cfg.per_device_train_batch_size} x {accumulation} x {world_size} x {cfg.sequence_length}"
    steps = f"{cfg.max_steps:,} steps = {count(cfg.max_steps * tokens)} tokens"
    if isinstance(dataset, str):
        shards = dataset
    else:
        epochs = cfg.max_steps * global_batch / dataset.num_samples
        steps += f" = {epochs:.3g} epochs" + (f" ({epochs:.2%} of the data)" if epochs < 1 else "")
        held = f", {dataset.num_eval_samples:,} windows held out" if dataset.num_eval_samples else ", none held out"
        shards = f"{cfg.data_dir}: {len(dataset.shards):,} shards, {count(dataset.num_tokens)} tokens per epoch{held}"
    schedule = {
        "cosine": f"cosine to {cfg.min_learning_rate:g}",
        "linear": f"linear to {cfg.min_learning_rate:g}",
        "constant": "constant",
        "warmup_stable_decay": f"stable, then linear to {cfg.min_learning_rate:g}",
    }[cfg.lr_scheduler_type]
    lines = {
        "model": f"GPT-NeoX, {cfg.num_hidden_layers} layers, {cfg.hidden_size} wide, {cfg.num_attention_heads} heads, "
        f"vocabulary {cfg.vocab_size:,}: {count(parameters)} parameters ({count(body)} without embeddings), "
        f"{count(neox.flops_per_token(cfg))}FLOP per token",
        "batch": f"{tokens:,} tokens per step = {product} (sequences x accumulation x processes x length)",
        "steps": steps,
        "schedule": f"learning rate {cfg.learning_rate:g}, {cfg.warmup_steps:,} steps of warm-up, {schedule}",
        "data": shards,
        "hardware": where,
        "output": f"checkpoints in {cfg.output_dir}, logs in {cfg.logging_dir}",
    }
    if cfg.num_processes and cfg.num_processes != world_size and not cfg.global_batch_size:
        lines["note"] = (
            f"this config was written for {cfg.num_processes} processes, this is {world_size}: the batch is "
            f"{global_batch} sequences; global_batch_size={cfg.batch(cfg.num_processes)[1]} keeps the intended one"
        )
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


class Trace:
    """trace.jsonl: one line per step, the proof that a resumed run is the same run.

    Steps that are run again after a resume are compared with the lines that are there already.
    """

    COMPARED = ("loss_hex", "grad_norm_hex", "lr_hex", "samples")

    def __init__(self, path: Path, start_step: int):
        self.expected: dict[int, dict] = {}
        self.same, self.first_difference = 0, None
        if path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]  # a kill may have cut the last line
            os.truncate(path, len(whole))
            lines = (json.loads(line) for line in whole.splitlines())
            # a step that was run more than once: the last line counts
            self.expected = {line["step"]: line for line in lines if line["step"] > start_step}
        self.last = max(self.expected, default=0)
        self.file = path.open("a", buffering=1)  # a line reaches the kernel at once: a SIGKILL loses none

    def record(self, step: int, figures: dict[str, float], ids: np.ndarray, extra: dict) -> None:
        line = {"step": step}
        for key, value in figures.items():
            line |= {key: value if math.isfinite(value) else str(value), f"{key}_hex": value.hex()}
        line["samples"] = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]
        line |= extra
        before = self.expected.pop(step, None)
        if before is not None:
            differs = [k for k in self.COMPARED if before.get(k) != line[k]]
            if not differs:
                self.same += 1
                return  # the line stands already
            if self.first_difference is None:
                self.first_difference = f"step {step}: " + ", ".join(
                    f"{k} was {before.get(k)}, is {line[k]}" for k in differs
                )
        self.file.write(json.dumps(line) + "\n")

    def replayed(self, step: int) -> str | None:
        """After the last step that was run before: what the comparison came to."""
        if not self.last or step < self.last:
            return None
        self.last = 0
        if self.first_difference:
            return f"replayed {self.same} steps identically, then not the same run: {self.first_difference}"
        return f"replayed {self.same} steps, {self.same} identical"

    def close(self) -> None:
        self.file.close()


class Monitor:
    """Collects each step's figures on rank 0 and turns them into lines, curves and the state that a resume needs."""

    def __init__(self, cfg: Config, env: parallel.Env, start_step: int, tokens_per_step: int, state: dict):
        self.cfg, self.env, self.tokens_per_step = cfg, env, tokens_per_step
        self.best = state.get("best_loss", math.inf)
        self.history = state.get("history", [])  # [step, loss, learning rate] of every log line
        self.recent = state.get("recent_losses", [])  # since the last line, so that a resume prints the same mean
        self.eval_loss = state.get("eval_loss")
        self.trace = self.board = None
        self.bar = tqdm(disable=True)
        if env.main:
            from torch.utils.tensorboard import SummaryWriter

            folder = Path(cfg.logging_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.trace = Trace(folder / "trace.jsonl", start_step)
            self.board = SummaryWriter(str(folder), purge_step=start_step + 1)  # hides what a kill left beyond it
            self.bar = tqdm(total=cfg.max_steps, initial=start_step, disable=None, unit="step", dynamic_ncols=True)
        self.begin, self.begin_step, self.waited = time.perf_counter(), start_step, 0.0

    def say(self, text: str) -> None:
        if self.env.main:
            self.bar.write(text)

    def step(self, step: int, loss: float, norm: float, lr: float, ids: np.ndarray) -> str | None:
        """Note one finished step; returns a message when a replay has come to its end."""
        self.recent.append(loss)
        self.bar.update(step - self.bar.n)
        if self.trace:
            self.trace.record(step, {"loss": loss, "grad_norm": norm, "lr": lr}, ids, {})
            return self.trace.replayed(step)

    def line(self, step: int, lr: float, norm: float, waited: float, stall: float) -> None:
        """The log line of the steps since the last one: mean loss, speed as seen on the wall.

        waited: seconds that the loader has been waited for so far; stall: that the last save kept training.
        """
        loss = math.fsum(self.recent) / len(self.recent)
        self.recent = []
        self.best = min(self.best, loss)
        self.history.append([step, loss, lr])
        seconds = time.perf_counter() - self.begin
        rate, wait_share = (step - self.begin_step) / seconds, (waited - self.waited) / seconds
        self.begin, self.begin_step, self.waited = time.perf_counter(), step, waited
        left = (self.cfg.max_steps - step) / rate
        memory = parallel.peak_memory(self.env)
        self.say(
            f"Step {step}: loss={loss:.4f}, lr={lr:.2e}, best={self.best:.4f} | {rate:.3g} steps/sec | "
            f"{count(rate * self.tokens_per_step)} tok/s | grad {norm:.3f} | data wait {wait_share:.1%} | "
            f"{memory / 2**30:.2f} GiB | {duration(left)} left"
        )
        if self.board:
            for name, value in {
                "train/loss": loss,
                "train/learning_rate": lr,
                "train/grad_norm": norm,
                "perf/tokens_per_second": rate * self.tokens_per_step,
                "perf/memory_gib": memory / 2**30,
                "perf/data_wait_share": wait_share,
                "ckpt/stall_seconds": stall,
            }.items():
                self.board.add_scalar(name, value, step)

    def evaluated(self, step: int, loss: float, seconds: float) -> None:
        """Note a held-out loss; the seconds it took do not count as training."""
        self.eval_loss = loss
        self.begin += seconds
        self.say(f"Step {step}: eval_loss={loss:.4f}, perplexity={math.exp(min(loss, 700)):.2f} | {seconds:.1f} s")
        if self.board:
            self.board.add_scalar("eval/loss", loss, step)

    def state(self) -> dict:
        return {
            "best_loss": self.best,
            "loss": self.history[-1][1] if self.history else None,
            "eval_loss": self.eval_loss,
            "history": self.history,
            "recent_losses": self.recent,
        }

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()
            self.trace.close()


def duration(seconds: float) -> str:
    """3725 -> 1h02m"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
