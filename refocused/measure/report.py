"""Runs in a picture and in figures, from the trace.jsonl in their logging_dir: report.png, and lines on the screen.

    python bench.py report LOGDIR [LOGDIR ...] [out=FOLDER] [--price DOLLARS]

The panels follow the branch that the last run was on. The lines give what the time of all runs went to, with a price also
in dollars, and the keys in which the configs differ.
"""

import argparse
import io
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs import ConfigError
from refocused.entry import here
from refocused.run.logs import TRACE
from refocused.run.trace import Lines, goodput, sentence

BINS = 500  # points of a drawn curve; more steps than that become means, with their range as a band
PANELS = {
    "loss": "loss",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
    "grad_norm": "gradient norm before clipping",
}
MARKS = {  # kind: its name in the legend, its shape, and at which height of each panel it stands, None for its own
    "checkpoint": ("checkpoint", "^", 0.015),
    "resume": ("resume", "--", None),
    "eval": ("evaluation", "o", None),
    "spike": ("spike", "*", 0.97),
    "bad": ("not finite", "x", 0.97),
    "skip": ("skipped", "v", 0.97),
}
WRITER = "bench.py report"  # stands near the beginning of its picture: another report.png is somebody's
PLACES = ("output_dir", "logging_dir", "resume")  # in which two runs always differ

Node = tuple[dict[str, Any], Any]  # a line of a trace and the node before it, None at the beginning


class ReportError(ValueError):
    """No trace where one was named, or none that says anything."""

    exit_code = 66


@dataclass
class Run:
    """What a trace says, each step once."""

    name: str  # its folder
    series: dict[str, dict[int, float]] = field(default_factory=lambda: {key: {} for key in PANELS})  # key: step: value
    marks: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in MARKS})  # kind: sorted steps
    eval_loss: dict[int, float] = field(default_factory=dict)
    skipped: int = 0  # lines that could not be read
    config: dict[str, Any] = field(default_factory=dict)  # of the last start; {} where the trace does not say
    seconds: dict[str, float] = field(default_factory=dict)  # see goodput; {} where the trace does not say


def number(value: Any) -> float:
    """As the trace has it: "nan" and "inf" are text."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def branch(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps and events on the way to where the last run is.

    A run that went back to a checkpoint leaves what lay beyond it, even where another one had gone on; steps that it ran
    again identically, and their events, were not written again.
    """
    standing: dict[int, list[dict[str, Any]]] = {}  # step: its lines as they were written last
    kept: dict[str, Node | None] = {}  # checkpoint: the way to it
    head: Node | None = None
    before: Node | None = None  # the way that the run before the last one had come
    at = begun = 0  # the step of head; where the last run began
    for line in lines:
        step, kind, name = line["step"], line.get("event"), line.get("checkpoint")
        if kind in ("start", "resume"):
            before, begun, at = head, step, step
            if kind == "start":
                head = None
            elif isinstance(name, str) and name in kept:
                head = kept[name]
            else:
                way, head = chain(head), None
                for old in (old for old in way if old["step"] <= step):
                    head = (old, head)
            head = (line, head)
            continue
        own = kind in (None, "skip")  # a line that says what a step was
        between = range(at + 1, step + (not own))
        for again in between if len(between) < len(standing) else sorted(s for s in standing if s in between):
            for old in standing.get(again, ()):
                head = (old, head)
        at = max(at, step)
        if kind == "clock":
            continue
        standing[step] = [line] if own else [*standing.get(step, ()), line]
        head = (line, head)
        if kind == "checkpoint" and isinstance(line.get("name"), str):
            kept[line["name"]] = head
    if at == begun and head and before:  # nothing is known of the last run yet
        head = (head[0], before)
    return chain(head)


def chain(head: Node | None) -> list[dict[str, Any]]:
    """The lines on the way to a node, the first one first."""
    way = []
    while head:
        way.append(head[0])
        head = head[1]
    return way[::-1]


