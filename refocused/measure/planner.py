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

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  gives collectives a meaning under FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import configs
import data
import model as neox
from configs import Config
from refocused.entry import parse_with_settings
from refocused.measure.gpus import GPUS
from refocused.run import optim, processes, strategy, words

# CUDA context, NCCL's buffers and matrix-product workspaces, in bytes; and what an allocator leaves unused
OVERHEAD, FRAGMENTATION = 2**30, 0.05
KINDS = ("parameters", "gradients", "unreduced", "optimizer", "activations", "loss", "communication", "temporaries")
HOST = ("parameters", "gradients", "optimizer")  # what cpu_offload keeps in host memory


class Ledger(TorchDispatchMode):
    """Every live tensor storage with the kind it is accounted to; the peak by kind; the bytes that are sent."""

    def __init__(self, on_host: tuple[str, ...]):
        super().__init__()
        self.entries = WeakIdKeyDictionary()  # storage -> [kind, bytes]
        self.kind = "activations"  # of what is made now
        self.now = Counter()  # kind -> bytes
        self.on_host = on_host
        self.restart()

    def restart(self) -> None:
        self.peak, self.at_peak, self.host_peak = 0, Counter(), 0
        self.gathered = self.reduced = 0  # bytes

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_

        def resize_(storage, size):  # FSDP2 frees and refills the whole parameters like this, unseen by dispatch
            self.resize(storage, size)
            if entry := self.entries.get(storage):
                self.now[entry[0]] += size - entry[1]
                entry[1] = size

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def account(self, tensor: torch.Tensor, kind: str, again: bool = True) -> None:
        """The tensor's memory is of this kind, unless it is known already and not to be decided again."""
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        entry = self.entries.get(storage)
        if entry is None:
            entry = self.entries[storage] = [kind, storage.nbytes()]
            self.now[kind] += entry[1]
            weakref.finalize(storage, lambda: self.now.subtract({entry[0]: entry[1]}))
        elif again:
            self.relabel(entry, kind)

    def relabel(self, entry: list, kind: str) -> None:
        self.now[entry[0]] -= entry[1]
        self.now[kind] += entry[1]
        entry[0] = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local operations come by here
        result = func(*args, **(kwargs or {}))
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
        on_host = sum(self.now[kind] for kind in self.on_host)
        self.host_peak = max(self.host_peak, on_host)
        on_device = sum(self.now.values()) - on_host
        if on_device > self.peak:
            self.peak, self.at_peak = on_device, self.now.copy()
        return result


@dataclasses.dataclass
class Estimate:
    """Bytes per process: on the device at the peak, by kind; in host memory with cpu_offload; sent per step."""

    device: dict[str, int]
    host: int
    sent: int

    @property
    def total(self) -> int:
        return sum(self.device.values())


def compiled_softmax_loss(logits, targets):
    """What softmax_loss allocates once it is one compiled kernel."""
    return logits.new_zeros((), dtype=torch.float32)


