"""What a config needs and costs on rented hardware, and its fastest layout there, without a GPU: `bench.py plan`."""

import argparse
import dataclasses
import functools
import math
import os
import re
import shlex
from typing import Any

import torch

import configs
import data
import model as neox
from configs import Config, ConfigError
from refocused.entry import here, parse_with_settings, positive, positive_number
from refocused.measure import calibrate, cost, gpus, planner, predictions, search
from refocused.measure.cost import CEILING, REACHED, Cost, Hardware
from refocused.measure.gpus import GPUS
from refocused.measure.planner import KINDS, PROCESS, estimate
from refocused.run import optim, room, words


def tokens_per_step(cfg: Config, world: int) -> int:
    return cfg.batch(world)[1] * cfg.sequence_length


def mfu(cfg: Config, world: int, seconds: float, peak: float | None) -> str:
    flops = tokens_per_step(cfg, world) * neox.flops_per_token(cfg)
    return f"{flops / seconds / world / peak:.0%}" if peak else "n/a"


def settings(cfg: Config, other: Config) -> str:
    """The command line's words that make cfg the other."""
    changes = configs.difference(dataclasses.asdict(cfg), dataclasses.asdict(other))
    return " ".join(f"{key}={str(new).lower() if isinstance(new, bool) else new}" for key, _, new in changes)


def memory_table(cfg: Config, world: int, usable: float) -> str:
    """Predicted GiB per GPU by kind; usable: GiB that torch finds on each."""
    found = estimate(cfg, world)
    cells = [*found.device.values(), found.total, found.pools, found.needed]
    sizes = " | ".join(f"{size / 2**30:.2f}" for size in cells)
    host = f"{found.host * world / 2**30:.1f}" if found.host else ""
    fits = "yes" if found.needed <= usable * 2**30 else "no"
    return "\n".join(
        [
            "| GiB per GPU | " + " | ".join(KINDS) + f" | alive | allocator | in all | fits {usable:.1f} | host |",
            "|---|" + "---:|" * (len(KINDS) + 3) + "---|---:|",
            f"| as configured ({layout(cfg, world)}) | {sizes} | {fits} | {host} |",
        ]
    )


def layout(cfg: Config, world: int) -> str:
    """A layout in a few words: fsdp, 4 x 4, selective."""
    parts = [
        cfg.parallel + (f" over {cfg.shard_size}" if cfg.shard_size else ""),
        f"{cfg.per_device_train_batch_size} x {cfg.batch(world)[0]}",
        cfg.activation_checkpointing,
        "offload" if cfg.cpu_offload else "",
        "bf16 moments" if cfg.adam_moments == "bf16" else "",
    ]
    return ", ".join(filter(None, parts))


