"""One process, DDP or FSDP2: how the model is wrapped, filled, compiled and stepped through."""

import contextlib
import functools
import socket
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from configs import Config, ConfigError
from model import GPTNeoX, Head, initial_value, num_parameters, softmax_loss
from refocused.run import processes
from refocused.run.devices import DTYPES, cores
from refocused.run.logs import log_error
from refocused.run.processes import Env
from refocused.shards.tokenizers import separator

SHARDED = {"ddp": False, "fsdp": True}  # whether `parallel` shards the model


def build(cfg: Config, env: Env) -> torch.nn.Module:
    """The model, wrapped, initialised from (seed, parameter name) and compiled; its parameters are on the device."""
    with torch.device("meta"):
        model = GPTNeoX(cfg, separator(cfg))
    whole: torch.nn.Module = model
    sharded = SHARDED[cfg.parallel]
    if sharded:
        shard(model, cfg, env)
    model.to_empty(device="cpu" if cfg.cpu_offload else env.device)
    model.tie_weights()  # to_empty makes a tensor per module, which unties them
    materialise(model, cores(env.local_world_size))
    tune_head(model.embed_out, env.device.type)
    if not sharded and env.world_size > 1:  # DDP reads real parameters, so it comes after they exist
        ids = None if env.device.type == "cpu" else [env.local_rank]
        # init_sync: every rank has made the same weights already
        whole = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, init_sync=False)
    if cfg.compile_model:
        # after wrapping, so that hooks stay outside; per block, so that time does not grow with depth
        for block in model.layers:
            block.attention.in_pieces = in_pieces(cfg, env.device.type)
            block.compile(dynamic=False)
        model.embed_out.kernel = torch.compile(softmax_loss, dynamic=False)
    return whole


def in_pieces(cfg: Config, device_type: str) -> bool:
    """Whether attention is plain products: compiled for a CPU, where windows are long enough to pay for that."""
    return cfg.compile_model and device_type == "cpu" and cfg.sequence_length >= 512


def tune_head(head: Head, device_type: str) -> None:
    """What suits the head's products on this kind of device; the numbers stay the same.

    CUDA's fast kernels want rows of a multiple of 16 bytes and tiles of 128. One chunk of 2**29 logits (1 GiB in bf16)
    takes less memory than four chunks and the fp32 sum of their gradients.
    """
    if device_type == "cuda":
        head.multiple, head.max_logits = 128, 1 << 29