def read(folder: Path) -> Run:
    """The run whose trace.jsonl is in `folder`; a last line that a kill has cut is not there. Raises ReportError."""
    path = folder / TRACE
    found = Lines(path)
    try:
        lines = list(found)
    except OSError as error:
        below = ", ".join(sorted(str(p.parent) for p in folder.rglob(TRACE))[:5]) if folder.is_dir() else ""
        hint = f"there is one in {below}" if below else "name the logging_dir of a run"
        raise ReportError(f"cannot read {path}: {error.strerror}; {hint}") from error
    clocks = [line for line in lines if line.get("event") == "clock"]
    run = Run(str(folder), skipped=found.unreadable, seconds=goodput(clocks) if clocks else {})
    way = branch(lines)
    steps = {line["step"]: line for line in way if "event" not in line}
    if not steps:
        raise ReportError(f"{path} has no whole line of a step yet")
    for step, line in steps.items():
        for key in PANELS:
            if line.get(key) is not None:
                run.series[key][step] = number(line[key])
        if not math.isfinite(run.series["loss"].get(step, 0) + run.series["grad_norm"].get(step, 0)):
            run.marks["bad"].append(step)
        elif line.get("verdict"):
            run.marks["spike"].append(step)
    for event in (line for line in way if "event" in line):
        step, kind = event["step"], event["event"]
        if kind in MARKS:
            run.marks[kind].append(step)
        if kind == "eval" and "loss" in event:
            run.eval_loss[step] = number(event["loss"])
        if isinstance(event.get("config"), dict):
            run.config = event["config"]
    run.marks = {kind: sorted(set(found)) for kind, found in run.marks.items()}
    return run


def label(runs: list[Run]) -> None:
    """Name the runs by what is left of their paths below the folder that all are in."""
    paths = [Path(run.name).absolute() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    for run, path in zip(runs, paths, strict=True):
        run.name = str(path.relative_to(common))


def bins(series: dict[int, float], count: int = BINS) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) of at most `count` stretches of equal length; what is not finite is left out."""
    points = sorted((step, value) for step, value in series.items() if math.isfinite(value))
    size = -(-len(points) // count) or 1
    stretches = [zip(*points[i : i + size], strict=True) for i in range(0, len(points), size)]
    return [(statistics.fmean(steps), statistics.fmean(v), min(v), max(v)) for steps, v in stretches]


def draw(runs: list[Run]) -> bytes:
    """The four panels as a PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(13, 8), dpi=110)
    figure.subplots_adjust(left=0.05, right=0.985, top=0.96, bottom=0.13, wspace=0.12, hspace=0.15)
    axes = dict(zip(PANELS, figure.subplots(2, 2, sharex=True).flat, strict=True))
    for key, ax in axes.items():
        across = {"transform": ax.get_xaxis_transform()}  # heights in units of the axis, whatever the curve does
        for i, run in enumerate(runs):
            colour = f"C{i % 10}"
            if curve := bins(run.series[key]):
                x, mean, low, high = zip(*curve, strict=True)
                ax.plot(x, mean, color=colour, linewidth=1.3, marker="." if len(x) < 3 else None)
                ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            ax.vlines(run.marks["resume"], 0, 1, color=colour, linestyle="--", linewidth=0.9, alpha=0.8, **across)
            for kind, (_, shape, height) in MARKS.items():
                if height is not None:
                    at = run.marks[kind]
                    ax.plot(at, [height] * len(at), shape, color=colour, ms=6, clip_on=False, **across)
            if key == "loss":
                ax.plot([*run.eval_loss], [*run.eval_loss.values()], "o", color=colour, mec="black", ms=5)
        if not any(run.series[key] for run in runs):
            ax.text(0.5, 0.5, "not in the trace", transform=ax.transAxes, ha="center", color="gray")
        ax.set_title(PANELS[key], fontsize=11)
        ax.grid(alpha=0.25)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes["grad_norm"].set_yscale("log")
    axes["tokens_per_second"].yaxis.set_major_formatter(EngFormatter())
    axes["tokens_per_second"].set_ylim(bottom=0)
    for ax in figure.axes[2:]:
        ax.set_xlabel("step")
    handles = [Line2D([], [], color=f"C{i % 10}", label=run.name) for i, run in enumerate(runs)]
    for kind, (name, shape, _) in MARKS.items():
        if any(run.marks[kind] for run in runs):
            style: dict[str, Any] = {"ls": shape} if kind == "resume" else {"ls": "", "marker": shape}
            handles.append(Line2D([], [], color="gray", label=name, **style))
    figure.legend(handles=handles, loc="lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": WRITER})
    return buffer.getvalue()


