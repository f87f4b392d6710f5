"""Seconds of an optimizer step in closed form: the FLOPs, bytes and messages of GPT-NeoX over three rates of a card.

What is counted, for a process with N tokens per micro-step, C channels, `inner` of the MLP, L blocks, p parameters each:

    products   a block has 2 N (4 C^2 + 2 C inner) FLOPs forward (qkv 3 C^2, dense C^2, the MLP 2 C inner) and twice that
               backward; the head 2 N C V three times; `selective` repeats the first product of the MLP, `full` all but the last
    attention  causal, so half of the pairs: 2 N T C forward (two products), 5 N T C backward (five, arXiv:2307.08691)
    memory     bytes that compiled kernels between the products read and write, in UNITS below; bytes per parameter
    messages   DDP sums 4 bytes per parameter once; FSDP2 gathers a block for forward and backward and scatters its sums

A message runs beside the computation that does not wait for it; what remains is `exposed`.
"""

import dataclasses

import model as neox
from configs import Config
from refocused.run.gpus import GPU

# One H200 (docs/gpu.md) reached 0.93 of the products' ceiling in the table, and 0.46 of that in attention by cuDNN. Bytes
# of parameters moved at 0.9 of the memory's bandwidth, those of a block at 0.6 of that. Flash attention, which documents
# take, took 3.4 times as long.
REACHED, ATTENTION, STREAMED, BLOCKS, DOCUMENTS = 0.93, 0.46, 0.9, 0.6, 3.4
CEILING = 0.8  # of the peak, where nobody has published a measurement: A100's and H100's are 0.80 to 0.87
LAUNCH, KERNELS = 4e-6, 30  # seconds between two kernels; how many a block has, forward and backward
LATENCY = 3e-5  # seconds of a collective without bytes
HOST, HOST_MEMORY = 25e9, 40e9  # bytes/s between host and device, and of the host's own memory, for a process


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one process, per second."""

    name: str
    products: float  # FLOP/s
    memory: float  # bytes
    link: float = 1e12  # bytes that a process sends within a node while a ring runs
    network: float = 1e12  # bytes that a node sends
    node: int = 8  # processes per node
    overlaps: bool = True  # communication runs beside computation; a CPU's cores do both
    peak: float | None = None  # FLOP/s, for MFU

    @classmethod
    def of(cls, name: str, gpu: GPU, link: float | None = None, network: float | None = None, node: int = 8):
        """The machine that such GPUs make; link, network: GB/s instead of the table's."""
        products = REACHED * (gpu.ceiling or CEILING * gpu.peak)
        link, network = 1e9 * link if link else gpu.link, 1e9 * network if network else gpu.network
        return cls(name, products, STREAMED * gpu.bandwidth, link, network, node, peak=gpu.peak)

    def ring(self, nbytes: float, ranks: int, world: int, beside: int = 1) -> float:
        """Seconds of a gather or a scatter of nbytes over `ranks` of the processes, `beside` rings at once.

        Each rank sends (ranks - 1) / ranks of them. A ring that crosses nodes has a share of the network.
        """
        if ranks == 1 or not nbytes:
            return 0.0
        crosses = world > self.node and (ranks > self.node or beside > 1)
        rate = min(self.link, self.network / min(beside, self.node)) if crosses else self.link
        return LATENCY + (ranks - 1) / ranks * nbytes / rate


@dataclasses.dataclass(frozen=True)
class Step:
    """An optimizer step: seconds by what limits them, and bytes that each process sends."""

    parts: dict[str, float]
    exposed: float  # seconds of messages that nothing hides
    sent: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values()) + self.exposed