def device_mesh(cfg: Config, env: Env) -> DeviceMesh:
    """All processes in a row; with shard_size, rows of so many that share one copy of the model (HSDP).

    Ranks of a node are consecutive, so with shard_size = GPUs per node parameters are gathered within the node and
    only sums of gradients travel between nodes. Raises ConfigError.
    """
    size, world = cfg.shard_size, env.world_size
    if size and world % size:
        fitting = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ConfigError(f"shard_size={size} does not divide the {world} processes; sizes that do: {fitting}")
    if size in (0, world):
        return init_device_mesh(env.device.type, (world,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(env.device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():  # it has no parameter for their timeout, which would be NCCL's half an hour
        _set_pg_timeout(processes.group_timeout(cfg, env.device), group)
    return mesh


def shard(model: GPTNeoX, cfg: Config, env: Env) -> None:
    """FSDP2: a group per block, one for the embedding, one for the final norm with the head; in place."""
    mesh = device_mesh(cfg, env)
    half = cfg.mixed_precision != "no"
    policy = MixedPrecisionPolicy(DTYPES[cfg.mixed_precision], torch.float32) if half else MixedPrecisionPolicy()
    # a block's inputs are in the right dtype already, except the rotary tables, which must stay fp32
    inner = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, cast_forward_inputs=False)
    offload = OffloadPolicy()
    if cfg.cpu_offload:  # pinned memory makes the copies run behind the computation; a CPU has nothing to pin for
        offload = CPUOffloadPolicy(pin_memory=env.device.type != "cpu" and can_pin(model, mesh.shape[-1]))
    share = functools.partial(fully_shard, mesh=mesh, offload_policy=offload)
    for block in model.layers:
        share(block, mp_policy=inner)
    if not cfg.tie_word_embeddings:  # tied: one parameter can be in one group only, which is then the root's
        share(model.embed_in, mp_policy=policy)
        model.embed_in.set_unshard_in_backward(False)  # a lookup's backward reads no weight: nothing to gather
        # backward starts here, so freeing the head after forward would only mean gathering it again
        share([model.final_layer_norm, model.embed_out], mp_policy=inner, reshard_after_forward=False)
    share(model, mp_policy=policy)


def can_pin(model: GPTNeoX, parts: int) -> bool:
    """Whether this system can pin this rank's part of every parameter, as FSDP2 will. Only a try tells, and torch's
    allocator keeps the pinned memory for FSDP2."""
    try:
        _ = [torch.empty(-(-len(p) // parts), *p.shape[1:], dtype=p.dtype).pin_memory() for p in model.parameters()]
        return True
    except RuntimeError as error:
        log_error(
            f"note      {socket.gethostname()} pins no {num_parameters(model.cfg)[0] * 4 / parts / 2**30:.1f} GiB, so "
            f"offload copies through unpinned memory, several times slower: {str(error).splitlines()[0]}"
        )
        with contextlib.suppress(AttributeError, RuntimeError):  # torch 2.11; nothing to pin for
            torch.accelerator.empty_host_cache()
        return False


def materialise(model: GPTNeoX, cores: int) -> None:
    """Give every parameter its initial value; each rank makes the full tensor and keeps its own part.

    A tensor's random numbers are one core's work: as many are made at a time as there are cores for this process.
    """
    parameters = list(model.named_parameters())
    making: deque[Future[torch.Tensor]] = deque()  # no more than cores, as they are large
    with torch.no_grad(), ThreadPoolExecutor(cores) as pool:
        for i, (_, p) in enumerate(parameters):
            for name, ahead in parameters[i + len(making) : i + cores]:
                making.append(pool.submit(initial_value, name, ahead.shape, model.cfg))
            full = making.popleft().result().to(p.device)
            if isinstance(p, DTensor):  # src_data_rank=None: no communication
                full = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None).to_local()
                p.to_local().copy_(full)
            else:
                p.copy_(full)


def raw(model: torch.nn.Module) -> GPTNeoX:
    """The GPTNeoX inside DDP, or the model itself."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, GPTNeoX)
    return inner


def sync_gradients(model: torch.nn.Module, cfg: Config, last: bool) -> None:
    """Before a forward: whether the backward behind it is its optimizer step's last, which communicates gradients.

    FSDP2's first gathers of a forward wait for all that was asked of the device before. With an event they wait for the
    last update alone, so that a micro-step's gathers run beside the backward before it.
    """
    on = last or cfg.cpu_offload  # else the gradients of every micro-step would stay on the device
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
        if updated := getattr(model, "updated", None):
            model.set_post_optim_event(updated)


def autocast(cfg: Config, env: Env) -> contextlib.AbstractContextManager:
    """Mixed precision for plain and DDP models; FSDP2 has its own policy."""
    if cfg.parallel == "fsdp" or cfg.mixed_precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(env.device.type, DTYPES[cfg.mixed_precision])


def eager(cfg: Config) -> contextlib.AbstractContextManager:
    """Compiled parts run as they are written; without any the compiler is not even imported, which takes half a second."""
    return torch.compiler.set_stance("force_eager") if cfg.compile_model else contextlib.nullcontext()


def warm_up(model: torch.nn.Module, cfg: Config, env: Env) -> float:
    """One backward on zeros, thrown away, before any state is loaded. Returns its seconds.

    DDP re-orders its gradient buckets after the first backward. The order is part of the sum's bits with three or
    more ranks, so a fresh run and a resumed one must both have it behind them; and compilation happens here.
    """
    begin = time.perf_counter()
    zeros = torch.zeros(cfg.per_device_train_batch_size, cfg.sequence_length, dtype=torch.int64, device=env.device)
    for _ in range(2):  # the second forward applies the new order
        sync_gradients(model, cfg, last=True)
        with autocast(cfg, env):
            loss = model(zeros, zeros)
        (loss * 0.0).backward()
        clear_gradients(model)
    if env.device.type != "cpu":
        torch.accelerator.empty_cache()  # or the optimizer's state would be cut out of blocks that a step wants whole
    return time.perf_counter() - begin


def alloc_retries() -> int:
    """How often torch's allocator was out of memory and tried again without its cache."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if torch.cuda.is_available() else 0


def clip_gradients(
    model: torch.nn.Module, max_norm: float, later: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Global gradient norm (fp32 scalar on the device, same on every rank); gradients are clipped to max_norm > 0.

    later: they are left as they are, and what the optimizer has to divide them by is returned beside the norm.
    """
    parameters = list(model.parameters())
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = total.full_tensor() if isinstance(total, DTensor) else total
    if max_norm > 0 and later:
        return norm, ((norm + 1e-6) / max_norm).clamp(min=1.0)  # as clip_grads_with_norm_ has it
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return norm, None


def clear_gradients(model: torch.nn.Module) -> None:
    """DDP's gradients are views of its buckets and are zeroed in place: None would make a second copy of them all."""
    model.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
