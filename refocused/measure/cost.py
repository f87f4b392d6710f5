"""Seconds of an optimizer step from its operations: what the planner's pass has seen, on hardware that is data."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import model as neox
from configs import Config
from refocused.measure.gpus import GPU
from refocused.run import strategy


class Op(NamedTuple):
    """A kernel, or what the compiler makes one of."""

    kind: str
    flops: float
    bytes: int  # read and written
    shape: tuple = ()  # of a product: its name and each factor's (sizes, strides, dtype), which a calibration times


class Message(NamedTuple):
    """A collective of FSDP2: bytes of the whole, of which each process has or gets its part."""

    kind: str  # gather or reduce
    bytes: int


REACHED = 0.85  # of the best product's rate by a step's products, assumed: 650 of 794 TFLOP/s were seen on an H100
CEILING = 0.8  # of the peak, where nobody has published a measurement: A100's and H100's are 0.80 to 0.87
FLASH = 0.55  # of the products' rate by attention: FlashAttention-2 (arXiv:2307.08691), forward and backward on an A100
STREAMED = 0.85  # of the memory's bandwidth by kernels that only move data, assumed
BUCKET = 25 << 20  # bytes of DDP's
PACKING = "packing for reductions"

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
LOOKUPS = {aten.embedding}  # of the first argument, it reads what it writes
OVERWRITES = {aten.copy_, aten.zero_, aten.fill_}  # the first argument is not read
ALLOCATES = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided}
COLLECTIVES = {
    "_allgather_base_": ("gather", 0),
    "_reduce_scatter_base_": ("reduce", 1),
    "alltoall_base_": ("gather", 0),
}


@dataclasses.dataclass(eq=False)
class Entry:
    """What the planner's ledger knows of a storage."""

    kind: str
    size: int
    stream: Any
    alive: bool = True


class Meter:
    """Turns the operations of a pass into Ops and Messages, by phase of the step.

    Element-wise operations between two others are one kernel where the code is compiled: it reads what was made
    outside and writes what is still alive at its end; that much of inductor's fusion is a matter of memory alone. A
    block's border ends it, as each block is compiled alone.
    """

    def __init__(self, compiled: bool):
        self.compiled, self.fusing, self.phase = compiled, False, ""
        self.restart()

    def restart(self) -> None:
        self.ops: dict[str, Counter[Op]] = {}
        self.messages: dict[str, list[Message]] = {}
        self.begin()

    def begin(self) -> None:
        """A region without operations yet."""
        self.read: dict[Entry, dict[tuple, int]] = {}  # {view: bytes} of what was made outside
        self.made: set[Entry] = set()
        self.written = 0

    def add(self, op: Op) -> None:
        self.ops.setdefault(self.phase, Counter())[op] += 1

    def border(self, fusing: bool) -> None:
        """What comes now is another piece of code, compiled or not."""
        self.flush()
        self.fusing = fusing and self.compiled

    def flush(self) -> None:
        """The end of a region."""
        moved = self.written + sum(entry.size for entry in self.made if entry.alive)
        moved += sum(min(sum(views.values()), entry.size) for entry, views in self.read.items())
        if moved:
            self.add(Op("element-wise", 0, moved))
        self.begin()

    def see(self, func: Any, args: tuple, kwargs: dict, fresh: list[torch.Tensor], entries: Any, result: Any) -> None:
        """One operation; fresh: its results in new memory; entries: storage -> Entry."""
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.flush()
            if name in COLLECTIVES:
                kind, whole = COLLECTIVES[name]
                self.messages.setdefault(self.phase, []).append(Message(kind, args[whole].nbytes))
            return
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        changed = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        changed = [t for t in tree_leaves(changed) if isinstance(t, torch.Tensor)]
        if packet in ALLOCATES or not (fresh or changed):  # memory that nothing is written to, or a view
            return
        moved = sum(t.nbytes for t in [*inputs, *fresh])
        if packet in PRODUCTS:
            self.flush()
            factors = [(tuple(t.shape), t.stride(), t.dtype) for t in args if isinstance(t, torch.Tensor)][-2:]
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
            self.add(Op("products", flops, moved, tuple(factors)))
        elif "scaled_dot_product" in name:  # causal: half of the scores; backward has five products, forward two
            self.flush()
            backward = "backward" in name
            q, k = inputs[1:3] if backward else inputs[:2]
            self.add(Op("attention", (5 if backward else 2) * q.numel() * k.size(-2), moved))
        elif func.namespace == "fsdp":  # into and out of what a collective carries
            self.flush()
            self.add(Op(PACKING if name == "chunk_cat" else "packing", 0, moved))
        elif name.startswith(("_foreach", "_fused")):  # kernels over lists: by tensor, whatever their number
            self.flush()
            fused = name.startswith("_fused")
            kind = "optimizer" if fused else "clipping" if self.phase == "update" else "packing"
            for column in zip(*(a for a in args if isinstance(a, list | tuple) and len(a)), strict=False):
                sizes = [t.nbytes for t in column if isinstance(t, torch.Tensor)]
                again = bool(changed) and not name.startswith(("_foreach_copy", "_foreach_zero"))  # read, then written
                wrote = 3 if fused else again  # parameter and both moments, or what is scaled
                self.add(Op(kind, 0, sum(sizes) + wrote * sizes[0]))
        else:
            if not self.fusing:
                self.flush()
            self.elementwise(packet, inputs, fresh, changed, entries)
            if not self.fusing:
                self.flush()

    def elementwise(self, packet: Any, inputs: list, fresh: list, changed: list, entries: Any) -> None:
        for t in inputs[1:] if packet in LOOKUPS | OVERWRITES else inputs:
            entry = entries.get(t.untyped_storage())
            if entry is not None and entry not in self.made:
                self.read.setdefault(entry, {})[t.storage_offset(), t.shape] = t.nbytes
        if packet in LOOKUPS:
            self.written += sum(t.nbytes for t in fresh)  # the rows that are read
        self.made |= {entries[t.untyped_storage()] for t in fresh}
        self.written += sum(t.nbytes for t in changed if entries.get(t.untyped_storage()) not in self.made)


