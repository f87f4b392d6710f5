"""Export and import: what is written, read by Transformers, onnxruntime and train.py; and what is refused."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from launch import GUARD, train
from safetensors.torch import load_file, save_file
from shards import own_tokenizer, tokens_in, use_gpt2
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import ckpt
import configs
import data
import sample
from configs import Config, ConfigError
from model import GPTNeoX
from refocused.checkpoint import huggingface, manifest, tensors
from refocused.checkpoint.manifest import CheckpointError
from refocused.checkpoint.weights import load as load_model
from refocused.commands import average, export, importing
from refocused.run.strategy import materialise
from refocused.shards import spelling, tokenizers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CFG = Config(
    vocab_size=257, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
    max_position_embeddings=64, sequence_length=32, tokenizer="byte", initializer_range=0.2,
)  # fmt: skip


def save(folder: Path, cfg: Config, step: int = 7) -> Path:
    """A checkpoint as train.py leaves it, of the initial weights, with the optimizer's tensors."""
    model = GPTNeoX(cfg)
    materialise(model, 1)
    tree = tensors.state_tree(model, torch.optim.AdamW(model.parameters(), fused=True))
    data = {"fingerprint": "f00d", "position": {"epoch": 2, "epoch_fraction": 0.25}}
    state = {"step": step, "tokens": step * 1000, "loss": 2.5, "eval_loss": 2.25}
    state |= {"run": {"torch": torch.__version__, "git_commit": "c0ffee"}, "config": dict(cfg.__dict__)}
    state |= {"samples_seen": step * 10, "data": data}
    final = folder / manifest.name(0, step, 0)
    tensors.save_alone(final, tree, state)
    return final


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("out"), CFG)


def logits(model, idx):
    with torch.no_grad():
        out = model(idx)
    return out if isinstance(out, torch.Tensor) else out.logits


IDX = torch.tensor([[100, 101, 102, 32, 7, 256, 0, 33]])


OTHER = {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_new", "rotary_pct": 0.5}
OTHER |= {"rotary_emb_base": 5000.0, "hidden_dropout": 0.5, "attention_dropout": 0.5}


@pytest.mark.parametrize("keys", [{}, OTHER])
def test_transformers_loads_it(tmp_path, capsys, keys, device):
    """Logits of the fp32 folder in AutoModelForCausalLM equal the checkpoint's to 1e-5, on a GPU to 1e-3.

    What was read back has the checkpoint's logits exactly, also of a model that was trained with dropout.
    """
    checkpoint = save(tmp_path / "out", dataclasses.replace(CFG, **keys))
    assert export.main([str(checkpoint), str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    assert "at most 0.0e+00" in capsys.readouterr().out
    hf, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), load_model(ckpt.find(str(checkpoint)))
    apart = logits(hf.to(device), IDX.to(device)) - logits(ours.to(device), IDX.to(device))
    assert apart.abs().max() < (1e-5 if device == "cpu" else 1e-3)
    assert hf.config.eos_token_id == hf.generation_config.eos_token_id == 256
    back = load_model(huggingface.source(tmp_path / "hf")).to(device)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters(), strict=True))


