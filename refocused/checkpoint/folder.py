"""The model alone: a verified checkpoint or a Hugging Face folder, read and written. Nothing here needs Transformers."""

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import configs
from configs import Config
from model import SAME_NAME, GPTNeoX, from_hf_config, num_parameters, to_hf_config
from refocused import files
from refocused.checkpoint import manifest, schema, tensors
from refocused.checkpoint.manifest import CheckpointError
from refocused.entry import here
from refocused.shards import tokenizers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FILE_BYTES = 5_000_000_000  # per model file, the hub's custom
# what a value of another type or size than meant comes to, somewhere between json and Config
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
MODEL_KEYS = (*SAME_NAME, "rotary_pct", "rotary_emb_base")
# of these, what weights mean; the others say how they are trained, and may differ between runs of one model
FUNCTION = tuple(
    key
    for key in MODEL_KEYS
    if key not in ("attention_dropout", "hidden_dropout", "max_position_embeddings", "initializer_range")
)


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


def is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def hf_source(path: Path) -> Source:
    """A GPT-NeoX folder's shape. Raises CheckpointError naming what this model cannot represent."""
    try:
        hf = json.loads((path / "config.json").read_bytes())
        end = hf.get("eos_token_id")
        end = end[0] if isinstance(end, list) else end
        if end is not None and not schema.whole(end):
            raise ValueError(f"eos_token_id={str(hf['eos_token_id'])[:80]} is no id of a token")
        ours = {key: configs.convert(key, value) for key, value in from_hf_config(hf).items()}
        length = min(Config.sequence_length, ours.get("max_position_embeddings", Config.sequence_length))
        tokenizer = str(path / tokenizers.FILE) if (path / tokenizers.FILE).is_file() else None
        cfg = Config(**ours, sequence_length=length, tokenizer=tokenizer)
    except MALFORMED as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    return Source(path, cfg, {}, end)


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
            tensors.load(source.path, tensors.state_tree(model))
        manifest.check_unchanged(source.path)
    return model.eval()


def hf_name(name: str) -> str:
    return name if name.startswith("embed_out.") else f"gpt_neox.{name}"


def read_folder(path: Path, model: GPTNeoX) -> None:
    """Fill the model from model.safetensors or the files of its index. Raises CheckpointError at what does not fit."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({Path(file).name for file in json.loads(index.read_bytes())["weight_map"].values()})
        except MALFORMED as error:
            raise CheckpointError(f"{index} is no index of weights: {error}") from error
    else:
        files = ["model.safetensors"]
    wanted = {hf_name(name): p for name, p in model.named_parameters()}
    missing = set(wanted)
    # masks and tables that older versions of Transformers saved; tied, the output matrix may come as a copy
    computed = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
    for file in files:
        if not (path / file).is_file():
            way = here('python -c "from transformers import AutoModelForCausalLM as A; ')
            raise CheckpointError(
                f"{path / file} is missing; pickled weights (.bin) are not read, convert them once: "
                f"{way}A.from_pretrained('{path}').save_pretrained('NEW')\""
            )
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
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        save_file({key: t.to(dtype) for key, t in part.items()}, folder / file, {"format": "pt"})
        files.widen(folder / file)  # save_file makes it readable by its owner alone
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
