"""Text from a trained model: a checkpoint of ours, local or in a bucket, or a Hugging Face folder.

    python sample.py prompt="def "                                      the newest checkpoint of configs/demo.py
    python sample.py configs/production.py resume=NAME prompt=FILE:prompts.txt temperature=0
    python sample.py resume=EXPORTED_FOLDER max_new_tokens=500

A batch of prompts is read at once, then each step adds a token to every text behind a cache of keys and values.
"""

from refocused import entry  # before all others: it says what this machine lacks

# isort: split
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import ckpt
import configs
from configs import Config, ConfigError
from model import GPTNeoX, num_parameters, rotary_tables
from refocused.bucket import start
from refocused.checkpoint import choice as checkpoint_choice
from refocused.checkpoint import folder, huggingface, manifest
from refocused.checkpoint.folder import Source
from refocused.run import devices, exits, processes, strategy
from refocused.shards import tokenizers
from refocused.shards.tokenizers import Stream, Tokenizer

GREEDY = 1e-6  # a temperature below it leaves no choice, and may divide beyond what a float can hold
SMALL = 20_000_000  # parameters below which a second thread gains nothing, and only waits on a busy machine


@dataclass(frozen=True)
class Options:
    # what to write
    prompt: str = ""  # text to go on from; FILE:path for one prompt per line; empty for a new document
    num_samples: int = 1  # texts per prompt
    max_new_tokens: int = 200  # length of a text at which it is cut, unless end-of-text comes first

    # how a token is chosen
    temperature: float = 0.8  # below 1 safer, above 1 wilder; 0 for always the likeliest token
    top_k: int = 0  # choose among the so many likeliest tokens; 0 for all
    top_p: float = 0.95  # choose among the likeliest tokens that share this much probability; 1 for all
    seed: int = 0  # another seed gives other texts, the same one the same

    # how it is computed
    dtype: str = "auto"  # fp32, bf16 or fp16; auto for bf16 on an accelerator and fp32 on a CPU
    batch_size: int = 16  # texts at once; fewer for less memory
    window: int = 0  # tokens that the model looks back at; 0 for its max_position_embeddings

    def __post_init__(self):
        least = {
            "num_samples": 1,
            "max_new_tokens": 1,
            "batch_size": 1,
            "temperature": 0,
            "top_k": 0,
            "window": 0,
            "seed": 0,
        }
        for key, number in least.items():
            if not number <= getattr(self, key) < math.inf:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least {number}, and finite")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.dtype not in ("auto", *folder.DTYPES):
            raise ConfigError(f"dtype={self.dtype} is none of auto, {', '.join(folder.DTYPES)}")


class NotFinite(ValueError):
    """The model leaves nothing to choose from."""

    exit_code = exits.NOT_FINITE


class Cache:
    """Keys and values of the tokens read so far, for a batch whose rows end at the same slot.

    Shorter rows begin with `padding` (B,) empty slots. A row that begins at slot 3 has its first token at position 3:
    rotary attention sees differences of positions only.
    """

    def __init__(self, model: GPTNeoX, slots: int, padding: torch.Tensor):
        cfg, like = model.cfg, model.embed_in.weight
        self.length = 0
        columns = torch.arange(slots, device=like.device)
        self.tables = rotary_tables(columns, int(cfg.head_dim * cfg.rotary_pct), cfg.rotary_emb_base)
        # (B, 1, 1, S); None where every row is full, which has the faster kernels
        self.visible = (columns >= padding.to(like.device)[:, None])[:, None, None] if padding.any() else None
        shape = (2, len(padding), cfg.num_attention_heads, slots, cfg.head_dim)
        self.layers = [LayerCache(self, *like.new_zeros(shape)) for _ in model.layers]


class LayerCache:
    def __init__(self, whole: Cache, keys: torch.Tensor, values: torch.Tensor):
        self.whole, self.keys, self.values = whole, keys, values  # (B, H, S, D)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Keep k and v (B, H, T, D) and attend from q to all that is kept: T tokens at first, then 1 at a time."""
        start, T = self.whole.length, q.size(2)
        end = start + T
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        mask = self.whole.visible
        if mask is not None:
            mask = mask[..., :end]
            if T > 1:  # a slot sees itself even where it is padding: a softmax over nothing would be NaN
                causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
                mask = mask & causal | torch.eye(T, dtype=torch.bool, device=q.device)
        k, v = self.keys[:, :, :end], self.values[:, :, :end]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T > 1 and mask is None)


