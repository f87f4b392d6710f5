"""What a run prints besides its steps: the plan, where a resume goes on, how it ended."""

import copy
import dataclasses
import shlex
import textwrap
from pathlib import Path

import configs
import model as neox
from configs import Config
from refocused.checkpoint import manifest, selection
from refocused.checkpoint.selection import Choice
from refocused.entry import here
from refocused.run.exits import DONE, INTERNAL, NO_DATA, NOT_IN_BUCKET, STOPPED, Cause, in_order
from refocused.run.optim import learning_rate
from refocused.shards.tokenizers import find

COLUMN = 10  # where the plan's text begins, behind a line's name


def count(n: float) -> str:
    """1414647808 -> 1.415B"""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.4g}{unit}"
    return f"{n:g}"


def duration(seconds: float) -> str:
    """3725 -> 1h02m"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def fitted(text: str, columns: int) -> str:
    """The text wrapped for a terminal so wide, the plan's lines below their text. Commands stay whole, to be copied."""
    lines = []
    for line in text.splitlines():
        if len(line) < columns or "`" in line or line.startswith("  ") and not line.startswith(" " * COLUMN):
            lines.append(line)
            continue
        indent = " " * (COLUMN + 2 * line.startswith(" ") if line[COLUMN - 1 : COLUMN] == " " else 2)
        wrapper = textwrap.TextWrapper(columns - 1, subsequent_indent=indent, break_long_words=False)
        wrapper.break_on_hyphens = False
        lines += wrapper.wrap(line)
    return "\n".join(lines)


def plan(cfg: Config, world_size: int, dataset, where: str, *of_machine: str) -> str:
    """The run in a few aligned lines. dataset: a data.Dataset, or the reason why there is none; of_machine: notes."""
    parameters, body = neox.num_parameters(cfg)
    accumulation, global_batch = cfg.batch(world_size)
    tokens = global_batch * cfg.sequence_length
    product = f"{cfg.per_device_train_batch_size} x {accumulation} x {world_size} x {cfg.sequence_length}"
    steps = f"{cfg.max_steps:,} steps = {count(cfg.max_steps * tokens)} tokens"
    shards, notes = dataset, [*of_machine]
    if not isinstance(dataset, str):
        epochs = cfg.max_steps * global_batch / dataset.num_samples
        shown = f"{epochs:.3g}" if epochs < 100 else f"{epochs:,.0f}"
        steps += f" = {shown} epochs" + f" ({epochs:.2%} of the data)" * (epochs < 1)
        held = f"{dataset.num_eval_samples:,} windows" if dataset.num_eval_samples else "none"
        per_epoch = f"{count(dataset.num_tokens)} tokens per epoch"
        shards = f"{cfg.data_dir}: {len(dataset.shards):,} shards, {per_epoch}, {held} held out"
        notes += dataset.notes
    kind = cfg.lr_scheduler_type.replace("warmup_stable_decay", "stable, then linear")
    schedule = kind if kind == "constant" else f"{kind} to {cfg.min_learning_rate:g}"
    if cfg.num_processes and cfg.num_processes != world_size and not cfg.global_batch_size:
        notes.append(
            f"this config was written for {cfg.num_processes} processes, this is {world_size}: the batch is "
            f"{global_batch} sequences; global_batch_size={cfg.batch(cfg.num_processes)[1]} keeps the intended one"
        )
    if cfg.tokenizer and (ids := find(cfg.tokenizer).size) > cfg.vocab_size:
        notes.append(
            f"tokenizer={cfg.tokenizer} has {ids:,} ids, vocab_size={cfg.vocab_size:,}: not the one of these shards; no text "
            "samples, no bits per byte, no tokenizer in an export (tokenizer=none says so)"
        )
    lines = [
        ("model", f"GPT-NeoX, {cfg.num_hidden_layers} layers, {cfg.hidden_size} wide, {cfg.num_attention_heads} heads, "
         f"vocabulary {cfg.vocab_size:,}: {count(parameters)} parameters ({count(body)} without embeddings), "
         f"{count(neox.flops_per_token(cfg))}FLOP per token"),
        ("batch", f"{tokens:,} tokens per step = {product} (sequences x accumulation x processes x length)"),
        ("steps", steps),
        ("schedule", f"learning rate {cfg.learning_rate:g}, {cfg.warmup_steps:,} steps of warm-up, "
         f"{schedule}"),
        ("data", shards),
        ("hardware", where),
        ("output", f"checkpoints in {cfg.output_dir}, logs in {cfg.logging_dir}"),
        *(("note", text) for text in notes if text),
    ]  # fmt: skip
    return "\n".join(f"{name:<{COLUMN - 1}} {text}" for name, text in lines)