def figures(run: Run, price: float) -> dict[str, str]:
    """A run in a few words; price: dollars per hour, 0 for none."""

    def listed(steps: list[int]) -> str:
        shown = "..., " * (len(steps) > 5) + ", ".join(f"{s:,}" for s in steps[-5:])
        return f"{len(steps)} (step {shown})" if steps else ""

    loss, norm = bins(run.series["loss"], 100), bins(run.series["grad_norm"], 1)
    speeds = [v for v in run.series["tokens_per_second"].values() if math.isfinite(v)]
    steps = run.series["loss"] or run.series["lr"]
    finite = (item for item in run.eval_loss.items() if math.isfinite(item[1]))
    best = min(finite, key=lambda item: item[1], default=None)
    marks = {name: listed(run.marks[kind]) for kind, (name, *_) in MARKS.items() if kind != "eval"}
    found = {
        "steps": f"{min(steps):,} to {max(steps):,}" if steps else "",
        "loss, mean of the last hundredth": f"{loss[-1][1]:.4f}" if loss else "",
        "best held-out loss": f"{best[1]:.4f} (step {best[0]:,})" if best else "",
        "tokens per second, median": f"{statistics.median(speeds):,.0f}" if speeds else "",
        "gradient norm, mean and largest": f"{norm[0][1]:.3g}, {norm[0][3]:.3g}" if norm else "",
        **marks,
        "unreadable lines skipped": f"{run.skipped or ''}",
        "time of all runs": sentence(run.seconds, price) if run.seconds else "",
    }
    return {name: value for name, value in found.items() if value}


def differences(runs: list[Run]) -> list[str]:
    """A line for each key in which configs differ, with the value of each run whose trace has its config."""
    known = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in known for key in run.config if key not in PLACES)
    values = {key: [str(run.config.get(key, "-")) for run in known] for key in keys}
    return [
        f"{key}: {', '.join(f'{value} ({run.name})' for run, value in zip(known, found, strict=True))}"
        for key, found in values.items()
        if len(set(found)) > 1
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.py report", description="Runs in a picture and in figures.")
    parser.add_argument("LOGDIR", nargs="+", type=Path, help="the logging_dir of a run")
    parser.add_argument("--out", type=Path, help="a folder for report.png (default: the first LOGDIR)")
    parser.add_argument("--price", type=float, default=0.0, help="dollars per hour of all machines together")
    args = parser.parse_args([f"--{a}" if a.startswith(("out=", "price=")) else a for a in argv])
    out = (args.out or args.LOGDIR[0]) / "report.png"
    runs = [read(folder) for folder in args.LOGDIR]
    label(runs)
    try:
        if out.exists() and WRITER.encode() not in out.read_bytes()[:1000]:
            raise ConfigError(f"{out} was not written by {WRITER} and stays; name another folder with --out")
        png = draw(runs)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(png)
    except ImportError as error:
        raise ConfigError(f"pictures need matplotlib: `{here('pip install matplotlib')}`") from error
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from error
    for run in runs:
        print(run.name, *(f"  {name}: {value}" for name, value in figures(run, args.price).items()), sep="\n")
    print(*differences(runs), out, sep="\n")
    return 0