def advance(model: GPTNeoX, idx: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Read idx (B, T) behind what the cache holds; the logits (B, V), fp32, of the token that follows."""
    start, end = cache.length, cache.length + idx.size(1)
    cos, sin = (table[start:end] for table in cache.tables)
    x = model.embed_in(idx)  # (B, T, C)
    for layer, kept in zip(model.layers, cache.layers, strict=True):
        x = layer(x, cos, sin, kept)
    cache.length = end
    return model.embed_out(model.final_layer_norm(x[:, -1])).float()


def prefill(model: GPTNeoX, rows: list[list[int]], slots: int) -> tuple[torch.Tensor, Cache]:
    """Read the rows, flush right, into a new cache with room for `slots` tokens; the logits that follow, and it."""
    T = max(map(len, rows))
    padding = torch.tensor([T - len(row) for row in rows])
    idx = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=model.embed_in.weight.device)
    cache = Cache(model, slots, padding)
    return advance(model, idx, cache), cache


def choose(logits: torch.Tensor, options: Options, generator: torch.Generator) -> torch.Tensor:
    """A token (B,) for each row of logits (B, V). Raises NotFinite."""
    greedy = options.temperature < GREEDY
    logits = logits if greedy else logits / options.temperature
    if not logits.isfinite().all():
        raise NotFinite(
            "the model's logits are not finite: its weights are damaged, or dtype= is too narrow; try dtype=fp32"
        )
    if greedy:
        return logits.argmax(dim=-1)
    if 0 < options.top_k < logits.size(-1):
        least = logits.topk(options.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if options.top_p < 1:  # a token stays if those before it, the likelier ones, do not make up top_p by themselves
        p, order = probabilities.sort(dim=-1, descending=True)
        p[:, 1:][(p.cumsum(dim=-1) - p)[:, 1:] >= options.top_p] = 0.0  # the first always: fp32 may hold top_p as 0
        return order.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(
    model: GPTNeoX, prompts: list[list[int]], options: Options, end: int | None = None
) -> Iterator[list[int | None]]:
    """Continue each prompt (token ids, not empty); yields each step's token of every row, None once a row has ended.

    A row ends before the token `end`. When a text fills the window, its older part is forgotten and the rest read
    again.
    """
    device = model.embed_in.weight.device
    generator = torch.Generator(device).manual_seed(options.seed)
    window = options.window or model.cfg.max_position_embeddings
    rows, running = [list(prompt) for prompt in prompts], [True] * len(prompts)
    cache: Cache | None = None
    chosen = torch.empty(0)  # (B,), the tokens of the last step
    for left in range(options.max_new_tokens, 0, -1):
        if cache is None or cache.length == window:
            T = max(map(len, rows))
            if T > window:  # half of it at least, so that reading again stays rare
                T = max(window // 2, window - left + 1, 1)
            logits, cache = prefill(model, [row[-T:] for row in rows], min(window, T + left - 1))
        else:
            logits = advance(model, chosen[:, None], cache)
        chosen = choose(logits, options, generator)
        tokens = chosen.tolist()
        for i, token in enumerate(tokens):
            rows[i].append(token)
            running[i] = running[i] and token != end
        yield [token if on else None for token, on in zip(tokens, running, strict=True)]
        if not any(running):
            return


def open_ended(model: GPTNeoX, cfg: Config) -> str:
    """What a model in training writes when nothing is given, cfg.sample_tokens long. Raises DataError without a tokenizer."""
    if not (tokenizer := tokenizers.fits(cfg.tokenizer, cfg.vocab_size)):
        return ""
    end = tokenizer.end
    # top_p adds up probabilities, for which a GPU has no deterministic kernel
    options = Options(max_new_tokens=cfg.sample_tokens, top_p=1.0 if cfg.deterministic else Options.top_p)
    model.eval()
    try:
        with strategy.eager(cfg):  # a graph for each length of the text would not pay
            ids = [token for [token] in generate(model, [[end]], options, end) if token is not None]
        return tokenizer.decode(ids)
    except NotFinite as error:  # what to do about it is the guard's affair
        return str(error)
    finally:
        model.train()


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
    if resume.startswith("gs://") or huggingface.is_hf(Path(resume)) or manifest.names(resume):
        return ckpt.find(resume)
    if (
        cfg.bucket_name
        and cfg.checkpoint_bucket_path
        and (found := start.find(dataclasses.replace(cfg, resume=resume)))
    ):
        start.pull(cfg, found)
    choice = checkpoint_choice.choose(cfg.output_dir, resume)
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
