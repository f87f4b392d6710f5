"""An entry of docs/records.md, or a row of a table like it: `python bench.py record`.

python bench.py record optimizer=muon max_steps=500                       # the demo's model and text, two processes
python bench.py record --average data_dir=data/demo-short save_steps=50   # the mean of the checkpoints that are kept

Trains some seeds, exports what came out, and evaluates the exports on the same held-out windows.
"""

import argparse
import contextlib
import dataclasses
import datetime
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any

import ckpt
import configs
import model as neox
from configs import DEMO, Config, ConfigError
from refocused.checkpoint import average, export, folder, manifest
from refocused.entry import ROOT, parse_with_settings, positive
from refocused.measure import evaluation, losses
from refocused.run import processes
from refocused.run.evaluate import Score
from refocused.run.origin import commit
from refocused.run.trace import Lines

BOUND = 1.3835  # nats per byte: AdamW's loss after the demo's 3.07M tokens
# what every entry is measured on, whatever it was trained with
WINDOWS: dict[str, Any] = {"sequence_length": 256, "eval_files": 1, "eval_samples": 256, "mixed_precision": "bf16"}
BUDGET = 3_072_000  # tokens
DATA = ("max_files", "tokenized_file_pattern")  # which windows are held out depends on them too
FIXED = ("seed", "resume", "init_from", "output_dir", "logging_dir", "eval_files")  # not for an entry to set


def check(cfg: Config, settings: list[str]) -> None:
    """Raises ConfigError where an entry would break a rule."""
    for word in settings:
        if word.removeprefix("--").split("=")[0] in FIXED:
            raise ConfigError(f"{word} is not for an entry to set; leave {', '.join(FIXED)} out")
    ours, demo = (neox.num_parameters(c)[0] for c in (cfg, configs.load([str(DEMO)])[0]))
    if abs(ours - demo) > demo / 100:
        raise ConfigError(f"{ours:,} parameters are not within 1 percent of the demo's {demo:,}")


def train(place: Path, seed: int, nproc: int, settings: list[str]) -> None:
    """Raises ConfigError with the end of what it said where a run does not end well."""
    launch = ["-m", "refocused.run.launch", "--standalone", f"--nproc_per_node={nproc}"] * (nproc > 1)
    own = [f"seed={seed}", f"output_dir={place}/out", f"logging_dir={place}/logs", "resume=none"]
    command = [sys.executable, *launch, str(ROOT / "train.py"), str(DEMO), "save_steps=0", "eval_steps=0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # found from any folder
    done = subprocess.run([*command, *settings, *own], capture_output=True, text=True, env=env)
    if done.returncode:
        raise ConfigError(f"the run of seed {seed} failed: {(done.stdout + done.stderr).strip()[-1000:]}")


def tokens_to(loss: float, logs: Path, tokens_per_step: int) -> float:
    """After how many tokens a run's held-out loss was first at most that, at its evaluations; infinite if never."""
    evaluations = [line for line in Lines(logs / "trace.jsonl") if line.get("event") == "eval"]
    return min((e["step"] * tokens_per_step for e in evaluations if float(e["loss"]) <= loss), default=math.inf)


def evaluate(place: Path, mean: bool, env: processes.Env) -> tuple[float, int]:
    """The loss of a run's export, with `mean` of the mean of all checkpoints that it left; the tokens it has seen."""
    sources = [ckpt.find(str(place / "out" / name)) for name in manifest.names(place / "out")]
    source = sources[0]  # the newest
    tokens, cfg = source.state["tokens"], dataclasses.replace(source.cfg, **WINDOWS)
    if mean:
        source = ckpt.find(str(average.average(sources, [1.0] * len(sources), place / "mean")))
    with contextlib.redirect_stdout(io.StringIO()):
        export.main_export([str(source.path), str(place / "hf"), "--dtype", "fp32"], ckpt.find)
    _, scores = evaluation.evaluate(folder.hf_source(place / "hf"), cfg, env)
    return Score(*(sum(values) for values in zip(*scores.values(), strict=True))).mean, tokens


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.py record", description="An entry of docs/records.md, by its rules.")
    parser.add_argument("--nproc", type=positive, default=2, help="processes; 2 for an entry")
    parser.add_argument("--seeds", type=positive, default=3, help="how many; 3 for an entry, fewer to try something")
    parser.add_argument("--average", action="store_true", help="the mean of the checkpoints that a run keeps")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the exports there, as DIR/seed-1 and so on")
    parser.add_argument("--to", type=float, metavar="LOSS", help="tokens to this loss, looked for every eval_steps=")
    args = parse_with_settings(parser, argv)
    cfg, _ = configs.load([str(DEMO), *args.settings])
    check(cfg, args.settings)
    _, global_batch = cfg.batch(args.nproc)
    evaluates = any(word.removeprefix("--").startswith("eval_steps=") for word in args.settings) and cfg.eval_steps
    if args.to is not None and not evaluates:
        raise ConfigError("--to looks at a run's evaluations: say how often with eval_steps=")
    for seed in range(1, args.seeds + 1):
        if args.keep and (args.keep / f"seed-{seed}").exists():
            raise ConfigError(f"--keep: {args.keep}/seed-{seed} exists; choose another folder")
    env = processes.start(Config(cpu_threads=1))
    found, speeds, reached, tokens = [], [], [], 0
    for seed in range(1, args.seeds + 1):
        with tempfile.TemporaryDirectory(prefix="record-") as temporary:
            place = Path(temporary)
            train(place, seed, args.nproc, args.settings)
            loss, tokens = evaluate(place, args.average, env)
            if args.keep:
                shutil.copytree(place / "hf", args.keep / f"seed-{seed}")
            lines = losses.read(place / "logs").values()
            speeds.append(
                median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line] or [math.nan])
            )
            found.append(loss)
            if args.to is not None:
                reached.append(tokens_to(args.to, place / "logs", global_batch * cfg.sequence_length))
        print(f"seed {seed}: {loss:.4f} after {tokens:,} tokens, {speeds[-1]:,.0f} tokens/s", flush=True)
    processes.stop()
    words = [*[f"--nproc {args.nproc}"] * (args.nproc != 2), *["--average"] * args.average]
    words += [f"--to {args.to:g}"] if reached else []
    each = ", ".join(f"{loss:.4f}" for loss in found)
    below, demo = fmean(found) < BOUND, configs.load([str(DEMO)])[0]
    if Path(cfg.data_dir).resolve() == Path(demo.data_dir).resolve() and all(
        getattr(cfg, key) == getattr(demo, key) for key in DATA
    ):
        print(f"the mean is {'below' if below else 'not below'} {BOUND}")
    else:
        print("no entry: its data are not the demo's, all of them")
    if reached:
        print(f"{fmean(reached):,.0f} tokens to {args.to:g} ({', '.join(f'{count:,.0f}' for count in reached)})")
    print(f"{median(speeds):,.0f} tokens/s\n")
    print("| date | track | tokens | loss (of each seed) | command | commit |\n|---|---|---:|---|---|---|")
    cells = (
        datetime.date.today(),
        f"fewest tokens to {BOUND}" if below and tokens < BUDGET else "lowest loss",
        f"{tokens:,}",
        f"{fmean(found):.4f} ({each})",
        f"`python bench.py record {' '.join([*words, *args.settings])}`",
    )
    print("| " + " | ".join(map(str, (*cells, (commit() or "unknown")[:8]))) + " |")
    return 0
