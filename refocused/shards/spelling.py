"""A tiktoken.Encoding as the tokenizer.json of Hugging Face."""

import hashlib
from typing import Any

from refocused.shards.tokenizers import FILE, OURS, SETTINGS, Encoding, as_json, settings


def byte_letters() -> list[str]:
    """The printable letter for each byte by which a byte-level BPE writes its tokens (as OpenAI's GPT-2 encoder)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def files(encoding: Encoding, max_length: int) -> dict[str, bytes]:
    """{file name: content} by which Transformers loads it."""
    content = as_json(tokenizer_json(encoding.name, encoding.known))
    ours = [encoding.name, hashlib.sha256(content).hexdigest()]
    return {FILE: content, SETTINGS: as_json(settings("<|endoftext|>", max_length, {}) | {OURS: ours})}


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