def time_table(cfg: Config, world: int, price: float | None, *links: Any) -> str:
    """The whole run on each known GPU: whether it fits, predicted speed, hours and dollars; links: as Hardware.of has them."""
    seen = planner.seen(cfg, world)
    lines = [
        "| GPU | GB | fits | s per step | tokens/s | MFU | hours | $ per GPU-hour | cost, $ |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, gpu in GPUS.items():
        seconds = cost.step(seen.work, cfg, world, Hardware.of(name, gpu, *links)).seconds
        hours, dollars = cfg.max_steps * seconds / 3600, gpu.price if price is None else price
        fits = "yes" if seen.needed <= gpu.found * 2**30 else "no"
        lines.append(
            f"| {world} x {name} | {gpu.sold:g} | {fits} | {seconds:.3g} | {tokens_per_step(cfg, world) / seconds:,.0f} "
            f"| {mfu(cfg, world, seconds, gpu.peak)} | {hours:,.1f} | {dollars:.2f} | {hours * world * dollars:,.0f} |"
        )
    return "\n".join(lines)


def wish(cfg: Config, world: int, steps_per_second: float, *links: Any) -> str:
    """What a wished-for speed asks of each GPU, as a multiple of its peak, and of what is predicted for it."""
    tokens, work = tokens_per_step(cfg, world), planner.seen(cfg, world).work
    need = steps_per_second * tokens * neox.flops_per_token(cfg) / world
    verdicts = []
    for name, gpu in GPUS.items():
        share, seconds = need / gpu.peak, cost.step(work, cfg, world, Hardware.of(name, gpu, *links)).seconds
        asked = f"{share:.1f} times its peak" if share > 1 else f"MFU {share:.0%}"
        verdicts.append(f"{name}: {asked}, {steps_per_second * seconds:.1f} times what is predicted")
    return (
        f"{steps_per_second:g} steps/s of {tokens:,} tokens on {world} GPUs need {need / 1e12:,.0f} TFLOP/s "
        f"of each; " + "; ".join(verdicts)
    )


def checkpoints(cfg: Config) -> str:
    """Bytes of one checkpoint and of all that are kept or written."""
    size = optim.checkpoint_bytes(cfg)
    saves = math.ceil(cfg.max_steps / cfg.save_steps) if cfg.save_steps else 1
    kept = min(saves, cfg.save_total_limit + room.kept_forever(cfg, 0)) if cfg.save_total_limit else saves
    timed = f", besides those of every {cfg.save_seconds:g} s" * bool(cfg.save_seconds)
    return (
        f"{size / 1e9:.2f} GB each; {kept} kept on disk = {kept * size / 1e9:.1f} GB; "
        f"{saves} saves write {saves * size / 1e12:.2f} TB in all{timed}"
    )


def command(config: str, given: list[str], cfg: Config, other: Config, world: int, node: int) -> str:
    """The command line that runs the other layout of a config."""
    words = " ".join(filter(None, ["train.py", shlex.join([config, *given]), settings(cfg, other)]))
    if world == 1:
        return here(f"python {words}")
    nodes = "--standalone"
    if world > node:
        nodes = f"--nnodes={world // node} --rdzv_id=run1 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    return here(f"python -m refocused.run.launch {nodes} --nproc_per_node={min(world, node)} {words}")


def fastest_table(result: search.Result, cfg: Config, world: int, price: float | None) -> str:
    """The layouts that were found, with what a step and the run take and cost."""
    machine = result.machine
    lines = [
        "| | layout | s per step | tokens/s | MFU | exposed communication, s | sent, GB | GiB per GPU | hours | $ |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for i, found in enumerate(result.fastest, 1):
        seconds, exposed = found.cost.seconds, found.cost.exposed
        hours = cfg.max_steps * seconds / 3600
        dollars = "n/a" if price is None else f"{hours * world * price:,.0f}"
        memory = f"{found.needed / 2**30:.1f}"
        memory += f" (host {found.host * min(world, machine.node) / 2**30:.0f})" if found.host else ""
        lines.append(
            f"| {i} | {layout(found.cfg, world)} | {seconds:.3g} | {tokens_per_step(found.cfg, world) / seconds:,.0f} "
            f"| {mfu(found.cfg, world, seconds, machine.peak)} | {exposed:.3f} ({exposed / seconds:.0%}) "
            f"| {found.cost.sent / 1e9:.1f} | {memory} | {hours:,.1f} | {dollars} |"
        )
    return "\n".join(lines)


def shares(found: Cost) -> dict[str, float]:
    """Seconds of a step by what limits them, the largest first."""
    groups = {"products": "matrix products", "attention": "attention", "host copies": "copies from and to the host"}
    seconds = {"the link": found.exposed}
    for kind, value in found.kinds.items():
        name = groups.get(kind, "memory bandwidth")
        seconds[name] = seconds.get(name, 0.0) + value
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def bottleneck(result: search.Result, world: int) -> str:
    """What the fastest layout waits for, and what would help."""
    best = result.fastest[0]
    parts = [f"{name} {value / best.cost.seconds:.0%}" for name, value in shares(best.cost).items()]
    text = f"bound by {', '.join(part for part in parts if not part.endswith(' 0%'))}."
    if best.cost.exposed > 0.02 * best.cost.seconds:
        text += f" A link without limit would make it {best.cost.seconds - best.cost.exposed:.3g} s."
        least = min(result.fastest, key=lambda found: found.cost.sent)
        if least.cost.sent < 0.8 * best.cost.sent:
            text += (
                f" {layout(least.cfg, world)} sends {least.cost.sent / 1e9:.1f} GB instead of "
                f"{best.cost.sent / 1e9:.1f} and takes {least.cost.seconds:.3g} s."
            )
    if large := result.too_large:
        text += (
            f" With {large.needed / 2**30:.1f} GiB per GPU {layout(large.cfg, world)} would take "
            f"{large.cost.seconds:.3g} s."
        )
    return text


def missing(result: search.Result, world: int) -> str:
    """What would make a layout fit, where none does."""
    if not (f := result.starved):
        return "more GPUs, or larger ones"
    host = math.ceil(f.host * min(world, result.machine.node) / 2**30)
    return f"{layout(f.cfg, world)} would, with --host-memory {host}; or more GPUs, or larger ones"


def affordable(
    cfg: Config, world: int, seconds: float, price: float | None, budget: float | None, limit: float | None
) -> str:
    """What can be trained for so many dollars, or within so many hours."""
    limits = [("$" + f"{budget:g}", budget / price / world)] if budget and price else []
    limits += [(f"{limit:g} h", limit)] if limit else []
    name, hours = min(limits, key=lambda pair: pair[1])
    tokens = tokens_per_step(cfg, world)
    steps = int(hours * 3600 / seconds)
    return (
        f"{name} buys {hours:,.1f} h = {steps:,} steps = {words.count(steps * tokens)} tokens, "
        f"{steps * tokens / neox.num_parameters(cfg)[0]:.2g} per parameter (Chinchilla, arXiv:2203.15556: about 20), "
        f"{steps / cfg.max_steps:.0%} of the config's {cfg.max_steps:,} steps: max_steps={steps}"
    )


def hours(text: str) -> float:
    """An argument's type: 48h, 2d or 90m as hours."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd]?)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is no time; write 48h, 2d or 90m")
    return float(match[1]) * {"m": 1 / 60, "h": 1, "": 1, "d": 24}[match[2]]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="bench.py plan", description="Memory, time and cost, before they are paid.")
    add = found.add_argument
    add("config", nargs="?", help="a config file, e.g. configs/production.py")
    add("--gpus", type=positive, help="default: the config's num_processes")
    add("--gpu", help=f"one of {', '.join(GPUS)}")
    add("--per-node", type=positive, default=8, help="GPUs of a node, where there are more")
    add(
        "--memory", type=positive_number, help="GB of each GPU, as sold; the smallest known kind that it fits if absent"
    )
    add("--host-memory", type=positive_number, default=64, help="GiB of a node, for cpu_offload")
    add("--link", type=positive_number, help="GB/s that a GPU sends within a node, instead of the table's")
    add("--network", type=positive_number, help="GB/s that a node sends, instead of the table's")
    add("--price", type=positive_number, help="$ per GPU and hour, instead of the table's")
    add("--search", action="store_true", help="the fastest layouts of the same step that fit")
    add("--budget", type=positive_number, help="$: what the fastest layout trains for that")
    add("--deadline", type=hours, help="as 48h: what the fastest layout trains in that time")
    add("--calibrate", action="store_true", help="measure this machine first and plan for it")
    add("--check", action="store_true", help="predict and run layouts on this machine, no config: a table")
    add("--rounds", type=positive, default=5, help="steps of each layout of --check, the best counts")
    add("--busy", action="store_true", help="--check by CPU seconds, for a machine that others use")
    add("--tokens", type=positive_number, help="tokens of the data set, for epochs where it is not here")
    add("--steps-per-second", type=positive_number, help="a wished-for speed to hold against the hardware")
    return found


def main(argv: list[str]) -> int:
    options = parse_with_settings(parser(), argv)
    if options.check:
        return predictions.main(options.settings, options.rounds, options.busy)
    if options.config is None:
        raise ConfigError("plan needs a config file, e.g. configs/production.py")
    cfg, _ = configs.load([options.config, *options.settings])
    original, world, node = cfg, options.gpus or cfg.num_processes or 1, options.per_node
    if world > node and world % node:
        raise ConfigError(f"--gpus {world} is not a multiple of --per-node {node}")
    searching = options.search or options.budget or options.deadline
    if searching:  # all that follows is about the step that the config means, whatever it was laid out for
        each = search.sequences(cfg, world)
        size = math.gcd(cfg.per_device_train_batch_size, each)
        cfg = dataclasses.replace(
            cfg, global_batch_size=each * world, per_device_train_batch_size=size, num_processes=world
        )
    cfg.batch(world)
    device = "cuda" if torch.cuda.is_available() or not options.calibrate else "cpu"
    measured = options.calibrate and device == "cuda"
    gpu = gpus.named(options.gpu) if options.gpu else gpus.find(torch.cuda.get_device_name()) if measured else None
    price = options.price or (gpu.price if gpu else None)
    if searching and not (gpu or options.calibrate):
        raise ConfigError(f"--search, --budget and --deadline need --gpu, one of {', '.join(GPUS)}, or --calibrate")
    if options.budget and not price:
        raise ConfigError("--budget needs --price, or --gpu with its own")
    if options.calibrate and (options.gpu or options.link or options.network):
        raise ConfigError("--calibrate measures what --gpu, --link and --network would say; leave these out")
    if options.memory and not (gpu and options.memory == gpu.sold):
        memory, usable, whose = options.memory, gpus.usable(options.memory), "GPU"
    elif measured:
        usable = torch.cuda.get_device_properties(0).total_memory / 2**30
        memory, whose = gpu.sold if gpu else round(usable), torch.cuda.get_device_name()
    elif options.calibrate:
        usable = memory = room.memory() / world / 2**30
        whose = "CPU process"
    elif gpu:
        memory, usable, whose = gpu.sold, gpu.found, "GPU"
    else:
        memory, whose = gpus.smallest(estimate(cfg, world).needed), "GPU"
        usable = gpus.usable(memory)
    try:
        dataset: data.Dataset | str = data.Dataset.open(cfg)
    except ValueError as error:
        dataset = f"not here ({str(error).splitlines()[0]})"
    known = options.memory or gpu or options.calibrate
    chosen = "" if known else ", the smallest known kind that it fits (--gpu or --memory names another)"
    where = f"{world} {options.gpu or whose}{'s' * (world > 1)} of {memory:.4g} GB{chosen}"
    where += "" if options.calibrate else ", planned without one"
    links = (options.link, options.network, node)
    print(words.plan(cfg, world, dataset, where))
    if options.tokens:
        epochs = cfg.max_steps * tokens_per_step(cfg, world) / options.tokens
        print(f"epochs    {epochs:.3g} of {words.count(options.tokens)} tokens")
    print(f"saves     {checkpoints(cfg)}")
    sent = estimate(cfg, world).sent if world > 1 else 0
    print(f"network   {sent / 1e9:.2f} GB sent by each GPU per optimizer step")
    if options.steps_per_second:
        print(f"wish      {wish(cfg, world, options.steps_per_second, *links)}")
    print(f"\n{memory_table(cfg, world, usable)}\n")
    print(
        "Predicted from the eager graph. Allocator: a pool of memory per stream serves that stream alone, so their peaks "
        f"add up. In all: with {estimate(cfg, world).beside / 2**30:.2f} GiB of CUDA context, workspaces"
        f"{' and NCCL buffers' * (world > 1)} (assumed). A card sold as {memory:g} GB gives torch "
        f"{usable:.1f} GiB. Host: all processes, pinned blocks rounded up, "
        f"{PROCESS / 2**30:.0f} GiB of each process's own (assumed).\n"
    )
    machine = None
    if options.calibrate:
        work = planner.seen(cfg, world, device).work
        machine = calibrate.calibrate(cfg, world, work.shapes())
        found = cost.step(work, cfg, world, machine)
        print(f"calibrated {machine.name}: {calibrate.described(machine)}")
        print(f"step      {found.seconds:.3g} s: {', '.join(f'{k} {v:.3g}' for k, v in shares(found).items())}")
    else:
        print(time_table(cfg, world, options.price, *links))
        usual = "given" if options.price else "assumed"
        print(
            f"\nPredicted from the operations of a step: products at {REACHED:.0%} of the best measured rate, or of "
            f"{CEILING:.0%} of the dense bf16 peak; links as in refocused/measure/gpus.py; prices {usual}."
        )
    if gpu and not machine:
        machine = Hardware.of(options.gpu, gpu, *links)
    if not machine or not searching:
        if estimate(cfg, world).needed > usable * 2**30:
            print("\ndoes not fit as configured; --search with --gpu finds what does")
        return 0
    workers = min(os.cpu_count() or 1, 8)
    measure = functools.partial(calibrate.calibrate, cfg, world) if options.calibrate else None
    limits = usable * 2**30, options.host_memory * 2**30
    result = search.search(cfg, world, machine, *limits, workers, device, measure)
    if not result.fastest:
        print(f"\nnone of {result.looked} layouts fits {usable:.1f} GiB: {missing(result, world)}")
        return 0
    print(f"\nthe fastest of {result.looked} layouts of the same step that fit {usable:.1f} GiB:\n")
    print(fastest_table(result, cfg, world, price))
    print(f"\n{bottleneck(result, world)}\n")
    for i, fast in enumerate(result.fastest, 1):
        print(f"{i}: {command(options.config, options.settings, original, fast.cfg, world, node)}")
    if options.budget or options.deadline:
        best = result.fastest[0]
        print(affordable(best.cfg, world, best.cost.seconds, price, options.budget, options.deadline))
    return 0