def units(cfg: Config) -> tuple[float, float]:
    """Forward and backward of a block: how many tensors of N x C numbers its kernels read and write.

    x, the residual stream, is fp32 under autocast, so it counts twice in half precision. `m` is inner / C.
    Forward: both norms read x and write one each (x + 2); rotary reads and writes q, k, v (6); attention's output is laid
    out anew (2: today's layout spares it, and the rates were fitted with it); the MLP's nonlinearity (2 m); the sum reads x
    and two branches and writes x (2 x + 2).
    Backward: the output's gradient laid out (2), and its bias and the MLP's second (2); nonlinearity (3 m); rotary (6)
    and the bias of qkv (3); each norm's gradient is read with x twice, for x and for its weights (4 + 2 x); x's own is
    read and written (2 x).
    """
    x = 2.0 if cfg.mixed_precision != "no" and cfg.parallel == "ddp" else 1.0
    m = cfg.intermediate_size / cfg.hidden_size
    forward, backward = 3 * x + 12 + 2 * m, 4 * x + 17 + 3 * m
    again = {"none": 0.0, "activation": 2 * m, "selective": x + 1 + 2 * m, "full": forward}
    return forward, backward + again[cfg.activation_checkpointing]


def per_parameter(cfg: Config, first: bool) -> float:
    """Bytes per parameter that a micro-step moves beside activations; first: gradients are written, not added up.

    Autocast reads fp32 weights and writes bf16 ones (6), a gradient becomes fp32 (6) and is added (12). FSDP2 copies out
    of two gathers (4 each), and adds the gradient of a whole block in fp32 (6, then 10).
    """
    if cfg.mixed_precision == "no":
        return 16.0 * (cfg.parallel == "fsdp") + 12.0 * (not first)
    if cfg.parallel == "fsdp":
        return 8.0 + (6.0 if first else 10.0)
    again = {"selective": 4.0, "full": 6.0}.get(cfg.activation_checkpointing, 0.0)  # what is computed again casts again
    return 12.0 + again + 12.0 * (not first)


def update(cfg: Config, machine: Machine, shards: int, world: int) -> tuple[dict[str, float], float]:
    """Seconds of the optimizers by what limits them, and of Muon's messages.

    AdamW reads weight, gradient and two moments and writes three of them (28 bytes per parameter); bf16 moments are
    widened and rounded on the way (52). The norm reads the gradients once (4), a CPU scales them in a pass (8). Muon: 40
    bytes, and five steps of Newton-Schulz on a matrix of m x n, m the smaller, 4 m^2 n + 2 m^3 FLOPs each; the matrices
    are shared out among the processes and their updates sent in bf16.
    """
    C, inner, L = cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers
    every = neox.num_parameters(cfg)[0]
    muons = L * (4 * C * C + 2 * C * inner) if cfg.optimizer == "muon" else 0
    each = (28 if cfg.adam_moments != "bf16" else 52) + 4 + 8 * (not machine.overlaps)
    nbytes = ((every - muons) * each + muons * (40 + 4)) / shards
    if cfg.cpu_offload:
        return {"host copies": nbytes / HOST_MEMORY}, 0.0
    found = {"memory": nbytes / machine.memory}
    if not muons:
        return found, 0.0
    shapes = ((C, 3 * C), (C, C), (min(C, inner), max(C, inner)), (min(C, inner), max(C, inner)))
    flops = sum(5 * (4 * m**2 * n + 2 * m**3) for m, n in shapes)
    found["products"] = L * flops / world / machine.products
    whole = 2 * muons if cfg.parallel == "ddp" else 2 * 2 * muons / shards  # a gather; two exchanges of a share
    return found, machine.ring(whole, world if cfg.parallel == "ddp" else shards, world)


