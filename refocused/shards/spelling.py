"""A tokenizer.json for an export: of a tiktoken.Encoding, and one that adds no special tokens."""

import hashlib
import json
from typing import Any

from refocused.shards.tokenizers import FILE, OURS, SETTINGS, Encoding, File, as_json, settings


def byte_letters() -> list[str]:
    """The printable letter for each byte by which a byte-level BPE writes its tokens (as OpenAI's GPT-2 encoder)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def files(encoding: Encoding, max_length: int) -> dict[str, bytes]:
    """{file name: content} by which Transformers loads it."""
    content = as_json(tokenizer_json(encoding.name, encoding.known))
    return named(encoding.name, content, settings("<|endoftext|>", max_length, {}))


def named(identity: str, content: bytes, found: dict[str, Any]) -> dict[str, bytes]:
    """A tokenizer.json and its settings, by which it stands for the run's tokenizer."""
    return {FILE: content, SETTINGS: as_json(found | {OURS: [identity, hashlib.sha256(content).hexdigest()]})}


def plain(known: File, max_length: int) -> dict[str, bytes]:
    """The same for a file, without what adds special tokens to a text: shards have none."""
    made, processor = known.files(max_length), known.json.get("post_processor")
    if processor == (without := adding_none(processor)):
        return made
    content = as_json(known.json | {"post_processor": without})
    return named(known.identity, content, json.loads(made[SETTINGS]))


def adding_none(processor: Any) -> Any:
    """The part of a post_processor that adds no special token: ByteLevel."""
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "Sequence":
        return processor | {"processors": [*filter(None, map(adding_none, processor["processors"]))]}
    return processor if kind == "ByteLevel" else None


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge rules, in order, of a BPE known by its tokens' ranks: a token's two halves are what is left when its
    bytes are merged by the earlier rules alone. A token that these do not lead to has no rule."""
    merges = []
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if parts[0] in ranks and parts[1] in ranks:
            merges.append((parts[0], parts[1]))
    return merges


def tokenizer_json(name: str, known: Any) -> dict[str, Any]:
    """The content of tokenizer.json for a tiktoken.Encoding."""
    ranks, letters = known._mergeable_ranks, byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    old = name not in ("cl100k_base", "o200k_base")  # whose pattern is GPT-2's, or any byte by itself
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = old and name != "byte"
    pattern = {"Regex": known._pat_str.replace("{1,3}+", "{1,3}")}  # Oniguruma takes {1,3}+ for a repetition of its own
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = sorted(known._special_tokens.items(), key=lambda item: item[1])
    # tiktoken takes a piece that is a token whole
    model: dict[str, Any] = {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "ignore_merges": not old}
    model |= dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    model["vocab"] = {spell(token): rank for token, rank in ranks.items()} | dict(specials)
    model["merges"] = [[spell(a), spell(b)] for a, b in merges_of(ranks)]
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [{"id": i, "content": token, **special} for token, i in specials],
        "pre_tokenizer": byte_level if old else {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": model,
    }
