"""Text from a trained model: a checkpoint of ours, local or in a bucket, or a Hugging Face folder.

python sample.py prompt="def "                                      the newest checkpoint of configs/demo.py
python sample.py configs/production.py resume=NAME prompt=FILE:prompts.txt temperature=0
python sample.py resume=EXPORTED_FOLDER max_new_tokens=500
"""

from refocused import entry  # before all others: it says what this machine lacks

# isort: split
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ckpt
import configs
from configs import Config, ConfigError
from model import num_parameters
from refocused.bucket import start
from refocused.checkpoint import folder, huggingface, selection
from refocused.checkpoint.folder import Source
from refocused.run import devices, processes
from refocused.run.generation import Options, generate
from refocused.shards import tokenizers
from refocused.shards.tokenizers import Stream, Tokenizer

SMALL = 20_000_000  # parameters below which a second thread gains nothing, and only waits on a busy machine


class Writer:
    """Writes several texts to one output: the first unfinished one as it grows, the others when their turn comes."""

    def __init__(self, tokenizer: Tokenizer, starts: list[list[int]], heads: list[str], out: Callable[[str], object]):
        """starts: the ids that a text begins with, its prompt's; heads: what stands before each text."""
        self.streams, self.out = [Stream(tokenizer) for _ in heads], out
        begun = zip(heads, self.streams, starts, strict=True)
        self.waiting = [head + stream.add(ids) for head, stream, ids in begun]  # text not yet written
        self.done = [False] * len(heads)
        self.turn = 0
        self._write()

    def add(self, tokens: list[int | None]) -> None:
        """A token for each text; None where it has ended."""
        for i, token in enumerate(tokens):
            if token is not None:
                self.waiting[i] += self.streams[i].add([token])
            elif not self.done[i]:
                self.waiting[i] += self.streams[i].close() + "\n"
                self.done[i] = True
        self._write()

    def close(self) -> None:
        self.add([None] * len(self.done))

    def _write(self) -> None:
        while self.turn < len(self.done):
            self.out(self.waiting[self.turn])
            self.waiting[self.turn] = ""
            if not self.done[self.turn]:
                break
            self.turn += 1


def parse(argv: list[str]) -> tuple[Config, Options]:
    """The run's config, which says where its checkpoints are, and what to sample. Raises ConfigError."""
    known = configs.types_of(Options)
    for key in (a.removeprefix("--").split("=")[0] for a in argv if configs.is_setting(a)):
        if key not in known and key not in configs.KEYS:
            near = configs.nearest(key, [*known, *configs.KEYS])
            raise ConfigError(f"unknown key {key!r}{near}; `{entry.here('python sample.py --help')}` lists them")
    mine = [a for a in argv if "=" in a and a.removeprefix("--").split("=")[0] in known]
    cfg, _ = configs.load([a for a in argv if a not in mine])
    texts = dict(a.removeprefix("--").split("=", 1) for a in mine)
    return cfg, Options(**{key: configs.parse(key, text, Options) for key, text in texts.items()})


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
    if resume.startswith("gs://") or huggingface.is_hf(Path(resume)) or selection.names(resume):
        return ckpt.find(resume)
    if (
        cfg.bucket_name
        and cfg.checkpoint_bucket_path
        and (found := start.find(dataclasses.replace(cfg, resume=resume)))
    ):
        start.pull(cfg, found)
    choice = selection.choose(cfg.output_dir, resume)
    for name, why in choice.passed_over:
        print(f"passed over {name}: {why}", file=sys.stderr)
    if choice.path is None:
        raise ckpt.CheckpointError(f"no checkpoint in {cfg.output_dir}; train first, or name one with resume=PATH")
    return Source.of(choice.path, choice.state)


def encode(prompts: list[str], tokenizer: Tokenizer, cfg: Config) -> list[list[int]]:
    """The prompts' ids; of an empty one end-of-text, behind which a document begins. Raises ConfigError."""
    rows = [tokenizer.encode(prompt) or [tokenizer.end] for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if max(row) >= cfg.vocab_size:
            raise ConfigError(
                f"prompt {prompt[:40]!r} has token {max(row)}, the model's vocabulary {cfg.vocab_size} ids: not the "
                "tokenizer that it was trained with"
            )
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
    model = folder.load(source).to(device, folder.DTYPES[dtype]).eval()
    write(model, source, tokenizer, prompts, rows, options)
    return 0


def main(argv: list[str]) -> int:
    return entry.run(command, argv)


def write(model, source, tokenizer, prompts, rows, options) -> None:
    weight = model.embed_in.weight
    print(f"{source}, {weight.device.type}, {str(weight.dtype).removeprefix('torch.')}", file=sys.stderr)
    window = options.window or model.cfg.max_position_embeddings
    if (most := max(map(len, rows)) + options.max_new_tokens - 1) > window:
        print(f"{most:,} tokens in a window of {window:,}: the oldest are forgotten as it fills", file=sys.stderr)
    count, reading, writing = 0, 0.0, 0.0
    for first in range(0, len(rows), options.batch_size):
        part = slice(first, first + options.batch_size)
        starts = [row if prompt else [] for row, prompt in zip(rows[part], prompts[part], strict=True)]
        heads = [f"--- {first + i} of {len(rows)}\n" * (len(rows) > 1) for i in range(1, len(starts) + 1)]
        writer = Writer(tokenizer, starts, heads, lambda text: print(text, end="", flush=True))
        begin = now = time.perf_counter()
        for step, tokens in enumerate(generate(model, rows[part], options, source.end)):
            writer.add(tokens)
            count += sum(token is not None for token in tokens)
            now = time.perf_counter()
            if step == 0:
                reading, begin = reading + now - begin, now
        writing += now - begin
        writer.close()
    print(
        f"{count:,} tokens after {sum(map(len, rows)):,} of prompt: {count / (reading + writing):,.0f} tokens/s "
        f"({reading:.2f} s until the first, {writing:.2f} s for the rest)",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
