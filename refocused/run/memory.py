"""What a config needs of memory, without a GPU.

The real model makes two optimizer steps under FakeTensorMode in a fake process group. Shapes and lifetimes are real, the
memory is not: 1.4 billion parameters are planned in half a gigabyte.
"""

import dataclasses
import functools
import json
import math
import sys
import warnings
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

import model as neox
from configs import Config
from refocused import entry
from refocused.checkpoint.tensors import local_part
from refocused.run import optim, processes, strategy

KINDS = ("parameters", "gradients", "unreduced", "optimizer", "activations", "loss", "communication", "temporaries")
HOST = ("parameters", "gradients", "optimizer")  # what cpu_offload keeps in host memory
# bytes that torch does not allocate, as others report them: CUDA's context with its kernels, NCCL's buffers (of several
# processes), workspaces of matrix products; and of a process's own in host memory
CONTEXT, NCCL, WORKSPACES, PROCESS = 0.5 * 2**30, 0.3 * 2**30, 0.05 * 2**30, 4 * 2**30


@dataclasses.dataclass(eq=False)
class Entry:  # of a storage
    kind: str
    size: int
    stream: Any


class Ledger(TorchDispatchMode):
    """Bytes of live tensors by kind; their peak, and a peak for each stream.

    A GPU's allocator keeps a pool of blocks for each stream, and what one has cached serves no other. FSDP2 gathers and
    scatters on streams of its own, also on a CPU, whose streams do nothing.
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
        self.pools: Counter[Any] = Counter()  # stream -> its peak of bytes

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_
        self.propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def resize_(storage, size):  # so FSDP2 frees and refills whole parameters, unseen by dispatch
            self.resize(storage, size)
            if entry := self.entries.get(storage):
                self.now[entry.kind, entry.stream] += size - entry.size
                entry.size = size

        def propagate(propagator, op_schema):  # DTensor tries an operation on dummies of the whole shapes
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

    def account(self, tensor: torch.Tensor, kind: str) -> None:
        """The tensor's memory is of this kind from now on."""
        storage = local_part(tensor).untyped_storage()
        if entry := self.entries.get(storage):
            self.relabel(entry, kind)
        else:
            entry = self.entries[storage] = Entry(kind, storage.nbytes(), torch.cpu.current_stream())
            self.now[kind, entry.stream] += entry.size
            weakref.finalize(storage, self.freed, entry)

    def freed(self, entry: Entry) -> None:
        self.now[entry.kind, entry.stream] -= entry.size

    def relabel(self, entry: Entry, kind: str) -> None:
        self.freed(entry)
        self.now[kind, entry.stream] += entry.size
        entry.kind = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local operations come by here
        result = func(*args, **(kwargs or {}))
        if self.dummies:
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.entries:
                self.account(tensor, self.kind)
        if func is torch.ops.c10d._allgather_base_.default:
            self.account(args[0], "communication")
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.account(args[0], "gradients")
            self.account(args[1], "communication")
        elif func is torch.ops.fsdp.split_with_sizes_copy.default:
            for whole in kwargs["out"]:
                self.account(whole, "communication")
        self.update_peaks()
        return result

    def update_peaks(self) -> None:
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
class Estimate:
    """Bytes per process."""

    device: dict[str, int]  # at the peak, by kind
    pools: int  # what torch's allocator needs for that: the sum of each stream's peak
    beside: float  # what is not torch's
    host: float  # in host memory, with cpu_offload

    @property
    def total(self) -> int:
        return sum(self.device.values())

    @property
    def needed(self) -> float:
        """Of a GPU's memory."""
        return self.pools + self.beside


@functools.cache
def estimate(cfg: Config, world_size: int, device: str = "cuda") -> Estimate:
    """The memory of one of the processes on a device. Each layer beyond the third adds what the third adds."""
    if (beyond := cfg.num_hidden_layers - 3) <= 0:
        return measure(cfg, world_size, device)
    second, third = (estimate(dataclasses.replace(cfg, num_hidden_layers=n), world_size, device) for n in (2, 3))
    return Estimate(
        {kind: size + beyond * (size - second.device[kind]) for kind, size in third.device.items()},
        third.pools + beyond * (third.pools - second.pools),
        third.beside,
        third.host + beyond * (third.host - second.host),
    )


def measure(cfg: Config, world_size: int, device: str) -> Estimate:
    """The same from a pass over all layers, which takes longer."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        return simulate(cfg, processes.Env(0, world_size, 0, world_size, torch.device("cpu"), 1), device)
    finally:
        dist.destroy_process_group()


def simulate(cfg: Config, env: processes.Env, device_type: str) -> Estimate:
    accumulation = min(2, cfg.batch(env.world_size)[0])  # the third micro-step is like the second
    with torch.device("meta"):
        model = neox.GPTNeoX(cfg)
    if cfg.parallel == "fsdp":  # outside the fake mode, where a mesh cannot be made
        with warnings.catch_warnings(action="ignore"):  # a fake group has no timeout to set
            strategy.shard(model, dataclasses.replace(cfg, cpu_offload=False), env)
    ddp = cfg.parallel == "ddp" and env.world_size > 1
    strategy.tune_head(model.embed_out, device_type)

    if cfg.compile_model:  # what softmax_loss allocates once it is compiled
        model.embed_out.kernel = lambda logits, targets: logits.new_zeros((), dtype=torch.float32)
    for block in model.layers:
        block.attention.in_pieces = strategy.in_pieces(cfg, device_type)
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger(HOST if cfg.cpu_offload else ()) as ledger:
        model.to_empty(device="cpu")
        model.tie_weights()
        optimizers = optim.make_optimizers(model, cfg)
        for p in model.parameters():
            ledger.account(p, "parameters")
            p.register_post_accumulate_grad_hook(lambda p: ledger.account(p.grad, "gradients"))
        model.embed_out.register_forward_pre_hook(lambda *_: setattr(ledger, "kind", "loss"))

        def update() -> None:
            strategy.clip_gradients(model, cfg.max_grad_norm, optim.clips_in_kernel(cfg, device_type))
            ledger.kind = "optimizer"
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=not ddp)  # DDP's buckets never go away

        for p in model.parameters():
            p.grad = torch.zeros_like(p)
            ledger.account(p.grad, "gradients")
        update()  # makes the optimizer's state, and DTensor's plans out of large dummies
        ledger.restart()
        x = torch.zeros(cfg.per_device_train_batch_size, cfg.sequence_length, dtype=torch.int64)
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
        update()
    device = {kind: 0 if kind in ledger.on_host else ledger.at_peak[kind] for kind in KINDS}
    host = 0.0
    if cfg.cpu_offload:  # pinned blocks are rounded up to powers of two: each parameter, and its gradient
        local = [local_part(p).nbytes for p in model.parameters()]
        host = PROCESS + ledger.host_peak + 2 * sum(2 ** math.ceil(math.log2(n)) - n for n in local if n)
    beside = CONTEXT + WORKSPACES + NCCL * (env.world_size > 1)
    return Estimate(device, sum(ledger.pools.values()), beside, host)


def main(argv: list[str]) -> int:
    """`python -m refocused.run.memory CONFIG_AS_JSON PROCESSES`: what each process needs, by kind, in one line."""
    found = estimate(Config(**json.loads(argv[0])), int(argv[1]))
    kinds = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in found.device.items() if size)
    print(f"planned GiB per process: {kinds}; {found.total / 2**30:.2f} in all")
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main, sys.argv[1:]))
