"""The model alone, read from a verified checkpoint or a Hugging Face folder."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch

import configs
from configs import Config
from model import GPTNeoX, num_parameters
from refocused.checkpoint import huggingface, manifest
from refocused.checkpoint.manifest import CheckpointError
from refocused.checkpoint.weights import MALFORMED, Weights
from refocused.entry import here
from refocused.shards import tokenizers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Source(NamedTuple):
    """A verified checkpoint, or a Hugging Face folder."""

    path: Path
    cfg: Config
    state: dict[str, Any]  # the checkpoint's state.json; {} for a Hugging Face folder
    end: int | None  # id of end-of-text

    @property
    def trained_on(self) -> str | None:
        """The fingerprint of the data that made it, as far as its state knows; an average's is its newest member's."""
        return self.state.get("data", {}).get("fingerprint", self.state.get("trained_on"))

    @classmethod
    def of(cls, path: Path, state: dict[str, Any]) -> "Source":
        """A checkpoint with its state.json; keys of its config that this version does not know are left out.

        Its tokenizer is the file that it holds, else the one that the config names; of an import without, unknown.
        Raises CheckpointError where its config, or its tokenizer, is none.
        """
        own = path / tokenizers.FILE
        try:
            cfg = Config(**{key: value for key, value in state["config"].items() if key in configs.KEYS})
            if own.is_file() or "imported_from" in state:
                cfg = dataclasses.replace(cfg, tokenizer=str(own) if own.is_file() else None)
            end = tokenizers.find(cfg.tokenizer).end if cfg.tokenizer else state.get("eos_token_id")
        except MALFORMED as error:
            raise CheckpointError(f"{path} holds no config that can be used: {error}") from error
        return cls(path, cfg, state, end)

    @property
    def is_hf(self) -> bool:
        return not self.state

    def __str__(self) -> str:
        trained = "" if self.is_hf else f", step {self.state['step']:,}"
        return f"{self.path}{trained}, {num_parameters(self.cfg)[0] / 1e6:,.1f}M parameters"


def hf_source(path: Path) -> Source:
    """A GPT-NeoX folder's shape. Raises CheckpointError naming what this model cannot represent."""
    path = huggingface.snapshot(path)
    try:
        hf = json.loads((path / "config.json").read_bytes())
        end = hf.get("eos_token_id")
        end = end[0] if isinstance(end, list) else end
        if end is not None and not manifest.whole(end):
            raise ValueError(f"eos_token_id={str(hf['eos_token_id'])[:80]} is no id of a token")
        ours = {key: configs.convert(key, value) for key, value in huggingface.from_config(hf).items()}
        length = min(Config.sequence_length, ours.get("max_position_embeddings", Config.sequence_length))
        tokenizer = str(path / tokenizers.FILE) if (path / tokenizers.FILE).is_file() else None
        cfg = Config(**ours, sequence_length=length, tokenizer=tokenizer)
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    return Source(path, cfg, {}, end)


def advice(place: str) -> str:
    """How to come by a model where `place` is none yet; "" where nothing is known of it."""
    path = Path(place)
    if not path.parent.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        way = here(f"hf download {place} --local-dir {path.name}")
        return f"{place} is no folder here; if it is a model's name on the Hugging Face hub: `{way}`"
    if any(path.glob("*model*.safetensors")) or any(path.glob("*model*.bin")):  # a checkpoint of ours has other names
        way = here(f"python ckpt.py import {shlex.quote(place)} OUT --config FILE.py")
        return f"{place} has weights and no config.json, as Accelerate leaves them; with the config that trained them: `{way}`"
    return ""


def load(source: Source) -> GPTNeoX:
    """The model with its weights, fp32, on the CPU; of a checkpoint no optimizer state is read. Raises CheckpointError."""
    with torch.device("meta"):
        model = GPTNeoX(source.cfg)
    weights = weights_of(source)
    weights.check(model)
    model.to_empty(device="cpu")
    model.tie_weights()
    weights.fill(model)
    if not source.is_hf:
        manifest.check_unchanged(source.path)
    return model.eval()


def weights_of(source: Source) -> Weights:
    """The model's parameters by their names. Raises CheckpointError."""
    if source.is_hf:
        return huggingface.read_weights(source.path, source.cfg.tie_word_embeddings)
    return Weights(source.path, shards(source.path), lambda key: key[6:] if key.startswith("model.") else None)


def shards(path: Path) -> list[Path]:
    """A checkpoint's files of tensors."""
    return [path / file for file in manifest.read_manifest(path)["files"] if file.endswith(manifest.SHARD)]
