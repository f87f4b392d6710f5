"""Starts train.main in real processes, quickly: a fork server has imported torch once, each rank is forked from it."""

import contextlib
import gc
import importlib
import multiprocessing
import os
import re
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


def until(happened: Callable[[], object], text: Callable[[], str] = str) -> None:
    """Return once happened() is true; polls, because the other side is another process. text() is for the failure."""
    end = time.monotonic() + GUARD
    while not happened():
        assert time.monotonic() < end, f"it did not happen in {GUARD} s: {text()[-5000:]}"
        time.sleep(0.01)


def last_step(text: str) -> int:
    """The last step that a run has printed, 0 before the first."""
    return int(["0", *re.findall(r"^Step (\d+): loss", text, re.M)][-1])


def stopped_at(text: str) -> int:
    """The step at which a run says that it was stopped."""
    return int(re.search(r"stopped at step ([\d,]+), ", text)[1].replace(",", ""))


# a model and a run of a second; every test states what it changes
TINY = (
    "vocab_size=257 hidden_size=32 num_hidden_layers=2 num_attention_heads=4 intermediate_size=64 "
    "max_position_embeddings=64 sequence_length=32 tokenizer=byte per_device_train_batch_size=4 "
    "gradient_accumulation_steps=1 dataloader_num_workers=1 learning_rate=1e-2 max_steps=10 warmup_steps=2 "
    "logging_steps=1 save_steps=0 mixed_precision=no compile_model=false cpu_threads=1 eval_samples=8 "
    "sample_tokens=0 max_failed_starts=0"
).split()


def _rank(environment: dict[str, str], cwd: Path | str, streams: tuple[Path, ...], main: Callable, args: tuple) -> None:
    gc.freeze()  # else the collection at a run's end goes through all that was imported, 0.2 s
    for number, path in enumerate(streams, 1):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    os.chdir(cwd)
    raise SystemExit(main(*args))


def start(nproc: int, port: int, main: Callable, *args: object, env=None, cwd: Path | str = ".", streams=()) -> list:
    """main(*args) in each of nproc ranks that may form a process group; streams: files for stdout and stderr."""
    ranks = []
    for rank in range(nproc):
        environment = (variables(rank, nproc, port) if nproc > 1 else {}) | (env or {})
        ranks.append(CONTEXT.Process(target=_rank, args=(environment, cwd, streams, main, args)))
    for process in ranks:
        process.start()
    return ranks


def join(ranks: list) -> list[int | None]:
    """The exit codes; past the guard everything is killed."""
    end = time.monotonic() + GUARD
    for process in ranks:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def _program(name: str, args: list[str]) -> int:
    return importlib.import_module(name).main(args)


class Started:
    """What a test has started and waits for: `text` is its output so far, `gone()` whether nothing of it is left."""

    def until(self, happened: Callable[[], object]) -> bool:
        """Whether it happened while something was left."""
        until(lambda: happened() or self.gone(), lambda: self.text)
        return bool(happened())

    def wait_for(self, pattern: str) -> None:
        """Until the output has the pattern; an error as soon as nothing is left that could still write it."""
        assert self.until(lambda: re.search(pattern, self.text, re.M)), f"no {pattern!r} in:\n{self.text}"


class Run(Started):
    """One launch of `nproc` ranks, as torchrun would make it, with the output of all in one log."""

    def __init__(
        self, args: list[str], nproc: int, folder: Path, env: dict[str, str] | None = None, config="", base=TINY,
        main: Callable[[str, list[str]], int] = _program,
    ):  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"run-{len(list(folder.glob('run-*.log')))}.log"
        self.log.touch()
        file = folder / "config.py"  # not the demo's values: only what the test states
        file.write_text(f"seed = 42\n{config}")  # a file that sets nothing is refused
        args = [str(file), *base, f"output_dir={folder}/out", f"logging_dir={folder}/logs", *args]
        self.port = free_port()
        log = (self.log, self.log)
        self.ranks = start(nproc, self.port, main, "train", args, env=env, cwd=folder, streams=log)

    def wait(self) -> list[int]:
        """The exit codes."""
        codes = join(self.ranks)
        assert None not in codes, f"still running after {GUARD} s:\n{self.text}"
        return codes

    def signal(self, number: int, rank: int | None = None) -> None:
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def gone(self) -> bool:
        return not any(process.is_alive() for process in self.ranks)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def losses(self) -> list[float]:
        return [float(x) for x in re.findall(r"^Step \d+: loss=([\d.]+|nan|inf)", self.text, re.M)]


def train(folder: Path, *args: str, nproc: int = 1, code: int = 0, env: dict[str, str] | None = None, config="") -> Run:
    """Run to the end and insist on the exit code."""
    run = Run(list(args), nproc, folder, env, config)
    codes = run.wait()
    assert codes == [code] * nproc, f"exit codes {codes}, expected {code}:\n{run.text}"
    return run


def _on_rank(function: Callable, args: tuple) -> int | None:
    return function(int(os.environ.get("RANK", 0)), *args)


def on_ranks(nproc: int, function: Callable, *args: object) -> None:
    """function(rank, *args) in each of nproc ranks that may form a process group; all of them end well."""
    ranks = start(nproc, free_port(), _on_rank, function, args)
    try:  # the others of one that fails would wait for it
        until(lambda: any(codes := [rank.exitcode for rank in ranks]) or None not in codes)
    finally:
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
    assert codes == [0] * nproc, codes


def program(folder: Path, name: str, *args: object, nproc: int = 1) -> tuple[list[int], str, str]:
    """`python NAME.py ARGS` in each of nproc ranks: exit codes, stdout and stderr of all."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err = (folder / f"{stream}-{time.monotonic_ns()}" for stream in ("out", "err"))
    codes = join(start(nproc, free_port(), _program, name, [*map(str, args)], streams=(out, err)))
    return codes, out.read_text(), err.read_text()


STANDALONE = ("--standalone", "--nproc_per_node=2")


class Launch(Started):
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
        command = [*prefix, sys.executable, *(["-m", module, *flags] if module else []), str(script), str(config)]
        command += [*TINY, f"output_dir={folder}/out", f"logging_dir={folder}/logs", *args]
        self.module, self.log = module, log or folder / "log"
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

    def gone(self) -> bool:
        """Nor is any of its ranks left, which torchrun's death does not end at once."""
        return self.over() and not self.processes()

    def send(self, number: int, *pids: int) -> None:
        """To these processes, or to all."""
        for pid in pids or self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
