"""What a config needs and costs on rented hardware, and its fastest layout there, without a GPU: `bench.py plan`."""

import argparse
import dataclasses
import math
import re
import shlex
import textwrap
from collections.abc import Iterable
from typing import Any

import torch

import configs
import data
import model as neox
from configs import Config, ConfigError
from refocused.arguments import parse_with_settings, positive, positive_number
from refocused.entry import here
from refocused.measure import calibrate, search
from refocused.run import gpus, messages, optim, preflight, speed
from refocused.run.gpus import GPUS
from refocused.run.memory import PROCESS, estimate
from refocused.run.speed import Machine, Step

GIB = 2**30
WIDTH = 100  # columns of what is printed
LIMITS = {"products": "matrix products", "memory": "memory bandwidth", "host copies": "copies from and to the host"}


# what is planned for: the GPU of the table, its name, GiB that torch finds on one, its rates, $ per GPU and hour
Target = tuple[gpus.GPU | None, str, float, Machine | None, float | None]


def say(text: str) -> None:
    print(textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False))


def table(head: str, rows: Iterable[Iterable[Any]]) -> str:
    """Markdown; columns are separated by | in the head."""
    cells = [head.split("|"), ["---"] * (head.count("|") + 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def tokens_per_step(cfg: Config, world: int) -> int:
    return cfg.batch(world)[1] * cfg.sequence_length


def mfu(cfg: Config, world: int, seconds: float, peak: float | None) -> str:
    flops = tokens_per_step(cfg, world) * neox.flops_per_token(cfg)
    return f"{flops / seconds / world / peak:.0%}" if peak else "n/a"


def cost(cfg: Config, world: int, seconds: float, price: float | None) -> tuple[str, str]:
    """Hours and dollars of the whole run."""
    hours = cfg.max_steps * seconds / 3600
    return f"{hours:,.1f}", "n/a" if price is None else f"{hours * world * price:,.0f}"


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


def memory_table(cfg: Config, world: int) -> str:
    found = estimate(cfg, world)
    rows: dict[str, float] = {kind: size for kind, size in found.device.items() if size}
    rows |= {"in all at the peak": found.total, "torch's allocator": found.pools}
    rows |= {"with what is not torch's": found.needed}
    rows |= {"host memory, all processes": found.host * world} if found.host else {}
    return table(f"{layout(cfg, world)}|GiB per GPU", ((kind, f"{size / GIB:.2f}") for kind, size in rows.items()))


def time_table(cfg: Config, world: int, price: float | None, chosen: gpus.GPU | None, *links: Any) -> str:
    """The whole run on each known GPU; links: as Machine.of has them."""
    needed, rows = estimate(cfg, world).needed, []
    for name, gpu in GPUS.items():
        seconds, dollars = speed.step(cfg, world, Machine.of(name, gpu, *links)).seconds, price or gpu.price
        hours, whole = cost(cfg, world, seconds, dollars)
        rows.append(
            (">" * (gpu is chosen), f"{world} x {name}", f"{gpu.sold:g}", "yes" if needed <= gpu.found * GIB else "no",
             f"{seconds:.3g}", f"{tokens_per_step(cfg, world) / seconds:,.0f}", mfu(cfg, world, seconds, gpu.peak),
             hours, f"{dollars:.2f}", whole)
        )  # fmt: skip
    return table("|GPU|GB|fits|s per step|tokens/s|MFU|hours|$ per GPU-hour|cost, $", rows)


def checkpoints(cfg: Config) -> str:
    """Bytes of one checkpoint and of all that are kept or written."""
    size = optim.checkpoint_bytes(cfg)
    saves = math.ceil(cfg.max_steps / cfg.save_steps) if cfg.save_steps else 1
    kept = min(saves, cfg.save_total_limit + preflight.kept_forever(cfg, 0)) if cfg.save_total_limit else saves
    timed = f", besides those of every {cfg.save_seconds:g} s" * bool(cfg.save_seconds)
    written = f"{saves} saves write {saves * size / 1e12:.2f} TB in all{timed}"
    return f"{size / 1e9:.2f} GB each; {kept} kept on disk = {kept * size / 1e9:.1f} GB; {written}"


def command(config: str, given: list[str], cfg: Config, other: Config, world: int, node: int) -> str:
    """The command line that runs the other layout of a config."""
    changes = configs.difference(dataclasses.asdict(cfg), dataclasses.asdict(other))
    keys = [f"{key}={str(new).lower() if isinstance(new, bool) else new}" for key, _, new in changes]
    line = " ".join(["train.py", shlex.join([config, *given]), *keys])
    if world == 1:
        return here(f"python {line}")
    nodes = "--standalone"
    if world > node:
        nodes = f"--nnodes={world // node} --rdzv_id=run1 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    return here(f"python -m refocused.run.launch {nodes} --nproc_per_node={min(world, node)} {line}")


def fastest_table(result: search.Result, cfg: Config, world: int, machine: Machine, price: float | None) -> str:
    """The layouts that were found, with what a step and the run take and cost."""
    rows = []
    for i, found in enumerate(result.fastest, 1):
        step, gib = found.step, f"{found.needed / GIB:.1f}"
        gib += f" + {found.host * min(world, machine.node) / GIB:.0f} host" if found.host else ""
        rows.append(
            (i, layout(found.cfg, world), f"{step.seconds:.3g}", f"{step.exposed / step.seconds:.0%}",
             mfu(found.cfg, world, step.seconds, machine.peak), f"{step.sent / 1e9:.1f}", gib,
             *cost(cfg, world, step.seconds, price))
        )  # fmt: skip
    return table("|layout|s per step|of it link|MFU|sent, GB|GiB|hours|$", rows)


def shares(found: Step) -> dict[str, float]:
    """Seconds of a step by what limits them, the largest first."""
    seconds = {LIMITS.get(kind, kind): value for kind, value in found.parts.items()} | {"the link": found.exposed}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def bottleneck(result: search.Result, world: int) -> str:
    """What the fastest layout waits for, and what would help."""
    best = result.fastest[0].step
    parts = [f"{name} {value / best.seconds:.0%}" for name, value in shares(best).items()]
    text = f"bound by {', '.join(part for part in parts if not part.endswith(' 0%'))}."
    if best.exposed > 0.02 * best.seconds:
        text += f" A link without limit would make it {best.seconds - best.exposed:.3g} s."
    return text


def affordable(cfg: Config, world: int, seconds: float, name: str, hours: float, price: float | None) -> str:
    """What a layout, called name, can train in the hours, at the seconds of a step."""
    steps = int(hours * 3600 / seconds)
    tokens = steps * tokens_per_step(cfg, world)
    of_config = f"{steps / cfg.max_steps:.0%} of the config's {cfg.max_steps:,} steps: " if cfg.max_steps else ""
    return (
        f"In {hours:,.1f} h" + (f", for ${hours * price * world:,.0f}," if price else "") + f" {name} makes {steps:,} "
        f"steps = {messages.count(tokens)} tokens, "
        f"{tokens / neox.num_parameters(cfg)[0]:.2g} per parameter (Chinchilla, arXiv:2203.15556: about 20), "
        f"{of_config}max_steps={steps}"
    )


def hours_in(text: str) -> float:
    """An argument's type: 48h, 2d or 90m as hours."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd]?)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is no time; write 48h, 2d or 90m")
    return float(match[1]) * {"m": 1 / 60, "h": 1, "": 1, "d": 24}[match[2]]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="bench.py plan", description="Memory, time and cost, before they are paid.")
    add = found.add_argument
    add("config", help="a config file, e.g. configs/production.py")
    add("--gpus", type=positive, help="how many (default: the config's num_processes)")
    add("--gpu", help=f"kind of GPU: {', '.join(GPUS)}")
    add("--per-node", type=positive, default=8, help="GPUs of a node (default: %(default)s)")
    add("--memory", type=positive_number, help="GB of each GPU, as sold (default: the smallest GPU that fits)")
    add("--host-memory", type=positive_number, default=64, help="GiB of a node, for cpu_offload (default: %(default)s)")
    add("--link", type=positive_number, help="GB/s that a GPU sends within a node, instead of the table's")
    add("--network", type=positive_number, help="GB/s that a node sends, instead of the table's")
    add("--price", type=positive_number, help="$ per GPU and hour, instead of the table's")
    add("--search", action="store_true", help="list the fastest layouts of the same step that fit")
    add("--budget", type=positive_number, help="$: how much the fastest layout trains for that")
    add("--deadline", type=hours_in, help="48h, 2d or 90m: how much the fastest layout trains in that time")
    add("--calibrate", action="store_true", help="measure this machine first and plan for it")
    return found


def target(options: argparse.Namespace, cfg: Config, world: int, *links: Any) -> Target:
    """Raises ConfigError."""
    if options.calibrate:
        machine = calibrate.machine(world)
        gpu, name, usable = gpus.find(machine.name), "CPU process", preflight.memory() / world / GIB
        if torch.cuda.is_available():
            name, usable = machine.name, torch.cuda.get_device_properties(0).total_memory / GIB
    elif options.gpu:
        if (gpu := gpus.find(options.gpu)) is None:
            near = configs.nearest(options.gpu, map(str.lower, GPUS))
            raise ConfigError(f"--gpu {options.gpu!r} is none of {', '.join(GPUS)}{near}")
        name, usable, machine = options.gpu, gpu.found, Machine.of(options.gpu, gpu, *links)
    else:
        gpu = machine = None
        sizes, needed = sorted({gpu.sold for gpu in GPUS.values()}), estimate(cfg, world).needed
        sold = next((size for size in sizes if needed <= gpus.usable(size) * GIB), sizes[-1])
        name, usable = f"GPU of {sold:g} GB, the smallest known kind that it fits", gpus.usable(sold)
    if options.memory and not (gpu and gpu.sold == options.memory):
        name, usable = f"{options.gpu or 'GPU'} of {options.memory:g} GB", gpus.usable(options.memory)
    return gpu, name, usable, machine, options.price or (gpu.price if gpu else None)


def main(argv: list[str]) -> int:
    options = parse_with_settings(parser(), argv)
    cfg, _ = configs.load([options.config, *options.settings])
    original, world, node = cfg, options.gpus or cfg.num_processes or 1, options.per_node
    if world > node and world % node:
        raise ConfigError(f"--gpus {world} is not a multiple of --per-node {node}")
    searching = options.search or options.budget or options.deadline
    if options.calibrate and (options.gpu or options.link or options.network):
        raise ConfigError("--calibrate measures what --gpu, --link and --network would say; leave these out")
    if searching and not (options.gpu or options.calibrate):
        raise ConfigError(f"--search, --budget and --deadline need --gpu, one of {', '.join(GPUS)}, or --calibrate")
    if searching:  # all that follows is about the step that the config means, whatever it was laid out for
        each = search.sequences(cfg, world)
        size = math.gcd(cfg.per_device_train_batch_size, each)
        cfg = dataclasses.replace(
            cfg, global_batch_size=each * world, per_device_train_batch_size=size, num_processes=world
        )
    cfg.batch(world)
    links = (options.link, options.network, node)
    gpu, name, usable, machine, price = target(options, cfg, world, *links)
    if options.budget and not price:
        raise ConfigError("--budget needs --price, or --gpu with its own")

    found = estimate(cfg, world)
    fits = found.needed <= usable * GIB
    answer = f"{'fits' if fits else 'does not fit as configured'}: {found.needed / GIB:.1f} of {usable:.1f} GiB on "
    answer += f"{'each of ' * (world > 1)}{world} x {name}"
    if machine:
        step = speed.step(cfg, world, machine)
        took, dollars = cost(cfg, world, step.seconds, price)
        answer += f"; {step.seconds:.3g} s per step, {took} hours" + f", ${dollars}" * bool(price)
    if gpu and not gpu.bf16 and cfg.mixed_precision == "bf16":
        answer += "; it has no bf16 products: take mixed_precision=fp16, for which the time is"
    say(answer + ("" if fits or searching else "; --search with --gpu finds what does"))
    try:
        dataset: data.Dataset | str = data.Dataset.open(cfg)
    except ValueError as error:
        dataset = f"not here ({str(error).splitlines()[0]})"
    lines = [messages.plan(cfg, world, dataset, f"{world} x {name}{', planned without one' * (not options.calibrate)}")]
    lines += [f"saves     {checkpoints(cfg)}"]
    sent = speed.step(cfg, world, Machine("", 1, 1)).sent
    lines += [f"network   {sent / 1e9:.2f} GB sent by each GPU per optimizer step"]
    plan = messages.fitted("\n".join(lines), WIDTH + 1)
    print(f"\n{plan}\n\n{memory_table(cfg, world)}\n")
    say(
        "Predicted from the eager graph. Torch's allocator keeps a pool of memory per stream, so their peaks add up. Not "
        f"torch's: {found.beside / GIB:.2f} GiB of CUDA context, workspaces{' and NCCL' * (world > 1)} (assumed). Host "
        f"memory: {PROCESS / GIB:.0f} GiB of each process's own (assumed)."
    )
    print()
    if options.calibrate and machine:
        rates = f"products {machine.products / 1e12:.3g} TFLOP/s, memory {machine.memory / 1e9:.3g} GB/s"
        rates += f", link {machine.link / 1e9:.3g} GB/s" * (world > 1)
        say(f"measured here: {rates}. Seconds of a step: " + ", ".join(f"{k} {v:.3g}" for k, v in shares(step).items()))
    else:
        print(time_table(cfg, world, options.price, gpu, *links) + "\n")
        apart = " Documents apart: flash attention, all pairs counted." * cfg.mask_documents
        say(
            f"By the formulas of refocused/run/speed.py: products at {speed.REACHED:.0%} of the best measured rate, or of "
            f"{speed.CEILING:.0%} of the dense bf16 peak; links as in refocused/run/gpus.py; prices "
            f"{'given' if options.price else 'assumed'}.{apart}"
        )
    if not machine or not searching:
        return 0
    result = search.search(cfg, world, machine, usable * GIB, options.host_memory * GIB)
    if not result.fastest:
        way = "more GPUs, or larger ones"
        if f := result.starved:
            host = math.ceil(f.host * min(world, node) / GIB)
            way = f"{layout(f.cfg, world)} would, with --host-memory {host}; or {way}"
        say(f"none of {result.looked} layouts fits {usable:.1f} GiB: {way}")
        return 0
    print(f"\nthe fastest of {result.looked} layouts of the same step that fit {usable:.1f} GiB:\n")
    print(fastest_table(result, cfg, world, machine, price) + "\n")
    say(bottleneck(result, world))
    print()
    for i, fast in enumerate(result.fastest, 1):
        print(f"{i}: {command(options.config, options.settings, original, fast.cfg, world, node)}")
    limits = [options.deadline] * bool(options.deadline)
    if options.budget and price:
        limits.append(options.budget / price / world)
    if limits:
        if fits:
            say(affordable(cfg, world, step.seconds, "the config as it is", min(limits), price))
        say(affordable(cfg, world, result.fastest[0].step.seconds, "layout 1", min(limits), price))
    return 0