@dataclasses.dataclass
class Work:
    """A step's operations by phase, of one block and of all that is no block; FSDP2's messages likewise.

    Phases: forward and backward of the first micro-step (0) and of the last (1), update.
    """

    block: dict[str, Counter[Op]]
    rest: dict[str, Counter[Op]]
    carried: dict[str, tuple[list[Message], list[Message], list[Message]]]  # before the blocks, in each, after them

    @classmethod
    def between(cls, fewer: Meter, more: Meter, layers: int) -> "Work":
        """From passes over `layers` blocks and over one block more, which differ by exactly that block."""
        block, rest, carried = {}, {}, {}
        for phase, ops in more.ops.items():
            block[phase] = minus(ops, fewer.ops[phase], 1)
            rest[phase] = minus(ops, block[phase], layers + 1)
            there = more.messages.get(phase, [])
            each = Counter(there)
            each.subtract(fewer.messages.get(phase, []))
            own = [message for message, n in each.items() for _ in range(n)]
            at = [i for i, message in enumerate(there) if message in own] or [len(there)]
            outside = [(i, message) for i, message in enumerate(there) if message not in own]
            carried[phase] = ([m for i, m in outside if i < at[-1]], own, [m for i, m in outside if i > at[-1]])
        return cls(block, rest, carried)

    def shapes(self) -> set[tuple]:
        """Of the products."""
        return {op.shape for ops in [*self.block.values(), *self.rest.values()] for op in ops if op.shape}


