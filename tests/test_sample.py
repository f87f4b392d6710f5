"""Generation: against Transformers, against recomputing everything, and as a program."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from launch import GUARD
from test_export import CFG, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

import sample
from configs import Config, ConfigError
from model import GPTNeoX
from refocused.bucket import remote
from refocused.checkpoint import huggingface
from refocused.run import generation
from refocused.run.generation import Options
from refocused.run.strategy import materialise
from refocused.shards import spelling, tokenizers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PROMPTS = [[100, 101, 102, 32], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model():
    model = GPTNeoX(CFG).eval()
    materialise(model, 1)
    return model


def collect(model, prompts, end=None, **keys) -> list[list[int]]:
    """Each row's tokens, those before its end."""
    steps = list(generation.generate(model, prompts, Options(**{"temperature": 0.0, **keys}), end))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, each from a whole forward pass over all that came before."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            row.append(model(torch.tensor([row]))[0, -1].argmax().item())
    return row[len(prompt) :]


@pytest.mark.parametrize("keys", [{}, {"use_parallel_residual": False, "rotary_pct": 1.0, "tie_word_embeddings": True}])
def test_greedy_equals_transformers(keys, tmp_path):
    """Greedy tokens of three prompts of other lengths, alone and as one batch, equal transformers.generate's."""
    cfg = Config(**{**CFG.__dict__, **keys})
    model = GPTNeoX(cfg).eval()
    materialise(model, 1)
    huggingface.write_configs(cfg, 256, tmp_path, torch.float32)
    huggingface.write_weights(model, tmp_path, torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = []
    for prompt in PROMPTS:
        idx, how = torch.tensor([prompt]), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=40, **how)
        wanted.append(out[0, len(prompt) :].tolist())
    assert [collect(model, [prompt], max_new_tokens=40)[0] for prompt in PROMPTS] == wanted
    assert collect(model, PROMPTS, max_new_tokens=40) == wanted
    assert len(set(map(tuple, wanted))) == 3


