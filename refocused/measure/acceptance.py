"""What a GPU does with this trainer, as facts: `make gpu-check`, `python -m refocused.measure.acceptance`.

Five parts of at most ten minutes: correctness, resume and saves, memory, speed, two ranks on one GPU. Every check is
one line, `PASS|FAIL|SKIP name: value (bound)`, and a row of the report at the end. A check that cannot run is SKIP and
never PASS; without a GPU all are. `--device cpu --tiny` runs the code of every check that a CPU can run.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import ckpt
import configs
import data
import model as neox
import train
from refocused import entry
from refocused.checkpoint import disk, huggingface, manifest
from refocused.checkpoint import folder as folders
from refocused.checkpoint.saver import Saver
from refocused.entry import ROOT
from refocused.run import devices, gpus, memory, optim, processes, strategy
from refocused.run.environment import free_port
from refocused.run.origin import hardware
from refocused.run.signals import StopSignal

PART_SECONDS = 540.0  # after so many a part begins no further check
LAST_SECONDS = 60.0  # then, for the check that is under way
MAKING = threading.Lock()  # of what several runs need
SIDE_BY_SIDE = 3  # runs of a check whose verdict is no matter of time; most of each is its start
# children are forked from one process that has imported everything and not touched the GPU
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["train", "torch.utils.tensorboard"]

TINY = (
    "vocab_size=257 hidden_size=32 num_hidden_layers=2 num_attention_heads=4 intermediate_size=64 sequence_length=32 "
    "max_position_embeddings=64 tokenizer=byte per_device_train_batch_size=4 gradient_accumulation_steps=1 "
    "learning_rate=1e-2 cpu_threads=1 compile_model=false mixed_precision=no"
)
SMALL = (
    "vocab_size=50257 hidden_size=512 num_hidden_layers=4 num_attention_heads=8 intermediate_size=2048 "
    "sequence_length=512 max_position_embeddings=512 per_device_train_batch_size=8 gradient_accumulation_steps=1 "
    "learning_rate=1e-3 compile_model=false mixed_precision=no"
)
COMMON = (
    "dataloader_num_workers=1 max_steps=10 warmup_steps=2 logging_steps=1 save_steps=0 save_seconds=0 save_total_limit=2 "
    "eval_samples=8 sample_tokens=0 check_hardware=false"
)


class Skip(Exception):
    """Why a check cannot run here."""


@dataclasses.dataclass
class Machine:
    """Where the checks run and how large they are."""

    device: str
    tiny: bool
    folder: Path

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def needs_cuda(self, why: str = "needs a GPU") -> None:
        if not self.cuda:
            raise Skip(why)

    @property
    def base(self) -> list[str]:
        return (TINY if self.tiny else SMALL).split()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any], rounds: int = 10) -> float:
        """Of one call, after a first one."""
        function()
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(rounds):
            function()
        self.synchronize()
        return (time.perf_counter() - begin) / rounds


@dataclasses.dataclass
class Run:
    """A launch of train.py that has ended."""

    codes: list[int]
    text: str
    folder: Path

    @property
    def trace(self) -> list[dict]:
        path = self.folder / "logs/trace.jsonl"
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        return [line for line in lines if "event" not in line]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.trace]

    def expect(self, *codes: int) -> "Run":
        assert self.codes == list(codes or [0] * len(self.codes)), f"exit codes {self.codes}\n{self.text[-3000:]}"
        return self

    def largest(self, key: str) -> float:
        return max((float(line.get(key) or 0) for line in self.trace), default=0.0)


Patch = Callable[[int], None]  # what is changed in a rank before it runs


def unsaved(rank: int) -> None:
    """For runs of the 1.4 billion parameters: 17 GB at the end of each would be most of their time."""
    ckpt.Checkpoints.save = lambda *_, **__: 0.0  # type: ignore[method-assign]


def without_tf32(rank: int) -> None:
    torch.set_float32_matmul_precision = lambda precision: None


def saying_recompiles(rank: int) -> None:
    torch._logging.set_logs(recompiles=True)


def slowly(rank: int) -> None:
    """A tenth of a second more per step, so that a kill meets one."""
    rate = train.optim.learning_rate

    def late(step: int, cfg: configs.Config) -> float:
        time.sleep(0.1)
        return rate(step, cfg)

    train.optim.learning_rate = late


def telling(rank: int) -> None:
    """Beside each log line what this process's allocator gave back, and what the driver counts as taken of the GPU."""
    unsaved(rank)
    line = train.Monitor.line

    def more(self, *args) -> None:
        line(self, *args)
        free, whole = torch.cuda.mem_get_info() if self.env.device.type == "cuda" else (0, 0)
        print("retries", train.strategy.alloc_retries(), "driver", whole - free, flush=True)

    train.Monitor.line = more  # type: ignore[method-assign, assignment]


