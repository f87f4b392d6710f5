"""Text generation with a cache: a batch of prompts is read at once, then each step adds a token to every text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from configs import Config, ConfigError
from model import GPTNeoX, rotary_tables
from refocused.checkpoint.weights import DTYPES
from refocused.run import exits, strategy
from refocused.shards import tokenizers


@dataclass(frozen=True)
class Options:
    # what to write
    prompt: str = ""  # text to go on from; FILE:path for one prompt per line; empty for a new document
    num_samples: int = 1  # texts per prompt
    max_new_tokens: int = 200  # length of a text at which it is cut, unless end-of-text comes first

    # how a token is chosen
    temperature: float = 0.8  # below 1 safer, above 1 wilder; 0 for always the likeliest token
    top_k: int = 0  # number of likeliest tokens to choose among; 0 for all
    top_p: float = 0.95  # choose among the likeliest tokens that share this much probability; 1 for all
    seed: int = 0  # another seed gives other texts, the same one the same

    # how it is computed
    dtype: str = "auto"  # fp32, bf16 or fp16; auto for bf16 on an accelerator and fp32 on a CPU
    batch_size: int = 16  # texts at once; fewer for less memory
    window: int = 0  # tokens that the model looks back at; 0 for its max_position_embeddings

    def __post_init__(self):
        for key in ("num_samples", "max_new_tokens", "batch_size", "temperature", "top_k", "window", "seed"):
            number = int(key in ("num_samples", "max_new_tokens", "batch_size"))
            if not number <= getattr(self, key) < math.inf:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least {number}, and finite")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(f"dtype={self.dtype} is none of auto, {', '.join(DTYPES)}")


class NotFinite(ValueError):
    """The model leaves nothing to choose from."""

    exit_code = exits.NOT_FINITE


class Cache:
    """Keys and values of the tokens read so far, for a batch whose rows end at the same slot."""

    # Shorter rows begin with `padding` (B,) empty slots. So one that begins at slot 3 has its first token at position 3,
    # which changes nothing: rotary attention sees differences of positions only.

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
    idx = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=model.embed_in.weight.device)
    cache = Cache(model, slots, torch.tensor([T - len(row) for row in rows]))
    return advance(model, idx, cache), cache


def choose(logits: torch.Tensor, options: Options, generator: torch.Generator) -> torch.Tensor:
    """A token (B,) for each row of logits (B, V). Raises NotFinite."""
    greedy = options.temperature < 1e-6  # the quotient might be more than a float holds
    logits = logits if greedy else logits / options.temperature
    if not logits.isfinite().all():
        raise NotFinite("the model's logits are not finite: damaged weights, or a dtype= too narrow; try dtype=fp32")
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

    A row ends before the token `end`. When a text fills the window, its older part is forgotten and the rest read again.
    """
    generator = torch.Generator(model.embed_in.weight.device).manual_seed(options.seed)
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
    """A text of cfg.sample_tokens that the model writes without a prompt. Raises DataError without a tokenizer."""
    if not (tokenizer := tokenizers.fits(cfg.tokenizer, cfg.vocab_size)):
        return ""
    end = tokenizer.end
    # top_p adds up probabilities, for which a GPU has no deterministic kernel
    options = Options(max_new_tokens=cfg.sample_tokens, top_p=1.0 if cfg.deterministic else Options.top_p)
    training = model.training
    model.eval()
    try:
        with strategy.eager(cfg):  # a graph for each length of the text would not pay
            ids = [token for [token] in generate(model, [[end]], options, end) if token is not None]
        return tokenizer.decode(ids)
    except NotFinite as error:  # what to do about it is the guard's affair
        return str(error)
    finally:
        model.train(training)
