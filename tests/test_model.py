"""The model is Transformers' GPTNeoXForCausalLM: logits, loss and every gradient; counts, FLOPs, initial weights."""

import dataclasses
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from conftest import ROOT
from launch import GUARD
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import model as neox
from configs import Config
from refocused.checkpoint import huggingface
from refocused.run import memory
from refocused.run.strategy import materialise

SMALL = Config(
    vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80,
    max_position_embeddings=64, sequence_length=32, rotary_pct=0.5,
)  # fmt: skip


def pair(cfg: Config) -> tuple[neox.GPTNeoX, transformers.GPTNeoXForCausalLM]:
    """Ours and theirs, built from our config.json, with the same weights by a rename."""
    ours = neox.GPTNeoX(cfg)
    materialise(ours, 1)
    with torch.no_grad():  # biases and norms too, so that none is where it could hide an error
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    hf = huggingface.to_config(cfg)
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**hf))
    theirs.load_state_dict(renamed(ours.state_dict()), strict=True)
    return ours, theirs


def renamed(tensors: dict) -> dict:
    return {("lm_head.weight" if k == "embed_out.weight" else f"gpt_neox.{k}"): v for k, v in tensors.items()}


CHANGES = (
    {},
    {"rotary_pct": 0.25, "rotary_emb_base": 500.0, "num_attention_heads": 2},
    {"hidden_act": "gelu_new", "use_parallel_residual": False, "layer_norm_eps": 1e-3},
    {"hidden_act": "gelu_fast", "rotary_pct": 1.0},
    {"hidden_act": "relu", "tie_word_embeddings": True},
)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["sdpa", "in pieces"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_parity_with_transformers(change, in_pieces):
    """fp32 logits, loss and the gradient of every parameter, ours against GPTNeoXForCausalLM with the same weights; so too
    with the plain products that a CPU compiles, at a length that does not divide into pieces."""
    torch.manual_seed(0)
    ours, theirs = pair(dataclasses.replace(SMALL, **change))
    for block in ours.layers:
        block.attention.in_pieces = in_pieces
    text = torch.randint(0, 101, (3, 31))
    x, y = text[:, :-1], text[:, 1:]
    torch.testing.assert_close(ours(x), theirs(input_ids=x).logits, atol=2e-5, rtol=1e-4)
    # theirs shifts labels by itself; ours gets targets that are the next tokens already
    loss, expected = ours(x, y) / y.numel(), theirs(input_ids=text, labels=text).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    expected.backward()
    gradients = renamed({n: p.grad for n, p in ours.named_parameters()})
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("level, units", [("none", 16), ("activation", 12), ("selective", 9), ("full", 2)])
def test_what_a_block_keeps_is_planned(level, units):
    """What the compiler's partitioner keeps of a block for backward, in 2 B T C bytes, is what the memory plan counts for
    one layer more: the units, the weights in bf16, and numbers per row."""
    B, T, C = 64, 256, 256
    cfg = dataclasses.replace(
        SMALL, hidden_size=C, intermediate_size=4 * C, num_attention_heads=2, sequence_length=T, max_position_embeddings=T,
        per_device_train_batch_size=B, gradient_accumulation_steps=1, mixed_precision="bf16", activation_checkpointing=level,
    )  # fmt: skip
    fewer, more = (memory.estimate(dataclasses.replace(cfg, num_hidden_layers=n), 1).device for n in (6, 7))
    kept: dict[int, int] = {}  # bytes, by storage

    def compiler(graph, inputs):
        if not kept:  # the forward, whose first result is the block's; all others are kept
            [output] = graph.graph.find_nodes(op="output")
            for node in output.args[0][1:]:
                t = node.meta["val"]
                # of the inputs only the block's, not parameters and tables; a random state that is kept is no float
                if t.is_floating_point() and (node.op != "placeholder" or t.shape == (B, T, C)):
                    kept[id(t.untyped_storage())] = t.untyped_storage().nbytes()
        return make_boxed_func(graph.forward)

    partition = partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition, decompositions=select_decomp_table()
    )
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        block, x = neox.Block(cfg), torch.randn(B, T, C, requires_grad=True)
        tables = neox.rotary_tables(torch.arange(T), 32, 10_000.0)
        torch.compile(block, backend=backend, dynamic=False)(x, *tables).sum().backward()
    found = sum(kept.values()) / (2 * B * T * C)
    planned = (more["activations"] - fewer["activations"]) / (2 * B * T * C)
    assert units <= found <= units + 0.3
    assert planned == pytest.approx(found, abs=0.02)


def test_counts_and_flops():
    """The 1.2B model has 1.414 billion parameters; counts equal the modules' own; FLOPs equal torch's counter."""
    assert neox.num_parameters(Config()) == (1_414_455_296, 1_208_602_624)
    for cfg in (SMALL, dataclasses.replace(SMALL, tie_word_embeddings=True)):
        with torch.device("meta"):
            module = neox.GPTNeoX(cfg)
        assert sum(p.numel() for p in module.parameters()) == neox.num_parameters(cfg)[0]
    cfg = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=1024, vocab_size=1000)
    module = neox.GPTNeoX(cfg)
    x = torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        module(x, x).backward()
    attention = 6 * cfg.num_hidden_layers * cfg.hidden_size * cfg.sequence_length  # the CPU's kernel counts as nothing
    measured = counter.get_total_flops() / x.numel() + attention
    assert measured == pytest.approx(neox.flops_per_token(cfg), rel=0.01)


def test_initial_weights():
    """A parameter's first value depends on (seed, name) alone: not on order, other parameters or the seed of torch."""
    a, b = neox.GPTNeoX(SMALL), neox.GPTNeoX(dataclasses.replace(SMALL, num_hidden_layers=2))
    materialise(a, 1)
    torch.manual_seed(123)
    materialise(b, 1)
    for (name, p), q in zip(b.named_parameters(), map(a.get_parameter, dict(b.named_parameters())), strict=True):
        assert torch.equal(p, q), name
    assert a.embed_in.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(a.layers[0].mlp.dense_h_to_4h.weight, a.layers[1].mlp.dense_h_to_4h.weight)
    assert a.layers[0].input_layernorm.weight.eq(1).all() and a.layers[0].attention.dense.bias.eq(0).all()
    other = neox.initial_value("embed_in.weight", a.embed_in.weight.shape, dataclasses.replace(SMALL, seed=1))
    assert not torch.equal(other, a.embed_in.weight)


def test_no_side_effects():
    """Importing train starts no process group and takes no signal."""
    code = "import train, torch.distributed as d, signal; assert not d.is_initialized()"
    code += "; assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=GUARD)
