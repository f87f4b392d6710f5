"""The model alone, in and out: a checkpoint -> a Hugging Face folder, and such a folder -> a checkpoint to start from.

    python ckpt.py export CHECKPOINT OUT [--dtype fp32] [--onnx]
    python ckpt.py import HF_FOLDER OUT
    python train.py init_from=OUT ...

CHECKPOINT is one, a folder of them (the highest step), or gs://BUCKET/PREFIX[/NAME]. Nothing here needs Transformers.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import ckpt
import configs
import data
import manifest
import sync
from ckpt import CheckpointError
from configs import Config, ConfigError
from model import SAME_NAME, GPTNeoX, from_hf_config, num_parameters, to_hf_config
from prepare import END_OF_TEXT

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FILE_BYTES = 5_000_000_000  # per model file, the hub's custom
MODEL_KEYS = (*SAME_NAME, "rotary_pct", "rotary_emb_base")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# ---- where a model comes from


class Source(NamedTuple):
    """A verified checkpoint, or a Hugging Face folder."""

    path: Path
    cfg: Config
    state: dict[str, Any]  # the checkpoint's state.json; {} for a Hugging Face folder
    end: int | None  # id of end-of-text

    @classmethod
    def of(cls, path: Path, state: dict[str, Any]) -> "Source":
        """A checkpoint with its state.json; keys of its config that this version does not know are left out."""
        cfg = Config(**{key: value for key, value in state["config"].items() if key in configs.KEYS})
        return cls(path, cfg, state, None if "imported_from" in state else END_OF_TEXT[cfg.tokenizer])

    @property
    def is_hf(self) -> bool:
        return not self.state

    @property
    def tokenizer(self) -> str | None:
        """The name of the tokenizer; None where a folder, not we, knows it."""
        return None if self.is_hf or "imported_from" in self.state else self.cfg.tokenizer

    def __str__(self) -> str:
        trained = "" if self.is_hf else f", step {self.state['step']:,}"
        return f"{self.path}{trained}, {num_parameters(self.cfg)[0] / 1e6:,.1f}M parameters"


def is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def find(place: str) -> Source:
    """What is at a path or gs:// place; a checkpoint is verified. Raises CheckpointError, BucketError."""
    if place.startswith("gs://"):
        path = pull(place)
    else:
        path = Path(os.path.abspath(place))
        if is_hf(path):
            return hf_source(path)
        if there := ckpt.names(path):
            choice = ckpt.choose(path, "latest")
            assert choice.path is not None, there
            return Source.of(choice.path, choice.state)
    return Source.of(path, ckpt.read_state(path))


def pull(url: str) -> Path:
    """A checkpoint of a bucket, the highest complete step if none is named, in a folder of its own below out/pulled."""
    place, name = sync.open_place(url)
    if not name:
        good = [remote.name for remote in place.checkpoints(place.objects()) if not remote.problem]
        if not good:
            raise CheckpointError(f"{place} has no complete checkpoint")
        name = good[0]
    return sync.fetch(place, name, Path("out/pulled", str(place).removeprefix("gs://")))


def hf_source(path: Path) -> Source:
    """A GPT-NeoX folder's shape. Raises CheckpointError naming what this model cannot represent."""
    try:
        hf = json.loads((path / "config.json").read_bytes())
        ours = {key: configs.convert(key, value) for key, value in from_hf_config(hf).items()}
        length = min(Config.sequence_length, ours.get("max_position_embeddings", Config.sequence_length))
        cfg = Config(**ours, sequence_length=length)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    end = hf.get("eos_token_id")
    return Source(path, cfg, {}, end[0] if isinstance(end, list) else end)


def load(source: Source) -> GPTNeoX:
    """The model with its weights, fp32, on the CPU; of a checkpoint no optimizer state is read."""
    with torch.device("meta"):
        model = GPTNeoX(source.cfg)
    model.to_empty(device="cpu")
    model.tie_weights()
    if source.is_hf:
        read_folder(source.path, model)
    else:
        with warnings.catch_warnings():  # that there is no process group is no news here
            warnings.simplefilter("ignore")
            ckpt.load(source.path, ckpt.state_tree(model))
    return model.eval()