def minus(ops: Counter[Op], others: Counter[Op], times: int) -> Counter[Op]:
    left = ops.copy()
    left.subtract({op: n * times for op, n in others.items()})
    return Counter({op: n for op, n in left.items() if n})


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a step's time depends on; rates of one process, per second."""

    name: str
    products: float  # FLOP/s
    attention: float  # FLOP/s
    bandwidth: float  # bytes of device memory
    link: float = 1e12  # bytes that a process sends within a node while a ring runs
    network: float = 1e12  # bytes that a node sends
    node: int = 8  # processes per node
    overlaps: bool = True  # communication runs beside computation; a CPU's cores do both
    launch: float = 4e-6  # seconds between two kernels
    latency: float = 3e-5  # seconds of a collective without bytes
    host: float = 25e9  # bytes between host and device
    host_memory: float = 40e9  # bytes that the host's own memory moves for a process
    peak: float | None = None  # FLOP/s, for MFU
    timed: Mapping[tuple, float] = dataclasses.field(default_factory=dict)  # seconds of products, by Op.shape
    speeds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # bytes/s of other kinds where measured

    @classmethod
    def of(
        cls, name: str, gpu: GPU, link: float | None = None, network: float | None = None, node: int = 8
    ) -> "Hardware":
        """The machine that such GPUs make; link, network: GB/s instead of the table's."""
        products = REACHED * (gpu.ceiling or CEILING * gpu.peak)
        link, network = 1e9 * link if link else gpu.link, 1e9 * network if network else gpu.network
        return cls(name, products, FLASH * products, STREAMED * gpu.bandwidth, link, network, node, peak=gpu.peak)

    def seconds(self, op: Op) -> float:
        if op.shape in self.timed:
            return self.timed[op.shape]
        rate = self.attention if op.kind == "attention" else self.products
        return max(op.flops / rate, op.bytes / self.speeds.get(op.kind, self.bandwidth)) + self.launch

    def message(self, kind: str, nbytes: int, ranks: int, world: int, beside: int = 1) -> float:
        """Seconds of a ring over `ranks` of the processes, `beside` rings at once; copies: between equal shards."""
        if ranks == 1 or not nbytes:
            return 0.0
        between = world > self.node and (ranks > self.node or kind == "copies")
        rate = min(self.link, self.network / min(beside, self.node)) if between else self.link
        rate = self.speeds.get(kind, rate)
        passes = 2 if kind in ("all-reduce", "copies") else 1
        return self.latency + passes * (ranks - 1) / ranks * nbytes / rate


@dataclasses.dataclass
class Cost:
    """Seconds of an optimizer step."""

    kinds: dict[str, float]  # of computation, by kind
    exposed: float  # that communication adds to it
    communication: float  # behind computation or not
    sent: int  # bytes per process

    @property
    def seconds(self) -> float:
        return sum(self.kinds.values()) + self.exposed


