"""What a config needs and costs, from the real model and without a GPU: `python bench.py plan`.

Two optimizer steps of the model that train.py builds run under FakeTensorMode in a pretended process group: shapes
and lifetimes are real, the memory is not, so 1.4 billion parameters are planned in half a gigabyte.
"""

import argparse
import dataclasses
import functools
import math
import multiprocessing
import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  gives collectives a meaning under FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import configs
import data
import model as neox
from configs import Config
from refocused.checkpoint.tensors import local_part
from refocused.entry import here, parse_with_settings
from refocused.measure import gpus
from refocused.measure.gpus import GPUS
from refocused.run import optim, processes, strategy, words

KINDS = ("parameters", "gradients", "unreduced", "optimizer", "activations", "loss", "communication", "temporaries")
HOST = ("parameters", "gradients", "optimizer")  # what cpu_offload keeps in host memory
# bytes beside what torch allocates, as others report them: the context with its kernels, NCCL's buffers
# (with more than one process), matrix-product workspaces; and of a process's own in host memory
LINKS = ((10, "PCIe without peer access"), (300, "NVLink"))  # GB/s that a GPU sends, assumed
CONTEXT, NCCL, WORKSPACES, PROCESS = 0.5 * 2**30, 0.3 * 2**30, 0.05 * 2**30, 4 * 2**30


class Ledger(TorchDispatchMode):
    """Every live tensor storage with the kind it is accounted to; the peak by kind and by stream; the bytes sent.

    A GPU's allocator keeps a pool of blocks for each stream, and what one pool has cached serves no other. FSDP2
    gathers and scatters on streams of its own, also where the device is a CPU whose streams do nothing.
    """

    def __init__(self, on_host: tuple[str, ...] = ()):
        super().__init__()
        self.entries: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage -> Entry
        self.kind = "activations"  # of what is made now
        self.now: Counter[tuple[str, Any]] = Counter()  # (kind, stream) -> bytes
        self.on_host = on_host
        self.dummies = False
        self.restart()

    def restart(self) -> None:
        self.peak, self.host_peak = 0, 0
        self.at_peak: Counter[str] = Counter()  # kind -> bytes
        self.pools: Counter[Any] = Counter()  # stream -> the most bytes that were alive in its pool
        self.gathered = self.reduced = 0  # bytes

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_
        self.propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def resize_(storage, size):  # FSDP2 frees and refills the whole parameters like this, unseen by dispatch
            self.resize(storage, size)
            if entry := self.entries.get(storage):
                self.now[entry.kind, entry.stream] += size - entry.size
                entry.size = size

        def propagate(propagator, op_schema):  # DTensor tries an operation out on dummies of the whole shapes
            self.dummies = True
            try:
                return self.propagate(propagator, op_schema)
            finally:
                self.dummies = False

        torch.UntypedStorage.resize_ = resize_
        ShardingPropagator._propagate_tensor_meta_non_cached = propagate
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        ShardingPropagator._propagate_tensor_meta_non_cached = self.propagate
        return super().__exit__(*error)

    def account(self, tensor: torch.Tensor, kind: str, again: bool = True) -> None:
        """The tensor's memory is of this kind, unless it is known already and not to be decided again."""
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        entry = self.entries.get(storage)
        if entry is None:
            entry = self.entries[storage] = Entry(kind, storage.nbytes(), torch.cpu.current_stream())
            self.now[kind, entry.stream] += entry.size
            weakref.finalize(storage, lambda: self.now.subtract({(entry.kind, entry.stream): entry.size}))
        elif again:
            self.relabel(entry, kind)

    def relabel(self, entry: "Entry", kind: str) -> None:
        self.now[entry.kind, entry.stream] -= entry.size
        self.now[kind, entry.stream] += entry.size
        entry.kind = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local operations come by here
        result = func(*args, **(kwargs or {}))
        if self.dummies:
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.account(tensor, self.kind, again=False)
        if func is torch.ops.c10d._allgather_base_.default:
            self.account(args[0], "communication")
            self.gathered += args[0].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.account(args[0], "gradients")
            self.account(args[1], "communication")
            self.reduced += args[1].nbytes
        elif func is torch.ops.fsdp.split_with_sizes_copy.default:
            for whole in kwargs["out"]:
                self.account(whole, "communication")
        self.look()
        return result

    def look(self) -> None:
        """Note what is alive now where it is the most so far."""
        kinds: Counter[str] = Counter()
        pools: Counter[Any] = Counter()
        for (kind, stream), size in self.now.items():
            kinds[kind] += size
            pools[stream] += 0 if kind in self.on_host else size
        self.pools |= pools
        self.host_peak = max(self.host_peak, sum(kinds[kind] for kind in self.on_host))
        if (on_device := sum(pools.values())) > self.peak:
            self.peak, self.at_peak = on_device, kinds