def describe_resume(choice: Choice, cfg: Config, dataset) -> str:
    """Which checkpoint and why, where the data continues in the data.Dataset, and what differs in the config."""
    if choice.path is None:
        return f"resume    no checkpoint in {cfg.output_dir}: a fresh run" if cfg.resume else ""
    state = choice.state
    reason = "what was saved last and is complete" if cfg.resume == "latest" else "as asked"
    lines = [f"resume    {choice.path.name} ({reason}), step {state['step']:,} of {cfg.max_steps:,}"]
    lines += [f"          passed over {name}: {why}" for name, why in choice.passed_over]
    ahead = [n for n in selection.names(cfg.output_dir) if manifest.step_of(n) > state["step"]]
    if ahead and cfg.resume != "latest":
        then = "once this run has saved; resume=latest then goes on here"
        lines.append(f"          {ahead[0]} is ahead of it: abandoned, {then}")
    if cfg.init_from and cfg.init_from != state["config"].get("init_from"):
        lines.append(f"          init_from={cfg.init_from} is not used: the weights are the checkpoint's")
    at = dataset.position(state["samples_seen"])
    lines.append(
        f"          data: continues at sample {state['samples_seen']:,}, token {state['tokens']:,}, epoch {at['epoch']}, "
        f"{at['epoch_fraction']:.1%}, shard {at['next_shard']} offset {at['next_offset']:,}"
    )
    lines += [f"          data: {text}" for text in dataset.check_same(state, cfg)]
    for key, old, new in configs.difference(state["config"], dataclasses.asdict(cfg)):
        if key != "resume":
            lines.append(f"          config: {key} {old} -> {new}")
    for key, was, instead in configs.removed(state["config"]):
        lines.append(f"          config: {key} was {was} and is no longer a key: {instead}")
    old_cfg = copy.copy(cfg)  # unlike replace() this checks nothing: keys of then and now need not fit each other
    vars(old_cfg).update(state["config"])
    if (before := learning_rate(state["step"], old_cfg)) != (now := learning_rate(state["step"], cfg)):
        rate = f"the rate goes on at {now:.3g} (was {before:.3g})"
        lines.append(f"          schedule: a function of step and config, so {rate}")
    return "\n".join(lines)


def ending(
    cfg: Config, step: int, newest: str | None, *, idle: bool = False, not_finite: int = 0,
    unreadable: str | None = None, failure: str | None = None, missing: str | None = None, stopped: float | None = None,
) -> tuple[int, str]:  # fmt: skip
    """The exit code of a run and its last message: the cause that decides the code, then all others.

    newest: the last complete checkpoint; idle: nothing was to do; not_finite: the code if the last steps were not;
    unreadable: why the next batch could not be read; failure: of the last save; missing: why the last checkpoint is not in
    the bucket; stopped: seconds since the signal.
    """
    goes_on = f"resume=latest continues from {newest}" if newest else "there is no checkpoint"
    stands = f"{newest} from before them stands" if newest else "there is no checkpoint from before them"
    causes = {  # in the order of time; a cause's value is the last line if it decides the code
        Cause(not_finite, "the last steps were not finite"): not_finite
        and f"the last steps up to {step:,} were not finite and nothing of them is saved (max_bad_steps="
        f"{cfg.max_bad_steps}); {stands}: lower learning_rate, or look at the shards named above",
        Cause(NO_DATA, str(unreadable)): unreadable and f"error: {unreadable}; stopped at step {step:,}, {goes_on}",
        Cause(INTERNAL, str(failure)): failure and f"ended at step {step:,}, but {failure}",
        Cause(NOT_IN_BUCKET, f"{newest or 'the run'} is not in the bucket: {missing}"): missing
        and f"ended at step {step:,}, saved in {cfg.output_dir}, but not in the bucket: {missing}",
        Cause(STOPPED, "a signal had asked for a stop"): stopped is not None
        and f"stopped at step {step:,}, {stopped:.1f} s after the signal; {goes_on}",
    }
    if found := in_order(cause for cause, text in causes.items() if text):
        also = "".join(f"; also: {cause.message}" for cause in found[1:])
        return found[0].code, f"{causes[found[0]]}{also}"
    if not newest:
        return DONE, f"done: {step:,} steps, and no checkpoint: max_steps={cfg.max_steps} trains nothing"
    if idle:
        way = "raise max_steps to go on, or name another output_dir and logging_dir for another run"
        return DONE, f"nothing to do: {newest} is at step {step:,}, max_steps={cfg.max_steps}; {way}"
    logs = Path(cfg.logging_dir)  # TensorBoard names runs by their folders below the one that it is given
    logs = logs.parent if logs.parent.name == "logs" else logs
    return DONE, (
        f"done: {step:,} steps. Next:\n"
        f"  {here(f'python sample.py resume={shlex.quote(cfg.output_dir)}')}\n"
        f"  {here(f'tensorboard --logdir {shlex.quote(str(logs))}')}\n"
        f"  or more training: the same command with max_steps={2 * max(1, step)} resume=latest"
    )