# ---- a Hugging Face folder


def hf_name(name: str) -> str:
    return name if name.startswith("embed_out.") else f"gpt_neox.{name}"


def read_folder(path: Path, model: GPTNeoX) -> None:
    """Fill the model from model.safetensors or the files of its index. Raises CheckpointError at what does not fit."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({Path(file).name for file in json.loads(index.read_bytes())["weight_map"].values()})
    else:
        files = ["model.safetensors"]
    wanted = {hf_name(name): p for name, p in model.named_parameters()}
    missing = set(wanted)
    # masks and tables that older versions of Transformers saved; tied, the output matrix may come as a copy
    computed = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
    for file in files:
        if not (path / file).is_file():
            raise CheckpointError(f"{path / file} is missing; pickled weights (.bin) are not read, convert them first")
        try:
            with safe_open(path / file, "pt") as tensors, torch.no_grad():
                for key in tensors.keys():  # noqa: SIM118, it is no dict
                    if computed.fullmatch(key) or (key == "embed_out.weight" and model.cfg.tie_word_embeddings):
                        continue
                    shape = tensors.get_slice(key).get_shape()
                    if key not in wanted:
                        raise CheckpointError(f"{path / file} has {key} {shape}, which this model does not")
                    if shape != list(wanted[key].shape):
                        raise CheckpointError(
                            f"{path / file}: {key} is {shape}, {list(wanted[key].shape)} by config.json"
                        )
                    wanted[key].copy_(tensors.get_tensor(key))
                    missing.discard(key)
        except SafetensorError as error:
            raise CheckpointError(f"{path / file} is damaged: {error}") from error
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing)[:4])}{' ...' * (len(missing) > 4)}")


def write_weights(model: GPTNeoX, folder: Path, dtype: torch.dtype) -> None:
    """model.safetensors, or several files and their index where it would be larger than FILE_BYTES."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, p in model.named_parameters():
        nbytes = p.numel() * dtype.itemsize
        if parts[-1] and size + nbytes > FILE_BYTES:
            parts.append({})
            size = 0
        parts[-1][hf_name(name)] = p.detach()
        size += nbytes
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        save_file({key: t.to(dtype) for key, t in part.items()}, folder / file, {"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # save_file makes it readable by its owner alone
        weight_map |= dict.fromkeys(part, file)
    if len(parts) > 1:
        total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_configs(source: Source, folder: Path, dtype: torch.dtype) -> None:
    end = source.end if source.end is not None and source.end < source.cfg.vocab_size else None
    ids = {"bos_token_id": end, "eos_token_id": end}
    torch_dtype = str(dtype).removeprefix("torch.")
    write_json(
        folder / "config.json", {**to_hf_config(source.cfg), **ids, "torch_dtype": torch_dtype, "use_cache": True}
    )
    write_json(folder / "generation_config.json", {**ids, "pad_token_id": end})


# ---- tokenizer


def byte_letters() -> list[str]:
    """The printable letter for each byte by which a byte-level BPE writes its tokens (as OpenAI's GPT-2 encoder)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge rules, in order, of a BPE known by its tokens' ranks: a token's two halves are what is left when its
    bytes are merged by the earlier rules alone."""
    merges = []
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def write_tokenizer(name: str, folder: Path, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json of "byte" or "gpt2". Raises DataError where tiktoken has no vocabulary."""
    known = data.get_tokenizer(name)
    ranks, letters, end = known._mergeable_ranks, byte_letters(), "<|endoftext|>"

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": name == "gpt2"}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": known.eot_token, "content": end, **special}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spell(token): rank for token, rank in ranks.items()} | {end: known.eot_token},
            "merges": [[spell(a), spell(b)] for a, b in merges_of(ranks)],
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "pad_token": end,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        },
    )


# ---- checks, card, ONNX


def fixed_tokens(cfg: Config) -> Tensor:
    """Tokens (1, T) from all over the vocabulary, the same ones every time."""
    return (torch.arange(min(64, cfg.max_position_embeddings)) * 7919 % cfg.vocab_size)[None]


@torch.inference_mode()
def check(model: GPTNeoX, folder: Path, dtype: torch.dtype) -> float:
    """Read the folder back into the model; the largest difference of logits from before. Raises CheckpointError.

    Every weight must be the checkpoint's, rounded to dtype; what differs in the logits is this rounding.
    """
    idx = fixed_tokens(model.cfg)
    before, rounded = model(idx), {name: p.to(dtype) for name, p in model.named_parameters()}
    read_folder(folder, model)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, rounded[name].float())]
    after = model(idx)
    if changed or not after.isfinite().all():
        raise CheckpointError(
            f"what was written differs from the checkpoint: {', '.join(changed[:4])}"
            if changed
            else f"logits are not finite in {str(dtype).removeprefix('torch.')}; a wider --dtype may hold the weights"
        )
    return (after - before).abs().max().item()


def write_onnx(model: GPTNeoX, file: Path) -> float:
    """input_ids (batch, sequence) -> logits, fp32, as an ONNX graph; its largest difference from ours in onnxruntime."""
    import onnxruntime

    file.parent.mkdir()
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=model.cfg.max_position_embeddings)}
    example = fixed_tokens(model.cfg).repeat(2, 1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (example,), file, input_names=["input_ids"], output_names=["logits"], dynamo=True,
            dynamic_shapes=(axes,), external_data=num_parameters(model.cfg)[0] > 400_000_000, verbose=False,
        )  # fmt: skip
        idx = example[:1, : max(1, example.size(1) - 3)]  # another shape than the example's
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"input_ids": idx.numpy()})
        return (torch.from_numpy(logits) - model(idx)).abs().max().item()


def card(source: Source, dtype: str) -> str:
    """README.md of the exported folder: the facts of the run, and how to load it."""
    cfg, state = source.cfg, source.state
    total, body = num_parameters(cfg)
    run, trained_on = state.get("run", {}), state.get("data", {})
    facts = [
        ("architecture", f"GPT-NeoX, {total:,} parameters ({body:,} without embeddings)"),
        ("shape", f"{cfg.num_hidden_layers} layers, width {cfg.hidden_size}, {cfg.num_attention_heads} heads"),
        ("tokenizer", f"{source.tokenizer or 'of the imported model'}, {cfg.vocab_size:,} ids"),
        ("context", f"trained on {cfg.sequence_length} tokens, at most {cfg.max_position_embeddings}"),
        ("checkpoint", source.path.name),
        ("optimizer steps", f"{state['step']:,}"),
        ("tokens seen", f"{state['tokens']:,}" if "tokens" in state else None),
        ("last training loss", f"{state['loss']:.4f}" if isinstance(state.get("loss"), float) else None),
        ("data fingerprint", trained_on.get("fingerprint")),
        ("weights", f"{dtype}, from fp32"),
        ("made with", f"torch {run['torch']}" if "torch" in run else None),
        ("code", run.get("git_commit")),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts if value)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt_neox
---

# GPT-NeoX, {total / 1e6:,.0f}M parameters

A base model: it continues text, it was not tuned to follow instructions.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_TO_THIS_FOLDER")
```
"""


# ---- the two commands


def check_empty(out: Path) -> None:
    """Raise ConfigError unless `out` is absent or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is {'not empty' if out.is_dir() else 'no folder'}; name a new folder")


def main_export(argv: list[str]) -> int:
    """ckpt.py export; returns the exit code. Raises ConfigError, CheckpointError, BucketError."""
    parser = argparse.ArgumentParser(prog="ckpt.py export", description="A checkpoint as a Hugging Face folder.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="one, a folder of them (the last), or gs://...")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights; bf16 unless said")
    parser.add_argument("--onnx", action="store_true", help="an ONNX graph too, fp32")
    args = parser.parse_args(argv)
    check_empty(args.out)
    absent = [package for package in ONNX_PACKAGES if args.onnx and not importlib.util.find_spec(package)]
    if absent:
        raise ConfigError(f"--onnx needs packages that are not here: pip install {' '.join(absent)}")
    source = find(args.checkpoint)
    if source.is_hf:
        raise CheckpointError(f"{source.path} is a Hugging Face folder already")
    model, dtype = load(source), DTYPES[args.dtype]
    print(f"{source} -> {args.out}, {args.dtype}")

    args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = args.out.absolute().with_name(f".tmp-{secrets.token_hex(4)}-{args.out.absolute().name}")
    folder.mkdir()  # what is under the final name is complete and checked
    try:
        write_configs(source, folder, dtype)
        write_weights(model, folder, dtype)
        (folder / "README.md").write_text(card(source, args.dtype), encoding="utf-8")
        if source.tokenizer is None:
            print("without tokenizer files: copy those of the imported folder")
        else:
            try:
                write_tokenizer(source.tokenizer, folder, source.cfg.max_position_embeddings)
            except data.DataError as error:
                print(f"without tokenizer files: {error}")
        if args.onnx:
            difference = write_onnx(model, folder / "onnx/model.onnx")
            print(f"onnxruntime: logits differ from ours by at most {difference:.1e}")
        difference = check(model, folder, dtype)
        print(f"read back: logits differ from the checkpoint's by at most {difference:.1e}")
        os.rename(folder, args.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def main_import(argv: list[str]) -> int:
    """ckpt.py import; returns the exit code. Raises ConfigError, CheckpointError."""
    parser = argparse.ArgumentParser(prog="ckpt.py import", description="A GPT-NeoX folder as a checkpoint.")
    parser.add_argument("folder", metavar="HF_FOLDER", help="config.json and safetensors, as GPT-NeoX or Pythia has")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, for init_from=OUT")
    args = parser.parse_args(argv)
    check_empty(args.out)
    if not is_hf(Path(args.folder)):
        raise CheckpointError(f"{args.folder} has no config.json: not a Hugging Face folder")
    source = hf_source(Path(os.path.abspath(args.folder)))
    model = load(source)
    args.out.mkdir(parents=True, exist_ok=True)
    final = args.out.absolute() / manifest.name(0, 0, 0)
    state = {
        "step": 0,
        "imported_from": source.path.name,
        "config": dataclasses.asdict(source.cfg),
        "run": {"torch": torch.__version__},
    }
    ckpt.save_alone(final, ckpt.state_tree(model), state)
    keys = [f"{k}={getattr(source.cfg, k)}" for k in MODEL_KEYS if getattr(source.cfg, k) != configs.KEYS[k].default]
    print(f"{source} -> {final}\ntrain from it with: init_from={args.out} {' '.join(keys)}")
    return 0


def init_from(place: str, cfg: Config, tree: dict[str, Tensor]) -> str:
    """Start a fresh run's weights, the `model.` part of its tree, from the checkpoint at `place`. Collective.

    Returns a line to print. Raises ConfigError where the checkpoint's model is another function than cfg's.
    """
    source = ckpt.agree(find, place)
    if source.is_hf:
        raise ConfigError(f"init_from={place} is a Hugging Face folder; first: python ckpt.py import {place} OUT")
    free = ("attention_dropout", "hidden_dropout", "max_position_embeddings", "initializer_range")
    different = [k for k in MODEL_KEYS if k not in free and getattr(source.cfg, k) != getattr(cfg, k)]
    if different:
        needed = " ".join(f"{k}={getattr(source.cfg, k)}" for k in different)
        ours = " ".join(f"{k}={getattr(cfg, k)}" for k in different)
        raise ConfigError(f"init_from={place} is another model: set {needed} (now {ours})")
    ckpt.load(source.path, {key: t for key, t in tree.items() if key.startswith("model.")})
    return f"init      {source}: weights only, the optimizer starts fresh at step 0"