@dataclasses.dataclass
class Entry:
    """What the ledger knows of a storage."""

    kind: str
    size: int
    stream: Any


@dataclasses.dataclass
class Estimate:
    """Bytes per process: on the device at the peak, by kind; pools: what torch's allocator needs for that, a peak for
    each stream; beside: what is not torch's; in host memory with cpu_offload; sent per step."""

    device: dict[str, int]
    pools: int
    beside: float
    host: float
    sent: int

    @property
    def total(self) -> int:
        return sum(self.device.values())

    @property
    def needed(self) -> float:
        """Of a GPU's memory."""
        return self.pools + self.beside


def compiled_softmax_loss(logits, targets):
    """What softmax_loss allocates once it is one compiled kernel."""
    return logits.new_zeros((), dtype=torch.float32)


@functools.cache
def estimate(cfg: Config, world_size: int, device: str = "cuda") -> Estimate:
    """Predict the memory of one process out of world_size, on such a device, and what it sends per optimizer step."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        return simulate(cfg, processes.Env(0, world_size, 0, world_size, torch.device("cpu"), 1), device)
    finally:
        dist.destroy_process_group()


def simulate(cfg: Config, env: processes.Env, device_type: str) -> Estimate:
    B, T = cfg.per_device_train_batch_size, cfg.sequence_length
    accumulation = min(2, cfg.batch(env.world_size)[0])  # the third micro-step is like the second
    with torch.device("meta"):
        model = neox.GPTNeoX(cfg)
    if cfg.parallel == "fsdp":  # outside the fake mode, where a mesh cannot be made
        strategy.shard(model, dataclasses.replace(cfg, cpu_offload=False), env)
    ddp = cfg.parallel == "ddp" and env.world_size > 1
    strategy.tune_head(model.embed_out, device_type)
    if cfg.compile_model:
        model.embed_out.kernel = compiled_softmax_loss
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger(HOST if cfg.cpu_offload else ()) as ledger:
        model.to_empty(device="cpu")
        model.tie_weights()
        optimizers = optim.make_optimizers(model, cfg)
        for p in model.parameters():
            ledger.account(p, "parameters")
            p.register_post_accumulate_grad_hook(lambda p: ledger.account(p.grad, "gradients"))
        model.embed_out.register_forward_pre_hook(lambda *_: setattr(ledger, "kind", "loss"))
        x = torch.zeros(B, T, dtype=torch.int64)
        for _ in range(2):  # the first step makes the optimizer's state, and DTensor's plans out of large dummies
            ledger.restart()
            for micro_step in range(accumulation):
                ledger.kind = "activations"
                strategy.sync_gradients(model, cfg, last=micro_step == accumulation - 1)
                with strategy.autocast(cfg, env):
                    loss = model(x, x)
                ledger.kind = "temporaries"
                loss.backward()
                del loss
                for entry in list(ledger.entries.values()):
                    if entry.kind == "temporaries":  # what outlives a backward: FSDP2's gradients of whole parameters
                        ledger.relabel(entry, "unreduced")
            strategy.clip_gradients(model, cfg.max_grad_norm)
            ledger.kind = "optimizer"
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=not ddp)  # DDP's buckets never go away
    device = {kind: 0 if kind in ledger.on_host else ledger.at_peak[kind] for kind in KINDS}
    others = (env.world_size - 1) / env.world_size  # a ring sends each part to all others
    if ddp:
        sent = 2 * others * 4 * neox.num_parameters(cfg)[0]
    else:
        rounds = cfg.batch(env.world_size)[0] / accumulation
        sent = others * (
            ledger.gathered * rounds + ledger.reduced * (rounds if strategy.reduces(cfg, last=False) else 1)
        )
    host = 0.0
    if cfg.cpu_offload:  # pinned blocks are rounded up to powers of two: each parameter, and its gradient
        local = [local_part(p).nbytes for p in model.parameters()]
        host = PROCESS + ledger.host_peak + 2 * sum(2 ** math.ceil(math.log2(n)) - n for n in local if n)
    beside = CONTEXT + WORKSPACES + NCCL * (env.world_size > 1)
    return Estimate(device, sum(ledger.pools.values()), beside, host, int(sent))


ALTERNATIVES: tuple[dict[str, Any], ...] = (
    {"activation_checkpointing": "activation"},
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": "full"},
    {"parallel": "fsdp"},
    {"parallel": "fsdp", "reduce_every_micro_step": True},
    {"parallel": "fsdp", "activation_checkpointing": "full"},
    {"parallel": "fsdp", "activation_checkpointing": "full", "cpu_offload": True},
)


def alternatives(cfg: Config, world_size: int) -> list[tuple[str, Config]]:
    """(settings, config) of what saves memory at the same global batch, the mildest first."""
    found: list[tuple[str, Config]] = []
    B, accumulation = cfg.per_device_train_batch_size, cfg.batch(world_size)[0]
    offloads = cfg.mixed_precision != "fp16" and cfg.optimizer == "adamw" and not cfg.shard_size

    def add(keys: dict[str, Any]) -> None:
        other = dataclasses.replace(cfg, **keys)
        if other != cfg and all(other != known for _, known in found):
            found.append((settings(cfg, other), other))

    def batched(size: int) -> dict[str, Any]:
        keys = {} if cfg.global_batch_size else {"gradient_accumulation_steps": accumulation * B // size}
        return {"per_device_train_batch_size": size, **keys}

    for keys in ALTERNATIVES:
        if keys.get("cpu_offload"):
            if offloads:  # each micro-step carries all parameters over the bus, so the fewest are the fastest
                add(keys | batched(B * accumulation))
                add(keys)
        elif (world_size > 1 or "parallel" not in keys) and (accumulation > 1 or "reduce_every_micro_step" not in keys):
            add(keys)
    if B > 1:
        add({"parallel": "fsdp", "activation_checkpointing": "full", "cpu_offload": offloads, **batched(1)})
    return found


def settings(cfg: Config, other: Config) -> str:
    changes = configs.difference(dataclasses.asdict(cfg), dataclasses.asdict(other))
    return " ".join(f"{key}={str(new).lower() if isinstance(new, bool) else new}" for key, _, new in changes)


def smallest(cfg: Config, world_size: int) -> float:
    """GB of the smallest kind of card that the config fits as it is; of the largest where it fits none."""
    sizes = sorted({size for _, size, _ in GPUS.values()})
    need = estimate(cfg, world_size).needed
    return next((size for size in sizes if need <= gpus.usable(size) * 2**30), sizes[-1])


def memory_table(cfg: Config, world_size: int, memory: float) -> str:
    """Predicted GiB per GPU; where a card of `memory` GiB is too small, also what the memory-saving settings need."""
    usable = gpus.usable(memory)
    lines = [
        "| GiB per GPU | " + " | ".join(KINDS) + f" | alive | allocator | in all | fits {usable:.1f} | host |",
        "|---|" + "---:|" * (len(KINDS) + 3) + "---|---:|",
    ]

    def row(label: str, cfg: Config) -> bool:
        found = estimate(cfg, world_size)
        fits = found.needed <= usable * 2**30
        cells = [*found.device.values(), found.total, found.pools, found.needed]
        host = f"{found.host * world_size / 2**30:.1f}" if found.host else ""
        sizes = " | ".join(f"{size / 2**30:.2f}" for size in cells)
        lines.append(f"| {label} | {sizes} | {'yes' if fits else 'no'} | {host} |")
        return fits

    chosen = f"{cfg.parallel}, activation_checkpointing={cfg.activation_checkpointing}"
    chosen += ", cpu_offload=true" if cfg.cpu_offload else ""
    if not row(f"as configured ({chosen})", cfg):
        fitting = [label for label, other in alternatives(cfg, world_size) if row(label, other)]
        lines += ["", f"does not fit as configured; try {fitting[0]}" if fitting else "does not fit: needs more GPUs"]
    return "\n".join(lines)


def time_table(cfg: Config, world_size: int, mfu: float, price: float | None) -> str:
    """Hours and dollars of the whole run for each known GPU, and whether it fits."""
    need = estimate(cfg, world_size).needed
    tokens = cfg.max_steps * cfg.batch(world_size)[1] * cfg.sequence_length
    flops = neox.flops_per_token(cfg)
    lines = [
        "| GPU | GB | fits | peak, TFLOP/s | tokens/s | hours | $ per GPU-hour | cost, $ |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, (peak, size, usual) in GPUS.items():
        rate = world_size * peak * mfu / flops
        hours, dollars = tokens / rate / 3600, usual if price is None else price
        fits = "yes" if need <= gpus.usable(size) * 2**30 else "no"
        lines.append(
            f"| {world_size} x {name} | {size} | {fits} | {peak / 1e12:.4g} | {rate:,.0f} "
            f"| {hours:,.1f} | {dollars:.2f} | {hours * world_size * dollars:,.0f} |"
        )
    return "\n".join(lines)


def wish(cfg: Config, world_size: int, steps_per_second: float) -> str:
    """What a wished-for speed asks of each GPU, as a multiple of what it can do at most."""
    tokens = cfg.batch(world_size)[1] * cfg.sequence_length
    need = steps_per_second * tokens * neox.flops_per_token(cfg) / world_size
    verdicts = []
    for name, (peak, _, _) in GPUS.items():
        share = need / peak
        verdicts.append(f"{name}: " + (f"{share:.1f} times its peak" if share > 1 else f"MFU {share:.0%}"))
    return (
        f"{steps_per_second:g} steps/s of {tokens:,} tokens on {world_size} GPUs need {need / 1e12:,.0f} TFLOP/s "
        f"of each; " + "; ".join(verdicts)
    )


def checkpoints(cfg: Config) -> str:
    """Bytes of one checkpoint and of all that are kept or written."""
    size = optim.checkpoint_bytes(cfg)
    saves = math.ceil(cfg.max_steps / cfg.save_steps) if cfg.save_steps else 1
    kept = min(saves, cfg.save_total_limit or saves)
    return (
        f"{size / 1e9:.2f} GB each; {kept} kept on disk = {kept * size / 1e9:.1f} GB; "
        f"{saves} saves write {saves * size / 1e12:.2f} TB in all"
    )


def explain_out_of_memory(error: BaseException, cfg: Config, world_size: int) -> str:
    """What the plan says that each process needs, by kind, and the keys that help."""
    try:  # in a process of its own: this one has a process group, and no memory
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(estimate, (cfg, world_size))
        kinds = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in found.device.items() if size)
        needs = f"planned GiB per process: {kinds}; {found.total / 2**30:.2f} in all"
    except Exception as failure:  # the error to explain is another one
        needs = f"no plan: {type(failure).__name__}: {failure}"
    B = cfg.per_device_train_batch_size
    offload = "cpu_offload=true" + " mixed_precision=bf16" * (cfg.mixed_precision == "fp16")
    return (
        f"out of memory: {str(error).splitlines()[0]}\n{needs}\n"
        f"what helps: per_device_train_batch_size={max(1, B // 2)} with gradient_accumulation_steps="
        f"{cfg.batch(world_size)[0] * (2 if B > 1 else 1)} (now {B} and {cfg.batch(world_size)[0]}), "
        f"activation_checkpointing=full (now {cfg.activation_checkpointing}), "
        f"parallel=fsdp (now {cfg.parallel}), and with it {offload}; `{here('python bench.py plan CONFIG.py')}` compares them"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.py plan", description="Memory, network, time and cost, without a GPU.")
    parser.add_argument("config", help="a config file, e.g. configs/production.py")
    parser.add_argument("--gpus", type=int, help="default: the config's num_processes")
    parser.add_argument(
        "--memory", type=float, help="GB of each GPU, as sold; the smallest known kind that it fits if absent"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak, for hours and cost")
    parser.add_argument("--price", type=float, help="$ per GPU and hour, instead of the table's")
    parser.add_argument("--tokens", type=float, help="tokens of the data set, for epochs where it is not here")
    parser.add_argument("--steps-per-second", type=float, help="a wished-for speed to hold against the hardware")
    options = parse_with_settings(parser, argv)
    cfg, _ = configs.load([options.config, *options.settings])
    world_size = options.gpus or cfg.num_processes or 1
    cfg.batch(world_size)
    try:
        dataset: data.Dataset | str = data.Dataset.open(cfg)
    except ValueError as error:
        dataset = f"not here ({str(error).splitlines()[0]})"
    memory = options.memory or smallest(cfg, world_size)
    chosen = "" if options.memory else ", the smallest known kind that it fits (--memory names another)"
    where = f"{world_size} GPU{'s' * (world_size > 1)} of {memory:g} GB{chosen}, planned without one"
    print(words.plan(cfg, world_size, dataset, where))
    if options.tokens:
        epochs = cfg.max_steps * cfg.batch(world_size)[1] * cfg.sequence_length / options.tokens
        print(f"epochs    {epochs:.3g} of {words.count(options.tokens)} tokens")
    print(f"saves     {checkpoints(cfg)}")
    sent = estimate(cfg, world_size).sent if world_size > 1 else 0
    seconds = ", ".join(f"{sent / rate / 1e9:.2g} s at {rate} GB/s ({link})" for rate, link in LINKS if sent)
    print(f"network   {sent / 1e9:.2f} GB sent by each GPU per optimizer step{f': {seconds}' * bool(seconds)}")
    if options.steps_per_second:
        print(f"wish      {wish(cfg, world_size, options.steps_per_second)}")
    print(f"\n{memory_table(cfg, world_size, memory)}\n")
    print(
        "Predicted from the eager graph. Allocator: a pool of memory per stream serves that stream alone, so their peaks "
        f"add up. In all: with {estimate(cfg, world_size).beside / 2**30:.2f} GiB of CUDA context, workspaces"
        f"{' and NCCL buffers' * (world_size > 1)} (assumed). A card sold as {memory:g} GB gives torch "
        f"{gpus.usable(memory):.1f} GiB. Host: all processes, pinned blocks rounded up, "
        f"{PROCESS / 2**30:.0f} GiB of each process's own (assumed).\n"
    )
    print(time_table(cfg, world_size, options.mfu, options.price))
    again = " Recomputation is not counted as work, so expect a lower MFU with it." * (
        cfg.activation_checkpointing != "none"
    )
    usual = "given" if options.price is not None else "assumed"
    print(f"\nAt an assumed MFU of {options.mfu:.0%} of the dense bf16 peak; prices {usual}.{again}")
    return 0
