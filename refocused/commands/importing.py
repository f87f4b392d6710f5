"""Weights made elsewhere -> a checkpoint to start from: `python ckpt.py import`.

python ckpt.py import HF_FOLDER OUT
python ckpt.py import ACCELERATE_FOLDER OUT --config FILE.py
"""

import argparse
import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import torch

import configs
from configs import Config, ConfigError
from refocused.checkpoint import huggingface, manifest, tensors
from refocused.checkpoint.manifest import CheckpointError
from refocused.checkpoint.source import Source, advice, is_hf
from refocused.checkpoint.weights import load
from refocused.commands.export import check_free, coming
from refocused.entry import here
from refocused.run import processes
from refocused.shards import tokenizers
from refocused.shards.prepare import FINE_TUNING


def read(place: str, config: str | None) -> Source:
    """The folder's shape by its config.json, or by a config file of ours. Raises ConfigError, CheckpointError."""
    path = Path(os.path.abspath(place))
    if is_hf(path):
        if config:
            raise ConfigError(f"{place} has a config.json, which says what model it is; leave --config out")
        return huggingface.source(path)
    if not config or not path.is_dir():
        why = f"{place} has no config.json: not a Hugging Face folder"
        if not path.is_dir():
            way = here(f"hf download ORG/{path.name} --local-dir {shlex.quote(place)}")
            why = f"{place} is no folder; `{way}` makes one of a model on the hub"
        raise CheckpointError(advice(place) or why)
    cfg, _ = configs.load([config])
    return Source(path, cfg, {}, tokenizers.find(cfg.tokenizer).end if cfg.tokenizer else None)


def main(argv: list[str]) -> int:
    """ckpt.py import; returns the exit code. Raises ConfigError, CheckpointError."""
    parser = argparse.ArgumentParser(prog="ckpt.py import", description="A GPT-NeoX folder as a checkpoint.")
    parser.add_argument("folder", metavar="FOLDER", help="a folder with config.json and safetensors, such as Pythia's")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, for init_from=OUT")
    parser.add_argument("--config", metavar="FILE.py", help="the model's config, for Accelerate's folders without one")
    args = parser.parse_args(argv)
    check_free(args.out)
    processes.warn_if_busy(torch.device("cpu"), torch.get_num_threads(), "")
    source = read(args.folder, args.config)
    cfg, model = source.cfg, load(source)
    state: dict[str, Any] = {"step": 0, "eos_token_id": source.end, "config": dataclasses.asdict(cfg)}
    if not args.config:
        state["imported_from"] = source.path.name  # so its tokenizer is the one beside it, or not known
    final = manifest.name(0, 0, 0)
    with coming(args.out) as folder:
        tensors.save_alone(folder / final, tensors.state_tree(model), state, files=tokenizers.own_files(cfg))
    print(f"{source} -> {args.out / final}")
    if args.config:
        left = [path.name for path in sorted(source.path.iterdir()) if not path.name.endswith(".safetensors")]
        print(f"weights alone come along: optimizer and schedule start fresh at step 0, without {', '.join(left)}")
    elif cfg.tokenizer:
        tokenizer = shlex.quote(str(args.out))
        print(f"make shards for it with: {here(f'python data.py tokenize TEXTS SHARDS --tokenizer {tokenizer}')}")
    else:
        print(f"without a tokenizer: {args.folder} has no {tokenizers.FILE}; nothing says which text its ids are")
    print(f"train from it with: {train_command(args.out, cfg, args.config)}")
    return 0


def train_command(start: Path, cfg: Config, config: str | None) -> str:
    """A whole command that trains from an imported checkpoint: what differs from the config file that it starts from."""
    base, _ = configs.load([config or str(configs.DEMO)])
    keys = [key for key in (*huggingface.MODEL_KEYS, "sequence_length") if getattr(base, key) != getattr(cfg, key)]
    places = {"init_from": start, "output_dir": f"out/{start.name}", "logging_dir": f"logs/{start.name}"}
    if not config:
        places |= {"data_dir": "SHARDS", "tokenizer": start if cfg.tokenizer else "none"}
        places["learning_rate"] = FINE_TUNING  # a config file has its own
    settings = [*places.items(), *((key, getattr(cfg, key)) for key in keys)]
    words = [config or "configs/demo.py", *(f"{key}={value}" for key, value in settings)]
    return here(f"python train.py {shlex.join(words)}")
