"""The tokenizers: tiktoken's, and the files by which Transformers knows them."""

import json
from pathlib import Path
from typing import Any

from refocused.shards.shard import DataError

END_OF_TEXT = {"byte": 256, "gpt2": 50256}


def get_tokenizer(name: str) -> Any:
    """The tiktoken.Encoding "byte" (256 bytes and end-of-text; needs no download) or "gpt2". Raises DataError."""
    import tiktoken

    if name == "byte":
        return tiktoken.Encoding(
            name="byte",
            pat_str=r"(?s:.)",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
            explicit_n_vocab=257,
        )
    if name != "gpt2":
        raise DataError(f"tokenizer={name} is unknown; there are byte and gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP client raises
        raise DataError(
            "tiktoken cannot fetch the gpt2 vocabulary; connect once, point TIKTOKEN_CACHE_DIR at a folder that holds it, "
            f"or use the byte tokenizer, which needs none: {type(error).__name__}: {error}"
        ) from error


def token_bytes(name: str) -> list[int]:
    """Of each id of "byte" or "gpt2", how many bytes of text it stands for; 0 for end-of-text. Raises DataError."""
    lengths = [0] * (END_OF_TEXT[name] + 1)
    for token, rank in get_tokenizer(name)._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


def file_bytes(file: Path) -> list[int]:
    """token_bytes of a byte-level tokenizer.json, in which each letter of a token is a byte. Raises DataError."""
    try:
        content = json.loads(file.read_bytes())
        if content["model"]["type"] != "BPE" or content["decoder"]["type"] != "ByteLevel":
            raise DataError(f"{file} is no byte-level BPE")
        sizes = {rank: len(token) for token, rank in content["model"]["vocab"].items()}
        for token in content["added_tokens"]:
            sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no tokenizer.json: {error}") from error
    return [sizes.get(rank, 0) for rank in range(max(sizes) + 1)]


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


def transformers_files(name: str, max_length: int) -> dict[str, dict[str, Any]]:
    """{file name: its JSON} by which Transformers loads "byte" or "gpt2". Raises DataError where tiktoken has no vocabulary."""
    known = get_tokenizer(name)
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
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,  # never needed; CTranslate2 wants a text here, as GPT-2's own files have
        "model_input_names": ["input_ids", "attention_mask"],  # else Transformers 4 makes token_type_ids
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