def test_bf16_in_several_files(checkpoint, tmp_path, monkeypatch, capsys):
    """With a limit of 100 kB a file: an index, files below the limit, and Transformers finds the rounded weights."""
    monkeypatch.setattr(huggingface, "FILE_BYTES", 100_000)
    assert export.main([str(checkpoint.parent), str(tmp_path / "hf")]) == 0
    files = sorted(tmp_path.glob("hf/model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_bytes())
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    assert sum(t.nbytes for f in files for t in load_file(f).values()) == index["metadata"]["total_size"]
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours = load_model(ckpt.find(str(checkpoint)))
    assert hf.dtype == torch.bfloat16
    for name, p in ours.named_parameters():
        theirs = hf.get_parameter(huggingface.file_name(name).replace("embed_out", "lm_head"))
        assert torch.equal(theirs, p.bfloat16()), name
    card = ModelCard.load(tmp_path / "hf/README.md")
    wanted = {"license": "other", "library_name": "transformers", "pipeline_tag": "text-generation"}
    assert card.data.to_dict() == wanted | {"tags": ["gpt_neox", "pretrained"]}
    facts = ["step7", "7,000", "2.5000", "f00d", "c0ffee", "bf16", f"torch | {torch.__version__}", "epochs | 2.25 "]
    facts += ["held-out loss | 2.2500 nats per token", "It wrote, with nothing", "sequence_length=32", "vllm serve"]
    assert [fact for fact in facts if fact not in card.text] == []
    assert "out/" not in card.text and "_dir" not in card.text  # names of this machine are nobody's business
    *_, read_back, _, last = capsys.readouterr().out.splitlines()
    assert read_back.endswith(", by the rounding to bf16")
    assert last == f"to publish it: hf upload USER/hf {tmp_path / 'hf'}"
    hub = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_none"}
    tried = subprocess.run(shlex.split(last.partition(": ")[2]), env=hub, capture_output=True, text=True, timeout=GUARD)
    assert "Connection refused" in tried.stderr  # as far as it gets without the hub


TEXTS = [
    "def f(x):\n    return x  # 42",
    "naïve café — 日本語 \U0001f600\x00\x7f",
    "",
    " <|endoftext|>\n\n",
    "don't  stop",
]


def exported(name: str, folder: Path):
    """AutoTokenizer of the files that stand for a tokenizer of ours; its ids and texts are found to be tiktoken's."""
    for file, content in spelling.files(tokenizers.find(name), 64).items():
        (folder / file).write_bytes(content)
    known, ours = AutoTokenizer.from_pretrained(folder), tokenizers.find(name).known
    for text in TEXTS:
        assert known.encode(text) == ours.encode(text, allowed_special="all")
        assert known.decode(known.encode(text)) == text
    return known


def test_byte_tokenizer(tmp_path):
    """AutoTokenizer's ids of a text are its bytes, the end-of-text id 256; shards of `byte` are of this file, unchanged."""
    known = exported("byte", tmp_path)
    assert known.encode("é") == list("é".encode()) and known.eos_token_id == 256 and len(known) == 257
    assert known.convert_tokens_to_ids(known.convert_ids_to_tokens(list(range(257)))) == list(range(257))
    assert set(known("a")) == {"input_ids", "attention_mask"} and known.unk_token == known.eos_token
    settings = json.loads((tmp_path / "tokenizer_config.json").read_bytes())  # what Transformers 4 goes by
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert tokenizers.find(str(tmp_path)).identity == "byte"
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")
    assert tokenizers.File(file).identity.startswith("sha256:")
    assert [spelling.adding_none(part) for part in (None, {"type": "BertProcessing"})] == [None, None]


def test_gpt2_tokenizer(tmp_path, monkeypatch):
    """tokenizer.json made from tiktoken's ranks: vocabulary and merges equal OpenAI's files, ids equal tiktoken's."""
    use_gpt2(tmp_path, monkeypatch)
    (tmp_path / "hf").mkdir()
    exported("gpt2", tmp_path / "hf")
    written = json.loads((tmp_path / "hf/tokenizer.json").read_bytes())["model"]
    vocabulary, merges = (
        path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("6*"))
    )  # as tiktoken names them
    assert written["vocab"] == json.loads(vocabulary)
    assert [" ".join(pair) for pair in written["merges"]] == merges.split("\n")[1:-1]


def test_onnx(checkpoint, tmp_path, capsys):
    """The ONNX graph in onnxruntime, on a batch of another shape, equals the checkpoint's logits to 1e-4."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export.main([str(checkpoint), str(tmp_path / "hf"), "--onnx"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "hf/onnx/model.onnx")
    idx = IDX.repeat(3, 5)[:, :37]
    (out,) = session.run(None, {"input_ids": idx.numpy()})
    ours = load_model(ckpt.find(str(checkpoint)))
    assert (torch.from_numpy(out) - logits(ours, idx)).abs().max() < 1e-4


def test_without_onnx_packages(checkpoint, tmp_path, capsys, monkeypatch):
    """In an environment without them: one line with the command that installs the rest, exit 2."""
    for package in export.ONNX_PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)  # as an absent one
    assert ckpt.main(["export", str(checkpoint), str(tmp_path / "hf"), "--onnx"]) == 2
    said = capsys.readouterr().err
    assert "pip install onnx onnxscript onnxruntime" in said and said.count("\n") == 1
    assert not (tmp_path / "hf").exists()


def pythia(folder: Path, vocab_size=320, **keys) -> GPTNeoXForCausalLM:
    """A small folder in Pythia's manner: fp16, vocabulary padded to a multiple; without keys the rotary ones' old names."""
    torch.manual_seed(1)
    hf = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=128, initializer_range=0.1, bos_token_id=0, eos_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        )
    ).half()  # fmt: skip
    hf.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_bytes()) | keys
    if not keys:
        rope = config.pop("rope_parameters")
        config |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config))
    return hf.float().eval()


HEAD = "embed_out.weight"
PYTHIA_KEYS = "vocab_size=320 hidden_size=64 num_hidden_layers=2 intermediate_size=256 max_position_embeddings=128"


def reworked(folder: Path, change, file: str = "model.safetensors") -> None:
    """Change the {name: tensor} of a folder's weights; `file` is where they go."""
    weights = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    save_file({key: t.clone() for key, t in weights.items()}, folder / file, {"format": "pt"})


def named(*heads: str, prefix: str = ""):
    """The head under these names, and all keys behind a prefix."""
    return lambda weights: {
        **{prefix + key: t for key, t in weights.items() if key != HEAD},
        **{prefix + head: weights.get(HEAD, weights["gpt_neox.embed_in.weight"]) for head in heads},
    }


def old(weights):
    """With the masks that old versions of Transformers saved."""
    name, mask = "gpt_neox.layers.0.attention.", torch.ones(1, 1, 8, 8, dtype=torch.bool)
    return weights | {name + "bias": mask, name + "masked_bias": torch.ones(())}


def cached(folder: Path) -> None:
    """As in the hub's cache, in which each version is a folder."""
    version = folder.rename(folder.with_name("files"))
    (folder / "snapshots").mkdir(parents=True)
    (folder / "refs").mkdir()
    version.rename(folder / "snapshots/c0ffee")
    (folder / "refs/main").write_text("c0ffee")


TIED = {"tie_word_embeddings": True}
WAYS = {  # what Transformers, or who trains with it, writes: (keys of config.json, a change of the weights)
    "as Pythia": ({}, old),
    "both names": ({}, named("lm_head.weight", HEAD)),
    "without a prefix": ({}, lambda w: {key.removeprefix("gpt_neox."): t for key, t in w.items()}),
    "compiled under DDP": ({}, named("lm_head.weight", prefix="module._orig_mod.")),
    "a variant in the cache": ({"hidden_act": "gelu_python"}, dict),
    "tanh": ({"hidden_act": "gelu_pytorch_tanh", "rope_scaling": {"type": "default"}}, dict),
    "tied": (TIED, dict),
    "tied, a copy": (TIED, named(HEAD)),
    "tied, under the name of the head": (
        TIED, lambda w: {key.replace("gpt_neox.embed_in", "lm_head"): t for key, t in named()(w).items()}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_import(way, tmp_path, capsys):
    """A folder becomes a checkpoint whose logits are Transformers'; the command that is printed trains this model; an
    export of it, and an average, keep its end-of-text."""
    keys, change = WAYS[way]
    hf = pythia(tmp_path / "hf", **keys)
    if keys == TIED:
        reworked(tmp_path / "hf", named())
    if keys:
        hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    in_cache = way == "a variant in the cache"
    reworked(tmp_path / "hf", change, f"model.{'fp16.' * in_cache}safetensors")
    if in_cache:
        cached(tmp_path / "hf")
    assert importing.main([str(tmp_path / "hf"), str(tmp_path / "start")]) == 0
    command = shlex.split(capsys.readouterr().out.split("train from it with: ")[1])
    assert command[:2] == ["python", "train.py"] and set(PYTHIA_KEYS.split()) <= set(command)
    cfg, _ = configs.load(command[2:])
    source = ckpt.find(str(tmp_path / "start"))
    assert source.state["step"] == 0 and manifest.verify(source.path) and cfg.init_from == str(tmp_path / "start")
    assert all(getattr(cfg, key) == getattr(source.cfg, key) for key in huggingface.MODEL_KEYS)
    assert cfg.learning_rate == 1e-4
    for there in (source, huggingface.source(tmp_path / "hf")):
        assert (logits(load_model(there), IDX) - logits(hf, IDX)).abs().max() < 1e-4
    if way == "as Pythia":
        assert export.main([str(tmp_path / "start"), str(tmp_path / "again")]) == 0
        for file in ("config.json", "generation_config.json"):
            assert json.loads((tmp_path / "again" / file).read_bytes())["eos_token_id"] == 0
        assert average.main([*[str(tmp_path / "start")] * 2, str(tmp_path / "mean")]) == 0
        assert ckpt.find(str(tmp_path / "mean")).end == source.end == 0


def test_import_what_accelerate_saved(tmp_path, capsys):
    """The folder of its save_state: a config file says what model it is, the message what does not come along, and the
    command that is printed trains it with that file."""
    materialise(model := GPTNeoX(CFG).eval(), 1)
    keys = (*huggingface.MODEL_KEYS, "sequence_length", "tokenizer")
    (tmp_path / "old.py").write_text("".join(f"{key} = {getattr(CFG, key)!r}\n" for key in keys))
    (folder := tmp_path / "state").mkdir()
    huggingface.write_weights(model, folder, torch.float32)
    (folder / "optimizer.bin").write_bytes(b"")
    for command in ("import", "export"):
        assert ckpt.main([command, str(folder), str(tmp_path / "never")]) == 66
        assert "has weights and no config.json" in (said := capsys.readouterr().err) and "--config FILE.py" in said
    start = str(tmp_path / "start")
    assert ckpt.main(["import", str(folder), start, "--config", str(tmp_path / "old.py")]) == 0
    assert "without optimizer.bin" in (said := capsys.readouterr().out)
    source = ckpt.find(start)
    assert torch.equal(logits(load_model(source), IDX), logits(model, IDX)) and source.end == 256
    cfg, _ = configs.load(shlex.split(said.split("train from it with: ")[1])[2:])
    assert cfg.hidden_size == CFG.hidden_size and ckpt.beginning(start, cfg).path == source.path


def test_a_killed_import_or_export_does_not_refuse_the_next(checkpoint, tmp_path):
    """SIGKILL in the middle of each: nothing is under the name, the same command then succeeds, and nothing else is
    left. One that is under way is not disturbed by a second."""
    pythia(tmp_path / "hf")
    commands = {"import": tmp_path / "hf", "export": checkpoint, "export --torch": checkpoint}
    die = "import os, signal, sys, ckpt; from refocused import files; "
    die += "files.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL); ckpt.main(sys.argv[1:])"
    for command, given in commands.items():
        out = tmp_path / f"out of {command}"
        arguments = [*command.split(), str(given), str(out)]
        killed = subprocess.run([sys.executable, "-c", die, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists() and list(tmp_path.glob(".making-*"))
        with pytest.raises(ConfigError, match=f"is being made by host .*, pid {os.getpid()}"):
            with export.coming(out), export.coming(out):
                raise AssertionError
        assert ckpt.main(arguments) == 0 and out.exists() and not list(tmp_path.glob(".making-*"))


def test_torch_file(checkpoint, tmp_path):
    """export --torch: torch.load reads every tensor, weights and moments, and the state, without unpickling objects."""
    assert ckpt.main(["export", str(checkpoint), "--torch", str(tmp_path / "all.pt")]) == 0
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    ours = load_model(ckpt.find(str(checkpoint)))
    assert found["state"]["step"] == 7
    for key, p in ours.named_parameters():
        assert torch.equal(found["tensors"][f"model.{key}"], p)
        assert not found["tensors"][f"optim.exp_avg_sq.{key}"].any()


GENERATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
given = tokenizer(text, return_tensors="pt")
out = model.generate(**given, max_new_tokens=8, do_sample=False)[0].tolist()
print(json.dumps([given["input_ids"][0].tolist(), out, tokenizer.decode(out), tokenizer.unk_token]))
"""


def test_one_tokenizer_from_text_to_export(tmp_path, capsys):
    """A Pythia-like model with a tokenizer of its own, by the commands that are printed: import, tokenize, train,
    export. Its text's ids and logits in Transformers are ours; the files of the model that came in are gone by then."""
    (tmp_path / "in").mkdir()
    for file in (ROOT / "refocused/shards").glob("[!_]*.py"):
        shutil.copy(file, tmp_path / f"in/{file.stem}.txt")
    texts = [file.read_text() for file in sorted((tmp_path / "in").iterdir())]
    pythia(tmp_path / "hf", vocab_size=512)
    own_tokenizer(tmp_path / "hf", texts)
    assert ckpt.main(["import", str(tmp_path / "hf"), str(tmp_path / "start")]) == 0
    said = capsys.readouterr().out
    tokenize = said.split("make shards for it with: ")[1].split("\n")[0].replace("TEXTS", str(tmp_path / "in"))
    program, *words = shlex.split(tokenize.replace("SHARDS", str(tmp_path / "shards")).removeprefix("python "))
    assert program == "data.py" and data.main([*words, "--shard_tokens", "8000"]) == 0, capsys.readouterr().err
    keys = shlex.split(said.split("train from it with: ")[1])[3:]
    known = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    known.no_truncation()
    known.no_padding()
    known.encode_special_tokens = True  # as what it is in a text: text
    ids = [i for text in texts for i in [*known.encode(text, add_special_tokens=False).ids, 0]]
    assert len(list((tmp_path / "shards").glob("*.npz"))) > 2 and tokens_in(tmp_path / "shards") == ids

    places = [f"data_dir={tmp_path / 'shards'}", f"output_dir={tmp_path / 'out'}", f"logging_dir={tmp_path / 'logs'}"]
    places += ["learning_rate=1e-3"]
    run = train(tmp_path, *keys, *places, "sequence_length=32", "eval_steps=10", "sample_tokens=4")
    assert "weights only" in run.text and "not known" not in run.text and run.losses[-1] < run.losses[0]
    assert " bits per byte" in run.text and "no text samples" not in run.text
    saved = ckpt.find(str(tmp_path / "out")).path
    assert {"tokenizer.json", "tokenizer_config.json"} <= manifest.verify(saved)["files"].keys()
    assert (saved / "tokenizer.json").read_bytes() == (tmp_path / "hf/tokenizer.json").read_bytes()
    assert ckpt.main(["export", str(tmp_path / "start"), str(tmp_path / "untouched")]) == 0
    assert (tmp_path / "untouched/tokenizer.json").read_bytes() == (tmp_path / "hf/tokenizer.json").read_bytes()
    for gone in ("hf", "start"):
        shutil.rmtree(tmp_path / gone)
    moved = [*keys, *places, f"tokenizer={tmp_path / 'out'}", "sequence_length=32"]  # from where it is found now
    assert "Step 12: " in train(tmp_path, *moved, "resume=latest", "max_steps=12").text

    both = [str(path) for path in sorted((tmp_path / "out").glob("checkpoint-*"))]
    assert len(both) == 2 and ckpt.main(["average", *both, str(tmp_path / "mean")]) == 0
    assert ckpt.find(str(tmp_path / "mean")).cfg.tokenizer.startswith(str(tmp_path / "mean"))
    assert ckpt.main(["export", str(tmp_path / "out"), str(tmp_path / "hf2"), "--dtype", "fp32"]) == 0
    assert "which adds no special tokens, as in training" in capsys.readouterr().out
    assert "tokenizer out/" not in (card := (tmp_path / "hf2/README.md").read_text()) and "500 ids, sha256:" in card
    assert ckpt.main(["import", str(tmp_path / "hf2"), str(tmp_path / "again")]) == 0
    for copy in ("hf2", "again"):  # of the run's tokenizer: its shards are good for them
        assert not tokenizers.differ(str(tmp_path / copy), str(tmp_path / "out"))
    trained, prompt = ckpt.find(str(tmp_path / "out")), "def convert(text: str) -> None:\n    # naïve"
    capsys.readouterr()
    assert sample.main([f"resume={tmp_path / 'out'}", f"prompt={prompt}", "max_new_tokens=8", "temperature=0"]) == 0
    ours = capsys.readouterr().out
    for interpreter in [sys.executable, *filter(None, [os.environ.get("TRANSFORMERS_4_PYTHON")])]:  # two major versions
        command = [interpreter, "-c", GENERATE, str(tmp_path / "hf2"), prompt]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GUARD)
        assert done.returncode == 0, done.stderr
        found, out, theirs, unknown = json.loads(done.stdout.splitlines()[-1])
        assert found == known.encode(prompt, add_special_tokens=False).ids and unknown == "<|endoftext|>"
        assert theirs == known.decode(out, skip_special_tokens=False) and ours.startswith(theirs.split("<|end")[0])
    hf, idx = AutoModelForCausalLM.from_pretrained(tmp_path / "hf2"), torch.tensor([ids[:32]])
    assert trained.state["step"] == 12 and hf.config.eos_token_id == 0
    assert (logits(hf, idx) - logits(load_model(trained), idx)).abs().max() < 1e-5


def test_export_without_a_tokenizer(tmp_path, capsys):
    """A model of 111 characters, and one whose import has no tokenizer: none is made up for an export."""
    pythia(tmp_path / "hf")
    assert ckpt.main(["import", str(tmp_path / "hf"), str(tmp_path / "start")]) == 0
    assert "without a tokenizer" in (said := capsys.readouterr().out) and "tokenizer=none" in said
    small = save(tmp_path / "small", dataclasses.replace(CFG, vocab_size=111))
    for checkpoint, words in (
        (small, "tokenizer=byte has 257 ids, the model 111"), (tmp_path / "start", "does not know which tokenizer"),
    ):  # fmt: skip
        out = tmp_path / f"of {checkpoint.name}"
        assert ckpt.main(["export", str(checkpoint), str(out)]) == 0
        assert "without tokenizer files" in (said := capsys.readouterr().out) and words in said
        assert not list(out.glob("tokenizer*")) and "| tokenizer | not known |" in (out / "README.md").read_text()


def test_init_from(tmp_path):
    """init_from fills the weights and nothing else of a run's tree; a config of another function is refused with the fix."""
    hf = pythia(tmp_path / "hf")
    assert importing.main([str(tmp_path / "hf"), str(tmp_path / "start")]) == 0
    own_tokenizer(tmp_path / "hf", ["a text"], size=300)
    assert importing.main([str(tmp_path / "hf"), str(tmp_path / "with")]) == 0
    cfg = ckpt.find(str(tmp_path / "start")).cfg
    model = GPTNeoX(cfg)
    tree = tensors.state_tree(model, torch.optim.AdamW(model.parameters()))

    def begin(name: str, **keys) -> str:
        mine = dataclasses.replace(cfg, **keys)
        return ckpt.init_from(ckpt.beginning(str(tmp_path / name), mine), mine, tree)

    assert "weights only" in begin("start") and (logits(model, IDX) - logits(hf, IDX)).abs().max() < 1e-4
    assert all(not t.any() for key, t in tree.items() if key.startswith("optim."))
    assert "its tokenizer is not known, taken for tokenizer=byte" in begin("start", tokenizer="byte")
    begin("with", tokenizer="byte", allow_change=True)
    for name, keys, words in (
        ("start", {"rotary_pct": 0.25}, "rotary_pct 0.5 -> 0.25; go on with rotary_pct=0.5"),
        ("hf", {}, "ckpt.py import"),
        ("with", {"tokenizer": "byte"}, "another tokenizer than tokenizer=byte; set tokenizer=.*/with/"),
    ):
        with pytest.raises(ConfigError, match=words):
            begin(name, **keys)


BIAS = "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"
REFUSED = [  # keys of config.json, a change of the weights, what is said
    ({"hidden_act": "silu"}, dict, "hidden_act='silu'"),
    ({"attention_bias": False}, dict, "attention_bias=False"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, dict, "rope_type='linear'"),
    ({"rope_parameters": {"type": "linear", "factor": 2.0}}, dict, "rope_type='linear'"),
    ({"model_type": "llama"}, dict, "model_type='llama'"),
    ({"hidden_size": "wide"}, dict, "hidden_size='wide' is a str"),
    ({"hidden_size": 32}, dict, "is .320, 64., .320, 32. by the config"),
    ({"num_hidden_layers": 3}, dict, "lacks layers.2"),
    ({"num_hidden_layers": 1}, dict, "has gpt_neox.layers.1.*which this model does not"),
    ({}, named(), "saved from a GPTNeoXModel, not from a GPTNeoXForCausalLM"),
    ({}, lambda w: w | {"lm_head.weight": w[HEAD] + 1}, "embed_out.weight and lm_head.weight, which differ"),
    (TIED, lambda w: w | {"lm_head.weight": w[HEAD]}, "=true by config.json, and embed_out.weight differs from"),
    ({}, lambda w: {key: t.to(torch.int8) for key, t in w.items()}, "quantized weights"),
    ({}, lambda w: w | {BIAS: w[BIAS] / 0}, "1.mlp.dense_h_to_4h.bias has values that are not finite"),
]  # fmt: skip


def test_refused_folders(tmp_path):
    """A folder that this model cannot represent, or whose files do not fit its config, is refused by name, and nothing is
    left."""

    def refused(folder: Path | str, words: str, command=importing.main) -> None:
        with pytest.raises(CheckpointError, match=words):
            command([str(folder), str(tmp_path / "never")])

    pythia(good := tmp_path / "good")
    config = json.loads((good / "config.json").read_bytes())
    for i, (keys, change, words) in enumerate(REFUSED):
        folder = shutil.copytree(good, tmp_path / str(i))
        (folder / "config.json").write_text(json.dumps(config | keys))
        reworked(folder, change)
        refused(folder, words)
    (good / "model.safetensors").write_bytes(b"x" * 100)
    refused(good, "damaged")
    (good / "model.safetensors").rename(good / "pytorch_model.bin")
    refused(good, "pickled weights .*convert them once: python -c [^;]*; AutoModelForCausalLM.from[^;]*$")
    (good / "tokenizer_config.json").touch()
    refused(good, "convert them once: .*; AutoTokenizer.from_pretrained.*save_pretrained")
    for variant in ("bf16", "fp16"):
        (good / f"model.{variant}.safetensors").touch()
    refused(good, "model.bf16.safetensors, model.fp16.safetensors and no model.safetensors")
    for index, words in (
        ('{"weight_map": {"a": "model-1-of-1.safetensors"}}', "lacks model-1-of-1.safetensors, which model.safetensors"),
        ('{"weight_map": 3}', "no index of weights"), ("[" * 100_000, "no index of weights"),
    ):  # fmt: skip
        (good / "model.safetensors.index.json").write_text(index)
        refused(good, words)
    for command in (importing.main, export.main):
        refused("EleutherAI/pythia-70m", "`hf download EleutherAI/pythia-70m --local-dir pythia-70m`", command)
    assert not list(tmp_path.glob("*never*"))


def test_refused_targets(checkpoint, tmp_path):
    """A folder with files is left as it is; a damaged checkpoint, and weights beyond fp16, leave nothing behind."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    shutil.copytree(checkpoint, damaged := tmp_path / checkpoint.name)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    large = save(tmp_path / "large", dataclasses.replace(CFG, initializer_range=1e5))
    for command, arguments, words in (
        (export.main, [checkpoint, tmp_path / "full"], "not empty"),
        (importing.main, [checkpoint, tmp_path / "full"], "not empty"),
        (export.main, [damaged, tmp_path / "hf"], "SHA-256 differs"),
        (export.main, [large, tmp_path / "hf", "--dtype", "fp16"], "not finite in float16.*--dtype"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=words):
            command([str(argument) for argument in arguments])
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.name, "full", "large"]
    assert [path.read_text() for path in (tmp_path / "full").iterdir()] == ["mine"]