@functools.cache
def estimate(cfg: Config, world_size: int) -> Estimate:
    """Predict the memory of one process out of world_size and what it sends per optimizer step."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        return simulate(cfg, processes.Env(0, world_size, 0, world_size, torch.device("cpu"), 1))
    finally:
        dist.destroy_process_group()


def simulate(cfg: Config, env: processes.Env) -> Estimate:
    B, T = cfg.per_device_train_batch_size, cfg.sequence_length
    accumulation = min(2, cfg.batch(env.world_size)[0])  # the third micro-step is like the second
    with torch.device("meta"):
        model = neox.GPTNeoX(cfg)
    if cfg.parallel == "fsdp":  # outside the fake mode, where a mesh cannot be made
        strategy.shard(model, dataclasses.replace(cfg, cpu_offload=False), env)
    ddp = cfg.parallel == "ddp" and env.world_size > 1
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
                strategy.sync_gradients(model, micro_step == accumulation - 1 or cfg.cpu_offload)
                with strategy.autocast(cfg, env):
                    loss = model(x, x)
                ledger.kind = "temporaries"
                loss.backward()
                del loss
                for entry in list(ledger.entries.values()):
                    if entry[0] == "temporaries":  # what outlives a backward are FSDP2's gradients of whole parameters
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
        sent = others * (ledger.gathered * rounds + ledger.reduced * (rounds if cfg.cpu_offload else 1))
    return Estimate(device, ledger.host_peak, int(sent))


ALTERNATIVES = (
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": "full"},
    {"parallel": "fsdp"},
    {"parallel": "fsdp", "activation_checkpointing": "full"},
    {"parallel": "fsdp", "activation_checkpointing": "full", "cpu_offload": True},
)


def alternatives(cfg: Config, world_size: int) -> list[tuple[str, Config]]:
    """(settings, config) of what saves memory at the same global batch, the mildest first."""
    found, offloads = [], cfg.mixed_precision != "fp16"  # whose scaler cannot follow gradients to the host
    for keys in ALTERNATIVES:
        if keys.get("cpu_offload") and not offloads:
            continue
        other = dataclasses.replace(cfg, **keys)
        shards_nothing = world_size == 1 and "parallel" in keys and not other.cpu_offload
        if other != cfg and not shards_nothing and all(other != known for _, known in found):
            found.append((settings(cfg, other), other))
    B = cfg.per_device_train_batch_size
    if B > 1:
        keys = {"per_device_train_batch_size": 1, "parallel": "fsdp", "activation_checkpointing": "full"}
        if not cfg.global_batch_size:
            keys["gradient_accumulation_steps"] = cfg.gradient_accumulation_steps * B
        smallest = dataclasses.replace(cfg, **keys, cpu_offload=offloads)
        found.append((settings(cfg, smallest), smallest))
    return found


def settings(cfg: Config, other: Config) -> str:
    changes = configs.difference(dataclasses.asdict(cfg), dataclasses.asdict(other))
    return " ".join(f"{key}={str(new).lower() if isinstance(new, bool) else new}" for key, _, new in changes)


def memory_table(cfg: Config, world_size: int, memory: float) -> str:
    """Predicted GiB per GPU; where that does not fit into `memory` GiB, also what the memory-saving settings need."""
    lines = [
        "| GiB per GPU | " + " | ".join(KINDS) + f" | peak | with overhead | fits {memory:g} | host |",
        "|---|" + "---:|" * (len(KINDS) + 2) + "---|---:|",
    ]

    def row(label: str, cfg: Config) -> bool:
        found = estimate(cfg, world_size)
        need = needed(found)
        fits = need <= memory * 2**30
        parts = " | ".join(f"{found.device[kind] / 2**30:.2f}" for kind in KINDS)
        host = f"{found.host * world_size / 2**30:.1f}" if found.host else ""
        peak = f"{found.total / 2**30:.2f} | {need / 2**30:.2f}"
        lines.append(f"| {label} | {parts} | {peak} | {'yes' if fits else 'no'} | {host} |")
        return fits

    chosen = f"{cfg.parallel}, activation_checkpointing={cfg.activation_checkpointing}"
    chosen += ", cpu_offload=true" if cfg.cpu_offload else ""
    if not row(f"as configured ({chosen})", cfg):
        fitting = [label for label, other in alternatives(cfg, world_size) if row(label, other)]
        lines += ["", f"does not fit as configured; try {fitting[0]}" if fitting else "does not fit: needs more GPUs"]
    return "\n".join(lines)


def needed(found: Estimate) -> float:
    """Bytes of a GPU, with what is not the program's own."""
    return found.total * (1 + FRAGMENTATION) + OVERHEAD


