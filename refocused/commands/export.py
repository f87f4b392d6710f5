"""A checkpoint -> a Hugging Face folder: `python ckpt.py export`.

python ckpt.py export CHECKPOINT OUT [--dtype fp32] [--onnx]
python ckpt.py export CHECKPOINT --torch FILE
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import ckpt
import configs
from configs import Config, ConfigError
from model import GPTNeoX, num_parameters
from refocused import files, locks
from refocused.checkpoint import manifest, tensors
from refocused.checkpoint.huggingface import write_configs, write_weights
from refocused.checkpoint.manifest import CheckpointError
from refocused.checkpoint.source import Source
from refocused.checkpoint.weights import DTYPES, fill, load
from refocused.entry import here
from refocused.run import processes
from refocused.run.generation import open_ended
from refocused.shards import spelling, tokenizers
from refocused.shards.shard import DataError

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def fixed_tokens(cfg: Config) -> Tensor:
    """Tokens (1, T) from all over the vocabulary, the same ones every time."""
    return (torch.arange(min(64, cfg.max_position_embeddings)) * 7919 % cfg.vocab_size)[None]


@torch.inference_mode()
def check(model: GPTNeoX, folder: Path, dtype: torch.dtype) -> float:
    """Read the folder back into the model, and compare; the largest difference of logits. Raises CheckpointError."""
    idx = fixed_tokens(model.cfg)
    before, rounded = model(idx), {name: p.to(dtype) for name, p in model.named_parameters()}
    fill(model, folder)
    if changed := [name for name, p in model.named_parameters() if not torch.equal(p, rounded[name].float())]:
        raise CheckpointError(f"what was written differs from the checkpoint: {', '.join(changed[:4])}")
    after = model(idx)  # another one than before by the rounding to dtype alone
    if not after.isfinite().all():
        raise CheckpointError(
            f"logits are not finite in {str(dtype).removeprefix('torch.')}; a wider --dtype may hold the weights"
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


def card(source: Source, dtype: str, out: Path, text: str) -> str:
    """README.md of the exported folder: the facts of the run, how to load it, and a text that the model wrote."""
    cfg, state, made = source.cfg, source.state, source.state.get("run", {})
    total, body = num_parameters(cfg)
    known = tokenizers.fits(cfg.tokenizer, cfg.vocab_size)
    at = state.get("data", {}).get("position")  # in the part that is trained on
    facts = {
        "architecture": f"GPT-NeoX, {total:,} parameters ({body:,} without embeddings)",
        "shape": f"{cfg.num_hidden_layers} layers, width {cfg.hidden_size}, {cfg.num_attention_heads} heads",
        "tokenizer": f"{known.size:,} ids, {known.identity}" if known else "not known",
        "vocabulary": f"{cfg.vocab_size:,} ids",
        "context": f"trained on {cfg.sequence_length} tokens, at most {cfg.max_position_embeddings}",
        "checkpoint": f"{source.path.name}, step {state['step']:,}",
        "tokens seen": f"{state['tokens']:,}" if "tokens" in state else None,
        "epochs": f"{at['epoch'] + at['epoch_fraction']:.3g}" if at else None,
        "held-out loss": f"{state['eval_loss']:.4f} nats per token" if state.get("eval_loss") else None,
        "loss of the last log line": f"{state['loss']:.4f}" if isinstance(state.get("loss"), float) else None,
        "data fingerprint": source.trained_on,
        "weights": f"{dtype}, from fp32",
        "code": made.get("git_commit"),
        "torch": made.get("torch"),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)
    # not what the file system and the bucket are called
    public = {key: value for key, value in vars(cfg).items() if not isinstance(value, str) or key in configs.CHOICES}
    keys = "\n".join(f"{key}={value}" for key, value in public.items() if value != getattr(Config(), key))
    written = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text).replace("\n", "\n    ")
    wrote = f"\nIt wrote, with nothing to go on from:\n\n    {written}\n" if text else ""
    return f"""---
license: other  # yours to choose
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt_neox
- pretrained
---

# {out.name}: GPT-NeoX, {total / 1e6:,.0f}M parameters

A base model: it continues text, it was not tuned to follow instructions.

| | |
|---|---|
{table}

