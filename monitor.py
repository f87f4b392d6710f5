"""What a run says: the plan before the first step, the log lines, TensorBoard and trace.jsonl."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

import configs
import data
import gpus
import manifest
import model as neox
import parallel
from configs import Config, ConfigError


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
    notes = []
    if cfg.num_processes and cfg.num_processes != world_size and not cfg.global_batch_size:
        notes.append(
            f"this config was written for {cfg.num_processes} processes, this is {world_size}: the batch is "
            f"{global_batch} sequences; global_batch_size={cfg.batch(cfg.num_processes)[1]} keeps the intended one"
        )
    if cfg.tokenizer == "byte" and cfg.vocab_size > 512:
        notes.append(f"tokenizer=byte has 257 ids: of vocab_size={cfg.vocab_size:,} the others are never used")
    if cfg.intermediate_size > 8 * cfg.hidden_size:
        notes.append(
            f"intermediate_size={cfg.intermediate_size} is {cfg.intermediate_size / cfg.hidden_size:g} times "
            "hidden_size; 4 times is usual"
        )
    return "\n".join(f"{name:<9} {text}" for name, text in [*lines.items(), *(("note", note) for note in notes)])


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


class Diverged(ValueError):
    """With deterministic=true a replay was not the same run."""

    exit_code = 70


class Trace:
    """trace.jsonl: one line per step, the proof that a resumed run is the same run, and lines with an "event" between.

    Steps that are run again after a resume are compared with the lines that are there already.
    """

    COMPARED = ("loss_hex", "grad_norm_hex", "lr_hex", "samples")

    def __init__(self, path: Path, start_step: int):
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a kill may have cut the last line
        self.file = path.open("a", buffering=1)  # a line reaches the kernel at once: a SIGKILL loses none
        os.truncate(path, len(whole))
        self.expected: dict[int, dict] = {}
        self.events: dict[tuple[str, int], dict] = {}
        for line in map(json.loads, whole.splitlines()):  # of a step that came more than once the last line counts
            if (step := line["step"]) <= start_step:
                continue
            if "event" not in line:
                self.expected[step] = line
                self.events.pop(("skip", step), None)
            else:
                self.events[line["event"], step] = line
                if line["event"] == "skip":
                    self.expected.pop(step, None)
        self.same, self.first_difference = 0, None
        self.last = max(self.expected, default=0)

    def record(self, step: int, figures: dict[str, float], ids: np.ndarray, extra: dict[str, Any]) -> None:
        line = {"step": step}
        for key, value in figures.items():
            line |= {key: readable(value), f"{key}_hex": value.hex()}
        line["samples"] = fingerprint(ids)
        if self.events.pop(("skip", step), None):
            self.differs(step, "was skipped, is run")
        before = self.expected.pop(step, None)
        if before is not None:
            differs = [k for k in self.COMPARED if before.get(k) != line[k]]
            if not differs:
                self.same += 1
                return  # the line stands already
            self.differs(step, ", ".join(f"{k} was {before.get(k)}, is {line[k]}" for k in differs))
        self.file.write(json.dumps(line | {key: readable(value) for key, value in extra.items()}) + "\n")

    def event(self, kind: str, step: int, **fields: Any) -> bool:
        """Something that happened after `step`; False if it stands already, the clock's figures (*_seconds) apart."""
        line = {"event": kind, "step": step, **{key: readable(value) for key, value in fields.items()}}
        before = self.events.pop((kind, step), {})
        if all(before.get(key) == value for key, value in line.items() if not key.endswith("_seconds")):
            return False
        self.file.write(json.dumps(line) + "\n")
        return True

    def skipped(self, step: int, ids: np.ndarray) -> None:
        if self.expected.pop(step, None):
            self.differs(step, "was run, is skipped")
        self.event("skip", step, samples=fingerprint(ids))

    def differs(self, step: int, how: str) -> None:
        if self.first_difference is None:
            self.first_difference = f"step {step}: {how}"

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


def readable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]


class Monitor:
    """Collects each step's figures on rank 0 and turns them into lines, curves and the state that a resume needs."""

    def __init__(self, cfg: Config, env: parallel.Env):
        self.cfg, self.env = cfg, env
        self.trace = self.board = self.log = self.peak = None
        self.bar = tqdm(disable=True)
        self.samples = cfg.sample_tokens and cfg.parallel != "fsdp"  # where rank 0 has the whole model
        if env.main:
            self.log = Path(cfg.logging_dir, "train.log").open("a", buffering=1)
        if env.device.type == "cuda":
            self.peak = gpus.peak_flops(torch.cuda.get_device_name(env.device))

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
        """A line on rank 0's console and in train.log."""
        if self.log:
            file = file or sys.stdout
            with console():
                self.bar.write(text, file=file)
                file.flush()
            self.log.write(text + "\n")

    def step(self, step: int, loss: float, norm: float, lr: float, ids: np.ndarray, **extra: Any) -> None:
        """Note one finished step. Raises Diverged with deterministic=true where a replay is not the same."""
        self.recent.append(loss)
        self.norm = norm
        with console():
            self.bar.update(step - self.bar.n)
        self.held = (step, {"loss": loss, "grad_norm": norm, "lr": lr}, ids, extra)
        if not self.cfg.logging_steps or step % self.cfg.logging_steps:
            self.record()

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
        memory, reserved = parallel.peak_memory(self.env), None
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

    def evaluated(self, step: int, loss: float, begin: float, model: torch.nn.Module) -> None:
        """Note a held-out loss and a text sample; the time since `begin`, perf_counter's, does not count as training."""
        self.eval_loss = loss
        spent = time.perf_counter() - begin
        self.say(f"Step {step}: eval_loss={loss:.4f}, perplexity={math.exp(min(loss, 700)):.2f} | {spent:.1f} s")
        if self.board:
            self.scalars(step, {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))})
            # TensorBoard purges curves after a resume but not texts, so a replay must not write them again
            if self.trace.event("eval", step, loss=loss, eval_seconds=spent) and self.samples:
                if text := self.text(parallel.raw(model)):
                    self.board.add_text("sample", text, step)
                self.board.flush()
        self.begin += time.perf_counter() - begin

    def text(self, model: neox.GPTNeoX) -> str | None:
        """What the model writes when nothing is given, as an indented block; None without a tokenizer."""
        from sample import Options, generate

        try:
            tokenizer = data.get_tokenizer(self.cfg.tokenizer)
        except data.DataError as error:
            self.say(f"no text samples: {error}")
            self.samples = False
            return None
        if (end := tokenizer.eot_token) >= self.cfg.vocab_size:
            return None
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # a graph for each length of the text would not pay
            # top_p adds up probabilities, for which a GPU has no deterministic kernel
            options = Options(
                max_new_tokens=self.cfg.sample_tokens, **({"top_p": 1.0} if self.cfg.deterministic else {})
            )
            steps = generate(model, [[end]], options, end)
            ids = [token for [token] in steps if token is not None and token < tokenizer.n_vocab]
        model.train()
        return "".join(f"    {line}\n" for line in tokenizer.decode(ids).splitlines())

    def histograms(self, step: int, model: torch.nn.Module) -> None:
        """Weights and clipped gradients of a model that is whole, as far as TensorBoard's bins reach."""
        if self.board and self.cfg.parallel != "fsdp":
            for name, p in parallel.raw(model).named_parameters():
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


def duration(seconds: float) -> str:
    """3725 -> 1h02m"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