def refusing_to_pin(rank: int) -> None:
    refuse = types.SimpleNamespace(cudaHostRegister=lambda *_: 2)  # cudaErrorMemoryAllocation
    torch.cuda.cudart = lambda: refuse  # type: ignore[method-assign, assignment, return-value]
    pin = torch.Tensor.pin_memory

    def small_ones(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.nbytes > 1 << 20:  # in the words of torch 2.13
            raise torch.AcceleratorError("CUDA error: out of memory")
        return pin(tensor)

    torch.Tensor.pin_memory = small_ones  # type: ignore[method-assign, assignment]


def failing(error: Exception, rank: int) -> None:
    """Rank 1 cannot go on at its fifth batch."""
    following, seen = data.Loader.__next__, []

    def broken(loader: data.Loader) -> data.Batch:
        seen.append(loader)
        if len(seen) == 5:
            raise error
        return following(loader)

    if rank == 1:
        data.Loader.__next__ = broken  # type: ignore


def as_rank(args: list[str], environment: dict[str, str], log: str, patch: Patch | None) -> None:
    """One process of a launch: train.py's main with its output in the log; `patch` is called before it."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    if patch:
        patch(int(environment.get("RANK", 0)))
    raise SystemExit(train.main(args))


def launch(
    m: Machine, name: str, *settings: str, nproc: int = 1, env: dict[str, str] | None = None, patch: Patch | None = None,
    during: Callable[[Path, list], None] | None = None, config: str = "", timeout: float = 300,
) -> Run:  # fmt: skip
    """Train in processes of their own, several on one GPU where there is one; during(log, processes) runs beside it."""
    folder = m.folder / name
    folder.mkdir(exist_ok=True)
    log = folder / f"run-{len(list(folder.glob('run-*.log')))}.log"
    log.touch()
    empty = m.folder / "empty.py"
    empty.write_text("")
    keys = [*([] if config else m.base), *COMMON.split(), f"output_dir={folder}/out", f"logging_dir={folder}/logs"]
    args = [config or str(empty), *keys, *settings]
    cfg, _ = configs.load(args)
    args.append(f"data_dir={tokens(m, cfg.vocab_size)}")
    ranks, port = [], free_port()
    for rank in range(nproc):
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(m.folder / "inductor"), **(env or {})}
        if not m.cuda:
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
        if nproc > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(nproc)}
            if m.cuda:  # NCCL refuses one GPU twice, except to what it takes for two machines
                environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NCCL_HOSTID": f"host{rank}"}
                environment |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), "lo") | {
                    "NCCL_NET": "Socket"
                }
        ranks.append(CONTEXT.Process(target=as_rank, args=(args, environment, str(log), patch)))
    for process in ranks:
        process.start()
    try:
        if during:
            during(log, ranks)
        end = time.monotonic() + timeout
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
    text = log.read_text(errors="replace")
    assert not late, f"ranks {late} still there after {timeout:.0f} s\n{text[-3000:]}"
    if nproc > 1 and m.cuda and "Duplicate GPU detected" in text:
        raise Skip("this NCCL refuses two ranks on one GPU")
    return Run([int(process.exitcode or 0) for process in ranks], text, folder)


def tokens(m: Machine, vocabulary: int) -> Path:
    """A data_dir of random tokens in documents of a hundred on average, made once."""
    folder = m.folder / f"tokens-{vocabulary}"
    with MAKING:
        if folder.exists():
            return folder
        folder.mkdir()
        count = 20_000 if m.tiny else 2_000_000
        for i in range(3):
            rng = np.random.default_rng(i)
            stream = rng.integers(0, vocabulary, count, dtype=np.uint16)
            stream[rng.random(count) < 0.01] = vocabulary - 1  # end-of-text, of both tokenizers
            np.savez(folder / f"tokenized_cleaned_{i}.npz", input_ids=stream)
    return folder


def wait_for(log: Path, pattern: str, ranks: list, timeout: float = 240) -> None:
    """Until the log has the pattern, which the ranks write or end without."""
    end = time.monotonic() + timeout
    while not re.search(pattern, text := log.read_text(errors="replace")):
        over = time.monotonic() > end or not any(process.is_alive() for process in ranks)
        assert not over, f"no {pattern!r} within {timeout:.0f} s, or before the end\n{text[-3000:]}"
        time.sleep(0.02)


def apart(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two runs' losses."""
    assert len(a) == len(b) > 0, f"{len(a)} and {len(b)} losses"
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def within(value: float, limit: float, unit: str = "") -> tuple[bool, str, str]:
    return value <= limit, f"{value:.3g}{unit}", f"at most {limit:g}{unit}"


def fact(text: str) -> tuple[bool, str, str]:
    return True, text, "a fact, no bound"


Result = tuple[bool, str, str]  # passed, value, bound


# --- 1. environment and correctness


def environment(m: Machine) -> Result:
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    driver = ""
    if m.cuda:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
        driver = f"; {found.stdout.strip()}" if found else "; no nvidia-smi"
    header = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    tools = f"cc {'yes' if shutil.which('cc') or shutil.which('gcc') else 'NO'}, Python.h {'yes' if header else 'NO'}"
    where = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return (2, 11) <= version <= (2, 14), f"{where}, {tools}{driver}", "torch 2.11 to 2.14"


def imports_without_google(m: Machine) -> Result:
    code = "import sys; sys.modules['google'] = None; sys.modules['google_crc32c'] = None; import train, ckpt, data"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode == 0, (done.stderr.splitlines() or ["imports"])[-1], "import train without Google's packages"


def ceiling(m: Machine) -> Result:
    n = 256 if m.tiny else 8192
    a, b = (torch.randn(n, n, device=m.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    rate = 2 * n**3 / m.seconds(lambda: torch.mm(a, b, out=out), 50)
    known = gpus.find(torch.cuda.get_device_name()) if m.cuda else None
    shares = {"peak": known.peak, "rate measured elsewhere": known.ceiling} if known else {}
    of = "".join(f", {rate / full:.0%} of the {what}" for what, full in shares.items() if full)
    return fact(f"{rate / 1e12:.4g} TFLOP/s bf16 at {n}^3{of}")


def transfers(m: Machine) -> Result:
    m.needs_cuda()
    size, rates = 1 << 30, []
    there = torch.empty(size, dtype=torch.uint8, device=m.device)
    for pinned in (True, False):
        here = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        rates.append(size / m.seconds(functools.partial(here.copy_, there, non_blocking=True), 3) / 1e9)
    return fact(f"device to host {rates[0]:.1f} GB/s pinned, {rates[1]:.1f} pageable")


def cpu_suite(m: Machine) -> Result:
    if m.tiny:
        raise Skip("the suite is not run inside the suite")
    files = [f"tests/test_{name}.py" for name in ("model", "loss", "config", "data", "train")]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "8", "-p", "no:cacheprovider", *files]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if "No module named pytest" in done.stderr or "unrecognized arguments: -n" in done.stderr:
        raise Skip("no pytest with xdist here")
    return done.returncode == 0, (done.stdout.splitlines() or [done.stderr[-200:]])[-1], "all pass with the GPU hidden"


def demo(m: Machine) -> Result:
    demo_data = m.folder / "demo"
    done = subprocess.run([sys.executable, "data.py", "demo", str(demo_data)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = 3 if m.tiny else 200
    keys = [
        f"max_steps={steps}",
        "warmup_steps=2",
        "eval_steps=0",
        "compile_model=false" if m.tiny else "compile_model=true",
    ]
    env = {} if m.cuda else {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "train.py", "configs/demo.py", *keys, "logging_steps=1", f"data_dir={demo_data}"]
    command += [f"output_dir={m.folder}/demo-out", f"logging_dir={m.folder}/demo-logs", "save_steps=0"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    last = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("Step ")), done.stderr[-300:])
    named = not m.cuda or torch.cuda.get_device_name() in done.stdout
    return done.returncode == 0 and named, last, "exit 0, the GPU named"


def device_against_cpu(m: Machine) -> Result:
    m.needs_cuda()
    worst = []
    for precision, limit in (("no", 1e-4), ("bf16", 1e-2)):
        keys = [f"mixed_precision={precision}"]
        here = launch(m, f"device-{precision}", *keys, patch=without_tf32).expect().losses
        hidden = {"CUDA_VISIBLE_DEVICES": ""}
        there = launch(m, f"cpu-{precision}", *keys, patch=without_tf32, env=hidden).expect().losses
        worst.append((apart(there, here), limit))
    value = ", ".join(f"{name} {found:.2g}" for name, (found, _) in zip(("fp32", "bf16"), worst, strict=True))
    return all(found <= limit for found, limit in worst), value, "1e-4 and 1e-2, relative, 10 losses"


def compiled_against_eager(m: Machine) -> Result:
    m.needs_cuda("compiling for a CPU has tests of its own")
    eager = launch(m, "eager", "mixed_precision=bf16").expect().losses
    compiled = launch(m, "compiled", "mixed_precision=bf16", "compile_model=true").expect().losses
    return within(apart(eager, compiled), 1e-2)


def no_recompilation(m: Machine) -> Result:
    m.needs_cuda("compiling for a CPU has tests of its own")

    def again(case: tuple[str, str]) -> bool:
        parallel, level = case
        keys = [f"parallel={parallel}", f"activation_checkpointing={level}", "compile_model=true", "max_steps=50"]
        keys += ["mixed_precision=bf16", "eval_steps=2", "gradient_accumulation_steps=2"]
        run = launch(m, f"recompile-{parallel}-{level}", *keys, patch=saying_recompiles).expect()
        return "Recompiling" in run.text.partition("Step 2: eval_loss")[2]

    cases = list(itertools.product(("ddp", "fsdp"), configs.CHOICES["activation_checkpointing"]))
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = [f"{case[0]} {case[1]}" for case, bad in zip(cases, pool.map(again, cases), strict=True) if bad]
    return not found, ", ".join(found) or "none", "no recompilation after the first evaluation, in 50 steps"


def fused_loss(m: Machine) -> Result:
    V, C, N = (1009, 32, 256) if m.tiny else (50257, 512, 4096)
    torch.manual_seed(0)
    errors: dict[str, float] = {}
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x = torch.randn(N, C, device=m.device, dtype=dtype, requires_grad=True)
        w = torch.randn(V, C, device=m.device).mul_(0.1).requires_grad_()
        y = torch.randint(V, (N,), device=m.device)
        with torch.autocast(m.device, enabled=False):
            plain = F.cross_entropy(x.double() @ w.to(dtype).double().T, y, reduction="sum")
        wanted = [plain.detach(), *torch.autograd.grad(plain, (x, w))]
        for multiple in (1, 128):
            for chunks in (1, 4):
                loss = neox.LinearCrossEntropy.apply(x, w, y, N // chunks, neox.softmax_loss, multiple)
                found = [loss.detach(), *torch.autograd.grad(loss, (x, w))]
                for kind, a, b in zip(("loss", "dx", "dw"), found, wanted, strict=True):
                    key = f"{str(dtype)[6:]} {kind}"
                    error = ((a.double() - b.double()).norm() / b.double().norm()).item() / limit
                    errors[key] = max(errors.get(key, 0.0), error)
    worst = max(errors, key=lambda key: errors[key])
    value = f"{errors[worst]:.2g} of the bound ({worst})"
    return errors[worst] <= 1, value, "fp32 1e-5, bf16 1e-2; whole and in chunks, padded and not"


def attention_kernel(m: Machine) -> Result:
    dtype = torch.float32 if m.tiny else torch.bfloat16
    shape = (1, 2, 32, 24) if m.tiny else (8, 16, 1024, 384)
    q, k, v = torch.randn(*shape, device=m.device, dtype=dtype).chunk(3, dim=-1)
    with torch.profiler.profile() as profile:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        m.synchronize()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    names = [event.key for event in profile.key_averages() if re.search("flash|efficient|cudnn|attention", event.key)]
    error = ((y.float() - plain).norm() / plain.norm()).item()
    return error < 1e-2, f"{error:.2g}; {', '.join(names)[:160]}", "1e-2 of the plain products"


def documents_apart(m: Machine) -> Result:
    """Attention within documents, its output and gradients, by CUDA's kernel in bf16 against the mask in fp32; compiled,
    documents of other lengths compile nothing again."""
    T, end = (64, 256) if m.tiny else (1024, 50256)
    cfg, _ = configs.load([*m.base, *([] if m.tiny else ["hidden_size=2048", "num_attention_heads=16"])])
    torch.manual_seed(0)
    exact = neox.Attention(cfg).to(m.device)
    half = neox.Attention(cfg).to(m.device, torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())
    worst = 0.0
    for compiled in (False, True)[: 2 if m.cuda else 1]:
        if compiled:
            half.compile(dynamic=False)
        for share in (0.005, 0.03):  # of tokens that begin a document
            idx = torch.where(torch.rand(4, T, device=m.device) < share, end, 0)
            documents = neox.Documents.of(idx, end, neox.takes_edges(idx.device, cfg.head_dim))
            tables = neox.rotary_tables(torch.arange(T, device=m.device), cfg.head_dim // 4, 10_000)
            x = torch.randn(4, T, cfg.hidden_size, device=m.device).bfloat16()
            found = []
            with torch._dynamo.config.patch(error_on_recompile=share == 0.03):
                for attention in (exact, half):
                    given = x.to(attention.dense.weight.dtype).requires_grad_()
                    y = attention(given, *tables, documents=documents)
                    gradients = torch.autograd.grad(y.float().square().sum(), (given, *attention.parameters()))
                    found.append([t.float() for t in (y, *gradients)])
            worst = max(worst, *(((b - a).norm() / a.norm()).item() for a, b in zip(*found, strict=True)))
    return within(worst, 2e-2)


def clipping(m: Machine) -> Result:
    """The update whose kernel divides the gradients, and whose moments are bf16 or fp32, against one clipped before."""
    errors = []
    for moments in ("fp32", "bf16"):
        weights = []
        for later in (False, True):
            torch.manual_seed(0)
            model = torch.nn.Linear(1000, 999, device=m.device)
            cfg = dataclasses.replace(configs.load(m.base)[0], adam_moments=moments, learning_rate=1e-2)
            optimizers = optim.make_optimizers(model, cfg)
            assert optim.clips(optimizers) == m.cuda
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
                _, divisor = strategy.clip_gradients(model, 1.0, later)
                scaler = torch.amp.GradScaler(m.device, enabled=False)
                optim.update(optimizers, scaler, torch.tensor(True, device=m.device), divisor)
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        errors.append(((weights[0] - weights[1]).norm() / weights[0].norm()).item())
    return within(max(errors), 1e-4)  # a rounding of the divisor moves what is about to round the other way


# --- 2. resume and saves


def same_end(a: Path, b: Path) -> bool:
    """The newest checkpoint of two folders: its weights, tensor by tensor, and fp16's scale with its count of steps."""
    ends = [ckpt.find(str(path)) for path in (a, b)]
    first, second = (folders.load(source).state_dict() for source in ends)
    same = all(torch.equal(first[key], second[key]) for key in first)
    return same and ends[0].state.get("scaler") == ends[1].state.get("scaler")


def killed_and_resumed(m: Machine, name: str, *keys: str, cold: bool = False) -> tuple[str, bool]:
    """A run, and the same one killed at a random step and resumed: (what its replay says, the same final weights).

    Their checkpoints are removed: those of all cases would fill a disk.
    """
    keys = (*keys, "save_steps=4", "max_steps=12", "async_save=false")
    whole = launch(m, f"{name}-whole", *keys).expect()
    step = random.randint(5, 10)

    def kill(log: Path, ranks: list) -> None:
        wait_for(log, f"Step {step}: loss", ranks)
        ranks[0].kill()

    killed = launch(m, name, *keys, during=kill, patch=slowly)
    assert killed.codes == [-signal.SIGKILL], killed.codes
    env = {"TORCHINDUCTOR_CACHE_DIR": str(m.folder / "cold")} if cold else {}
    resumed = launch(m, name, *keys, "resume=latest", env=env).expect()
    said = next((line for line in resumed.text.splitlines() if "replayed" in line), "nothing was replayed")
    same = same_end(whole.folder / "out", resumed.folder / "out")
    usual = {line["step"]: line["loss_hex"] for line in whole.trace}
    if other := [line["step"] for line in resumed.trace if line["loss_hex"] != usual[line["step"]]]:
        said += f", from step {other[0]} on not the uninterrupted run's"
    for run in (whole, resumed):
        shutil.rmtree(run.folder / "out")
    return said, same


def bitwise_resume(m: Machine) -> Result:
    cases = [
        (parallel, precision, optimizer)
        for parallel in ("ddp", "fsdp")
        for precision in ("bf16", "fp16", "no")
        for optimizer in ("adamw", "muon")
        if (precision, optimizer) != ("fp16", "muon")
    ]
    for more in ("adam_moments=bf16", "mask_documents=true activation_checkpointing=activation"):
        cases += [(parallel, "bf16", f"adamw {more}") for parallel in ("ddp", "fsdp")]
    cases = [("fsdp", "no", "adamw")] if m.tiny else cases

    def judge(i: int) -> str:
        parallel, precision, optimizer = cases[i]
        keys = f"parallel={parallel} mixed_precision={precision} optimizer={optimizer} deterministic=true".split()
        keys += [] if m.tiny else ["compile_model=true"]
        said, same = killed_and_resumed(m, f"resume-{i}", *keys, cold=i == 0)
        good = same and "identical" in said and "identically" not in said
        return "" if good else f"{parallel} {precision} {optimizer}: {said}, weights {'the same' if same else 'others'}"

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        bad = list(filter(None, pool.map(judge, range(len(cases)))))
    return not bad, "; ".join(bad) or f"{len(cases)} of {len(cases)}", "replay and final weights, bit for bit"


def loose_resume(m: Machine) -> Result:
    if m.tiny:
        raise Skip("on a CPU the same as with deterministic=true")
    said, same = killed_and_resumed(m, "loose", "mixed_precision=bf16", "compile_model=true")
    return fact(f"without deterministic: {said}; final weights {'the same' if same else 'others'}")


def asynchronous_saves(m: Machine) -> Result:
    """The bytes on disk are those at the call, while the tensors go on changing; for how long save() takes."""
    cfg, _ = configs.load([str(ROOT / "configs/demo.py"), *m.base])
    processes.start(cfg)
    size = (1 << 16) if m.tiny else (1 << 32)  # numbers: 17 GB
    tree = {f"model.{i}": torch.randn(size // 8, device=m.device) for i in range(8)}
    target = m.folder / "saves"
    processes.on_rank_0(disk.lock, target)
    saver = Saver(target)
    note, stalls = saver.reserve(tree), []
    for step in range(1, 4):
        expected = {key: t.double().sum().item() for key, t in tree.items()}
        saver.save(manifest.name(0, step, 0), tree, {"step": step})
        stalls.append(saver.stall_seconds)
        for t in tree.values():
            t.add_(1.0)  # the steps that go on
        assert (error := saver.wait()) is None, error
        after = {key: torch.zeros(size // 8) for key in tree}
        ckpt.tensors.load(target / manifest.name(0, step, 0), after)
        found = {key: t.to(m.device).double().sum().item() for key, t in after.items()}
        assert found == expected, f"save {step} holds other numbers"
        shutil.rmtree(target / manifest.name(0, step, 0))
    saver.close()
    processes.stop()
    rate = 4 * size / min(stalls) / 1e9
    return (
        True,
        f"3 saves of {4 * size / 1e9:.2g} GB, stall {min(stalls):.3g} s, {rate:.3g} GB/s{note}",
        "equal numbers",
    )


def unpinned_saves(m: Machine) -> Result:
    m.needs_cuda("a CPU pins nothing")
    said = []
    for name, *keys in (("saves", "save_steps=4"), ("offload", "parallel=fsdp", "cpu_offload=true")):
        run = launch(m, f"unpinned-{name}", *keys, patch=refusing_to_pin).expect()
        said.append("unpinned" in run.text)
    return all(said), f"said: {said}", "exit 0, and a note, for saves and for offload"


def other_devices(m: Machine) -> Result:
    keys = ("save_steps=4", "parallel=fsdp")
    launch(m, "travel", *keys, "max_steps=4").expect()
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    launch(m, "travel", *keys, "max_steps=6", "resume=latest", env=hidden).expect()
    run = launch(m, "travel", *keys, "max_steps=8", "resume=latest", "parallel=ddp").expect()
    return len(run.losses) == 8, f"{len(run.losses)} steps", "device, CPU, device; 8 steps"


def exported(m: Machine) -> Result:
    try:
        import transformers  # slow to import, and not everywhere
    except ImportError as error:
        raise Skip("no transformers here") from error
    launch(m, "export", "max_steps=3", "save_steps=3").expect()
    source = ckpt.find(str(m.folder / "export/out"))
    ours = folders.load(source).to(m.device).eval()
    target = m.folder / "exported"
    target.mkdir()
    huggingface.write_configs(source.cfg, source.end, target, torch.float32)
    huggingface.write_weights(ours, target, torch.float32)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(target)
    theirs.to(m.device).eval()
    idx = torch.randint(source.cfg.vocab_size, (2, source.cfg.sequence_length), device=m.device)
    with torch.no_grad():
        return within((ours(idx) - theirs(input_ids=idx).logits).abs().max().item(), 1e-3)


def not_finite(m: Machine) -> Result:
    bad = launch(m, "not-finite", "learning_rate=1e30", "max_bad_steps=2", "max_steps=40")
    return bad.codes == [65], f"exit {bad.codes[0]}", "exit 65"


# --- 3. memory


def plan_against_memory(m: Machine) -> Result:
    lines, worst = [], 0.0
    for B, level in [(4, "none")] if m.tiny else [(8, "none"), (8, "selective"), (16, "full")]:
        keys = [f"per_device_train_batch_size={B}", f"activation_checkpointing={level}", "parallel=ddp", "max_steps=3"]
        keys += ["gradient_accumulation_steps=1", "async_save=false", "compile_model=false"]
        config = "" if m.tiny else str(ROOT / "configs/production.py")
        run = launch(m, f"plan-{B}-{level}", *keys, config=config, patch=telling).expect()
        cfg, _ = configs.load(
            [config or str(m.folder / "empty.py"), *([] if config else m.base), *COMMON.split(), *keys]
        )
        wanted = memory.estimate(cfg, 1).total
        found, reserved = run.largest("memory_allocated"), run.largest("memory_reserved")
        worst = max(worst, abs(found / wanted - 1))
        taken = max(map(int, re.findall(r"driver (\d+)", run.text)))  # the context, and libraries' own memory, too
        gib = f"{wanted / 2**30:.2f} planned, {found / 2**30:.2f} allocated, {reserved / 2**30:.2f} reserved"
        gib += f", {taken / 2**30:.2f} taken of the GPU"
        lines.append(f"{B} x {level}: {gib}")
    m.needs_cuda("a CPU process's memory is not what the plan counts")
    return worst <= 0.03, "; ".join(lines), "within 3 %"


def two_ranks_of_24(m: Machine) -> Result:
    """configs/production.py's two ranks on this GPU, each with what a 4090 leaves to torch's allocator."""
    rows, good = [], True
    total = torch.cuda.get_device_properties(0).total_memory / 2**30 if m.cuda else 0.0
    if m.cuda and total < 60:
        raise Skip(f"{total:.0f} GiB do not hold two cards of 24 GB")
    for level, segments in [("selective", True), ("none", True), ("none", False)][: 1 if m.tiny else 3]:
        conf = f"expandable_segments:{segments}"
        conf += f",per_process_memory_fraction:{22.9 / total:.4f}" if m.cuda else ""
        keys = [f"activation_checkpointing={level}", "max_steps=4", "parallel=fsdp", "async_save=false"]
        config = "" if m.tiny else str(ROOT / "configs/production.py")
        env = {"PYTORCH_ALLOC_CONF": conf}
        run = launch(m, f"24-{level}-{segments}", *keys, nproc=2, config=config, env=env, patch=telling)
        retries = re.findall(r"retries (\d+)", run.text) or ["?"]
        good &= level != "selective" or run.codes == [0, 0]
        rows.append(f"{level}, {conf}: exit {run.codes}, {retries[-1]} retries, "
                    f"{run.largest('memory_reserved') / 2**30:.2f} GiB reserved")  # fmt: skip
    return good, "; ".join(rows), "as configured: exit 0"


def offload(m: Machine) -> Result:
    rows, config = [], "" if m.tiny else str(ROOT / "configs/production.py")
    layouts = ((2, 2, "full"), (4, 1, "full")) if m.tiny else ((4, 8, "none"), (32, 1, "full"))
    for B, accumulation, level in layouts:
        keys = ["parallel=fsdp", "cpu_offload=true", "max_steps=3", f"activation_checkpointing={level}"]
        keys += [f"per_device_train_batch_size={B}", f"gradient_accumulation_steps={accumulation}"]
        run = launch(m, f"offload-{B}", *keys, config=config, patch=unsaved, timeout=400).expect()
        seconds = 1 / run.largest("steps_per_second")
        memory = run.largest("memory_allocated") / 2**30
        rows.append(f"{B} x {accumulation} {level}: {seconds:.2f} s a step, {memory:.2f} GiB on the device")
    return fact("; ".join(rows))


def out_of_memory(m: Machine) -> Result:
    m.needs_cuda("a CPU's memory is everyone's")
    begin = time.monotonic()
    run = launch(m, "oom", "per_device_train_batch_size=100000")
    named = "per_device_train_batch_size=50000" in run.text
    seconds = time.monotonic() - begin
    return run.codes == [70] and named, f"exit {run.codes[0]} after {seconds:.0f} s", "exit 70 with the keys that help"


def steady(m: Machine) -> Result:
    steps = 20 if m.tiny else 300
    trace = launch(m, "steady", f"max_steps={steps}", "mixed_precision=bf16").expect().trace
    key = "memory_reserved" if m.cuda else "memory_allocated"
    early, late = (trace[i].get(key) or 0 for i in (len(trace) // 4, -1))
    return late <= 1.02 * early, f"{early / 2**20:.0f} MiB, at the end {late / 2**20:.0f}", "2 % more at most"


# --- 4. speed


class Watch:
    """Lets no host wait for the device unseen from the third to the last step but one."""

    def __init__(self, m: Machine, steps: int):
        self.step, self.steps, self.m = 0, steps, m

    def tick(self) -> None:
        self.step += 1
        if self.m.cuda and self.step in (3, self.steps - 1):
            torch.cuda.set_sync_debug_mode("error" if self.step == 3 else "default")


def no_host_sync(m: Machine) -> Result:
    steps = 6 if m.tiny else 53
    args = [*m.base, *COMMON.split(), f"max_steps={steps}", "logging_steps=0"]
    args += [f"data_dir={tokens(m, 257 if m.tiny else 50257)}"]
    (m.folder / "empty.py").write_text("")
    codes = []
    for i, kind in enumerate(("optimizer=adamw", "optimizer=muon mixed_precision=bf16")):
        places = [f"{what}_dir={m.folder}/sync-{i}/{what}" for what in ("output", "logging")]
        cfg, origins = configs.load([str(m.folder / "empty.py"), *args, *kind.split(), *places])
        dataset, watch = data.open_dataset(cfg), Watch(m, steps)
        codes.append(train.train(cfg, origins, processes.start(cfg), dataset, StopSignal(), watch.tick))
    m.needs_cuda("a CPU has nothing to wait for")
    return codes == [0, 0], f"exit {codes}", f"no synchronisation in {steps - 4} steps of AdamW, nor of Muon with bf16"


def attention_order(m: Machine) -> Result:
    """Milliseconds of causal attention, forward and backward, by what may run it; torch takes flash before cuDNN."""
    dtype = torch.float32 if m.tiny else torch.bfloat16
    shape = (1, 2, 32, 24) if m.tiny else (8, 16, 1024, 384)
    qkv = torch.randn(*shape, device=m.device, dtype=dtype, requires_grad=True)
    kinds = ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"] if m.cuda else ["FLASH_ATTENTION", "MATH"]
    rows = []

    def attend() -> None:
        q, k, v = qkv.chunk(3, dim=-1)
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(q.detach())

    def note(name: str, backend: str) -> None:
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            try:
                rows.append(f"{name} {1e3 * m.seconds(attend):.3g}")
            except RuntimeError as error:
                rows.append(f"{name}: {str(error).splitlines()[0][:80]}")

    for kind in kinds:
        note(kind.removesuffix("_ATTENTION").lower(), kind)
    if m.cuda:
        try:
            torch.nn.attention.activate_flash_attention_impl("FA3")
            note("FA3", "FLASH_ATTENTION")
        except Exception as error:  # its wheel is not there, or this torch does not know it
            rows.append(f"FA3: {type(error).__name__}")
    return fact(", ".join(rows) + " (ms)")


def dip(m: Machine) -> Result:
    """Seconds of training that one asynchronous save of the whole model costs: its stall, and ten slower steps."""
    config, size = ("", 1) if m.tiny else (str(ROOT / "configs/production.py"), 8)
    keys = f"parallel=ddp per_device_train_batch_size={size} gradient_accumulation_steps=1 max_steps=31 save_steps=20"
    trace = launch(m, "dip", *keys.split(), "save_total_limit=1", config=config, timeout=400).expect().trace
    seconds = {line["step"]: 1 / line["steps_per_second"] for line in trace}
    stall = max(line["save_stall_seconds"] for line in trace[:-1])
    usual = sorted(seconds[step] for step in range(10, 20))[5]
    slower = sum(seconds[step] - usual for step in range(21, 31))
    return fact(f"stall {stall:.3g} s, ten steps after it {slower:.3g} s longer than ten usual ones of {usual:.3g} s")


TINY_LAYOUT = ("per_device_train_batch_size=2 gradient_accumulation_steps=2",)
LAYOUTS = (
    "per_device_train_batch_size=8 gradient_accumulation_steps=4 activation_checkpointing=none",
    "per_device_train_batch_size=8 gradient_accumulation_steps=1 activation_checkpointing=none",
    "per_device_train_batch_size=16 gradient_accumulation_steps=2 activation_checkpointing=none",
    "per_device_train_batch_size=16 gradient_accumulation_steps=2 activation_checkpointing=none mask_documents=true",
    "per_device_train_batch_size=32 gradient_accumulation_steps=1 activation_checkpointing=selective",
)


def speed(m: Machine) -> Result:
    """tokens/s and MFU of whole optimizer steps; of the last log line, when compilation and warm-up are over."""
    rows, config = [], "" if m.tiny else str(ROOT / "configs/production.py")
    for i, layout in enumerate(TINY_LAYOUT if m.tiny else LAYOUTS):
        keys = [*layout.split(), "parallel=ddp", "max_steps=12", "logging_steps=4", "async_save=false"]
        keys += ["profile=6-7"] if i == 0 else []
        env = {"TORCHINDUCTOR_CACHE_DIR": str(m.folder / "speed-cold")} if i == 0 else {}
        run = launch(m, f"speed-{i}", *keys, config=config, env=env, patch=unsaved, timeout=400).expect()
        line, ready = run.trace[-1], re.search(r"ready in [\d.]+ s", run.text)
        mfu = "n/a" if line["mfu"] is None else f"{line['mfu']:.1%}"
        memory = f"{(line['memory_allocated'] or 0) / 2**30:.2f} GiB, data wait {line['data_wait_share']:.2%}"
        cold = f", {ready[0]} with no kernel cached" if ready and i == 0 else ""
        rows.append(f"{layout}: {line['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, {memory}{cold}")
    return fact("; ".join(rows))


def split(m: Machine) -> Result:
    """Where the device's time went in the profiled steps of the run before, by the kernels' names."""
    folder = m.folder / "speed-0" / "logs/profile"
    if not (found := list(folder.glob("*.json"))):
        raise Skip("no profile: the run before it failed")
    events = json.loads(found[0].read_text())["traceEvents"]
    wanted = "kernel" if m.cuda else "cpu_op"
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == wanted and "dur" in event:
            name = event["name"].lower()
            kind = next((k for k, p in KERNELS.items() if re.search(p, name)), "element-wise")
            spent[kind] += event["dur"]
    whole = sum(spent.values())
    return fact(", ".join(f"{kind} {time / whole:.0%}" for kind, time in spent.most_common()))


KERNELS = {
    "attention": "flash|fmha|attention|sdpa",
    "products": "gemm|cutlass|nvjet|xmma|addmm|::mm|matmul",
    "optimizer": "adam|multi_tensor|foreach",
    "communication": "nccl|c10d|gloo",
}


def head(m: Machine) -> Result:
    """Forward and both gradients of the head and its loss, padded or not, in one chunk and in several."""
    V, C, N = (1009, 32, 256) if m.tiny else (50257, 2048, 8192)
    x = torch.randn(N, C, device=m.device, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(V, C, device=m.device, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    y = torch.randint(V, (N,), device=m.device)
    kernel = neox.softmax_loss if m.tiny else torch.compile(neox.softmax_loss, dynamic=False)
    rows = []
    for multiple in (1, 128):
        for chunks in (1, 4):

            def step(multiple=multiple, chunks=chunks):
                neox.LinearCrossEntropy.apply(x, w, y, N // chunks, kernel, multiple)

            rate = 6 * N * V * C / m.seconds(step, 5)
            rows.append(f"multiple of {multiple}, {chunks} chunks {rate / 1e12:.3g}")
    try:  # the sum of chunks inside the product: where this works it can replace the fp32 additions
        half = torch.zeros(8, 8, device=m.device, dtype=torch.bfloat16)
        torch.addmm(half.float(), half, half, out_dtype=torch.float32)
        rows.append("addmm adds bf16 products in fp32")
    except (RuntimeError, NotImplementedError):
        rows.append("addmm does not add bf16 products in fp32")
    return fact(", ".join(rows) + " (TFLOP/s)")


def peers(m: Machine) -> Result:
    toy = "hidden_size=64 num_attention_heads=4 intermediate_size=256 num_hidden_layers=1 sequence_length=64"
    names = "floor" if m.tiny else "ours,seed,nanogpt,floor"
    command = ["step", "--size", "small" if m.tiny else "large", "--rounds", "1" if m.tiny else "3"]
    # all are in memory at once, four times the 1.4 billion parameters would not fit 80 GB
    command += [
        "--contenders",
        names,
        *(f"{toy} vocab_size=512 compile_model=false" if m.tiny else "num_hidden_layers=8").split(),
    ]
    env = {**os.environ} if m.cuda else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "bench.py", *command], cwd=ROOT, env=env, capture_output=True, text=True)
    rows = [
        line.split("|")[1:3] for line in done.stdout.splitlines() if line.startswith("| ") and "tokens/s" not in line
    ]
    value = "; ".join(f"{row[0].strip()} {row[1].strip()}" for row in rows)
    return (
        done.returncode == 0 and len(rows) == len(names.split(",")),
        value or done.stderr[-300:],
        "a row each, tokens/s",
    )


# --- 5. two ranks, on one GPU where there is one


def layouts_agree(m: Machine) -> Result:
    common = ["global_batch_size=8", "max_steps=6"]
    one = launch(m, "one", *common, "per_device_train_batch_size=8").expect().losses
    worst = 0.0
    for name, *keys in (("ddp",), ("fsdp", "parallel=fsdp"), ("hsdp", "parallel=fsdp", "shard_size=1")):
        run = launch(m, f"two-{name}", *common, "per_device_train_batch_size=4", *keys, nproc=2).expect()
        worst = max(worst, apart(one, run.losses))
    return within(worst, 1e-5)


def one_rank_fails(m: Machine) -> Result:
    rows, good = [], True
    errors = {"data": (66, data.DataError("made up")), "memory": (70, torch.OutOfMemoryError("made up"))}
    for name, (code, error) in list(errors.items())[: 1 if m.tiny else 2]:
        ended: list[float] = []

        def watch(log: Path, ranks: list, ended: list[float] = ended) -> None:
            wait_for(log, "Step 2: loss", ranks)
            begin = time.monotonic()
            for process in ranks:
                process.join(90)
            ended.append(time.monotonic() - begin)

        patch = functools.partial(failing, error)
        run = launch(m, f"fails-{name}", "max_steps=100000", nproc=2, patch=patch, during=watch, timeout=1)
        good &= ended[0] < 60 and run.codes == [70, code]
        rows.append(f"{name}: exit {run.codes} after {ended[0]:.0f} s")
    return good, "; ".join(rows), "both gone within 60 s, it with 66 or 70, the other with 70"


def one_rank_is_told(m: Machine) -> Result:
    rows, good = [], True
    for i, moment in enumerate(("Step 2: loss", "Step 4: eval_loss", "ready in")[: 1 if m.tiny else 3]):

        def tell(log: Path, ranks: list, moment: str = moment) -> None:
            wait_for(log, moment, ranks)
            os.kill(ranks[1].pid, signal.SIGTERM)

        run = launch(m, f"told-{i}", "max_steps=100000", "eval_steps=4", nproc=2, during=tell)
        again = launch(m, f"told-{i}", f"max_steps={len(run.losses) + 2}", "resume=latest", nproc=2)
        good &= run.codes == [75, 75] and again.codes == [0, 0]
        rows.append(f"at {moment!r}: exit {run.codes}, then {again.codes}")
    return good, "; ".join(rows), "75, resumable"


def clean_exits(m: Machine) -> Result:
    times = 1 if m.tiny else 20
    bad = 0
    for i in range(times):
        run = launch(m, f"exit-{i}", "max_steps=2", nproc=2)
        bad += run.codes != [0, 0] or "destroy_process_group" in run.text
    return bad == 0, f"{times - bad} of {times}", "exit 0, nothing said of the process group"


PARTS: dict[int, tuple[str, list[Callable[[Machine], Result]]]] = {
    1: ("environment and correctness", [environment, imports_without_google, ceiling, transfers, fused_loss,
        attention_kernel, documents_apart, clipping, demo, device_against_cpu, compiled_against_eager, no_recompilation,
        cpu_suite]),
    2: ("resume and saves", [exported, not_finite, other_devices, asynchronous_saves, unpinned_saves, loose_resume,
        bitwise_resume]),
    3: ("memory", [out_of_memory, steady, plan_against_memory, two_ranks_of_24, offload]),
    4: ("speed", [no_host_sync, head, attention_order, speed, split, dip, peers]),
    5: ("two ranks", [layouts_agree, one_rank_fails, one_rank_is_told, clean_exits]),
}  # fmt: skip


def in_child(check: Callable[[Machine], Result], m: Machine, answers) -> None:
    """One check, in a process that its errors and the GPU memory it took end with."""
    os.setsid()  # with all that it starts
    os.chdir(m.folder)
    CONTEXT.set_forkserver_preload(PRELOAD)  # its own runs come from a server of its own
    if not m.cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        passed, value, bound = check(m)
        answers.put(("PASS" if passed else "FAIL", value, bound))
    except Skip as why:
        answers.put(("SKIP", str(why), ""))
    except BaseException as error:
        traceback.print_exc()
        answers.put(("FAIL", (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:300], "no error"))
    answers.close()
    answers.join_thread()
    os._exit(0)


def judge(check: Callable[[Machine], Result], m: Machine, end: float) -> tuple[str, str, str]:
    """PASS, FAIL or SKIP with value and bound; a check that is not over a while after its part's time is ended."""
    if time.monotonic() > end:
        return "SKIP", "the part's ten minutes were over", ""
    answers = CONTEXT.Queue()
    child = CONTEXT.Process(target=in_child, args=(check, m, answers))
    child.start()
    assert child.pid
    while True:
        try:
            answer = answers.get(timeout=1)
            break
        except Exception:  # nothing yet
            if not child.is_alive():
                answer = ("FAIL", f"the process of the check ended with {child.exitcode}", "an answer")
                break
            if time.monotonic() > end + (LAST_SECONDS if m.cuda else 600):
                answer = ("FAIL", "not over when the part's ten minutes were", "an end")
                break
    child.join(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # its runs would take the GPU from the checks that follow
    return answer


def report(rows: list[tuple[int, str, str, str, str]], where: str) -> str:
    lines = [f"{where}", "", "| part | check | | value | bound |", "|---:|---|---|---|---|"]
    for part, name, verdict, value, bound in rows:
        cells = (str(part), name, verdict, value, bound)
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    counts = Counter(row[2] for row in rows)
    return "\n".join([*lines, "", ", ".join(f"{counts[kind]} {kind}" for kind in ("PASS", "FAIL", "SKIP"))])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="acceptance", description="What a GPU does with this trainer, as facts.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of seconds, to try the checks themselves")
    parser.add_argument("--part", type=int, choices=PARTS, action="append", help="only this part; may come again")
    parser.add_argument("--folder", help="where runs and their logs go, and stay; else a temporary folder")
    parser.add_argument("--report", help="a file for the markdown report, beside the one that is printed")
    options = parser.parse_args(argv)
    CONTEXT.set_forkserver_preload(PRELOAD)
    here = options.device == "cpu" or devices.any_device().type == "cuda"
    if not here:
        print("no GPU that torch can use: nothing is checked (--device cpu --tiny tries the checks themselves)")
    rows = []
    with tempfile.TemporaryDirectory(prefix="acceptance-") as temporary:
        folder = Path(options.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        m = Machine(options.device, options.tiny, folder)
        for part in sorted(set(options.part or PARTS)):
            end = time.monotonic() + PART_SECONDS
            for check in PARTS[part][1]:
                name = check.__name__.replace("_", " ")
                verdict, value, bound = judge(check, m, end) if here else ("SKIP", "no GPU", "")
                print(f"{verdict} {name}: {value}{f' ({bound})' if bound else ''}", flush=True)
                rows.append((part, name, verdict, value, bound))
    text = report(rows, f"{hardware()}; {options.device}{', tiny' * options.tiny}")
    print(f"\n{text}")
    if options.report:
        Path(options.report).write_text(text + "\n")
    return 1 if any(row[2] == "FAIL" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(entry.run(main, sys.argv[1:]))
