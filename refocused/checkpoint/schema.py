"""What a checkpoint's JSON may hold. Checksums say that bytes are as they were written; this, that they make sense.

Whoever can write a checkpoint can sign it, and other programs may write one, so every value that is used later is
looked at here, once. Each function returns what is wrong in a few words, or "".
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import configs

LARGEST = 1 << 53  # of a count; beyond it JSON's numbers are not exact everywhere
HEADER_BYTES = 100 << 20  # what safetensors itself allows


def whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def number(value: Any) -> bool:
    return type(value) in (int, float)


def of_manifest(manifest: Any, state: str) -> str:
    """The manifest's dict; `state` is the file that it must name."""
    if not isinstance(manifest, dict):
        return "no object"
    checks = {
        "name": lambda v: type(v) is str,
        "save_id": lambda v: type(v) is str and re.fullmatch(r"[0-9a-f]{8,64}", v),
        "step": whole,
        "time": number,
        "generation": whole,
        "files": lambda v: type(v) is dict and state in v,
    }
    for key, good in checks.items():
        if key == "generation" and key not in manifest:
            continue  # of a checkpoint from before there were any
        if not good(manifest.get(key)):
            return f"{key}={str(manifest.get(key))[:80]}"
    for file, entry in manifest["files"].items():
        plain = file not in ("", ".", "..") and file.isprintable() and not set(file) & {"/", "\\"}
        if not plain:
            return f"the file name {file[:80]!r}"
        texts = isinstance(entry, dict) and all(type(entry.get(k)) is str for k in ("crc32c", "sha256"))
        if not (texts and whole(entry.get("size"))):
            return f"the entry of {file}"
    return ""


def of_state(state: Any) -> str:
    """state.json. One with "data" is a run's, and must have all that a resume goes by."""
    if not isinstance(state, dict):
        return "no object"
    checks = {
        "step": whole,
        "samples_seen": whole,
        "tokens": whole,
        "loss": lambda v: v is None or number(v),
        "best_loss": number,
        "eval_loss": lambda v: v is None or number(v),
        "history": lambda v: type(v) is list,
        "recent_losses": lambda v: type(v) is list and all(map(number, v)),
        "spike_window": lambda v: v is None or _is_table(v),
        "scaler": lambda v: type(v) is dict and all(map(number, v.values())),
        "run": lambda v: type(v) is dict and whole(v.get("world_size", 1)),
        "config": lambda v: type(v) is dict,
        "data": lambda v: type(v) is dict and _is_data(v),
        "imported_from": lambda v: type(v) is str,
        "eos_token_id": lambda v: v is None or whole(v),
    }
    needed = ("step", "samples_seen", "tokens", "config", "run") if "data" in state else ()
    for key, good in checks.items():
        if (key in state or key in needed) and not good(state.get(key)):
            return f"{key}={str(state.get(key))[:80]}"
    for key, value in state.get("config", {}).items():
        if key in configs.KEYS:  # those that this version does not know are left out later
            try:
                configs.convert(key, value)
            except configs.ConfigError as error:
                return f"config: {error}"
            if isinstance(value, int) and abs(value) > LARGEST:
                return f"config: {key}={str(value)[:80]}"
    return ""


def _is_table(value: Any) -> bool:
    return type(value) is list and all(type(row) is list and len(row) == 2 and all(map(number, row)) for row in value)


def _is_data(data: dict[str, Any]) -> bool:
    kinds = {"path": str, "tokens": int, "dtype": str, "crc32": str}  # what distinguishes two shards
    shards = data.get("manifest")
    if type(data.get("fingerprint")) is not str or type(shards) is not list:
        return False
    return all(type(s) is dict and all(type(s.get(k)) is kind for k, kind in kinds.items()) for s in shards)


def of_shard(path: Path) -> str:
    """The header of a safetensors file and torch.distributed.checkpoint's note in it: where each part lies.

    Raises OSError.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES):
            return "no safetensors header"
        content = file.read(length)
    try:
        header = json.loads(content)
        note = header.pop("__metadata__")
        offsets = json.loads(note["DCP_SHARDING_INFO"])
        for key, entry in header.items():
            shape, (begin, end), at = entry["shape"], entry["data_offsets"], offsets[key]["saved_offsets"]
            good = type(entry["dtype"]) is str and len(at) == len(shape) and all(map(whole, [*shape, *at, begin, end]))
            if not (good and begin <= end <= size - 8 - length and math.prod(shape) <= size):
                return f"the entry of {key[:80]}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"its header ({type(error).__name__}: {str(error)[:80]})"
    return ""
