"""The device of this process: which it is, its settings, and how figures come back from it."""

import contextlib
import ctypes
import glob
import os
import resource
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from configs import Config, ConfigError
from refocused.run.environment import launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
DEVICES, DRIVER = "/dev/nvidia[0-9]*", Path("/proc/driver/nvidia/version")  # a container has the host's numbers
# a container's limit of CPU time, of both versions: (file, file of the period)
QUOTAS = (
    ("/sys/fs/cgroup/cpu.max", None),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def any_device() -> torch.device:
    """An accelerator if there is one, or the CPU. Raises ConfigError for a GPU that torch cannot use."""
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        return accelerator
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "NoDevFiles")
    found = sorted(glob.glob(DEVICES))
    if not torch.version.cuda or not found or hidden:
        return torch.device("cpu")
    driver = "unknown"
    with contextlib.suppress(OSError):  # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat ..."
        driver = next((word for word in DRIVER.read_text().split() if word[:1].isdigit() and "." in word), driver)
    raise ConfigError(
        f"{found[0]} is here, but torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no usable GPU "
        f"(driver {driver}; CUDA 13 needs 580, CUDA 12 needs 525): update the driver, or install torch for the CUDA "
        "that nvidia-smi shows; CUDA_VISIBLE_DEVICES= trains on the CPU"
    )


def pick_device(local_rank: int, local_world_size: int) -> torch.device:
    """This process's accelerator, or the CPU. Raises ConfigError for more processes than accelerators."""
    accelerator = any_device()
    if accelerator.type == "cpu":
        return accelerator
    count = torch.accelerator.device_count()
    if local_world_size > count:
        hide = ", or hide them (CUDA_VISIBLE_DEVICES=) to run on the CPU" if accelerator.type == "cuda" else ""
        here = f"{local_world_size} processes on a machine with {count} {accelerator.type} device(s)"
        raise ConfigError(f"{here}; use --nproc_per_node={count}{hide}")
    return torch.device(accelerator.type, local_rank)


def check_precision(cfg: Config, device: torch.device) -> None:
    """Raises ConfigError for what this kind of device does not have."""
    if device.type == "cpu" and cfg.mixed_precision == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ConfigError("mixed_precision=fp16: this CPU has no fp16 matrix products; use bf16 or no")
    if device.type == "mps" and launch().world_size > 1:
        raise ConfigError("MPS runs one process: start train.py without torchrun")


def precision_note(cfg: Config, device: torch.device) -> str:
    """A note where a CPU would take bf16 apart into fp32 and back, number by number."""
    bf16_on_cpu = device.type == "cpu" and cfg.mixed_precision == "bf16" and torch.backends.mkldnn.is_available()
    if bf16_on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bf16 matrix products: mixed_precision=no is about ten times as fast"
    return ""


def check_compiler(cfg: Config, device: torch.device) -> None:
    """Raises ConfigError if a run that compiles lacks a compiler (C++ for a CPU, C for Triton on a GPU) or a folder."""
    if not cfg.compile_model or device.type == "mps":  # whose shaders need no compiler of this machine's
        return
    off = "compile_model=false trains without, slower"
    names = list(dict.fromkeys([os.environ.get("CC") or "gcc", "gcc", "clang"]))
    if device.type == "cpu":
        names = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    if not any(map(shutil.which, names)):
        what = f"a compiler, and none is found ({', '.join(names)}); Debian, Ubuntu: apt-get install g++ python3-dev"
        raise ConfigError(f"compile_model=true needs {what}; {off}")
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
    try:
        os.makedirs(cache, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise ConfigError(
            f"compile_model=true keeps compiled code in {cache}, which cannot be written: {error}; set "
            f"TORCHINDUCTOR_CACHE_DIR to a folder with room that is not mounted noexec; {off}"
        ) from error


def tune(cfg: Config, device: torch.device, local_rank: int, local_world_size: int) -> int:
    """Set this process's threads and numerics; returns the threads of a CPU's operations."""
    if device.type == "cpu" or cfg.cpu_offload:  # whose optimizer runs in host memory
        # torchrun sets OMP_NUM_THREADS=1, which would leave cores idle whenever there are fewer processes than cores
        torch.set_num_threads(cfg.cpu_threads or cores(local_world_size))
    if device.type == "cpu":
        # inductor merges the two equal bias gradients of a parallel-residual block into one kernel that does not
        # compile with bf16 parameters (torch 2.13); without horizontal fusion there is nothing to merge
        inductor.cpp.max_horizontal_fusion_size = 1
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):  # another libc than glibc
                libc = ctypes.CDLL(None)  # by default each tensor of a step is mapped, zeroed by pages, and unmapped
                libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing through mmap
                libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing back to the kernel
    else:
        torch.accelerator.set_device_index(local_rank)
    torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for on a GPU; no effect on a CPU
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")  # trees of other shapes sum in other orders
        torch.use_deterministic_algorithms(True)
        deterministic: Any = torch.utils.deterministic  # a module whose attribute the stubs do not know
        deterministic.fill_uninitialized_memory = False  # takes time, and nothing here reads what it did not write
        torch.backends.cudnn.benchmark = False
        if device.type == "cuda":  # the one library that can leave split-K out, whose order of sums nobody promises
            torch.backends.cuda.preferred_blas_library("cublaslt")
        for kind in ("bf16", "fp16"):
            setattr(torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction", (False, False))
        inductor.triton.autotune_pointwise = False  # no kernel is chosen by a clock
    return torch.get_num_threads()


def cores(local_world_size: int) -> int:
    """Cores of the CPU for each of so many processes on this machine, within a container's limit."""
    usable = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    for file, period in QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # the other version; "max"
            words = Path(file).read_text().split() + (Path(period).read_text().split() if period else [])
            if (limit := int(words[0])) > 0:  # -1 is none
                usable.append(limit / int(words[1]))
    return max(1, int(min(usable)) // local_world_size)


def peak_memory(device: torch.device) -> int:
    """Bytes: peak allocated on the accelerator, or peak resident size of the process on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    with contextlib.suppress(OSError):  # getrusage's figure would include what the parent had when it forked us
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Readback:
    """Copies figures from the device to the host a step late, so that the host never waits for the step in flight."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pending: deque[tuple[Any, torch.Tensor, torch.Event | None]] = deque()

    def put(self, tag: Any, figures: torch.Tensor) -> None:
        """Start copying a small 1-D tensor; `tag` comes back with it."""
        if self.device.type == "cpu":
            self.pending.append((tag, figures, None))
            return
        host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=self.device.type == "cuda")
        host.copy_(figures, non_blocking=True)
        event = torch.Event(self.device.type)
        event.record()
        self.pending.append((tag, host, event))

    def take(self, wait: bool) -> Iterator[tuple[Any, list[float]]]:
        """(tag, figures) of every step but the newest, or of that too with `wait`, oldest first."""
        while len(self.pending) > (0 if wait else 1):
            tag, host, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            yield tag, host.tolist()
