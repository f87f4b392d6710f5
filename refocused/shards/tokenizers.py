"""The tokenizers: tiktoken's by their names, any other by its Hugging Face tokenizer.json; and how Transformers knows them."""

import contextlib
import copy
import functools
import hashlib
import json
import os
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

from configs import Config, ConfigError, nearest
from refocused.entry import here
from refocused.shards.shard import DataError, Shard

# {name: (id of end-of-text, number of ids)}, known without the vocabulary, which has to be fetched for all but byte
ENCODINGS = {
    "gpt2": (50256, 50257), "byte": (256, 257), "r50k_base": (50256, 50257), "p50k_base": (50256, 50281),
    "cl100k_base": (100257, 100277), "o200k_base": (199999, 200019),
}  # fmt: skip
HELP = f"{', '.join(ENCODINGS)}, or a tokenizer.json, or a folder that has one"
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")  # what models call it, where nothing says so
LARGEST = 1 << 24  # of an id; there is no vocabulary of millions
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
OURS = "tokenizer_of_the_run"  # in the settings that are written: [identity, SHA-256 of the tokenizer.json beside them]
# what can be raised by a file whose content is another than meant
MALFORMED = (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Encoding:
    """One of tiktoken's, or "byte", which needs no download.

    name: for a reader; identity: by which shards and checkpoints know it; end: id of end-of-text; size: of the vocabulary
    """

    def __init__(self, name: str):
        self.name = self.identity = name
        self.end, self.size = ENCODINGS[name]

    @cached_property
    def known(self) -> Any:
        """The tiktoken.Encoding. Raises DataError."""
        import tiktoken

        if self.name == "byte":
            ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
            return tiktoken.Encoding("byte", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens=special)
        try:
            return tiktoken.get_encoding(self.name)
        except Exception as error:  # whatever its HTTP client raises
            raise DataError(
                f"tiktoken cannot fetch the {self.name} vocabulary; connect once, point TIKTOKEN_CACHE_DIR at a folder "
                f"that holds it, or use the byte tokenizer, which needs none: {type(error).__name__}: {error}"
            ) from error

    @cached_property
    def ids(self) -> frozenset[int]:
        return frozenset((*self.known._mergeable_ranks.values(), *self.known._special_tokens.values()))

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt; special tokens in it are these tokens, as in Transformers."""
        return self.known.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        """The text; ids that only pad the vocabulary decode to nothing."""
        return self.known.decode([i for i in ids if i in self.ids])

    def byte_lengths(self) -> list[int]:
        """Of each id, how many bytes of text it stands for; 0 for end-of-text and what else is no text."""
        lengths = [0] * self.size
        for token, rank in self.known._mergeable_ranks.items():
            lengths[rank] = len(token)
        return lengths


class File:
    """A tokenizer.json, with what an Encoding has. Only text to ids and back needs the package `tokenizers`.

    Reading it, its end and its identity raise ConfigError; what needs the package DataError.
    """

    def __init__(self, file: Path):
        self.file = file
        self.name = f"{file.absolute().parent.name}/{file.name}"
        try:
            content = file.read_bytes()
            self.content = content.decode(json.detect_encoding(content)).encode()  # without a byte order mark
            self.json = json.loads(self.content)
            vocab = self.json["model"]["vocab"]
            if isinstance(vocab, list):  # Unigram's, with scores
                vocab = {token: i for i, (token, _) in enumerate(vocab)}
            self.added = {token["content"]: token for token in self.json.get("added_tokens") or ()}
            self.vocab = {**vocab, **{token: entry["id"] for token, entry in self.added.items()}}
            if not self.vocab or not all(type(i) is int and 0 <= i < LARGEST for i in self.vocab.values()):
                raise ValueError("its vocabulary is empty or has ids that are none")
            if not all(type(token) is str for token in self.vocab):
                raise ValueError("its vocabulary has tokens that are no text")
            self.own = {**beside(file, "special_tokens_map.json"), **beside(file, SETTINGS)}
            decoder = self.json.get("decoder")
            self.byte_level = isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"
        except MALFORMED as error:
            raise ConfigError(f"{file} is no tokenizer.json: {type(error).__name__}: {error}") from error
        self.size = max(self.vocab.values()) + 1

    @cached_property
    def end(self) -> int:
        """By the settings beside it, else a model's config.json there, else a special token that is usually called so."""
        if (token := text_of(self.own.get("eos_token"))) in self.vocab:
            return self.vocab[token]
        with contextlib.suppress(*MALFORMED):
            by_model = beside(self.file, "config.json").get("eos_token_id")
            by_model = by_model[0] if isinstance(by_model, list) else by_model
            if type(by_model) is int and by_model in self.vocab.values():
                return by_model
        if usual := [self.vocab[token] for token in ENDS if token in self.added]:
            return usual[0]
        special = ", ".join(list(self.added)[:5]) or "none"
        raise ConfigError(
            f"{self.file} does not say which token ends a text (its special tokens: {special}); name it in a file "
            f'{SETTINGS} beside it: {{"eos_token": "..."}}'
        )

    @cached_property
    def identity(self) -> str:
        digest = hashlib.sha256(self.content).hexdigest()
        match self.own.get(OURS):  # an export's file may differ from the run's
            case [str(noted), of] if of == digest and (noted in ENCODINGS or noted.endswith(f" {self.end}")):
                return noted
        return f"sha256:{digest}, end-of-text {self.end}"

    @cached_property
    def known(self) -> Any:
        """A tokenizers.Tokenizer. Raises DataError."""
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"{self.name} needs one more package: `{here('pip install tokenizers')}`") from error
        try:
            known = tokenizers.Tokenizer.from_str(self.content.decode())
        except Exception as error:  # it has no type of its own
            raise DataError(f"{self.file} cannot be used: {error}") from error
        known.no_truncation()  # which a file may ask for, from when it was used last
        known.no_padding()
        return known

    @cached_property
    def plain(self) -> Any:
        """One to which special tokens are ordinary text."""
        plain = copy.deepcopy(self.known)
        plain.encode_special_tokens = True
        return plain

    def encode(self, text: str) -> list[int]:
        return self.known.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.known.decode(ids, skip_special_tokens=False)

    def byte_lengths(self) -> list[int]:
        """For a byte-level BPE, in which each letter of a token is a byte."""
        if not self.byte_level or "merges" not in self.json["model"]:  # old files have no type
            raise DataError(f"{self.file} is no byte-level BPE: nothing says how many bytes a token is")
        lengths = [0] * self.size
        for token, i in self.vocab.items():
            lengths[i] = len(token)
        for token, entry in self.added.items():
            lengths[entry["id"]] = 0 if entry.get("special") else len(token.encode(errors="replace"))
        return lengths

    def files(self, max_length: int) -> dict[str, bytes]:
        spelled = {i: token for token, i in self.vocab.items()}
        found = settings(spelled[self.end], max_length, self.own)
        return {FILE: self.content, SETTINGS: as_json(found)}


