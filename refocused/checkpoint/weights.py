"""A model's weights without the optimizer: of a checkpoint, whichever layout wrote it, or of a Hugging Face folder."""

import json
import shlex
from pathlib import Path

import torch

from model import GPTNeoX
from refocused.checkpoint import manifest, tensors
from refocused.checkpoint.huggingface import HEAD, our_name
from refocused.checkpoint.manifest import CheckpointError
from refocused.checkpoint.source import Source, is_hf
from refocused.entry import here
from refocused.shards.tokenizers import MALFORMED

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(source: Source) -> GPTNeoX:
    """The model in eval mode with its weights, fp32, on the CPU. Collective where there is a process group.

    Raises CheckpointError.
    """
    with torch.device("meta"):
        model = GPTNeoX(source.cfg)
    model.to_empty(device="cpu")
    model.tie_weights()
    if source.state:
        tensors.load(source.path, tensors.state_tree(model))
        manifest.check_unchanged(source.path)
    else:
        fill(model, source.path)
    return model.eval()


@torch.no_grad()
def fill(model: GPTNeoX, path: Path) -> None:
    """Copy a Hugging Face folder's weights into the model. Raises CheckpointError unless they are its parameters."""
    found = hf_weights(path)
    if model.cfg.tie_word_embeddings and HEAD in found:
        head = found.pop(HEAD)
        own = found.setdefault("embed_in.weight", head)
        if not torch.equal(own.read(), head.read()):
            raise CheckpointError(
                f"{path}: tie_word_embeddings=true by config.json, and {head.key} differs from {own.key}; "
                "set it to false there if the output matrix was trained apart"
            )
    wanted = dict(model.named_parameters())
    if HEAD in wanted and HEAD not in found:
        raise CheckpointError(
            f"{path} has no output matrix ({HEAD} or lm_head.weight): it was saved from a GPTNeoXModel, not from a "
            "GPTNeoXForCausalLM; with tie_word_embeddings=true in config.json the input matrix serves as both"
        )
    for name, part in found.items():
        key, size = part.key, list(part.sizes)
        if name not in wanted:
            raise CheckpointError(f"{path} has {key} {size}, which this model does not")
        if size != list(wanted[name].shape):
            raise CheckpointError(f"{path}: {key} is {size}, {list(wanted[name].shape)} by the config")
        if not part.dtype.is_floating_point:
            raise CheckpointError(f"{path}: {key} is of {part.dtype}: quantized weights cannot be trained")
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(f"{path} lacks {', '.join(missing[:4])}{' ...' * (len(missing) > 4)}")
    for name, part in found.items():
        wanted[name].copy_(part.read())


def hf_weights(path: Path) -> dict[str, tensors.Part]:
    """Where a folder has each parameter, by our names. Raises CheckpointError where it has one twice, and differently."""
    found: dict[str, tensors.Part] = {}
    for file in hf_files(path):
        for key, part in tensors.parts_in(file).items():
            if (name := our_name(key)) is not None:
                first = found.setdefault(name, part)
                if first is not part and not torch.equal(first.read(), part.read()):
                    raise CheckpointError(f"{path} has {first.key} and {key}, which differ; remove the wrong one")
    return found


def hf_files(path: Path) -> list[Path]:
    """The folder's model.safetensors, or the files of its index, or those of its one variant. Raises CheckpointError."""
    usual = [path / "model.safetensors", path / "model.safetensors.index.json"]
    variants = [file for file in path.glob("model.*.safetensors") if "-of-" not in file.name]
    variants += path.glob("model.safetensors.index.*.json")
    found = [file for file in usual if file.is_file()][:1] or sorted(variants)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path} has {names} and no model.safetensors; leave one of them, which is then taken")
    if not found:
        raise CheckpointError(f"{path} has no model.safetensors, and no index of several files{pickled(path)}")
    if found[0].suffix != ".json":
        return found
    try:
        files = sorted({path / Path(file).name for file in json.loads(found[0].read_bytes())["weight_map"].values()})
    except MALFORMED as error:
        raise CheckpointError(f"{found[0]} is no index of weights: {error}") from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{path} lacks {', '.join(absent[:4])}, which {found[0].name} names")
    return files


def pickled(path: Path) -> str:
    """How to convert a folder's pickled weights, if it has any."""
    if not any(path.glob("*.bin")):
        return ""
    if is_hf(path):
        kinds = ["AutoModelForCausalLM"] + ["AutoTokenizer"] * any([*path.glob("*token*"), *path.glob("vocab*")])
        way, old = f"from transformers import {', '.join(kinds)}", repr(str(path))
        way += "".join(f'; {kind}.from_pretrained({old}).save_pretrained("NEW")' for kind in kinds)
    else:
        old, new = (repr(str(path / name)) for name in ("pytorch_model.bin", "model.safetensors"))
        way = f"import torch; from safetensors.torch import save_file; W = torch.load({old}, weights_only=True); "
        way += f"save_file({{k: v.clone() for k, v in W.items()}}, {new})"
    return f"; pickled weights (.bin) are not read, convert them once: {here('python -c')} {shlex.quote(way)}"
