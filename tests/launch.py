"""Starts train.main in real processes, quickly: a fork server has imported torch once, each rank is forked from it."""

import contextlib
import gc
import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from refocused.entry import ROOT
from refocused.run.environment import free_port, variables

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "torch.utils.tensorboard"])

# Seconds after which something that a test waits for has hung. The only limit in the suite: it says nothing about how
# long anything takes, and a machine that is new, busy and slow stays far below it.
GUARD = 600


def until(happened: Callable[[], object]) -> None:
    """Return once happened() is true; polls, because the other side is another process."""
    end = time.monotonic() + GUARD
    while not happened():
        assert time.monotonic() < end, f"it did not happen in {GUARD} s"
        time.sleep(0.01)


# a model and a run of a second; every test states what it changes
TINY = (
    "vocab_size=257 hidden_size=32 num_hidden_layers=2 num_attention_heads=4 intermediate_size=64 "
    "max_position_embeddings=64 sequence_length=32 tokenizer=byte per_device_train_batch_size=4 "
    "gradient_accumulation_steps=1 dataloader_num_workers=1 learning_rate=1e-2 max_steps=10 warmup_steps=2 "
    "logging_steps=1 save_steps=0 mixed_precision=no compile_model=false cpu_threads=1 eval_samples=8 "
    "sample_tokens=0 max_failed_starts=0"
).split()


def _rank(args: list[str], environment: dict[str, str], log: str, cwd: str) -> None:
    gc.freeze()  # else the collection at a run's end goes through all that was imported, 0.2 s
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(cwd)
    import train

    raise SystemExit(train.main(args))


class Run:
    """One launch of `nproc` ranks, as torchrun would make it, with the output of all in one log."""

    def __init__(
        self, args: list[str], nproc: int, folder: Path, env: dict[str, str] | None = None, config: str = "", base=TINY
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"run-{len(list(folder.glob('run-*.log')))}.log"
        self.log.touch()
        file = folder / "config.py"  # not the demo's values: only what the test states
        file.write_text(f"seed = 42\n{config}")  # a file that sets nothing is refused
        args = [str(file), *base, f"output_dir={folder}/out", f"logging_dir={folder}/logs", *args]
        self.port = free_port()
        self.ranks = []
        for rank in range(nproc):
            environment = (variables(rank, nproc, self.port) if nproc > 1 else {}) | (env or {})
            self.ranks.append(CONTEXT.Process(target=_rank, args=(args, environment, str(self.log), str(folder))))
        for process in self.ranks:
            process.start()

    def wait(self) -> list[int]:
        """The exit codes; past the guard everything is killed and the test fails with the log."""
        end = time.monotonic() + GUARD
        for process in self.ranks:
            process.join(max(0, end - time.monotonic()))
        if any(process.is_alive() for process in self.ranks):
            self.kill()
            raise AssertionError(f"still running after {GUARD} s:\n{self.text}")
        return [process.exitcode for process in self.ranks]

    def signal(self, number: int, rank: int | None = None) -> None:
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def wait_for(self, pattern: str) -> None:
        """Until the log has the pattern; an error as soon as nothing runs that could still write it."""

        def found_or_over() -> bool:
            return bool(re.search(pattern, self.text)) or not any(process.is_alive() for process in self.ranks)

        until(found_or_over)
        assert re.search(pattern, self.text), f"no {pattern!r} in:\n{self.text}"

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def losses(self) -> list[float]:
        return [float(x) for x in re.findall(r"^Step \d+: loss=([\d.]+|nan|inf)", self.text, re.M)]


STANDALONE = ("--standalone", "--nproc_per_node=2")


class Launch:
    """`python -m MODULE FLAGS`, or one process without a module: a script that runs `before` and then train.main."""

    def __init__(
        self, folder, *args: str, before="", flags=STANDALONE, module="refocused.run.launch", prefix=(), cwd=ROOT, log=None,
        **env: str,
    ):  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        script, config = folder / "script.py", folder / "config.py"
        script.write_text(
            f"import os, signal, sys, time\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{before}\n"
            "import train\nsys.exit(train.main(sys.argv[1:]))\n"
        )
        config.write_text("seed = 42")
        command = [
            *prefix,
            sys.executable,
            *(["-m", module, *flags] if module else []),
            str(script),
            str(config),
            *TINY,
        ]
        command += [f"output_dir={folder}/out", f"logging_dir={folder}/logs", *args]
        self.module, self.begin, self.log = module, time.monotonic(), log or folder / "log"
        self.token = f"LAUNCH={time.monotonic_ns()}"  # in the environment of all processes, whose child they may be
        env = {**os.environ, "PYTHONPATH": str(ROOT), **env, "LAUNCH": self.token.partition("=")[2]}
        with self.log.open("ab") as file:
            self.at = file.tell()
            self.process = subprocess.Popen(command, cwd=cwd, env=env, stdout=file, stderr=file, start_new_session=True)

    @property
    def text(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.at)
            return file.read().decode(errors="replace")

    def wait_for(self, pattern: str) -> None:
        until(lambda: re.search(pattern, self.text, re.M))

    def processes(self, only_ranks: bool = False) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (entry / "environ").read_bytes().split(b"\0")
                rank = not self.module or any(value.startswith(b"LOCAL_RANK=") for value in environment)
                if self.token.encode() in environment and (rank or not only_ranks):
                    found.append(int(entry.name))
        return found

    def over(self) -> bool:
        return self.process.poll() is not None

    def send(self, number: int) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _call(function: Callable, rank: int, environment: dict[str, str], args: tuple) -> None:
    os.environ.update(environment)
    raise SystemExit(function(rank, *args))


def _on_ranks(nproc: int, function: Callable, *args: object) -> list[int]:
    """The exit codes of function(rank, *args) in each of nproc ranks that may form a process group."""
    port = free_port()
    environments = [variables(rank, nproc, port) if nproc > 1 else {} for rank in range(nproc)]
    ranks = [CONTEXT.Process(target=_call, args=(function, r, environments[r], args)) for r in range(nproc)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(GUARD)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def on_ranks(nproc: int, function: Callable, *args: object) -> None:
    """The same, where all of them end well."""
    codes = _on_ranks(nproc, function, *args)
    assert codes == [0] * nproc, codes


def _program(rank: int, name: str, args: list[str], out: str, err: str) -> int:
    for number, path in ((1, out), (2, err)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    return importlib.import_module(name).main(args)


def program(folder: Path, name: str, *args: object, nproc: int = 1) -> tuple[list[int], str, str]:
    """`python NAME.py ARGS` in each of nproc ranks: exit codes, stdout and stderr of all."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / f"out-{time.monotonic_ns()}", folder / f"err-{time.monotonic_ns()}"
    codes = _on_ranks(nproc, _program, name, [*map(str, args)], str(out), str(err))
    return codes, out.read_text(), err.read_text()


def train(folder: Path, *args: str, nproc: int = 1, code: int = 0, env: dict[str, str] | None = None) -> Run:
    """Run to the end and insist on the exit code."""
    run = Run(list(args), nproc, folder, env)
    codes = run.wait()
    assert codes == [code] * nproc, f"exit codes {codes}, expected {code}:\n{run.text}"
    return run


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
