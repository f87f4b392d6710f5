"""Numbers before the money is spent: this trainer beside its peers, and what a config needs and costs.

python bench.py step                                          # three sizes, all contenders, on this machine
python bench.py step --size medium --contenders ours,ours-fsdp-2 gradient_accumulation_steps=4
python bench.py plan configs/production.py --gpus 2 --memory 24
python bench.py save                                          # what a checkpoint costs the training loop
python bench.py sample out/demo                               # tokens/s of sampling, beside transformers.generate
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import ckpt
import configs
import gpus
import model as neox
import parallel
import planner
from configs import Config, ConfigError

HERE = Path(__file__).parent

SIZES = {
    "small": dict(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, vocab_size=50304,
                  sequence_length=512, per_device_train_batch_size=4),
    "medium": dict(hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, vocab_size=50304,
                   sequence_length=1024, per_device_train_batch_size=2),
    "wide": dict(hidden_size=2048, num_hidden_layers=2, num_attention_heads=16, vocab_size=50257,
                 sequence_length=1024, per_device_train_batch_size=2),
}  # fmt: skip
ROUNDS = {"small": 4, "medium": 2, "wide": 2}  # all three sizes in less than ten minutes on two cores
NAMES = {
    "ours": "this trainer",
    "whole": "this trainer, compiled in one piece",
    "seed": "Transformers GPTNeoXForCausalLM, Accelerate, torch.compile",
    "nanogpt": "nanoGPT-style GPT-2, torch.compile",
    "floor": "its matrix products alone",
}


# --- the parent: starts the contenders, gives them turns, prints the table


class ContenderError(RuntimeError):
    exit_code = 1


@dataclasses.dataclass
class Contender:
    """A contender's processes, all waiting for their turn but one."""

    name: str
    processes: list[subprocess.Popen]
    world_size: int
    log: Path

    def turn(self, steps: int) -> dict[str, float]:
        """Run so many steps; {"seconds": in all, "memory": peak bytes of the hungriest process so far}."""
        lines = []
        with contextlib.suppress(BrokenPipeError):  # it died while it waited
            for process in self.processes:
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
            lines = [process.stdout.readline() for process in self.processes]
        if not (lines and all(lines)):
            raise ContenderError(self.last_words())
        reports = [json.loads(line) for line in lines]
        return {key: max(report[key] for report in reports) for key in ("seconds", "memory")}

    def last_words(self) -> str:
        codes = []
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                codes.append(process.wait(timeout=5))
        killed = "; -9 is a kill, most often for want of memory: name fewer contenders, or a smaller --size"
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
        return f"{self.name} ended early with {codes}{killed if -9 in codes else ''}; the end of its log:\n{tail}"


def start(name: str, folder: Path, settings: list[str]) -> Contender:
    """`ours-fsdp-2` is this trainer with parallel=fsdp on two processes; other names stand for one process."""
    kind, _, rest = name.partition("-")
    strategy, _, world = rest.partition("-")
    world_size = int(world or 1)
    home = folder / name
    home.mkdir()
    settings = [f"output_dir={home / 'out'}", f"logging_dir={home / 'logs'}", *settings]
    settings += [f"parallel={strategy}"] if strategy else []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    log = home / "log"
    for rank in range(world_size):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(home / "cache")}  # cold, so that compile time is real
        if world_size > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(HERE / "peers.py"), kind, str(folder / "config.py"), *settings]
        with log.open("a") as errors:
            processes.append(
                subprocess.Popen(command, env=env, stdin=-1, stdout=-1, stderr=errors, text=True, cwd=folder)
            )
    return Contender(name, processes, world_size, log)


def write_inputs(folder: Path, keys: dict, settings: list[str]) -> Config:
    """A config file and a shard of random tokens for it (what is read does not change the speed); the config."""
    keys = {
        **keys,
        "intermediate_size": 4 * keys["hidden_size"],
        "gradient_accumulation_steps": 1,
        "data_dir": str(folder / "data"),
        "max_steps": 100_000,
        "logging_steps": 10,
        "save_steps": 0,
        "async_save": False,  # its second copy of model and optimizer is the price of saves that the peers don't do
        "dataloader_num_workers": 1,
    }
    (folder / "config.py").write_text("".join(f"{key} = {value!r}\n" for key, value in keys.items()))
    cfg, _ = configs.load([str(folder / "config.py"), *settings])
    (folder / "data").mkdir()
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 2_000_000, dtype=np.uint16)
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
            global_batch = cfg.batch(contender.world_size)[1]
            row = rows[contender.name]
            row["rate"] = global_batch * cfg.sequence_length / statistics.median(row["seconds"])
    return table(size, cfg, rows)


