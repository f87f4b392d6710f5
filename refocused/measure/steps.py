"""An optimizer step of this trainer beside its peers': `python bench.py step`."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import configs
import model as neox
from configs import Config, ConfigError
from refocused import entry
from refocused.arguments import parse_with_settings, positive
from refocused.measure.calibrate import MeasureError
from refocused.run import environment, gpus
from refocused.run.preflight import git

SIZES = {
    "small": dict(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, vocab_size=50304,
                  sequence_length=512, per_device_train_batch_size=4),
    "medium": dict(hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, vocab_size=50304,
                   sequence_length=1024, per_device_train_batch_size=2),
    "wide": dict(hidden_size=2048, num_hidden_layers=2, num_attention_heads=16, vocab_size=50257,
                 sequence_length=1024, per_device_train_batch_size=2),
    "large": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, vocab_size=50257,
                  sequence_length=1024, per_device_train_batch_size=8),  # for GPUs of 80 GB: the 1.4 billion parameters
}  # fmt: skip
ROUNDS = {"small": 3, "medium": 2, "wide": 2, "large": 4}
STEPS = 6  # in a round: single ones spread over more than their median on a shared machine
TRUSTED = 0.15  # the largest spread with which a table means something
NAMES = {
    "ours": "this trainer",
    "muon": "this trainer with Muon",
    "transformers": "Transformers GPTNeoXForCausalLM, Accelerate, torch.compile",
    "nanogpt": "nanoGPT-style GPT-2, torch.compile",
    "floor": "its matrix products alone",
}


@dataclasses.dataclass
class Contender:
    """A contender's processes, all waiting for their turn but one."""

    name: str
    processes: list[subprocess.Popen]
    log: Path

    def turn(self, steps: int) -> dict[str, float]:
        """Run the steps; {"seconds": of all, "memory": the largest peak of a process, in bytes}."""
        lines = []
        with contextlib.suppress(BrokenPipeError):  # it died while it waited
            for process in self.processes:
                assert process.stdin
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
            lines = [process.stdout.readline() for process in self.processes if process.stdout]
        if not (lines and all(lines)):
            raise MeasureError(self.last_words())
        reports = [json.loads(line) for line in lines]
        return {key: max(report[key] for report in reports) for key in reports[0]}

    def last_words(self) -> str:
        codes = []
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                codes.append(process.wait(timeout=5))
        killed = "; -9 is a kill, most often because memory ran out: name fewer contenders, or a smaller --size"
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
        return f"{self.name} ended early with {codes}{killed if -9 in codes else ''}; the end of its log:\n{tail}"


def start(name: str, folder: Path, settings: list[str]) -> Contender:
    """`ours-fsdp-2` is this trainer with parallel=fsdp on two processes; other names stand for one process."""
    kind, _, rest = name.partition("-")
    layout, _, world = rest.partition("-")
    home, world_size, port = folder / name, int(world or 1), environment.free_port()
    home.mkdir()
    settings = [f"output_dir={home / 'out'}", f"logging_dir={home / 'logs'}", *settings]
    settings += [f"parallel={layout}"] * bool(layout) + ["optimizer=muon"] * (kind == "muon")
    peer = "ours" if kind == "muon" else kind
    command = [sys.executable, "-m", "refocused.measure.peers", peer, str(folder / "config.py"), *settings]
    env = {**os.environ, "PYTHONPATH": str(entry.ROOT)}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(home / "cache")}  # an empty one, so that the time of compiling is real
    processes = []
    with (home / "log").open("a") as log:
        for rank in range(world_size):
            own = env | (environment.variables(rank, world_size, port) if world_size > 1 else {})
            processes.append(subprocess.Popen(command, env=own, stdin=-1, stdout=-1, stderr=log, text=True, cwd=folder))
    return Contender(name, processes, home / "log")


def write_inputs(folder: Path, keys: dict, settings: list[str]) -> Config:
    """A config file, and a shard of random tokens for it; the config."""
    keys |= dict(
        intermediate_size=4 * keys["hidden_size"], gradient_accumulation_steps=1, data_dir=str(folder / "data"),
        max_steps=100_000, logging_steps=10, save_steps=0, dataloader_num_workers=1,
        async_save=False,  # its second copy of model and optimizer is the price of saves that the peers don't do
    )  # fmt: skip
    (folder / "config.py").write_text("".join(f"{key} = {value!r}\n" for key, value in keys.items()))
    cfg, _ = configs.load([str(folder / "config.py"), *settings])
    (folder / "data").mkdir()
    dtype = np.uint16 if cfg.vocab_size <= 1 << 16 else np.uint32
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 2_000_000, dtype=dtype)
    np.savez(folder / "data" / "tokenized_cleaned_0.npz", input_ids=tokens)
    return cfg