Tokenizer = Encoding | File


@functools.cache
def find(name: str) -> Tokenizer:
    """The tokenizer that tokenizer= names: what a file says is read once. Raises ConfigError.

    A file may be named by its folder, or by a folder of checkpoints of which each has it.
    """
    if name in ENCODINGS:
        return Encoding(name)
    path = Path(os.path.expanduser(name))
    with contextlib.suppress(OSError):  # a name that is too long, a folder that may not be read
        for candidate in (path, path / FILE, *sorted(path.glob(f"checkpoint-*/{FILE}"))[-1:]):
            if candidate.is_file():
                return File(candidate)
    raise ConfigError(
        f"tokenizer={name} is none of {', '.join(ENCODINGS)}, no tokenizer.json and no folder that has one"
        f"{nearest(name, ENCODINGS)}; each checkpoint of a run keeps a copy of the run's file"
    )


def separator(cfg: Config) -> int | None:
    """The id by which the model keeps documents apart, None where it does not. Raises ConfigError for one it never sees."""
    if not cfg.mask_documents:
        return None
    if (end := find(str(cfg.tokenizer)).end) >= cfg.vocab_size:
        raise ConfigError(
            f"mask_documents=true: end-of-text of tokenizer={cfg.tokenizer} is {end}, which a model with "
            f"vocab_size={cfg.vocab_size} never sees; name the shards' tokenizer"
        )
    return end


def differ(one: str | None, other: str | None) -> bool:
    """Whether both are known, and are two. Raises ConfigError."""
    return bool(one and other) and find(str(one)).identity != find(str(other)).identity


def fits(name: str | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer, if one is known and the model has all of its ids: else it was trained with another."""
    known = find(name) if name else None
    return known if known and known.size <= vocab_size else None


def own_files(cfg: Config) -> dict[str, bytes]:
    """What each checkpoint of a run holds of its tokenizer, so that both go to other machines together: a file's copy."""
    known = find(cfg.tokenizer) if cfg.tokenizer else None
    return known.files(cfg.max_position_embeddings) if isinstance(known, File) else {}


def check_shards(shards: list[Shard], cfg: Config) -> str | None:
    """The identity of cfg.tokenizer. Raises DataError where shards say that another one made them, ConfigError."""
    if cfg.tokenizer is None:
        return None
    ours = find(cfg.tokenizer)
    others = [shard for shard in shards if shard.tokenizer and shard.tokenizer[0] != ours.identity]
    if others and not cfg.allow_change:
        identity, name = others[0].tokenizer or ("", "")
        theirs = name if identity == name else f"{name} ({identity})"
        keys = f"tokenizer={name} vocab_size={ENCODINGS[name][1]}" if name in ENCODINGS else "tokenizer= to its path"
        way = here(f"python data.py tokenize SRC DST --tokenizer {shlex.quote(cfg.tokenizer)}")
        raise DataError(
            f"{len(others)} of {len(shards)} shards of {cfg.data_dir}, such as {others[0].path}, were made with {theirs}, "
            f"this run has tokenizer={cfg.tokenizer}, to which their ids are other text; set {keys}, "
            f"or make them anew with `{way}`; allow_change=true trains on them all the same"
        )
    return ours.identity


# ---- files


def as_json(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # half an emoji becomes the escape that JSON has for it


def beside(file: Path, name: str) -> dict[str, Any]:
    """The JSON object in another file of the same folder; {} if there is none. Raises what MALFORMED lists."""
    other = file.with_name(name)
    return dict(json.loads(other.read_bytes())) if other.is_file() else {}


def text_of(token: Any) -> str | None:
    """A token as Transformers writes it: its text, or an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def settings(end: str, max_length: int, own: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json for Transformers 4 and 5; end: what end-of-text is written as, own: the file's that was."""
    tokens = {key: text_of(own.get(key)) or end for key in SPECIAL}  # CTranslate2 wants a text for each
    kept = {key: own[key] for key in ("chat_template", OURS) if own.get(key)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        **tokens, "eos_token": end,
        "model_input_names": ["input_ids", "attention_mask"],  # else Transformers 4 makes token_type_ids
        "model_max_length": max_length, "clean_up_tokenization_spaces": False, **kept,
    }  # fmt: skip