def test_full_window(model):
    """Beyond the window, tokens equal those of whole forward passes over what is still remembered; a prompt of 100 tokens in
    a window of 64 goes on as its last 64 - 20 + 1 tokens alone would."""
    row, window = [5, 6, 7, 8], 16
    seen = len(row)
    for left in range(40, 0, -1):
        seen = seen if seen <= window else max(window // 2, window - left + 1)
        row += greedy(model, row[-seen:], 1)
        seen += 1
    assert collect(model, [row[:4]], max_new_tokens=40, window=window)[0] == row[4:]
    prompt = [i * 7 % 257 for i in range(100)]
    assert collect(model, [prompt], max_new_tokens=20)[0] == greedy(model, prompt[-45:], 20)


def test_end_of_text(model):
    """With a token of the greedy text as end-of-text, a row stops before it; another row goes on as it would alone."""
    alone = [greedy(model, prompt, 30) for prompt in PROMPTS]
    end = next(token for token in alone[0] if token not in alone[1])
    stopped = collect(model, PROMPTS[:2], end, max_new_tokens=30)
    assert stopped == [alone[0][: alone[0].index(end)], alone[1]]


DRAWN = [  # keys, what is drawn how often of five tokens with the probabilities 4 : 3 : 2 : 1 : 0
    ({}, (4, 3, 2, 1, 0)),
    ({"temperature": 0.5}, (16, 9, 4, 1, 0)),
    ({"top_k": 2}, (4, 3, 0, 0, 0)),
    ({"top_p": 0.69}, (4, 3, 0, 0, 0)),
    ({"top_p": 0.71}, (4, 3, 2, 0, 0)),
    ({"top_p": 0.01}, (1, 0, 0, 0, 0)),
    ({"temperature": 0}, (1, 0, 0, 0, 0)),
]


def test_choose():
    """Frequencies of 20,000 draws against the probabilities that temperature, top_k and top_p leave; the same seed."""
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]).log()[None].clamp(min=-50).expand(20_000, -1)

    def draw(seed=0, **keys):
        options = Options(**{"temperature": 1.0, "top_p": 1.0, **keys})
        return generation.choose(logits, options, torch.Generator().manual_seed(seed)).bincount(minlength=5) / 20_000

    for keys, wanted in DRAWN:
        assert draw(**keys).tolist() == pytest.approx([share / sum(wanted) for share in wanted], abs=0.02), keys
    assert torch.equal(draw(seed=1), draw(seed=1)) and not torch.equal(draw(seed=1), draw(seed=2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of step 7 of the model above, with moments beside the weights."""
    return save(tmp_path_factory.mktemp("out"), CFG)


def main(capsys, *args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of sample.main."""
    code = sample.main(list(args))
    return code, *capsys.readouterr()


def test_program_on_latest(checkpoint, model):
    """`sample.py output_dir=... resume=latest` prints the prompt and what whole forward passes continue it with."""
    args = [f"output_dir={checkpoint.parent}", "resume=latest", "prompt=def ", "max_new_tokens=12", "temperature=0"]
    command = [sys.executable, str(ROOT / "sample.py"), *args, "dtype=fp32"]
    done = subprocess.run(command, capture_output=True, timeout=GUARD)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"def {bytes(greedy(model, list(b'def '), 12)).decode(errors='replace')}\n".encode()
    assert b"step 7" in done.stderr and b"tokens/s" in done.stderr


def test_a_text_is_one_decode(model, tmp_path, capsys):
    """Of a tokenizer like Llama's the text is what one decode of the prompt's and the new ids gives: blanks between words
    stay, also behind the prompt."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], vocab_size=60, show_progress=False)
    made.train_from_iterator(["once upon a time, there was a girl; don't stop"] * 50, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer, prompt = tokenizers.find(str(tmp_path)), "once upon a time"
    ids, options = tokenizer.encode(prompt), Options(max_new_tokens=20, temperature=0)
    sample.write(model, SimpleNamespace(end=None), tokenizer, [prompt], [ids], options)
    new = [i for i in greedy(model, ids, 20) if i < tokenizer.size]
    out = capsys.readouterr().out
    assert out == made.decode(ids + new, skip_special_tokens=False) + "\n" and out.startswith(prompt)


def test_batch_from_a_file(checkpoint, tmp_path, capsys):
    """Two prompts of a file, two samples each, in blocks of three: four headed texts, those of a prompt differ. A byte
    order mark is none of the text, and only a line feed ends a prompt."""
    (tmp_path / "prompts.txt").write_text("\ufeffdef f\nimport os,\u2028sys\n", encoding="utf-8")
    args = [f"resume={checkpoint}", f"prompt=FILE:{tmp_path}/prompts.txt", "num_samples=2", "batch_size=3"]
    code, out, _ = main(capsys, *args, "max_new_tokens=9")
    assert code == 0
    heads, bodies = zip(*(text.split("\n", 1) for text in out.split("--- ")[1:]), strict=True)
    assert heads == tuple(f"{i} of 4" for i in range(1, 5))
    assert [body.startswith("def f") for body in bodies] == [True, True, False, False]
    assert bodies[0] != bodies[1] and bodies[2].startswith("import os,\u2028sys")


@pytest.mark.usefixtures("server")
def test_from_a_bucket(checkpoint, tmp_path, monkeypatch, capsys):
    """resume=gs://BUCKET/PREFIX gives the text that the local checkpoint gives."""
    monkeypatch.chdir(tmp_path)
    place, _ = remote.open_url("gs://bucket/runs/a")
    remote.publish(place, checkpoint)
    _, pulled, _ = main(capsys, "resume=gs://bucket/runs/a", "prompt=x", "max_new_tokens=9")
    keys = ["bucket_name=bucket", "checkpoint_bucket_path=runs/a", f"output_dir={tmp_path}/empty"]
    _, latest, _ = main(capsys, *keys, "prompt=x", "max_new_tokens=9")  # no resume is the latest
    code, out, _ = main(capsys, f"resume={checkpoint}", "prompt=x", "max_new_tokens=9")
    assert code == 0 and pulled == out and latest == out


def test_empty_prompt_and_special_token(checkpoint, model, capsys):
    """No prompt begins after end-of-text; "<|endoftext|>" in a prompt is that one token."""
    args = [f"resume={checkpoint}", "max_new_tokens=5", "temperature=0", "dtype=fp32"]
    _, empty, _ = main(capsys, *args)
    _, special, _ = main(capsys, *args, "prompt=<|endoftext|>")
    assert special == "<|endoftext|>" + empty
    assert empty == bytes(greedy(model, [256], 5)).decode(errors="replace") + "\n"


def test_numbers_near_zero_and_a_full_window(checkpoint, capsys):
    """A temperature or top_p down to the smallest number that a float has: the likeliest token. A text that outgrows the
    window is written, and that is said."""
    args = [f"resume={checkpoint}", "prompt=a", "max_new_tokens=9"]
    _, likeliest, _ = main(capsys, *args, "temperature=0")
    for setting in ("temperature=1e-7", "temperature=1e-39", "temperature=5e-324", "top_p=1e-39", "top_p=5e-324"):
        assert main(capsys, *args, setting)[:2] == (0, likeliest), setting
    code, _, err = main(capsys, f"resume={checkpoint}", "prompt=abcd", "max_new_tokens=90")
    assert code == 0 and "window of 64" in err


def test_mistakes(checkpoint, tmp_path, capsys):
    """Exit code and the words that say what is wrong."""
    materialise(broken := GPTNeoX(CFG), 1)
    broken.final_layer_norm.weight.data[3] = torch.nan
    huggingface.write_configs(CFG, 256, tmp_path, torch.float32)
    huggingface.write_weights(broken, tmp_path, torch.float32)
    (tmp_path / "tokenizer.json").write_bytes(spelling.files(tokenizers.find("byte"), 64)["tokenizer.json"])
    (tmp_path / "none").mkdir()
    for args, code, words in [
        (["temprature=1"], 2, "unknown key 'temprature'; did you mean temperature"),
        (["temperature=-1"], 2, "must be at least 0"),
        (["temperature=hot"], 2, "temperature=hot is no float; its default is 0.8"),
        (["top_p=0"], 2, "above 0"),
        (["prompt"], 2, "no config file prompt"),
        (["dtype=int8"], 2, "none of auto, bf16, fp16, fp32"),
        ([f"prompt=FILE:{tmp_path}/gone"], 2, "cannot be read"),
        ([f"resume={tmp_path}", "prompt=a"], 65, "logits are not finite"),
        ([f"resume={tmp_path}/gone"], 66, "no such directory"),
        ([f"output_dir={tmp_path}/none", "resume=latest"], 66, "train first"),
    ]:
        got, _, err = main(capsys, *args)
        assert (got, words in err) == (code, True), (args, got, err)
    with pytest.raises(ConfigError, match="this is not the tokenizer"):
        sample.encode(["é"], tokenizers.find("byte"), Config(vocab_size=150))