def measure(size: str, contenders: list[str], settings: list[str], rounds: int, steps: int) -> str:
    """The markdown table of one size; contenders take turns of `steps` optimizer steps."""
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as running:
        folder = Path(name)
        cfg = write_inputs(folder, SIZES[size], settings)
        started = []
        for contender_name in contenders:  # all import at once
            started.append(start(contender_name, folder, settings))
            for process in started[-1].processes:
                running.callback(process.kill)
        for contender in started:  # one compiles at a time: the first round is one step
            rows[contender.name] = {"first": contender.turn(1)["seconds"], "seconds": []}
        for _ in range(rounds):
            for contender in started:
                report = contender.turn(steps)
                rows[contender.name]["seconds"].append(report["seconds"] / steps)
                rows[contender.name]["memory"] = report["memory"]
        for contender in started:
            row, tokens = rows[contender.name], cfg.batch(len(contender.processes))[1] * cfg.sequence_length
            row["rate"] = tokens / statistics.median(row["seconds"])
    return table(size, cfg, rows)


def table(size: str, cfg: Config, rows: dict[str, dict]) -> str:
    shape = (
        f"L{cfg.num_hidden_layers} D{cfg.hidden_size} H{cfg.num_attention_heads} V{cfg.vocab_size} "
        f"T{cfg.sequence_length} B{cfg.per_device_train_batch_size}"
    )
    if cfg.gradient_accumulation_steps > 1:
        shape += f" x {cfg.gradient_accumulation_steps} accumulated"
    rounds = len(next(iter(rows.values()))["seconds"])
    lines = [
        f"**{size}**: {shape}, {cfg.mixed_precision.replace('no', 'fp32')}; {rounds} rounds",
        "",
        "| | tokens/s | of the Transformers design | of the floor | peak memory, GiB | first step, s | spread | MFU |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    gpu = gpus.find(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    spreads = []
    for name, row in rows.items():
        kind, _, rest = name.partition("-")
        shares = [f"{row['rate'] / rows[k]['rate']:.2f}" if k in rows else "n/a" for k in ("transformers", "floor")]
        costs = ["", ""] if kind == "floor" else [f"{row['memory'] / 2**30:.2f}", f"{row['first']:.0f}"]
        world = int(rest.rpartition("-")[2] or 1)
        mfu = f"{row['rate'] * neox.flops_per_token(cfg) / world / gpu.peak:.1%}" if gpu else "n/a"
        spreads.append((max(row["seconds"]) - min(row["seconds"])) / statistics.median(row["seconds"]))
        label = NAMES[kind] + (f" ({rest.replace('-', ' on ')} processes)" if rest else "")
        lines.append(
            "| " + " | ".join([label, f"{row['rate']:,.0f}", *shares, *costs, f"{spreads[-1]:.0%}", mfu]) + " |"
        )
    if (widest := max(spreads)) > TRUSTED:
        lines += ["", f"Not to be trusted: a spread of {widest:.0%} is above {TRUSTED:.0%}. Again on an idle machine."]
    return "\n".join(lines)


def hardware() -> str:
    """Processor or GPU, versions, date and commit: what a figure means nothing without."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        match = re.search(r"model name\s*: (.+)", info)
        extras = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if f" {flag}" in info]
        name = f"{match[1] if match else platform.processor() or platform.machine()}, "
        name += f"{torch.get_num_threads()} cores" + (f" ({extras[0]})" if extras else "")
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{name}; torch {torch.__version__}; {datetime.date.today()}; commit {commit}{changed}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.py step", description="tokens/s of a whole optimizer step")
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all", help="all (default): without large, of 80 GB")
    names = "of these and muon, ours-ddp-N, muon-fsdp-N (default: %(default)s)"
    parser.add_argument("--contenders", default="ours,transformers,nanogpt,floor", help=names)
    parser.add_argument("--rounds", type=positive, help=f"turns of each contender (default by size: {ROUNDS})")
    parser.add_argument("--steps", type=positive, default=STEPS, help="optimizer steps per turn (default: %(default)s)")
    options = parse_with_settings(parser, argv)
    contenders = options.contenders.split(",")
    for name in contenders:
        if not re.fullmatch(r"(ours|muon)(-(ddp|fsdp)-[1-9]\d*)?|transformers|nanogpt|floor", name):
            known = "transformers, nanogpt, floor, ours, muon, ours-ddp-N, muon-fsdp-N"
            raise ConfigError(f"contender {name!r} is none of {known}")
        if contenders.count(name) > 1:
            raise ConfigError(f"--contenders {options.contenders} has {name} twice; a table has one row for each")
    sizes = [size for size in SIZES if size != "large"] if options.size == "all" else [options.size]
    print(hardware())
    print(f"medians of rounds of {options.steps} optimizer step(s), contenders taking turns\n", flush=True)
    for size in sizes:
        rounds = ROUNDS[size] if options.rounds is None else options.rounds
        print(measure(size, contenders, options.settings, rounds, options.steps) + "\n", flush=True)
    return 0