def step(cfg: Config, world: int, machine: Machine) -> Step:
    """An optimizer step of one of `world` processes."""
    accumulation, L, C, T = cfg.batch(world)[0], cfg.num_hidden_layers, cfg.hidden_size, cfg.sequence_length
    N = cfg.per_device_train_batch_size * T
    every, body = neox.num_parameters(cfg)
    ddp, width = cfg.parallel == "ddp", 4 if cfg.mixed_precision == "no" else 2  # bytes of a number
    shards = 1 if ddp else cfg.shard_size or world
    # --- computation of a block and of the rest, forward and backward
    matrices = 2 * N * (4 * C * C + 2 * C * cfg.intermediate_size)
    scores = N * T * C * (DOCUMENTS if cfg.mask_documents and machine.overlaps else 1)
    full = cfg.activation_checkpointing == "full"
    widens = 2 * N * C * cfg.intermediate_size  # each of the MLP's two products
    again = matrices - widens if full else widens * (cfg.activation_checkpointing == "selective")
    flops = (matrices, 2 * matrices + again)
    attention = (2 * scores, (5 + 2 * full) * scores)
    moved = tuple(n * N * C * width for n in units(cfg))
    launches = KERNELS / 2 * LAUNCH * machine.overlaps

    def block(way: int) -> dict[str, float]:
        return {
            "products": flops[way] / machine.products,
            "attention": attention[way] / (ATTENTION * machine.products),
            "memory": moved[way] / (BLOCKS * machine.memory) + launches,
        }

    # the loss reads the logits three times and writes them once; embedding and last norm move a few tensors
    head = {"products": 6 * N * C * cfg.vocab_size / machine.products,
            "memory": (4 * N * cfg.vocab_size + 12 * N * C) * width / machine.memory}  # fmt: skip
    parts = {"products": 0.0, "attention": 0.0, "memory": 0.0}
    for piece, times in ((block(0), L * accumulation), (block(1), L * accumulation), (head, accumulation)):
        for kind, seconds in piece.items():
            parts[kind] += times * seconds
    weights = [every * per_parameter(cfg, first=i == 0) / machine.memory for i in range(accumulation)]
    parts["memory"] += sum(weights)
    if cfg.cpu_offload:  # fp32 parameters for forward and for backward, gradients back, and added up there
        local = 4 * every / shards
        parts["host copies"] = accumulation * 3 * local / HOST + (accumulation - 1) * 3 * local / HOST_MEMORY
    optimizers, exposed = update(cfg, machine, shards, world)
    for kind, seconds in optimizers.items():
        parts[kind] = parts.get(kind, 0.0) + seconds
    # --- messages of the embedding, of each block and of the head with the last norm
    outside = (every - body) // (1 if cfg.tie_word_embeddings else 2)
    sizes = (outside, (body - 2 * C) // L, every - body - outside + 2 * C)
    forward, backward = (sum(block(way).values()) + weights[-1] / 2 / L for way in (0, 1))
    if ddp:
        sums = [2 * machine.ring(4 * n, world, world) for n in sizes]
        sent = 2 * (world - 1) / world * 4 * every
        return Step(parts, exposed + exposed_sums(sums, L, backward, machine.overlaps), sent)
    copies, rounds = world // shards, accumulation if cfg.cpu_offload else 1
    gathers = [machine.ring(width * n, shards, world) for n in sizes]
    within = [machine.ring(4 * n, shards, world) for n in sizes]
    between = [2 * machine.ring(4 * n / shards, copies, world, shards) for n in sizes]
    gathered = gathers[0] + L * gathers[1] + gathers[2]
    if not machine.overlaps:
        exposed += accumulation * (gathered + L * gathers[1])
        exposed += rounds * sum(exposed_sums(sums, L, backward, False) for sums in (within, between))
    else:
        # the first gathers of a step wait for the last update, and nothing runs beside them
        exposed += max(gathered - L * forward, gathers[0] + gathers[1])
        exposed += (accumulation - 1) * max(0.0, gathered - L * forward)
        # a block's gather and the sum of the one before share the link; the sums between nodes have a stream of their own
        exposed += (accumulation - rounds) * L * max(0.0, gathers[1] - backward)
        within[1] += gathers[1]
        exposed += rounds * max(exposed_sums(sums, L, backward, True) for sums in (within, between))
    sent = (shards - 1) / shards * (accumulation * width * (every + L * sizes[1]) + rounds * 4 * every)
    sent += rounds * 2 * (copies - 1) / copies * 4 * every / shards
    return Step(parts, exposed, sent)


def exposed_sums(messages: list[float], L: int, backward: float, overlaps: bool) -> float:
    """Seconds that sums of gradients add to a backward; of the embedding, of each of L blocks, of the head.

    The head's are known before the blocks' backward begins, the embedding's when all is over: that message is never
    hidden, nor is the last block's. The link is busy for the head's and all blocks'; the device for all blocks.
    """
    embedding, block, head = messages
    if not overlaps:
        return embedding + L * block + head
    return embedding + max(block, L * (block - backward) + max(head, backward))
