"""Two runs compared step by step, bit for bit: `python bench.py losses A B`.

A and B are a trace.jsonl, the folder of one, or a commit, whose demo is then run for some steps in a worktree of its own.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from configs import ConfigError
from refocused.arguments import parse_with_settings, positive
from refocused.entry import ROOT
from refocused.run.trace import Lines, Trace

Steps = dict[int, dict[str, Any]]  # {step: what the trace says of it}


def read(place: Path) -> Steps:
    """A trace's steps, of one that was run again the last. Raises ConfigError."""
    file = place / "trace.jsonl" if place.is_dir() else place
    try:
        steps = {line["step"]: line for line in Lines(file) if "event" not in line}
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not steps:
        raise ConfigError(f"{file} has no line of a step")
    return steps


def compare(a: Steps, b: Steps) -> tuple[int, str | None]:
    """(how many steps both have, the first of them that differs, in words, or None), in the figures that both have."""
    both = sorted(a.keys() & b.keys())
    for step in both:
        for key in Trace.COMPARED:
            x, y = a[step].get(key), b[step].get(key)
            if x != y and x is not None and y is not None:
                if name := key.removesuffix("_hex") * key.endswith("_hex"):
                    x, y = float.fromhex(x), float.fromhex(y)
                return len(both), f"step {step}: {name or key} {x!r} and {y!r}"
    return len(both), None


def git(*args: str) -> None:
    """Raises ConfigError with what git says."""
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"git {args[0]} {args[-1]}: {done.stderr.strip()}")


def of_commit(commit: str, steps: int, nproc: int, settings: list[str]) -> Steps:
    """The first steps of the demo at a commit, its schedule as it is; the run is stopped behind them.

    Raises ConfigError where there is no such commit, or its run ends before.
    """
    with tempfile.TemporaryDirectory(prefix="losses-") as temporary:
        tree, trace, log = (Path(temporary, name) for name in ("tree", "logs/trace.jsonl", "log"))
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] * (nproc > 1)
            keys = [f"data_dir={ROOT / 'data/demo'}", f"output_dir={temporary}/out", f"logging_dir={temporary}/logs"]
            keys = ["configs/demo.py", "resume=none", "eval_steps=0", "save_steps=0", *keys, *settings]
            with log.open("wb") as out:
                run = subprocess.Popen([sys.executable, *torchrun, "train.py", *keys], cwd=tree, stdout=out, stderr=out)
            try:
                while run.poll() is None and not (trace.exists() and trace.read_bytes().count(b"\n") > steps):
                    time.sleep(0.1)
            finally:
                run.terminate()
                run.wait()
            if not trace.exists() or trace.read_bytes().count(b"\n") < 2:  # the first line is the start's
                raise ConfigError(f"the demo does not run at {commit}: {log.read_text(errors='replace')[-1000:]}")
            return {step: line for step, line in read(trace).items() if step <= steps}
        finally:
            git("worktree", "remove", "--force", str(tree))


def main(argv: list[str]) -> int:
    """0 where every step that both have is the same, 1 at the first that differs."""
    parser = argparse.ArgumentParser(prog="bench.py losses", description="The first step in which two runs differ.")
    parser.add_argument("A", help="a trace.jsonl, the folder that it is in, or a commit")
    parser.add_argument("B", help="the same")
    parser.add_argument("--steps", type=positive, default=20, help="of the demo, at a commit (default: %(default)s)")
    parser.add_argument("--nproc", type=positive, default=2, help="processes of that run (default: %(default)s)")
    args = parse_with_settings(parser, argv)
    a, b = (
        read(Path(place)) if Path(place).exists() else of_commit(place, args.steps, args.nproc, args.settings)
        for place in (args.A, args.B)
    )
    count, difference = compare(a, b)
    if not count:
        raise ConfigError(f"{args.A} and {args.B} have no step in common")
    print(difference or f"{count:,} steps, {count:,} identical")
    return 1 if difference else 0
