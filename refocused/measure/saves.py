"""What a checkpoint costs the training loop: `python bench.py save`."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import configs
import model as neox
from configs import Config
from refocused.checkpoint import manifest
from refocused.checkpoint.saver import Saver
from refocused.checkpoint.tensors import state_tree
from refocused.entry import positive
from refocused.run import processes, strategy
from refocused.run.origin import hardware


def save_rows(cfg: Config, folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds for which training stands still for one save of cfg's state, ours and two plain ways."""
    env = processes.start(cfg)
    model = strategy.build(cfg, env)
    tree = state_tree(model, torch.optim.AdamW(model.parameters(), fused=True))
    saver = Saver(folder, save_total_limit=1)
    saver.reserve(tree)
    host = {key: t.clone() for key, t in tree.items()}
    seconds: dict[str, list[float]] = {"ours": [], "copy": [], "torch.save": [], "behind": []}
    for i in range(rounds + 1):  # the first round finds cold caches
        begin = time.perf_counter()
        for key, t in tree.items():
            host[key].copy_(t)
        copied = time.perf_counter()
        torch.save(tree, folder / "torch.pt")
        saved = time.perf_counter()
        saver.save(manifest.name(0, i + 1, 0), tree, {"step": i + 1})
        if error := saver.wait():
            raise RuntimeError(error)
        for key, value in zip(
            seconds, (saver.stall_seconds, copied - begin, saved - copied, saver.write_seconds), strict=True
        ):
            seconds[key].append(value)
    assert saver.last
    written = sum(f.stat().st_size for f in (folder / saver.last).iterdir())
    saver.close()
    processes.stop()
    row: dict[str, float] = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    return row | {"parameters": neox.num_parameters(cfg)[0], "bytes": written}


def main(argv: list[str]) -> int:
    """Two sizes, each in this process; files go to a temporary folder below --folder."""
    parser = argparse.ArgumentParser(prog="bench.py save", description="What a checkpoint costs training.")
    parser.add_argument("--folder", default=".", help="where the files are written, and removed again")
    parser.add_argument("--rounds", type=positive, default=7)
    options = parser.parse_args(argv)
    demo = configs.DEMO
    wide = (
        "hidden_size=1024 num_hidden_layers=8 num_attention_heads=16 intermediate_size=4096 vocab_size=50257 "
        "tokenizer=gpt2 num_processes=1"
    )
    print(hardware())
    print(f"median of {options.rounds} saves; milliseconds for which training stands still\n")
    print("| parameters | ours | a plain copy in memory | torch.save | ours / copy | ours / torch.save "
          "| ours, until on disk | bytes per parameter |")  # fmt: skip
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for settings in ("", wide):
        cfg, _ = configs.load([str(demo), *settings.split()])
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
            row = save_rows(cfg, Path(folder), options.rounds)
        ms = [f"{1000 * row[key]:,.1f}" for key in ("ours", "copy", "torch.save", "behind")]
        ratios = [f"{row['ours'] / row[key]:.2f}" for key in ("copy", "torch.save")]
        size = f"{row['parameters'] / 1e6:,.1f}M"
        cells = [size, *ms[:3], *ratios, ms[3], f"{row['bytes'] / row['parameters']:.3f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    return 0
