"""Documents kept apart: a packed window is its documents each alone, in every layout; windows cut elsewhere each epoch."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_shards
from launch import train
from shards import config
from test_model import SMALL
from test_resume import assert_same_tensors, newest, steps, take
from test_train import relative
from torch._dynamo.utils import counters

import configs
import model as neox
from data import Dataset, window_shift
from refocused.run.strategy import materialise
from refocused.shards.tokenizers import separator

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # tensors() reads without ranks
END = 100


def packed(lengths: list[int]) -> tuple[torch.Tensor, list[slice]]:
    """Documents of these lengths in one row, each begun by its end-of-text, behind 5 tokens that have none; the places."""
    idx = torch.randint(0, END, (sum(lengths) + 5,))
    places, at = [slice(0, 5)], 5
    for length in lengths:
        idx[at] = END
        places.append(slice(at, at := at + length))
    return idx, places


def build(in_pieces: bool) -> neox.GPTNeoX:
    torch.manual_seed(0)
    model = neox.GPTNeoX(SMALL, END)
    materialise(model, 1)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    for block in model.layers:
        block.attention.in_pieces = in_pieces
    return model


@pytest.mark.parametrize("in_pieces", [False, True], ids=["sdpa", "in pieces"])
def test_a_packed_window_is_its_documents_alone(in_pieces):
    """Logits of two packed rows, an empty document among theirs, against each document by itself; gradients too.

    The gradient of one document's loss reaches no other's embeddings; a model that keeps nothing apart fails both.
    """
    model = build(in_pieces)
    rows = [packed([9, 1, 20, 13]), packed([3, 7, 3, 15, 15])]
    x = torch.stack([idx for idx, _ in rows])  # (2, 48)
    embedded = []
    model.embed_in.register_forward_hook(lambda module, args, out: embedded.append(out))
    together = model(x)
    for row, (idx, places) in enumerate(rows):
        for place in places:
            torch.testing.assert_close(together[row, place], model(idx[None, place])[0], atol=2e-5, rtol=1e-4)
            [gradient] = torch.autograd.grad(together[row, place].square().sum(), embedded[0], retain_graph=True)
            inside = torch.zeros(x.shape, dtype=torch.bool)
            inside[row, place] = True
            assert gradient[~inside].eq(0).all() and gradient[inside].ne(0).any()
    model.end = None
    assert not torch.allclose(together, model(x), atol=1e-2)


def test_edges_for_cuda():
    """The offsets that CUDA's kernel gets are the mask: attention a span at a time equals the masked one.

    In a window with more documents than there is room for, those behind are one; rows never touch.
    """
    torch.manual_seed(0)
    x = torch.stack([packed(lengths)[0] for lengths in ([9, 1, 20, 13], [30, 13], [20, 23])])
    documents = neox.Documents.of(x, END)
    q, k, v = torch.randn(3, 3, 2, 48, 8).unbind()  # (B, H, T, D)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=documents.visible())
    assert documents.edges.shape == (3 * 3 + 1,) and documents.edges.dtype == torch.int32
    assert documents.edges.tolist() == [0, 5, 14, 48, 53, 83, 96, 101, 121, 144]  # the first has five, two too many
    q, k, v, masked = (t.transpose(0, 1).flatten(1, 2) for t in (q, k, v, masked))  # (H, B * T, D)
    for begin, end in itertools.pairwise(documents.edges.tolist()[3:]):  # all documents of the other two rows
        parts = (t[:, begin:end] for t in (q, k, v))
        torch.testing.assert_close(F.scaled_dot_product_attention(*parts, is_causal=True), masked[:, begin:end])


def test_a_kernel_that_takes_edges_or_none(monkeypatch):
    """flash_api.cpp's limits: compute capability 8.0, heads of multiples of 8 up to 256; elsewhere the mask serves."""
    cuda = torch.device("cuda", 0)
    for capability, size, can in (((8, 0), 64, True), ((9, 0), 256, True), ((7, 5), 64, False), ((9, 0), 52, False)):
        neox.takes_edges.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert neox.takes_edges(cuda, size) == can
    assert not neox.takes_edges(cuda, 264) and not neox.takes_edges(torch.device("cpu"), 64)
    neox.takes_edges.cache_clear()


def test_an_end_of_text_that_never_comes_is_refused():
    """A model of 257 tokens with GPT-2's end-of-text would keep nothing apart and say that it does."""
    cfg = configs.load(["vocab_size=257", "tokenizer=gpt2", "mask_documents=true"])[0]
    with pytest.raises(configs.ConfigError, match="is 50256, which a model with vocab_size=257 never sees"):
        separator(cfg)
    assert separator(dataclasses.replace(cfg, tokenizer="byte")) == 256


