"""Text from a trained model: a checkpoint of ours, local or in a bucket, or a Hugging Face folder.

python sample.py prompt="def "                                      the newest checkpoint of configs/demo.py
python sample.py configs/production.py resume=NAME prompt=FILE:prompts.txt temperature=0
python sample.py resume=EXPORTED_FOLDER max_new_tokens=500
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
from refocused import entry  # before all others: it says what this machine lacks

# isort: split
import dataclasses
import time
from pathlib import Path

import torch
from tqdm import tqdm

import ckpt
import configs
from configs import Config, ConfigError
from model import num_parameters
from refocused.bucket import start
from refocused.checkpoint import huggingface, selection, weights
from refocused.checkpoint.source import Source, is_hf
from refocused.run import devices, processes
from refocused.run.generation import Options, generate
from refocused.shards import tokenizers
from refocused.shards.tokenizers import Tokenizer

SMALL = 20_000_000  # parameters below which a second thread gains nothing, and only waits on a busy machine


def parse(argv: list[str]) -> tuple[Config, Options]:
    """The run's config, which says where its checkpoints are, and what to sample. Raises ConfigError."""
    known, texts, others = configs.types_of(Options), {}, []
    for word in argv:
        key, _, text = word.removeprefix("--").partition("=")
        if configs.is_setting(word) and key not in known and key not in configs.KEYS:
            near = configs.nearest(key, [*known, *configs.KEYS])
            raise ConfigError(f"unknown key {key!r}{near}; `{entry.here('python sample.py --help')}` lists them")
        if "=" in word and key in known:
            texts[key] = text
        else:
            others.append(word)
    return configs.load(others)[0], Options(**{key: configs.parse(key, text, Options) for key, text in texts.items()})


def read_prompts(prompt: str) -> list[str]:
    if not prompt.startswith("FILE:"):
        return [os.fsencode(prompt).decode(errors="replace")]  # a command line need not be UTF-8
    try:
        text = Path(prompt.removeprefix("FILE:")).expanduser().read_text(encoding="utf-8-sig")  # without a BOM
        prompts = text.removesuffix("\n").split("\n") if text else []  # only these end a line, not U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt={prompt} cannot be read: {error}") from error
    if not prompts:
        raise ConfigError(f"prompt={prompt} has no line; each line is a prompt")
    return prompts


def locate(cfg: Config) -> Source:
    """What cfg.resume (latest if unset) names: a checkpoint in output_dir or the bucket, or any path or gs:// place."""
    resume = cfg.resume or "latest"
    if is_hf(Path(resume)):
        return huggingface.source(resume)
    if resume.startswith("gs://") or selection.names(resume):
        return ckpt.find(resume)
    if cfg.bucket_name and cfg.checkpoint_bucket_path:
        chosen = start.choose(dataclasses.replace(cfg, resume=resume))
        if chosen.path and not chosen.state:
            chosen = selection.read(start.pull(cfg, chosen), chosen.passed_over)
    else:
        chosen = selection.choose(cfg.output_dir, resume)
    for name, why in chosen.passed_over:
        print(f"passed over {name}: {why}", file=sys.stderr)
    if chosen.path is None:
        raise ckpt.CheckpointError(f"no checkpoint in {cfg.output_dir}; train first, or name one with resume=PATH")
    return Source.of(chosen.path, chosen.state)


def encode(prompts: list[str], tokenizer: Tokenizer, cfg: Config) -> list[list[int]]:
    """The prompts' ids; of an empty one end-of-text, behind which a document begins. Raises ConfigError."""
    rows = [tokenizer.encode(prompt) or [tokenizer.end] for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if max(row) >= cfg.vocab_size:
            why = f"has token {max(row)}, the model {cfg.vocab_size} ids: this is not the tokenizer of its training"
            raise ConfigError(f"prompt {prompt[:40]!r} {why}")
    return rows


def command(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        usage = __doc__.replace("python sample.py", entry.here("python sample.py"))
        last = f"and every key of `{entry.here('python train.py --help')}`"
        print(usage, *configs.key_table(Options), "", last, sep="\n")
        return 0
    cfg, options = parse(argv)
    prompts = [p for p in read_prompts(options.prompt) for _ in range(options.num_samples)]
    source = locate(cfg)
    if not source.cfg.tokenizer:
        raise ConfigError(f"{source.path} does not know its tokenizer: nothing says which text its tokens are")
    tokenizer = tokenizers.find(source.cfg.tokenizer)
    rows = encode(prompts, tokenizer, source.cfg)
    device = devices.any_device()
    if device.type == "cpu" and (cfg.cpu_threads or num_parameters(source.cfg)[0] < SMALL):
        torch.set_num_threads(cfg.cpu_threads or 1)
    processes.warn_if_busy(device, torch.get_num_threads())
    dtype = options.dtype if options.dtype != "auto" else "fp32" if device.type == "cpu" else "bf16"
    model = weights.load(source).to(device, weights.DTYPES[dtype]).eval()
    write(model, source, tokenizer, prompts, rows, options)
    return 0


def write(model, source, tokenizer, prompts, rows, options) -> None:
    """Continue the prompts, whose ids are rows: the texts to stdout as batches are done, the speed to stderr."""
    weight = model.embed_in.weight
    print(f"{source}, {weight.device.type}, {str(weight.dtype).removeprefix('torch.')}", file=sys.stderr)
    window = options.window or model.cfg.max_position_embeddings
    if (most := max(map(len, rows)) + options.max_new_tokens - 1) > window:
        print(f"{most:,} tokens in a window of {window:,}: the oldest are forgotten as it fills", file=sys.stderr)
    count, begin = 0, time.perf_counter()
    for first in range(0, len(rows), options.batch_size):
        part = slice(first, first + options.batch_size)
        texts = [list(row) if prompt else [] for row, prompt in zip(rows[part], prompts[part], strict=True)]
        steps = generate(model, rows[part], options, source.end)
        for tokens in tqdm(steps, total=options.max_new_tokens, unit="token", leave=False, disable=None):
            for ids, token in zip(texts, tokens, strict=True):
                ids += [token] if token is not None else []
                count += token is not None
        for i, ids in enumerate(texts, first + 1):
            text = tokenizer.decode([i for i in ids if i < tokenizer.size])  # others only pad a model's vocabulary
            print(f"--- {i} of {len(rows)}\n{text}" if len(rows) > 1 else text, flush=True)
    speed = count / (time.perf_counter() - begin)
    print(f"{count:,} tokens after {sum(map(len, rows)):,} of prompt: {speed:,.0f} tokens/s", file=sys.stderr)


def main(argv: list[str]) -> int:
    return entry.run(command, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
