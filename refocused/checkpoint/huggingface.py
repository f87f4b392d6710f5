"""A GPT-NeoX folder as Hugging Face writes it: its names, its config.json both ways, its files. Transformers is not needed."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import configs
from configs import Config
from model import ACTIVATIONS, GPTNeoX
from refocused.checkpoint.manifest import CheckpointError, whole
from refocused.checkpoint.source import Source, snapshot
from refocused.files import widen
from refocused.shards import tokenizers

FILE_BYTES = 5_000_000_000  # per model file, the hub's custom
SAME_NAME = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act attention_dropout "
    "hidden_dropout max_position_embeddings initializer_range layer_norm_eps tie_word_embeddings use_parallel_residual"
).split()
MODEL_KEYS = (*SAME_NAME, "rotary_pct", "rotary_emb_base")
# functions that Transformers has under several names
SAME_FUNCTION = {"gelu_python": "gelu"}
SAME_FUNCTION |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_new")
# masks and tables that older versions of Transformers saved
COMPUTED = re.compile(r"(layers\.\d+\.attention\.(masked_)?bias|(.+\.)?rotary_emb\.(original_)?inv_freq)")
HEAD = "embed_out.weight"


def to_config(cfg: Config) -> dict[str, Any]:
    """The config.json of GPTNeoXForCausalLM; rotary keys in both the older and the newer spelling."""
    pct, base = cfg.rotary_pct, cfg.rotary_emb_base
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **{key: getattr(cfg, key) for key in SAME_NAME},
        "attention_bias": True,
        "rotary_pct": pct,
        "rotary_emb_base": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": pct},
    }


def from_config(hf: dict[str, Any]) -> dict[str, Any]:
    """Our model keys from a config.json's dict. Raises ValueError naming what this model does not have."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # as Transformers, the older name first
    only = {"model_type": "gpt_neox", "attention_bias": True, "quantization_config": None}
    unsupported = [f"{key}={hf[key]!r} (only {only[key]!r})" for key in only if hf.get(key, only[key]) != only[key]]
    kinds = {rope.get(key, "default") for key in ("rope_type", "type")} - {"default"}
    unsupported += [f"rope_type={kind!r} (only 'default')" for kind in kinds]
    ours = {key: hf[key] for key in SAME_NAME if key in hf}
    act = ours.setdefault("hidden_act", "gelu")
    ours["hidden_act"] = SAME_FUNCTION.get(act, act)
    if ours["hidden_act"] not in ACTIVATIONS:
        unsupported.append(f"hidden_act={act!r} (only {', '.join([*ACTIVATIONS, *SAME_FUNCTION])})")
    if unsupported:
        raise ValueError("this model cannot represent " + "; ".join(unsupported))
    ours["rotary_pct"] = rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
    ours["rotary_emb_base"] = float(rope.get("rope_theta", hf.get("rotary_emb_base", 10000.0)))
    return ours


def file_name(name: str) -> str:
    """What a parameter is called in a file."""
    return name if name.startswith("embed_out.") else f"gpt_neox.{name}"


def our_name(key: str) -> str | None:
    """The parameter that a file calls `key`, as any version of Transformers, Accelerate, DDP or torch.compile does."""
    name = re.sub(r"^(module\.|gpt_neox\.)*", "", key.replace("_orig_mod.", ""))
    return None if COMPUTED.fullmatch(name) else re.sub(r"^lm_head\.", "embed_out.", name)


def source(place: str | Path) -> Source:
    """A GPT-NeoX folder by its config.json. Raises CheckpointError naming what this model cannot represent."""
    path = snapshot(Path(os.path.abspath(place)))
    own = path / tokenizers.FILE
    try:
        hf = json.loads((path / "config.json").read_bytes())
        end = hf.get("eos_token_id")
        end = end[0] if isinstance(end, list) else end
        if end is not None and not whole(end):
            raise ValueError(f"eos_token_id={str(hf['eos_token_id'])[:80]} is no id of a token")
        ours = {key: configs.convert(key, value) for key, value in from_config(hf).items()}
        length = min(Config.sequence_length, ours.get("max_position_embeddings", Config.sequence_length))
        cfg = Config(**ours, sequence_length=length, tokenizer=str(own) if own.is_file() else None)
    except tokenizers.MALFORMED as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    return Source(path, cfg, {}, end)


def write_weights(model: GPTNeoX, folder: Path, dtype: torch.dtype) -> None:
    """model.safetensors, or several files and their index where it would be larger than FILE_BYTES.

    A tied model's matrix is written under both names: llama.cpp looks for the output's.
    """
    parts: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, p in model.named_parameters(remove_duplicate=False):
        nbytes = p.numel() * dtype.itemsize
        if parts[-1] and size + nbytes > FILE_BYTES:
            parts.append({})
            size = 0
        parts[-1][file_name(name)] = p.detach()
        size, total = size + nbytes, total + nbytes
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        save_file({key: t.to(dtype, copy=True) for key, t in part.items()}, folder / file, {"format": "pt"})
        widen(folder / file)  # save_file makes it readable by its owner alone
        weight_map |= dict.fromkeys(part, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_configs(cfg: Config, end: int | None, folder: Path, dtype: torch.dtype) -> None:
    """config.json and generation_config.json; end: the id of end-of-text."""
    end = end if end is not None and end < cfg.vocab_size else None
    ids = {"bos_token_id": end, "eos_token_id": end}
    kind = {"torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True}
    write_json(folder / "config.json", {**to_config(cfg), **ids, **kind})
    write_json(folder / "generation_config.json", {**ids, "pad_token_id": end})