def table(size: str, cfg: Config, rows: dict[str, dict]) -> str:
    shape = (
        f"L{cfg.num_hidden_layers} D{cfg.hidden_size} H{cfg.num_attention_heads} V{cfg.vocab_size} "
        f"T{cfg.sequence_length} B{cfg.per_device_train_batch_size}"
    )
    accumulation = cfg.gradient_accumulation_steps
    shape += f" x {accumulation} accumulated" if accumulation > 1 else ""
    base, best = rows.get("seed"), rows.get("floor")
    lines = [
        f"**{size}**: {shape}, {cfg.mixed_precision.replace('no', 'fp32')}; {len(rows[next(iter(rows))]['seconds'])} rounds",
        "",
        "| | tokens/s | of the Transformers design | of the floor | peak memory, GiB | first step, s | spread | MFU |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        kind, _, rest = name.partition("-")
        of_base = f"{row['rate'] / base['rate']:.2f}" if base else "n/a"
        of_best = f"{row['rate'] / best['rate']:.2f}" if best else "n/a"
        memory, first = f"{row['memory'] / 2**30:.2f}", f"{row['first']:.0f}"
        if kind == "floor":
            memory, first = "", ""
        world_size = int(rest.rpartition("-")[2] or 1)
        peak = gpus.peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        mfu = f"{row['rate'] * neox.flops_per_token(cfg) / world_size / peak:.1%}" if peak else "n/a"
        spread = (max(row["seconds"]) - min(row["seconds"])) / statistics.median(row["seconds"])
        label = NAMES[kind] + (f" ({rest.replace('-', ' on ')} processes)" if rest else "")
        lines.append(
            f"| {label} | {row['rate']:,.0f} | {of_base} | {of_best} | {memory} | {first} | {spread:.0%} | {mfu} |"
        )
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
    dirty = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{name}; torch {torch.__version__}; {datetime.date.today()}; commit {commit}{dirty}"


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()


# --- what a checkpoint costs the training loop


def save_rows(cfg: Config, folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds for which training stands still for one save of cfg's state, ours and two plain ways."""
    env = parallel.start(cfg)
    model = parallel.build(cfg, env)
    tree = ckpt.state_tree(model, torch.optim.AdamW(model.parameters(), fused=True))
    saver = ckpt.Saver(folder, save_total_limit=1)
    saver.reserve(tree)
    host = {key: t.clone() for key, t in tree.items()}
    seconds: dict[str, list[float]] = {"ours": [], "copy": [], "torch.save": [], "behind": []}
    for i in range(rounds + 1):  # the first round finds cold caches
        begin = time.perf_counter()
        for key, t in tree.items():
            host[key].copy_(t)
        copied = time.perf_counter()
        torch.save(tree, folder / "torch.pt")
        saved = time.perf_counter()
        saver.save(ckpt.name(0, i + 1, 0), tree, {"step": i + 1})
        if error := saver.wait():
            raise RuntimeError(error)
        for key, value in zip(
            seconds, (saver.stall_seconds, copied - begin, saved - copied, saver.write_seconds), strict=True
        ):
            seconds[key].append(value)
    written = sum(f.stat().st_size for f in (folder / saver.last).iterdir())
    saver.close()
    parallel.stop()
    row = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    return row | {"parameters": neox.num_parameters(cfg)[0], "bytes": written}


def save_command(options: argparse.Namespace) -> None:
    """Two sizes, each in this process; files go to a temporary folder below --folder."""
    demo = HERE / "configs" / "demo.py"
    wide = (
        "hidden_size=1024 num_hidden_layers=8 num_attention_heads=16 intermediate_size=4096 vocab_size=50257 "
        "tokenizer=gpt2 num_processes=1"
    )
    print(hardware())
    print(f"median of {options.rounds} saves; milliseconds for which training stands still\n")
    print("| parameters | ours | a plain copy in memory | torch.save | ours / copy | ours / torch.save "
          "| ours, until on disk | bytes per parameter |")  # fmt: skip
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for settings in ("", wide):
        cfg, _ = configs.load([str(demo), *settings.split()])
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
            row = save_rows(cfg, Path(folder), options.rounds)
        ms = [f"{1000 * row[key]:,.1f}" for key in ("ours", "copy", "torch.save", "behind")]
        ratios = [f"{row['ours'] / row[key]:.2f}" for key in ("copy", "torch.save")]
        size = f"{row['parameters'] / 1e6:,.1f}M"
        cells = [size, *ms[:3], *ratios, ms[3], f"{row['bytes'] / row['parameters']:.3f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


# --- sampling


def sample_command(options: argparse.Namespace) -> None:
    """Greedy tokens/s after one prompt: with our cache, without any, and transformers.generate on the same weights."""
    import export
    import sample

    try:
        import transformers
    except ImportError as error:
        raise ConfigError("bench.py sample needs its peer: pip install -r requirements-dev.txt") from error

    source = export.find(options.checkpoint)
    if source.is_hf:
        raise ConfigError(f"{source.path} is a Hugging Face folder; name one of our checkpoints")
    model, count = export.load(source), options.tokens
    if (most := source.cfg.max_position_embeddings) < count:
        raise ConfigError(f"--tokens={count} does not fit max_position_embeddings={most}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        export.write_configs(source, Path(folder), torch.float32)
        export.write_weights(model, Path(folder), torch.float32)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.set_num_threads(options.threads)
    prompt = torch.tensor([[source.end or 0]])

    @torch.inference_mode()
    def cached() -> list[int]:
        steps = sample.generate(model, prompt.tolist(), sample.Options(temperature=0, max_new_tokens=count))
        return [row[0] for row in steps]

    @torch.inference_mode()
    def generate() -> list[int]:
        most = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return peer.generate(prompt, attention_mask=torch.ones_like(prompt), **most)[0, 1:].tolist()

    @torch.inference_mode()
    def recomputed() -> list[int]:
        row = prompt
        for _ in range(count):
            row = torch.cat((row, model(row)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        return row[0, 1:].tolist()

    ways = {"this trainer": cached, "transformers.generate": generate, "this trainer without a cache": recomputed}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    texts: dict[str, list[int]] = {}
    for _ in range(options.rounds):
        for way, run in ways.items():
            begin = time.perf_counter()
            texts[way] = run()
            seconds[way].append(time.perf_counter() - begin)
    ours = statistics.median(seconds["this trainer"])
    print(hardware())
    print(f"{source}, fp32, greedy, {count} tokens, {options.threads} thread(s), median of {options.rounds}\n")
    print("| | tokens/s | ours is faster by | same tokens |")
    print("|---|---:|---:|---|")
    for way, values in seconds.items():
        middle = statistics.median(values)
        same = "yes" if texts[way] == texts["this trainer"] else "no"
        print(f"| {way} | {count / middle:,.1f} | {middle / ours:.2f} | {same} |")


# --- command line


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def step_command(options: argparse.Namespace) -> None:
    contenders = options.contenders.split(",")
    for name in contenders:
        if not re.fullmatch(r"(ours|whole)(-(ddp|fsdp)-\d+)?|seed|nanogpt|floor", name):
            raise ConfigError(
                f"contender {name!r} is none of seed, nanogpt, floor, ours, whole, ours-ddp-N, whole-fsdp-N"
            )
    sizes = list(SIZES) if options.size == "all" else [options.size]
    print(hardware())
    print(f"medians of rounds of {options.steps} optimizer step(s), contenders taking turns\n", flush=True)
    for size in sizes:
        rounds = ROUNDS[size] if options.rounds is None else options.rounds
        print(measure(size, contenders, options.settings, rounds, options.steps) + "\n", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="step|plan|save|sample")
    step = commands.add_parser("step", help="tokens/s of a whole optimizer step, ours and the peers'")
    step.add_argument("--size", choices=[*SIZES, "all"], default="all")
    step.add_argument("--contenders", default="ours,seed,nanogpt,floor", help="also whole, ours-ddp-N, whole-fsdp-N")
    step.add_argument("--rounds", type=positive, help=f"unless given: {ROUNDS}")
    step.add_argument("--steps", type=positive, default=1, help="optimizer steps per turn")
    step.add_argument("settings", nargs="*", metavar="key=value", help="configuration keys, for all contenders")
    step.set_defaults(run=step_command)
    planner.add_command(commands)
    save = commands.add_parser("save", help="what a checkpoint costs the training loop, at two sizes")
    save.add_argument("--folder", default=".", help="where the files are written, and removed again")
    save.add_argument("--rounds", type=positive, default=7)
    save.set_defaults(run=save_command)
    sampling = commands.add_parser("sample", help="tokens/s of sampling, beside transformers.generate")
    sampling.add_argument("checkpoint", help="one of ours, or a folder of them")
    sampling.add_argument("--tokens", type=int, default=512)
    sampling.add_argument("--threads", type=int, default=1)
    sampling.add_argument("--rounds", type=positive, default=3)
    sampling.set_defaults(run=sample_command)
    try:
        options, late = parser.parse_known_args(argv)  # argparse takes key=value before the options, not after
        if unknown := [word for word in late if "settings" not in options or word.startswith("-") or "=" not in word]:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        if late:
            options.settings += late
        options.run(options)
    except (ConfigError, ckpt.CheckpointError, ContenderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["plan"]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `plan ... | head` ends as any other filter does
    sys.exit(main(sys.argv[1:]))