def time_table(cfg: Config, world_size: int, mfu: float, price: float | None) -> str:
    """Hours and dollars of the whole run for each known GPU, and whether it fits."""
    need = needed(estimate(cfg, world_size))
    tokens = cfg.max_steps * cfg.batch(world_size)[1] * cfg.sequence_length
    flops = neox.flops_per_token(cfg)
    lines = [
        "| GPU | GiB | fits | peak, TFLOP/s | tokens/s | hours | $ per GPU-hour | cost, $ |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, (peak, size, usual) in GPUS.items():
        rate = world_size * peak * mfu / flops
        hours, dollars = tokens / rate / 3600, usual if price is None else price
        lines.append(
            f"| {world_size} x {name} | {size} | {'yes' if need <= size * 2**30 else 'no'} | {peak / 1e12:.4g} | {rate:,.0f} "
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
    """Bytes of one checkpoint (fp32 weights and two moments) and of all that are kept or written."""
    size = 12 * neox.num_parameters(cfg)[0]
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
            needs = pool.apply(estimate, (cfg, world_size))
        kinds = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in needs.device.items() if size)
        needs = f"planned GiB per process: {kinds}; {needs.total / 2**30:.2f} in all"
    except Exception as failure:  # the error to explain is another one
        needs = f"no plan: {type(failure).__name__}: {failure}"
    B = cfg.per_device_train_batch_size
    offload = "cpu_offload=true" + " mixed_precision=bf16" * (cfg.mixed_precision == "fp16")
    return (
        f"out of memory: {str(error).splitlines()[0]}\n{needs}\n"
        f"what helps: per_device_train_batch_size={max(1, B // 2)} with gradient_accumulation_steps="
        f"{cfg.batch(world_size)[0] * (2 if B > 1 else 1)} (now {B} and {cfg.batch(world_size)[0]}), "
        f"activation_checkpointing=full (now {cfg.activation_checkpointing}), "
        f"parallel=fsdp (now {cfg.parallel}), and with it {offload}; python bench.py plan compares them"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.py plan", description="Memory, network, time and cost, without a GPU.")
    parser.add_argument("config", help="a config file, e.g. configs/production.py")
    parser.add_argument("--gpus", type=int, help="default: the config's num_processes")
    parser.add_argument("--memory", type=float, default=24, help="GiB of each GPU")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak, for hours and cost")
    parser.add_argument("--price", type=float, help="$ per GPU and hour, instead of the table's")
    parser.add_argument("--tokens", type=float, help="tokens of the data set, for epochs where it is not here")
    parser.add_argument("--steps-per-second", type=float, help="a wished-for speed to hold against the hardware")
    options = parse_with_settings(parser, argv)
    cfg, _ = configs.load([options.config, *options.settings])
    world_size = options.gpus or cfg.num_processes or 1
    cfg.batch(world_size)
    try:
        dataset = data.Dataset.open(cfg)
    except ValueError as error:
        dataset = f"not here ({str(error).splitlines()[0]})"
    where = f"{world_size} GPU{'s' * (world_size > 1)} of {options.memory:g} GiB, planned without one"
    print(words.plan(cfg, world_size, dataset, where))
    if options.tokens:
        epochs = cfg.max_steps * cfg.batch(world_size)[1] * cfg.sequence_length / options.tokens
        print(f"epochs    {epochs:.3g} of {words.count(options.tokens)} tokens")
    print(f"saves     {checkpoints(cfg)}")
    sent = estimate(cfg, world_size).sent if world_size > 1 else 0
    print(f"network   {sent / 1e9:.2f} GB sent by each GPU per optimizer step")
    if options.steps_per_second:
        print(f"wish      {wish(cfg, world_size, options.steps_per_second)}")
    print(f"\n{memory_table(cfg, world_size, options.memory)}\n")
    print(
        f"Predicted from the eager graph. With overhead: {FRAGMENTATION:.0%} that the allocator leaves unused and "
        f"{OVERHEAD / 2**30:g} GiB of CUDA context, NCCL buffers and workspaces (assumed).\n"
    )
    print(time_table(cfg, world_size, options.mfu, options.price))
    again = " Recomputation is not counted as work, so expect a lower MFU with it." * (
        cfg.activation_checkpointing != "none"
    )
    usual = "given" if options.price is not None else "assumed"
    print(f"\nAt an assumed MFU of {options.mfu:.0%} of the dense bf16 peak; prices {usual}.{again}")
    return 0