class Timeline:
    """Runs pieces of computation and messages on the streams that FSDP2 and DDP give them.

    A gather is asked for one piece ahead; FSDP2 lets it begin when the piece before the one before it has begun
    (forward), or the one before it (backward). Its reductions run behind the next piece, and the one after waits; DDP's
    are waited for at the end.
    """

    def __init__(self, hardware: Hardware, ddp: bool):
        self.hardware, self.ddp = hardware, ddp
        self.device = self.link = self.network = 0.0
        self.begun = [0.0, 0.0]  # the last two pieces
        self.reduced = [0.0, 0.0]  # the last two reductions' ends

    def piece(
        self, seconds: float, gather: float = 0.0, *, ahead: int = 1, reduces: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        """Computation that waits for its gather, and a reduction within and between nodes behind it, all in seconds."""
        if not self.hardware.overlaps:
            self.device += seconds + gather + sum(reduces)
            return
        if gather:
            self.link = max(self.link, self.begun[-ahead]) + gather
        begin = max(self.device, self.link if gather else 0.0, 0.0 if self.ddp else self.reduced[0])
        self.begun = [self.begun[1], begin]
        self.device = begin + seconds
        if any(reduces):
            self.link = max(self.link, self.device) + reduces[0]
            self.network = max(self.network, self.link) + reduces[1] if reduces[1] else self.network
            self.reduced = [self.reduced[1], max(self.link, self.network if reduces[1] else 0.0)]

    def wait(self) -> float:
        """All that was asked for has ended."""
        self.device = max(self.device, self.link, self.network)
        self.reduced = [0.0, 0.0]
        return self.device


def step(work: Work, cfg: Config, world: int, hardware: Hardware) -> Cost:
    """The step of a config whose blocks and rest are `work`."""
    accumulation, layers = cfg.batch(world)[0], cfg.num_hidden_layers
    size = cfg.shard_size or world
    copies, ddp = world // size, cfg.parallel == "ddp"
    N, body = neox.num_parameters(cfg)
    kinds: dict[str, float] = defaultdict(float)
    line, sent, carried = Timeline(hardware, ddp), 0.0, 0.0
    latest = 1 if "forward 1" in work.rest else 0

    def compute(ops: Counter[Op], times: int = 1, reducing: bool = True) -> float:
        """Seconds of the operations once, noted so many times."""
        seconds: dict[str, float] = defaultdict(float)
        for op, n in ops.items():
            if reducing or op.kind != PACKING:
                seconds[op.kind] += n * hardware.seconds(op)
        for kind, value in seconds.items():
            kinds[kind] += value * times
        return sum(seconds.values())

    def send(messages: list[Message], kind: str) -> tuple[float, float]:
        """Seconds within and between nodes of the messages of that kind."""
        nonlocal sent, carried
        within = between = 0.0
        for nbytes in (m.bytes for m in messages if m.kind == kind):
            if kind == "all-reduce":
                buckets = max(1, round(nbytes / BUCKET))
                within += buckets * hardware.message(kind, nbytes // buckets, world, world)
                sent += 2 * (world - 1) / world * nbytes
                continue
            within += hardware.message(kind, nbytes, size, world)
            sent += (size - 1) / size * nbytes
            if kind == "reduce":
                between += hardware.message("copies", nbytes // size, copies, world, size)
                sent += 2 * (copies - 1) / copies * nbytes / size
        carried += within + between
        return within, between

    none: tuple[list[Message], list[Message], list[Message]] = ([], [], [])
    summed = work.carried.get(f"backward {latest}", none)
    if ddp:  # the pass is of the bare model
        outside = (N - body) // (1 if cfg.tie_word_embeddings else 2)
        shares = (outside, (body - 2 * cfg.hidden_size) // layers, N - body - outside)
        head, own, embedding = ([Message("all-reduce", 4 * n)] if n and world > 1 else [] for n in shares)
        summed = (head, own, embedding)
    way = "all-reduce" if ddp else "reduce"
    for micro_step in range(accumulation):
        forward, backward = (f"{name} {min(micro_step, latest)}" for name in ("forward", "backward"))
        reducing = strategy.reduces(cfg, last=micro_step == accumulation - 1)
        before, each, after = work.carried.get(forward, none)
        block, rest = compute(work.block[forward], layers), compute(work.rest[forward])
        line.piece(0.0, send(before, "gather")[0])
        for _ in range(layers):
            line.piece(block, send(each, "gather")[0], ahead=2)
        line.piece(rest, send(after, "gather")[0], ahead=2)
        each = work.carried.get(backward, none)[1]
        first, own, last = summed if reducing else none
        block, rest = (compute(ops[backward], n, reducing) for ops, n in ((work.block, layers), (work.rest, 1)))
        line.piece(rest, reduces=send(first, way))
        for _ in range(layers):
            line.piece(block, send(each, "gather")[0], reduces=send(own, way))
        line.piece(0.0, reduces=send(last, way))
        if cfg.cpu_offload:  # fp32 parameters for forward and for backward, gradients back, and added up there
            local = 4 * N / size
            adding = 3 * local / hardware.host_memory if micro_step else 0.0
            kinds["host copies"] += 3 * local / hardware.host + adding
    exposed = max(0.0, line.wait() - sum(value for kind, value in kinds.items() if kind != "host copies"))
    for ops, times in ((work.block["update"], layers), (work.rest["update"], 1)):
        if cfg.cpu_offload:
            kinds["optimizer"] += times * sum(n * op.bytes for op, n in ops.items()) / hardware.host_memory
        else:
            compute(ops, times)
    exposed += send(sum(work.carried.get("update", none), []), "gather")[0]  # Muon's matrices
    return Cost(kinds, exposed, carried, round(sent))
