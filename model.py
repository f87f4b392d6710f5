"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745) on torch alone: modules, loss, parameter counts and FLOPs.

Parameters are named as in Hugging Face's files, without the `gpt_neox.` prefix. Processes and precision are not known here.
"""

import functools
import zlib
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": gelu_tanh, "gelu_fast": gelu_tanh, "relu": F.relu}


def rotary_tables(positions: torch.Tensor, dims: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 (T, 1, dims / 2), of the rotary angles (Su et al. 2021, arXiv:2104.09864) at int positions (T,)."""
    # computed in every forward: a buffer would have to be filled again after a model is built on the meta device
    inverse = base ** -(torch.arange(0, dims, 2, device=positions.device, dtype=torch.float32) / dims)
    angles = positions.float()[:, None, None] * inverse  # (T, 1, dims / 2)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dimensions of each head of x (B, T, H, D), pairing i with i + dims / 2; the rest passes."""
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    # the products are fp32, as the tables: in bf16 neighbouring positions would blur beyond a few hundred
    return torch.cat(((x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest), dim=-1)


# CUDA's kernel gets room for one document per so many tokens of a window. The number is fixed, so it compiles once.
# More room would cost more in empty documents than in full ones. What does not fit is taken for one document.
TOKENS_PER_DOCUMENT = 16


class Documents(NamedTuple):
    """Where the documents of a batch begin: each at an end-of-text, the token before its first word."""

    # so the first word is predicted from end-of-text alone, as when a model writes without a prompt;
    # rotary positions go on through a window, because scores depend on differences of positions only
    first: torch.Tensor  # int32 (B, T): the position of the first token that this one may look at
    edges: torch.Tensor | None  # int32 (B * n + 1): the same as offsets into B * T tokens, where a kernel takes them

    @classmethod
    def of(cls, idx: torch.Tensor, end: int, edges: bool = True) -> "Documents":
        """Those of idx (B, T), by the id of end-of-text; with edges where asked."""
        # all shapes are fixed by these two: nothing is compiled again, and nothing waits for the device
        B, T = idx.shape
        positions = torch.arange(T, device=idx.device, dtype=torch.int32)
        first = torch.where(idx == end, positions, 0).cummax(dim=1).values
        if not edges:
            return cls(first, None)
        n = -(-T // TOKENS_PER_DOCUMENT)
        begins = torch.where(first == positions, positions, T).sort(dim=1).values[:, :n]  # (B, n)
        offsets = begins + T * torch.arange(B, device=idx.device, dtype=torch.int32)[:, None]  # the rest: length 0
        return cls(first, F.pad(offsets.flatten(), (0, 1), value=B * T))

    def visible(self) -> torch.Tensor:
        """bool (B, 1, T, T): which key each query sees."""
        keys = torch.arange(self.first.size(1), device=self.first.device)
        return ((keys >= self.first[..., None]) & (keys <= keys[:, None]))[:, None]


@functools.cache
def takes_edges(device: torch.device, head_dim: int) -> bool:
    """Whether varlen_attn, flash attention without a fallback, runs there, by torch's flash_api.cpp."""
    if device.type != "cuda" or head_dim % 8 or head_dim > 256 or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    global varlen_attn  # imported here: its module loads all of torch's compiler, which takes seconds
    from torch.nn.attention.varlen import varlen_attn

    return True


class CausalSoftmax(torch.autograd.Function):
    """Causal attention weights, by a softmax in fp32, of the scores (B, H, rows, T) of the last `rows` queries."""

    # written out, because autograd would keep the fp32 weights for backward; these are kept in the scores' dtype
    @staticmethod
    def forward(ctx, scores, scale, first=None):  # first (B, rows): the first key that each query sees
        rows, T = scores.shape[-2:]
        hidden = torch.ones(rows, T, dtype=torch.bool, device=scores.device).triu(T - rows + 1)
        if first is not None:  # an index is compared with a number per row: no (T, T) mask is read
            hidden = hidden | (torch.arange(T, device=scores.device, dtype=first.dtype) < first[:, None, :, None])
        weights = torch.softmax((scores.float() * scale).masked_fill(hidden, float("-inf")), dim=-1)
        if weights.dtype != scores.dtype:  # torch 2.11 compiles a cast to the same dtype into a gradient of zeros
            weights = weights.to(scores.dtype)
        ctx.save_for_backward(weights)
        ctx.scale = scale
        return weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weights,) = ctx.saved_tensors
        p, d = weights.float(), grad.float()
        return ((d - (d * p).sum(dim=-1, keepdim=True)) * p * ctx.scale).to(weights.dtype), None, None


def attend_in_pieces(q, k, v, first=None, pieces=4):
    """Causal attention of q, k, v (B, H, T, D) as plain products; first (B, T), or None: the first key that a query sees."""
    # compiled for a CPU it is faster than the fused kernel (LOG.md); backward keeps 5/8 of the (T, T) weights
    T, y = q.size(2), []
    rows = -(-T // pieces)
    for start in range(0, T, rows):  # a piece of the queries takes only the keys that it sees
        end = min(start + rows, T)
        begin = None if first is None else first[:, start:end]
        weights = CausalSoftmax.apply(q[:, :, start:end] @ k[:, :, :end].mT, q.size(3) ** -0.5, begin)
        y.append(weights @ v[:, :, :end])
    return torch.cat(y, dim=2)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.num_heads, self.dropout = cfg.num_attention_heads, cfg.attention_dropout
        self.in_pieces = False  # set where attend_in_pieces is compiled and faster
        self.query_key_value = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.dense = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x, cos, sin, cache=None, documents=None):
        B, T, C = x.shape
        # GPT-NeoX interleaves per head: q, k and v of head 0, then of head 1, ...
        q, k, v = self.query_key_value(x).view(B, T, self.num_heads, -1).chunk(3, dim=-1)  # (B, T, H, D) each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # v has no position
        # transposed last, as cuDNN lays its output out as q: then neither that nor its gradient is copied; and a view
        # of v would keep all of qkv until backward
        q, k, v = (t.transpose(1, 2) for t in (q, k, v.contiguous()))  # (B, H, T, D)
        p = self.dropout if self.training else 0.0
        if cache is not None:  # generation: sample.py keeps this layer's keys and values of earlier tokens
            y = cache.attend(q, k, v)
        elif self.in_pieces and p == 0.0:
            y = attend_in_pieces(q, k, v, None if documents is None else documents.first)
        elif documents is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        elif documents.edges is not None and p == 0.0 and q.dtype != torch.float32:
            q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (B * T, H, D)
            y = varlen_attn(q, k, v, documents.edges, documents.edges, T, T, window_size=(-1, 0))  # to the left: causal
            y = y.unflatten(0, (B, T)).transpose(1, 2)  # (B, H, T, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=documents.visible(), dropout_p=p)
        return self.dense(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.dense_4h_to_h = nn.Linear(cfg.intermediate_size, cfg.hidden_size)
        self.act = ACTIVATIONS[cfg.hidden_act]

    def narrow(self, h):  # apart, because activation_checkpointing=activation computes it again
        return self.dense_4h_to_h(self.act(h))

    def forward(self, x):
        return self.narrow(self.dense_h_to_4h(x))


# what of a block is computed a second time in backward instead of kept, by activation_checkpointing
RECOMPUTED = {"none": "", "activation": "activation", "selective": "mlp", "full": "block"}


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.attention = Attention(cfg)
        self.mlp = MLP(cfg)
        self.parallel, self.p = cfg.use_parallel_residual, cfg.hidden_dropout
        self.recomputed = RECOMPUTED[cfg.activation_checkpointing]
        self.random = bool(cfg.hidden_dropout or cfg.attention_dropout)

    def recompute(self, function, *args):
        """function(*args), computed a second time in backward instead of kept."""
        # without dropout there is no random state to keep
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=self.random)

    def forward(self, x, cos, sin, cache=None, documents=None):
        if self.training and self.recomputed == "block":
            return self.recompute(self.body, x, cos, sin, None, documents)
        return self.body(x, cos, sin, cache, documents)

    def body(self, x, cos, sin, cache, documents):
        a = F.dropout(self.attention(self.input_layernorm(x), cos, sin, cache, documents), self.p, self.training)
        if self.parallel:  # both read x, so their matrix products do not wait for each other
            return x + a + self.mlp_branch(x)
        x = x + a
        return x + self.mlp_branch(x)

    def mlp_branch(self, x):
        h = self.post_attention_layernorm(x)
        part = self.recomputed if self.training else ""
        # the MLP's two wide tensors are a third of what a block keeps: before and after the activation function
        if part == "activation":  # drops the second, which costs no product
            h = self.recompute(self.mlp.narrow, self.mlp.dense_h_to_4h(h))
        else:  # "mlp" drops both, for one product: backward does not ask for the result of the other
            h = self.recompute(self.mlp, h) if part == "mlp" else self.mlp(h)
        return F.dropout(h, self.p, self.training)


def softmax_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy (fp32 scalar) of logits (N, V) at targets (N,), negative for none; logits become its gradient."""
    x = logits.float()  # loss and softmax are fp32 throughout
    lse = torch.logsumexp(x, dim=-1, keepdim=True)  # (N, 1)
    counts = (targets >= 0)[:, None]  # (N, 1)
    hit = torch.arange(x.size(1), device=x.device)[None] == targets[:, None]  # (N, V), fused away when compiled
    loss = torch.where(counts, lse - torch.where(hit, x, 0.0).sum(dim=-1, keepdim=True), 0.0).sum()
    # the gradient is softmax minus one-hot; in place, so that a chunk exists once
    logits.copy_(torch.where(counts, torch.exp(x - lse) - hit.float(), 0.0))
    return loss


def padded(weight: torch.Tensor, dtype: torch.dtype, multiple: int) -> torch.Tensor:
    """A matrix (V, C) in dtype, with rows of zeros up to a multiple of rows."""
    extra = -weight.size(0) % multiple
    if not extra:
        return weight.to(dtype)
    w = weight.new_zeros(weight.size(0) + extra, weight.size(1), dtype=dtype)
    w[: weight.size(0)] = weight  # F.pad of weight.to(dtype) would need the memory of two copies
    return w


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of x @ weight.T, a chunk of rows at a time: the (N, V) logits never exist at once."""

    # forward makes both gradients while a chunk's softmax is at hand: three matrix products, as in the plain loss;
    # a checkpointed chunk would need a fourth
    @staticmethod
    def forward(ctx, x, weight, targets, chunk_rows, kernel, multiple):
        V = weight.size(0)
        w = padded(weight, x.dtype, multiple)  # (V or more, C)
        loss = x.new_zeros((), dtype=torch.float32)
        dx, dw = torch.empty_like(x), None
        chunks = list(zip(x.split(chunk_rows), targets.split(chunk_rows), dx.split(chunk_rows), strict=True))
        for x_c, y_c, dx_c in chunks:
            dlogits = x_c @ w.T  # still the logits; the kernel turns them into their gradient
            loss += kernel(dlogits[:, :V], y_c)  # what is beyond V is zero, as a logit and as a gradient
            torch.mm(dlogits, w, out=dx_c)
            part = dlogits.T @ x_c  # (V or more, C)
            if dw is None:
                dw = part if len(chunks) == 1 else part.float()  # chunks add up in fp32
            else:
                dw += part
            del dlogits, part  # or the next chunk's would be made beside them
        ctx.save_for_backward(dx, dw[:V])  # backward multiplies them by the gradient of the loss, a scalar
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dw.to(ctx.weight_dtype).mul_(grad), None, None, None, None


class Head(nn.Linear):
    """The output matrix together with its loss, so that FSDP2 gathers the weight once for both."""

    # logits per chunk: 2**26 in bf16 are 128 MiB, enough rows to keep a CPU's matrix products at full speed
    max_logits = 1 << 26
    multiple = 1  # of rows and columns of the products: a GPU's fast kernels refuse rows of 50,257 numbers

    def __init__(self, cfg):
        super().__init__(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.kernel = softmax_loss  # replaced by its compiled form

    def forward(self, x, targets=None, reduction="sum"):
        """As GPTNeoX.forward, of its last hidden states x (B, T, C)."""
        if targets is None:
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        N, V = targets.numel(), self.weight.size(0)
        x, y = x.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        rows = -(-N // -(-N * V // self.max_logits))  # as few chunks as may be, all of one size
        rows += -rows % self.multiple
        if torch.is_grad_enabled():  # evaluation needs no gradients, and may ask for each token's loss
            return LinearCrossEntropy.apply(x, self.weight, y, rows, self.kernel, self.multiple)
        w = padded(self.weight, x.dtype, self.multiple)
        losses = [
            F.cross_entropy((x_c @ w.T)[:, :V].float(), y_c, reduction=reduction, ignore_index=-100)
            for x_c, y_c in zip(x.split(rows), y.split(rows), strict=True)
        ]
        return torch.cat(losses).view(targets.shape) if reduction == "none" else sum(losses)


class GPTNeoX(nn.Module):
    def __init__(self, cfg, end=None):  # end: id of end-of-text, where each token attends to its own document alone
        super().__init__()
        self.cfg, self.end = cfg, end
        self.embed_in = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.embed_out = Head(cfg)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.cfg.tie_word_embeddings:  # again after to_empty, which makes two tensors of one
            self.embed_out.weight = self.embed_in.weight

    def forward(self, idx, targets=None, reduction="sum"):
        """Logits (B, T, V) for int64 idx (B, T); with targets (B, T) the sum of token losses, an fp32 scalar.

        Targets are the next tokens already: nothing is shifted here. One of -100 does not count.
        reduction="none", without gradients: the token losses (B, T), 0 where a target does not count.
        """
        cfg, positions = self.cfg, torch.arange(idx.size(1), device=idx.device)
        cos, sin = rotary_tables(positions, int(cfg.head_dim * cfg.rotary_pct), cfg.rotary_emb_base)
        x = F.dropout(self.embed_in(idx), cfg.hidden_dropout, self.training)  # (B, T, C)
        edges = takes_edges(idx.device, cfg.head_dim)
        documents = None if self.end is None else Documents.of(idx, self.end, edges)
        for layer in self.layers:
            x = layer(x, cos, sin, documents=documents)
        return self.embed_out(self.final_layer_norm(x), targets, reduction)


def initial_value(name: str, shape: torch.Size, cfg) -> torch.Tensor:
    """The fp32 tensor (CPU, full shape) that parameter `name` starts from: ones, zeros or normal(0, initializer_range)."""
    # a function of (seed, name) alone, so any number of processes and any layout begin with the same weights
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    # a hash, because the CPU's generator looks at the low 32 bits of its seed only
    generator = torch.Generator().manual_seed(zlib.crc32(f"{cfg.seed}:{name}".encode()))
    return torch.empty(shape).normal_(0.0, cfg.initializer_range, generator=generator)


def num_parameters(cfg) -> tuple[int, int]:
    """(all parameters, parameters without the input and output embeddings) of a config."""
    C, inner, V = cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size
    attention, mlp = 3 * (C + 1) * C + (C + 1) * C, (C + 1) * inner + (inner + 1) * C
    body = cfg.num_hidden_layers * (attention + mlp + 4 * C) + 2 * C  # each norm has 2 C
    return body + V * C * (1 if cfg.tie_word_embeddings else 2), body


def flops_per_token(cfg) -> float:
    """FLOPs of forward and backward per trained token: 6 N + 6 L C T (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)."""
    # N: parameters that multiply, all but the input embedding, at 2 FLOPs forward and 4 backward. Attention multiplies q
    # by k and weights by v: 2 * 2 * C * T per layer and token forward, 3 times that with backward, half of it under the
    # causal mask. PaLM (arXiv:2204.02311, appendix B) counts the masked half too, so its MFU looks higher.
    N = num_parameters(cfg)[1] + cfg.vocab_size * cfg.hidden_size
    return 6.0 * N + 6.0 * cfg.num_hidden_layers * cfg.hidden_size * cfg.sequence_length
