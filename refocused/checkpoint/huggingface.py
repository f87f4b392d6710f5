"""A GPT-NeoX folder as Hugging Face writes it: config.json and safetensors, both ways. Nothing here needs Transformers."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs import Config
from model import ACTIVATIONS, GPTNeoX
from refocused.checkpoint.manifest import CheckpointError
from refocused.checkpoint.weights import MALFORMED, Weights
from refocused.entry import here
from refocused.files import widen

FILE_BYTES = 5_000_000_000  # per model file, the hub's custom
SAME_NAME = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act attention_dropout "
    "hidden_dropout max_position_embeddings initializer_range layer_norm_eps tie_word_embeddings use_parallel_residual"
).split()
MODEL_KEYS = (*SAME_NAME, "rotary_pct", "rotary_emb_base")
# functions that Transformers has under several names
SAME_FUNCTION = {
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
}
# masks and tables that older versions of Transformers saved
COMPUTED = re.compile(
    r"(layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)|rotary_emb\.(original_)?inv_freq)"
)
HEAD = "embed_out.weight"


def to_config(cfg: Config) -> dict[str, Any]:
    """The config.json of GPTNeoXForCausalLM; rotary keys in both the older and the newer spelling."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **{key: getattr(cfg, key) for key in SAME_NAME},
        "attention_bias": True,
        "rotary_pct": cfg.rotary_pct,
        "rotary_emb_base": cfg.rotary_emb_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": cfg.rotary_emb_base,
            "partial_rotary_factor": cfg.rotary_pct,
        },
    }


def from_config(hf: dict[str, Any]) -> dict[str, Any]:
    """Our model keys from a config.json's dict. Raises ValueError naming what this model does not have."""
    rope = hf.get("rope_parameters") or {}
    only = {"model_type": "gpt_neox", "attention_bias": True, "rope_scaling": None, "quantization_config": None}
    unsupported = [
        f"{key}={hf[key]!r} (only {wanted!r})" for key, wanted in only.items() if hf.get(key, wanted) != wanted
    ]
    if rope.get("rope_type", "default") != "default":
        unsupported.append(f"rope_type={rope['rope_type']!r} (only 'default')")
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


def snapshot(path: Path) -> Path:
    """The folder; of the hub's cache of a model (models--ORG--NAME), the version in it that was fetched last."""
    try:
        return path / "snapshots" / (path / "refs/main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return path


def is_hf(path: Path) -> bool:
    return (snapshot(path) / "config.json").is_file()


def weight_files(path: Path) -> list[Path]:
    """The folder's model.safetensors, or the files of its index, or those of its one variant. Raises CheckpointError."""
    usual = [path / "model.safetensors", path / "model.safetensors.index.json"]
    variants = [file for file in path.glob("model.*.safetensors") if "-of-" not in file.name]
    variants += path.glob("model.safetensors.index.*.json")
    found = [file for file in usual if file.is_file()][:1] or sorted(variants)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path} has {names} and no model.safetensors; leave one of them, which is then taken")
    if not found:
        if not any(path.glob("*.bin")):
            raise CheckpointError(f"{path} has no model.safetensors, and no index of several files")
        if is_hf(path):
            way = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained('{path}').save_pretrained('NEW')"
        else:
            way = f"import torch; from safetensors.torch import save_file; W = torch.load('{path}/pytorch_model.bin', "
            way += f"weights_only=True); save_file({{k: v.clone() for k, v in W.items()}}, '{path}/model.safetensors')"
        raise CheckpointError(
            f"{path / 'model.safetensors'} is missing; pickled weights (.bin) are not read, convert them once: "
            f'{here("python -c")} "{way}"'
        )
    if found[0].suffix != ".json":
        return found
    try:
        files = sorted({path / Path(file).name for file in json.loads(found[0].read_bytes())["weight_map"].values()})
    except MALFORMED as error:
        raise CheckpointError(f"{found[0]} is no index of weights: {error}") from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{path} lacks {', '.join(absent[:4])}, which {found[0].name} names")
    return files


def read_weights(path: Path, tied: bool) -> Weights:
    """The folder's weights by our names. Raises CheckpointError where it holds an output matrix twice, and differently."""
    weights = Weights(path, weight_files(path), our_name)
    copies = [part for part in weights.parts.get(HEAD, ())]
    if len(copies) > 1:
        if not all(torch.equal(copies[0].read(), copy.read()) for copy in copies[1:]):
            keys = " and ".join(part.key for part in copies)
            raise CheckpointError(f"{path} has {keys}, which differ; remove the one that is not the model's")
        del weights.parts[HEAD][1:]
    if tied and copies:
        embedding = weights.parts.setdefault("embed_in.weight", copies[:1])
        if not torch.equal(embedding[0].read(), copies[0].read()):
            raise CheckpointError(
                f"{path}: tie_word_embeddings=true by config.json, and {copies[0].key} differs from {embedding[0].key}; "
                "set it to false there if the output matrix was trained apart"
            )
        del weights.parts[HEAD]
    elif not tied and not copies:
        raise CheckpointError(
            f"{path} has no output matrix ({HEAD} or lm_head.weight): it was saved from a GPTNeoXModel, not from a "
            "GPTNeoXForCausalLM; with tie_word_embeddings=true in config.json the input matrix serves as both"
        )
    return weights


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