`ckpt.py eval` of the code that trained it gives bits per byte. In Transformers, and in vLLM (`vllm serve FOLDER`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_TO_THIS_FOLDER")
```
{wrote}
Keys of the run that are not the trainer's defaults:

```
{keys}
```
"""


def write_tokenizer(source: Source, folder: Path) -> str:
    """The files of the tokenizer that the model was trained with, if that is known; a line that says which it is.

    A run's adds no special tokens, as its shards have none. A model that was only imported keeps the file that it had.
    """
    cfg = source.cfg
    if not cfg.tokenizer:
        why = "the checkpoint does not know which tokenizer made the ids that it was trained on"
        return f"without tokenizer files: {why}"
    known, length = tokenizers.find(cfg.tokenizer), cfg.max_position_embeddings
    try:
        if known.size > cfg.vocab_size:
            raise DataError(f"tokenizer={known.name} has {known.size:,} ids, the model {cfg.vocab_size:,}: not the one")
        special = ""
        if isinstance(known, tokenizers.File):
            written = spelling.plain(known, length) if source.trained_on else known.files(length)
            special = ", which adds no special tokens, as in training" * (written[tokenizers.FILE] != known.content)
        else:
            written = spelling.files(known, length)
        for name, content in written.items():
            (folder / name).write_bytes(content)
    except DataError as error:  # a vocabulary that cannot be fetched, too
        return f"without tokenizer files: {error}"
    return f"tokenizer {known.name}, {known.size:,} ids, end-of-text {known.end}{special}"


def check_free(out: Path, for_file: bool = False) -> None:
    """Raise ConfigError unless `out` is absent or, where a folder is to be made, an empty one."""
    if os.path.lexists(out) and (for_file or out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        what = "there already" if for_file else "not empty" if out.is_dir() else "no folder"
        raise ConfigError(f"{out} is {what}; name a new one")


@contextlib.contextmanager
def coming(out: Path) -> Iterator[Path]:
    """A path at which to make a file or folder; at the end, complete and durable, it is renamed to `out`.

    It lies in `.making-NAME` beside `out`, which a lock keeps for one process. What a killed one left there goes first.
    Raises ConfigError, DiskError.
    """
    out = out.absolute()
    check_free(out)
    folder = out.with_name(f".making-{os.fsencode(out.name)[:100].decode(errors='ignore')}")
    if os.path.lexists(folder) and not (folder / locks.FILLING).exists():
        check_free(folder)  # else it is not this program's
    try:
        with locks.filling(folder, wait=False):
            made = folder / "made"
            files.remove(made)
            files.remove_stale(folder)
            try:
                yield made
                for path in [made, *made.rglob("*")]:
                    files.sync_folder(path) if path.is_dir() else files.sync(path)
                check_free(out)
                os.rename(made, out)
                files.sync_folder(out.parent)
            finally:
                files.remove(made)
                files.remove(folder / locks.FILLING)
                with contextlib.suppress(OSError):  # what else is in it is somebody's
                    folder.rmdir()
    except locks.Taken as error:
        raise ConfigError(f"{out} is being made by {error.owner}; wait for it, or name another one") from None


def main(argv: list[str]) -> int:
    """ckpt.py export. Returns the exit code; raises ConfigError, CheckpointError."""
    parser = argparse.ArgumentParser(prog="ckpt.py export", description="A checkpoint as a Hugging Face folder.")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, a folder of them (its last), or gs://..."
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="type of the weights (default: %(default)s)")
    parser.add_argument("--onnx", action="store_true", help="also write an ONNX graph in fp32")
    parser.add_argument("--torch", action="store_true", help="write one file with all state for torch.load instead")
    args = parser.parse_args(argv)
    check_free(args.out, args.torch)
    processes.warn_if_busy(torch.device("cpu"), torch.get_num_threads(), "")
    if absent := [package for package in ONNX_PACKAGES if args.onnx and not importlib.util.find_spec(package)]:
        way = here(f"pip install {' '.join(absent)}")
        raise ConfigError(f"--onnx needs packages that are not here: `{way}`")
    source = ckpt.find(args.checkpoint)
    if args.torch:
        with coming(args.out) as file:  # every tensor, weights and optimizer state by their names, with the state
            saved = tensors.saved_parts(source.path)
            torch.save({"tensors": {key: tensors.whole(saved[key]) for key in saved}, "state": source.state}, file)
            manifest.check_unchanged(source.path)
        print(f"{source} -> {args.out}, for torch.load")
        return 0
    model, dtype = load(source), DTYPES[args.dtype]
    print(f"{source} -> {args.out}, {args.dtype}")
    with coming(args.out) as folder:
        folder.mkdir()
        write_configs(source.cfg, source.end, folder, dtype)
        write_weights(model, folder, dtype)
        print(write_tokenizer(source, folder))
        has_tokenizer = (folder / tokenizers.FILE).exists()
        text = open_ended(model, dataclasses.replace(source.cfg, sample_tokens=60)) if has_tokenizer else ""
        (folder / "README.md").write_text(card(source, args.dtype, args.out, text), encoding="utf-8")
        if args.onnx:
            difference = write_onnx(model, folder / "onnx/model.onnx")
            print(f"onnxruntime: logits differ by at most {difference:.1e}; in optimum load it with use_cache=False")
        rounding = f", by the rounding to {args.dtype}" * (dtype != torch.float32)
        print(f"read back: logits differ from the checkpoint's by at most {check(model, folder, dtype):.1e}{rounding}")
    print(f"once: `{here('pip install huggingface_hub')}` and `hf auth login`")
    print(f"to publish it: hf upload USER/{args.out.name} {shlex.quote(str(args.out))}")
    return 0
