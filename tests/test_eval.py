"""ckpt.py eval: the loss that Transformers and the run itself find on the same windows, in nats, in bits per byte."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards
from launch import program, train
from transformers import AutoModelForCausalLM

import ckpt
import configs
from data import Dataset
from refocused.commands import evaluation, export
from refocused.run.evaluate import byte_table
from refocused.shards import tokenizers


@pytest.fixture
def evaluate(tmp_path):
    def call(*args, nproc: int = 1, code: int = 0) -> str:
        codes, out, err = program(tmp_path, "ckpt", "eval", *args, "cpu_threads=1", nproc=nproc)
        assert codes == [code] * nproc, out + err
        if code == 0:  # no minute without a word
            assert f"reading {args[0]}\n" in err and " windows of 32 of " in err
        return out if code == 0 else err

    return call


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Four shards, the last two for holding out."""
    return write_shards(tmp_path_factory.mktemp("two"), tokens=1500)


@pytest.fixture(scope="module")
def run(two, tmp_path_factory):
    """A run of 6 steps that held two shards out and evaluated at its end, with its export."""
    folder = tmp_path_factory.mktemp("run")
    args = [f"data_dir={two}", "vocab_size=260", "eval_files=2", "eval_samples=21", "eval_steps=6", "max_steps=6"]
    done = train(folder, *args, "mask_documents=true")
    assert export.main([str(folder / "out"), str(folder / "hf"), "--dtype", "fp32"]) == 0
    return folder, done


def test_equals_transformers(run, two, evaluate):
    """The checkpoint on two processes and its export on one against Transformers on the same windows, to 1e-5; bits per byte
    counted by hand, without the targets that are no byte."""
    folder, _ = run
    keys = ["vocab_size=260", "sequence_length=32", "tokenizer=byte", "eval_files=2", f"data_dir={two}"]
    dataset = Dataset.open(configs.load(keys)[0])
    windows = torch.from_numpy(dataset.gather(dataset.eval_ids(21)))
    with torch.no_grad():
        hf = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
        found = hf(input_ids=windows, labels=windows)
    targets = windows[:, 1:]
    each = torch.nn.functional.cross_entropy(found.logits[:, :-1].transpose(1, 2), targets, reduction="none")
    text, loss = targets < 256, found.loss.item()
    assert not text.all() and each.mean().item() == pytest.approx(loss, rel=1e-6)
    bits = each[text].sum().item() / math.log(2) / text.sum().item()
    wanted = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits,
        "tokens": 21 * 32,
        "bytes": int(text.sum()),
    }
    given = [*keys[1::2], keys[4], "--mask_documents=false", "eval_samples=21", "mixed_precision=no", "--json"]
    ours = json.loads(evaluate(folder / "out", *given, "per_device_train_batch_size=4", nproc=2))
    theirs = json.loads(evaluate(folder / "hf", *given))  # its tokenizer.json says what a byte is
    assert theirs["step"] is None and ours["step"] == 6 and ours["windows"] == 21
    for key, value in wanted.items():
        assert [ours[key], theirs[key]] == pytest.approx([value, value], rel=1e-6, abs=1e-5), key


def test_equals_the_run(run, evaluate):
    """With the run's own keys: the eval_loss and bits per byte of its log, documents apart as there."""
    folder, done = run
    [(loss, bits)] = re.findall(r"eval_loss=([\d.]+), .* \| ([\d.]+) bits per byte \| documents apart", done.text)
    out = evaluate(folder / "out")
    assert f"loss {loss} |" in out and f"bits per byte {bits} |" in out and "documents apart" in out
    keys = ("mask_documents=true", "mask_documents=false")
    apart, together = (json.loads(evaluate(folder / "out", key, "--json")) for key in keys)
    assert apart["mask_documents"] and not together["mask_documents"] and apart["loss"] != together["loss"]


def test_what_may_have_been_trained_on(run, two):
    """Of what a run's own keys hold out, nothing; more shards, another set, or of one shard another tail, may have been."""
    source = ckpt.find(str(run[0] / "out"))
    for keys, may in (({}, False), ({"eval_files": 1}, False), ({"eval_files": 3}, True), ({"max_files": 3}, True)):
        cfg = dataclasses.replace(source.cfg, **keys)
        assert evaluation.seen(source, cfg, Dataset.open(cfg)) == may, keys
    one = dataclasses.replace(source.cfg, max_files=1)
    dataset = Dataset.open(one)
    alone = source._replace(cfg=one, state={"trained_on": dataset.fingerprint})  # as an average has it
    assert not evaluation.seen(alone, one, dataset)
    assert evaluation.seen(alone, dataclasses.replace(one, sequence_length=16), dataset)


def test_bytes_of_tokens(run, tmp_path):
    """Bytes per id: by name, and by the tokenizer.json of an export; special tokens count for none."""
    byte = tokenizers.find("byte").byte_lengths()
    assert byte == [1] * 256 + [0] == tokenizers.find(str(run[0] / "hf")).byte_lengths()
    unigram = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": unigram, "decoder": {"type": "ByteLevel"}}))
    with pytest.raises(tokenizers.DataError, match="tokenizer.json is no byte-level BPE"):
        tokenizers.find(str(tmp_path)).byte_lengths()
    assert byte_table(str(tmp_path), 300) is None, "an evaluation goes on without bits per byte"


def test_refused(run, two, evaluate):
    """Another model's keys, nothing held out: one sentence each; and a note where a CPU has no bf16 products."""
    folder, _ = run
    said = evaluate(folder / "hf", "eval_files=0", f"data_dir={two}", code=66)  # in bf16, as no run says otherwise
    assert ("no bf16 matrix products" in said) != torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert "the model is the checkpoint's" in evaluate(folder / "out", "hidden_size=64", code=2)
    assert "eval_files=0 holds nothing out" in evaluate(folder / "out", "eval_files=0", code=66)
    assert np.isfinite(json.loads(evaluate(folder / "out", "eval_samples=1", "--json"))["loss"])
