"""Two runs compared step by step, bit for bit: `python bench.py losses A B`.

A and B are a trace.jsonl, or the folder of one.
"""

import argparse
from pathlib import Path
from typing import Any

from configs import ConfigError
from refocused.run.trace import Lines, Trace


def read(place: Path) -> dict[int, dict[str, Any]]:
    """{step: what the trace says of it}, of a step that was run again the last. Raises ConfigError."""
    file = place / "trace.jsonl" if place.is_dir() else place
    try:
        steps = {line["step"]: line for line in Lines(file) if "event" not in line}
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not steps:
        raise ConfigError(f"{file} has no line of a step")
    return steps


def compare(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> tuple[int, str | None]:
    """(how many steps both have, the first of them that differs, in words, or None)."""
    both = sorted(a.keys() & b.keys())
    for step in both:
        for key in Trace.COMPARED:
            if a[step].get(key) != b[step].get(key):
                name = key.removesuffix("_hex")
                return len(both), f"step {step}: {name} {a[step].get(name)} and {b[step].get(name)}"
    return len(both), None


def main(argv: list[str]) -> int:
    """0 where every step that both have is the same, 1 at the first that differs."""
    parser = argparse.ArgumentParser(prog="bench.py losses", description="The first step in which two runs differ.")
    parser.add_argument("A", type=Path, help="a trace.jsonl, or the folder that it is in")
    parser.add_argument("B", type=Path)
    args = parser.parse_args(argv)
    count, difference = compare(read(args.A), read(args.B))
    if not count:
        raise ConfigError(f"{args.A} and {args.B} have no step in common")
    print(difference or f"{count:,} steps, {count:,} identical")
    return 1 if difference else 0
