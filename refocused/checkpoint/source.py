"""The model that a path names: a checkpoint, the newest of a folder of them, or a Hugging Face folder."""

import dataclasses
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import configs
from configs import Config, ConfigError
from model import num_parameters
from refocused.checkpoint import manifest, selection
from refocused.checkpoint.manifest import CheckpointError
from refocused.entry import here
from refocused.shards import tokenizers


class Source(NamedTuple):
    """A model: in a verified checkpoint, or in a Hugging Face folder."""

    path: Path
    cfg: Config
    state: dict[str, Any]  # the checkpoint's state.json; {} for a Hugging Face folder
    end: int | None  # id of end-of-text

    @property
    def trained_on(self) -> str | None:
        """The fingerprint of its training data, if its state has one; an average's is that of its newest member."""
        return self.state.get("data", {}).get("fingerprint", self.state.get("trained_on"))

    @classmethod
    def of(cls, path: Path, state: dict[str, Any]) -> "Source":
        """A checkpoint with its state.json. Keys of its config that this version does not know are left out.

        Its tokenizer is the file that it holds, else the one that the config names. An import without one has none.
        Raises CheckpointError.
        """
        own = path / tokenizers.FILE
        try:
            cfg = Config(**{key: value for key, value in state["config"].items() if key in configs.KEYS})
            if own.is_file() or "imported_from" in state:
                cfg = dataclasses.replace(cfg, tokenizer=str(own) if own.is_file() else None)
            end = tokenizers.find(cfg.tokenizer).end if cfg.tokenizer else state.get("eos_token_id")
        except tokenizers.MALFORMED as error:
            raise CheckpointError(f"{path} holds no config that can be used: {error}") from error
        return cls(path, cfg, state, end)

    def __str__(self) -> str:
        trained = f", step {self.state['step']:,}" if self.state else ""
        return f"{self.path}{trained}, {num_parameters(self.cfg)[0] / 1e6:,.1f}M parameters"


def source_at(place: str | Path) -> Source:
    """The verified checkpoint at a path, or the newest of a folder of them.

    Raises CheckpointError, or ConfigError for a Hugging Face folder.
    """
    path = Path(os.path.abspath(place))
    if is_hf(path):
        way = here(f"python ckpt.py import {shlex.quote(str(place))} OUT")
        raise ConfigError(f"{place} is a Hugging Face folder; first: `{way}`")
    if selection.names(path):
        chosen = selection.choose(path, "latest")
        assert chosen.path is not None
        for name, why in chosen.passed_over:
            print(f"passed over {name}: {why}", file=sys.stderr)
        return Source.of(chosen.path, chosen.state)
    if not (path / manifest.MANIFEST).exists() and (why := advice(str(place))):
        raise CheckpointError(why)
    return Source.of(path, manifest.read(path)[1])


def snapshot(path: Path) -> Path:
    """The folder. Of the hub's cache of a model (models--ORG--NAME), the version in it that was fetched last."""
    try:
        return path / "snapshots" / (path / "refs/main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return path


def is_hf(path: Path) -> bool:
    return (snapshot(path) / "config.json").is_file()


def advice(place: str) -> str:
    """How to come by a model where `place` is none; "" if nothing is known of it."""
    path = Path(place)
    if not path.parent.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        way = here(f"hf download {place} --local-dir {path.name}")
        return f"{place} is no folder here; if it is a model's name on the Hugging Face hub: `{way}`"
    if any(path.glob("*model*.safetensors")) or any(path.glob("*model*.bin")):  # a checkpoint of ours has other names
        way = here(f"python ckpt.py import {shlex.quote(place)} OUT --config FILE.py")
        return f"{place} has weights and no config.json, as Accelerate leaves them; with the config that trained them: `{way}`"
    return ""