def test_compiled_equals_eager():
    """Compiled blocks in pieces, recomputed in backward, on two batches cut differently: losses and gradients as eager.

    One compilation serves both batches: boundaries are values and not shapes.
    """
    eager, compiled = build(False), build(True)
    torch._dynamo.reset()
    counters.clear()
    for block in compiled.layers:
        block.recomputed = "block"
        block.compile(dynamic=False)
    for lengths in ([9, 1, 20, 13], [30, 13]):
        x, y = packed(lengths)[0][None], torch.randint(0, END, (1, 48))
        losses = [model(x, y) for model in (eager, compiled)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        for loss in losses:
            loss.backward()
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """Four shards of documents of about 15 bytes, each token mostly a function of the one before."""
    rng, folder = np.random.default_rng(0), write_shards(tmp_path_factory.mktemp("short"))
    for file in folder.rglob("*.npz"):
        stream = np.load(file)["input_ids"]
        np.savez(file, input_ids=np.where(rng.random(len(stream)) < 1 / 15, 256, stream).astype(np.uint16))
    return folder


def test_layouts_agree(short, tmp_path):
    """Documents apart: one process, DDP 2, FSDP2 2 and recomputed activations give the same losses; together, others.

    The evaluation keeps them apart as well, in every layout, and says so.
    """
    common = [f"data_dir={short}", "global_batch_size=8", "eval_steps=5", "mask_documents=true"]
    layouts = {
        "one": (1, []),
        "ddp": (2, ["activation_checkpointing=full"]),
        "fsdp": (2, ["parallel=fsdp", "activation_checkpointing=selective"]),
        "dropout's kernel": (1, ["attention_dropout=1e-9"]),
        "together": (1, ["mask_documents=false"]),
    }
    runs = {name: train(tmp_path / name, *common, *args, nproc=n) for name, (n, args) in layouts.items()}
    for name, run in runs.items():
        found = [r.losses + [float(x) for x in re.findall(r"eval_loss=([\d.]+)", r.text)] for r in (runs["one"], run)]
        assert (relative(*found) < 1e-4) == (name != "together") == ("documents apart" in run.text), name


def test_resume_is_bitwise(short, tmp_path):
    """Documents apart and moving windows over several epochs: 4 steps, a resume and 6 more against ten, bit for bit."""
    args = [f"data_dir={short}", "mask_documents=true", "shift_windows=true", "gradient_accumulation_steps=16"]
    args += ["save_steps=4", "save_total_limit=0"]
    train(tmp_path / "whole", *args, nproc=2)
    take(tmp_path / "whole", 4, tmp_path / "rest")
    assert "epoch 1," in train(tmp_path / "rest", *args, "resume=latest", nproc=2).text
    wanted = {step: bits for step, bits in steps(tmp_path / "whole").items() if step > 4}
    assert steps(tmp_path / "rest") == wanted and len(wanted) == 6
    assert_same_tensors(newest(tmp_path / "whole"), newest(tmp_path / "rest"))


def test_windows_move(short):
    """With shift_windows: golden shifts; each epoch's windows are slices of the shard at that shift, as many as without.

    A shard's last window lies at its end; an epoch visits each once, and a batch of several epochs is one of their order.
    """
    assert [window_shift(42, epoch, 1024) for epoch in (0, 1, 2, 3, 1000)] == [692, 300, 932, 540, 884]
    keys = {"sequence_length": 32, "tokenizer": "byte", "vocab_size": 257}
    moving, still = (Dataset.open(config(short, shift_windows=shift, **keys)) for shift in (True, False))
    n, held_out = moving.num_samples, moving.num_eval_samples
    assert n == still.num_samples and moving.eval_ids(8).tolist() == still.eval_ids(8).tolist()
    streams = [np.load(path)["input_ids"].astype(int) for path in sorted(short.rglob("*.npz"))[:3]]
    for epoch in range(3):
        ids, shift = moving.sample_ids(epoch * n, n), window_shift(7, epoch, 32)
        starts = [min(i * 32 + shift, 3000 - 33) for i in range(2999 // 32)]
        windows = [stream[start : start + 33].tolist() for stream in streams for start in starts]
        assert sorted(moving.gather(ids).tolist()) == sorted(windows)
        assert (ids % (n + held_out)).tolist() == still.sample_ids(epoch * n, n).tolist()
    assert moving.sample_ids(n - 7, 3 * n).tolist() == [
        int(moving.sample_ids(p, 1)[0]) for p in range(n - 7, 4 * n - 7)
    ]
    assert list(moving.position(n).values())[-2:] == list(*moving.locate(moving.sample_ids(n, 1)))
