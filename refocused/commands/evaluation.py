"""A checkpoint's or a Hugging Face folder's loss on held-out windows: `python ckpt.py eval`.

python ckpt.py eval CHECKPOINT [key=value ...] [--json]
torchrun --standalone --nproc_per_node=2 ckpt.py eval CHECKPOINT
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

import ckpt
import configs
import data
from configs import Config, ConfigError
from refocused.arguments import parse_with_settings
from refocused.checkpoint import huggingface, weights
from refocused.checkpoint.source import Source, is_hf
from refocused.run import devices, exits, failures, processes
from refocused.run.evaluate import Score, evaluate
from refocused.shards.shard import DataError
from refocused.shards.tokenizers import separator


def figures(found: Score) -> dict[str, Any]:
    loss = {"loss": found.mean, "perplexity": math.exp(min(found.mean, 700)), "bits_per_byte": found.bits_per_byte}
    return {**loss, "tokens": int(found.tokens), "bytes": int(found.bytes)}


def line(found: Score) -> str:
    loss, perplexity, bits, tokens, size = figures(found).values()
    shown = "n/a, by this tokenizer" if bits is None else f"{bits:.4f}"
    return f"loss {loss:.4f} | perplexity {perplexity:.2f} | bits per byte {shown} | {tokens:,} tokens, {size:,} bytes"


def seen(source: Source, cfg: Config, dataset: data.Dataset) -> bool:
    """Whether the run, as far as the checkpoint knows it, may have trained on what is held out here."""
    tail = not {*dataset.shards}.isdisjoint(dataset.eval_shards)  # of a shard, whose begin depends on sequence_length
    return source.trained_on is not None and (
        source.trained_on != dataset.fingerprint
        or cfg.eval_files > source.cfg.eval_files
        or (tail and cfg.sequence_length != source.cfg.sequence_length)
    )


def main(argv: list[str]) -> int:
    """ckpt.py eval. Raises ConfigError, CheckpointError, DataError, BucketError."""
    parser = argparse.ArgumentParser(prog="ckpt.py eval", description="The loss on the windows that are held out.")
    place = "a checkpoint, a folder of checkpoints (the last one), a Hugging Face folder, or gs://..."
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=place)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parse_with_settings(parser, argv)
    values = {key: configs.parse(key, text) for key, text in (word.split("=", 1) for word in options.settings)}
    if fixed := [key for key in values if key in huggingface.MODEL_KEYS]:
        raise ConfigError(f"{fixed[0]}={values[fixed[0]]}: the model is the checkpoint's; leave {', '.join(fixed)} out")
    machine = {key: values[key] for key in ("cpu_threads", "deterministic") if key in values}
    env = processes.start(Config(**machine))
    if env.main:
        print(f"reading {options.checkpoint}", file=sys.stderr, flush=True)
        processes.warn_if_busy(env.device, env.threads)
    try:
        place = options.checkpoint
        source = processes.on_rank_0(huggingface.source if is_hf(Path(place)) else ckpt.find, place)
        cfg = dataclasses.replace(source.cfg, **values)
        devices.check_precision(cfg, env.device)
        if env.main and (note := devices.precision_note(cfg, env.device)):
            print(f"note: {note}", file=sys.stderr, flush=True)
        processes.on_each_node(env, data.unpack, cfg)
        dataset = data.open_dataset(cfg)
        if not dataset.num_eval_samples:
            raise DataError(f"eval_files={cfg.eval_files} holds nothing out; set eval_files=1 or more")
        count = len(dataset.eval_ids(cfg.eval_samples))
        windows = f"{count:,} windows of {cfg.sequence_length:,}"
        if env.main:
            print(f"{source}, on {windows} of {cfg.data_dir}", file=sys.stderr, flush=True)
        model = weights.load(source).to(env.device)
        model.end = separator(cfg)
        batches = math.ceil(count / cfg.per_device_train_batch_size / env.world_size)
        with tqdm(total=batches, unit="batch", disable=None if env.main else True) as bar:
            found = evaluate(model, dataset, cfg, env, each_batch=bar.update)
    except Exception as error:
        code, text = failures.explain(error)
        failures.report(error, lambda: print(text, file=sys.stderr, flush=True))
        return exits.leave(code, text)
    processes.stop()
    if not env.main:
        return 0
    assert found, "a stop is never asked for here"
    if seen(source, cfg, dataset):
        print("note: the run held out other data; what is read here may have been trained on", file=sys.stderr)
    if options.json:
        report = {"checkpoint": str(source.path), "step": source.state.get("step"), "data_dir": cfg.data_dir}
        report |= {"windows": count, "sequence_length": cfg.sequence_length, "mask_documents": cfg.mask_documents}
        print(json.dumps({**report, **figures(found)}))
    else:
        apart = ", documents apart" if cfg.mask_documents else ""
        print(f"{source}\n{cfg.data_dir}: {windows}{apart}\n{line(found)}")
    return 0
