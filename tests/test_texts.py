"""Texts in files, tables and a bucket -> shards: files as others write them, and a real HTTP server as the bucket."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shards
from launch import GUARD
from pyarrow import parquet
from shards import byte_ids, content, data_py_process, flip, tokens_in
from tokenizers import Tokenizer

from configs import Config
from refocused.bucket import texts
from refocused.shards import prepare, readers, tables, tokenize
from refocused.shards.readers import Rules
from refocused.shards.shard import DataError, Shard
from refocused.shards.tokenizers import find

MEDIA = "alt=media"


ROWS = [f"row {i}, naïve " + "word " * (i % 40) for i in range(3000)]
COLUMN = [*ROWS[:5], None, "", *ROWS[5:]]
TABLES = {  # field that is named: the columns of the table
    "text": pa.table({"text": pa.array(COLUMN), "id": pa.array(range(3002))}),
    "text, large": pa.table({"text": pa.array(COLUMN, pa.large_string())}),
    "text, by a dictionary": pa.table({"text": pa.array(COLUMN).dictionary_encode()}),
    "text, called content": pa.table({"content": pa.array(COLUMN), "url": pa.array(["x"] * 3002)}),
    "raw.text": pa.table({"raw": pa.array([{"text": text, "n": 1} for text in COLUMN])}),
    "a.b": pa.table({"a.b": pa.array(COLUMN)}),
}


def tokenizing(source: Path, target: Path, tokenizer: object = "byte", shard_tokens: int = 10**6, **rules) -> Counter:
    rules = Rules(**{"fields": ["text"], **rules})
    return tokenize.tokenize(tokenize.local(source, target, rules, 2), target, str(tokenizer), rules, shard_tokens, 2)


def goes_on(folder: Path, count: int, again: Callable[[], dict]) -> None:
    """All but the first shards away, as if the run was killed there: these are kept, and all are the same bytes."""
    made = content(folder)
    for name in sorted(made)[count:]:
        (folder / name).unlink()
    assert again()["kept"] == min(count, len(made)) and content(folder) == made


# ---- files


def test_tokenize(tmp_path, data_py):
    """The command on a .txt and Reddit-like lines against the byte encoding of each document, and its words.

    Stopped and continued, or with a damaged shard: the same bytes. Other settings or sources are refused.
    """
    folder, out, documents = tmp_path / "in", tmp_path / "out", ["one whole document\n"]
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text(documents[0])
    (folder / "b/notes.json").write_text("{}")
    documents += [f"naïve comment number {i} <|endoftext|> " + "word " * (i % 50) for i in range(300)]
    lines = [json.dumps({"body": text, "score": i}) for i, text in enumerate(documents[1:])]
    lines[5:5] = ["", json.dumps({"body": "[deleted]"}), json.dumps({"body": ""})]
    (source := folder / "b/comments.jsonl").write_text("\n".join(lines))

    def again(shard_tokens: int = 5000, workers: int = 1) -> dict:
        more = ("--fields", "body,title", "--shard_tokens", shard_tokens, "--workers", workers)
        code, *said = data_py("tokenize", folder, out, "--tokenizer", "byte", *more)
        found = re.search(r"\((\d+) were there\)", said[0])
        return {"code": code, "kept": found and int(found[1]), "said": "".join(said)}

    said, expected = again(workers=3)["said"], byte_ids(documents)
    assert tokens_in(out) == expected and len(content(out)) > 3
    assert f"{len(expected):,} tokens, 0 padding dropped, 301 documents, 2 empty or bad ones skipped" in said
    assert f"train on it: python train.py configs/demo.py data_dir={out} " in said and " vocab_size=257" in said
    assert f"left out, {KINDS}: b/notes.json" in said and "none of 302 lines has the field title" in said
    assert "note: 300 times <|endoftext|> became ordinary text; in .txt files --split '<|endoftext|>'" in said
    goes_on(out, 2, again)
    whole = content(out)
    (out / ".tmp-0123456789abcdef-tokenized_cleaned_00002.npz").write_bytes(b"half")
    flip(out / "tokenized_cleaned_00001.npz", -2000)
    assert again()["kept"] == 1 and content(out) == whole
    before = source.stat()
    source.write_text(source.read_text().replace("number 7 ", "number X "))  # of equal size, its time put back
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    for shard_tokens, other in ((6000, "sources, shard_tokens"), (5000, "sources")):
        found = again(shard_tokens)
        assert found["code"] == 66 and f"made from other {other}; name another folder" in found["said"]


def test_tokenize_by_a_file(tmp_path, data_py):
    """A tokenizer.json, and one of more ids than 16 bits hold: shards against the library's ids of the whole text, in
    which what is special is text. They note their tokenizer, and keep the note when they are prepared once more."""
    words = "naïve words <|endoftext|> and don't  stop\n\n日本語 12.5\t" * 200
    (tmp_path / "a.txt").write_text(words)
    shards.own_tokenizer(tmp_path / "own", [words], 400)
    large = {"type": "WordLevel", "vocab": {"[UNK]": 0, "stop": 70_000, "and": 1}, "unk_token": "[UNK]"}
    shards.plain_tokenizer(tmp_path / "large", large, 9, pre_tokenizer={"type": "Whitespace"})
    first = "tokenized_cleaned_00000.npz"
    for name, end, dtype in (("own", 0, "uint16"), ("large", 9, "uint32")):
        known = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        known.no_truncation()
        known.no_padding()
        known.encode_special_tokens = True
        tokenizing(tmp_path / "a.txt", tmp_path / f"{name} out", tmp_path / name)
        assert tokens_in(tmp_path / f"{name} out") == [*known.encode(words, add_special_tokens=False).ids, end]
        shard = Shard.open(tmp_path / f"{name} out", first)
        assert shard.stream.dtype == dtype
        assert shard.tokenizer == (find(str(tmp_path / name)).identity, f"{name}/tokenizer.json")
    shutil.copytree(tmp_path / "own", tmp_path / "moved")
    assert tokenizing(tmp_path / "a.txt", tmp_path / "own out", tmp_path / "moved")["kept"] == 1, "it is the same"
    with pytest.raises(DataError, match="made from other tokenizer"):
        tokenizing(tmp_path / "a.txt", tmp_path / "own out")

    shards.write_padded(tmp_path / "bucket/a.npz", [np.arange(50)], 64)
    ends = ["--end_of_text", "0", "--vocab_size", "64"]
    for source, file, more, maker in (
        ("large out", first, ["--vocab_size", "80000"], shard.tokenizer),
        ("bucket", "a.npz", ends, None),  # what nobody named is not known
        ("bucket", "a.npz", ["--tokenizer", "byte", *ends], None),
        ("bucket", "a.npz", ["--tokenizer", "r50k_base"], ("r50k_base",) * 2),
    ):
        assert data_py("prepare", tmp_path / source, tmp_path / f"prepared {source}", *more)[0] == 0
        assert Shard.open(tmp_path / f"prepared {source}", file).tokenizer == maker
    for made in ("large out", "prepared large out"):
        assert data_py("verify", tmp_path / made)[0] == 0
    os.rename(tmp_path / "bucket/a.npz", tmp_path / "bucket" / first)
    code, _, said = data_py("prepare", tmp_path / "bucket", tmp_path / "own out", *ends)
    assert code == 66 and f"{first} was not made by this command, and stays" in said


def test_the_command_after_an_import(tmp_path, monkeypatch):
    """What is printed behind `tokenize --tokenizer IMPORTED` trains that model, with its keys, and not the demo's."""
    monkeypatch.chdir(tmp_path)
    shards.own_tokenizer(Path("it"), ["some text"], 300)
    Path("set").mkdir()
    assert "init_from" not in prepare.training_command(Path("set"), "it", None)
    model = Config(vocab_size=320, hidden_size=64, num_attention_heads=8, rotary_pct=0.5, tokenizer=None)
    state = {"imported_from": "x", "config": dataclasses.asdict(model)}
    Path("it/checkpoint-epoch0-step0-files0").mkdir()
    Path("it/checkpoint-epoch0-step0-files0/state.json").write_text(json.dumps(state))
    words = prepare.training_command(Path("set"), "it", None).split()
    assert {"init_from=it", "tokenizer=it", "vocab_size=320", "hidden_size=64", "data_dir=set"} <= {*words}
    assert {"num_hidden_layers=24", "sequence_length=1024", "learning_rate=1e-4"} <= {*words}


@pytest.mark.parametrize("split", ["", "<|endoftext|>"])
def test_a_long_text_is_read_in_pieces(tmp_path, monkeypatch, split):
    """A .txt of many pieces, by gpt2 and with marks at the cuts: its tokens against those of each whole document."""
    shards.use_gpt2(tmp_path, monkeypatch)
    monkeypatch.setattr(readers, "PIECE", 1000)
    monkeypatch.setattr(tokenize, "BATCH", 3000)
    rng = np.random.default_rng(0)
    parts = [*"word~ ~ ~\n~\n\n~it's~ 12~.~naïve~日本語~\t~\r\n~🙂~\u3000".split("~"), "x" * 40]
    words = "".join(rng.choice(parts, 20_000)) + " end\n"
    for place in sorted(rng.integers(0, len(words), 40), reverse=True):
        words = words[:place] + "\n<|endoftext|>\n" + words[place:]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + words.encode())

    def tokenized() -> Counter:
        return tokenizing(tmp_path / "a.txt", tmp_path / "out", "gpt2", 4000, split=split)

    encoding, totals = find("gpt2").known, tokenized()
    mark = r"[\r\n]*<\|endoftext\|>[\r\n]*"  # line breaks next to a mark belong to it
    whole = [text for text in re.split(mark, words) if text] if split else [words]
    assert tokens_in(tmp_path / "out") == [i for text in whole for i in [*encoding.encode_ordinary(text), 50256]]
    assert totals["documents"] == len(whole) and totals["files"] > 5
    goes_on(tmp_path / "out", 3, tokenized)
    long = "x" + "日本語" * 2000  # which can be cut between letters alone
    (tmp_path / "b.txt").write_text(long)
    tokenizing(tmp_path / "b.txt", tmp_path / "b out")
    assert tokens_in(tmp_path / "b out") == byte_ids([long])


def packed(name: str, data: bytes) -> bytes:
    """As the suffix says, in two parts one behind the other, as parallel compressors write."""
    module = readers.PACKED.get(name[name.rfind(".") :].lower())
    if not module:
        return data
    compress = pytest.importorskip(module).compress
    return compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :])


NAMES = ["a.JSONL.gz", "RC_2020-01.zst", "a.TXT.xz", "a.ndjson.bz2", "c4-train.00000-of-01024.json.gz", "a.json"]


@pytest.mark.parametrize("name", [*NAMES, "array.json", "bom-array.json.xz"])
def test_texts_as_people_have_them(tmp_path, name):
    """Compressed and plain, stopped and continued: the same tokens; a file cut short is an error and not a shorter set."""
    lines = [json.dumps({"text": f"comment {i}, naïve", "n": 0}) for i in range(500)]
    data = (",\n".join(lines).join("[]") if "array" in name else "\n".join(lines)).encode() + b"\n"
    data = b"\xef\xbb\xbf\n" * ("bom" in name) + data
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(packed(name, data))
    documents = [data.decode()] if ".txt" in name.lower() else [json.loads(line)["text"] for line in lines]

    def tokenized(target: str = "out") -> Counter:
        return tokenizing(tmp_path / "in", tmp_path / target, "byte", 3000)

    assert tokenized()["documents"] == len(documents) and tokens_in(tmp_path / "out") == byte_ids(documents)
    goes_on(tmp_path / "out", 2, tokenized)
    broken = [(packed(name, data)[:-20], "ended before")] if readers.PACKED.get(Path(name).suffix.lower()) else []
    broken += [(packed(name, data) + b"more", "no gzip; cut it off")] if name.endswith(".gz") else []
    broken += [(data[:-20], "is not one whole array: no JSON: ")] if name == "array.json" else []
    for i, (cut, message) in enumerate(broken):
        (tmp_path / "in" / name).write_bytes(cut)
        with pytest.raises(DataError, match=f"{name}.* ?{message}"):
            tokenized(f"cut {i}")


TEXTS = [
    "    return x\n",
    " \t\n",
    "\u3000wide\r\n\r\n",
    "\ufeffbom",
    "\x00\x1f",
    "plain",
    "[deleted] by me",
    "\n",
    "\ufffd",
]


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2", "file"])
def test_a_text_is_what_its_file_says(tmp_path, monkeypatch, capsys, tokenizer):
    """Odd texts in a .jsonl, a .json array and as marked .txt: each whole, by every kind of tokenizer; only what Reddit
    deleted and what is empty is left out, and counted."""
    shards.use_gpt2(tmp_path, monkeypatch)
    if tokenizer == "file":
        shards.own_tokenizer(tmp_path, TEXTS, 300)
        tokenizer = str(tmp_path)
    known = find(tokenizer)
    (tmp_path / "in").mkdir()
    halves = [text.replace("\ufffd", "\ud83d") for text in TEXTS]  # half an emoji becomes U+FFFD
    records = [{"text": text} for text in (*halves, "", "[deleted]", " [removed]\n")]
    (tmp_path / "in/a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "in/b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "in/c.txt").write_bytes("<mark>".join(TEXTS[:1] + TEXTS[5:7]).encode())
    totals = tokenizing(tmp_path / "in", tmp_path / "out", tokenizer, split="<mark>")
    marked = [text.rstrip("\n") for text in TEXTS[:1] + TEXTS[5:7]]
    ids = tokenize.encode_documents(known, [*TEXTS, *TEXTS, *marked], Counter())
    assert tokens_in(tmp_path / "out") == [token for document in ids for token in (*document.tolist(), known.end)]
    assert (totals["documents"], totals["skipped"], totals["blank"]) == (2 * len(TEXTS) + 3, 6, 4)
    assert known.decode(ids[0].tolist()) == TEXTS[0]
    assert "note: 4 documents are nothing but white space" in capsys.readouterr().err


LONG = '{"text": "b", "n": ' + "9" * 4301 + "}\n"
DEEP = '{"text":"x","m":' + "[" * 100_000 + "]" * 100_000 + "}"
TWO = {"a.jsonl": b'{"title": "T", "selftext": "b"}\n'}
NESTED = {"a.jsonl": b'{"a": {"b": "one"}}\n{"a": null}\n{"a.b": "two", "a": {"b": "x"}}\n'}
KINDS = f"no {readers.READ}"
CSV = "pandas.read_csv(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)\" '@/a.csv' '@/a.csv'.jsonl`"
NOWHERE = "the mark is nowhere in them, in which backslashes are no escapes: bash has $'\\n\\n' for"
UTF_16 = '{"text": "x"}\n'.encode("utf-16")
LISTS = pa.table({"tags": pa.array([["a", "b"]] * 9), "n": pa.array(range(9))})


def second(record: str) -> dict[str, bytes]:
    """A file of lines of which this is the second."""
    return {"a.jsonl": f'{{"text": "one"}}\n{record}\n{{"text": "two"}}'.encode("latin-1")}


def parquet_of(table: pa.Table, change: Callable[[bytes], bytes] = bytes) -> dict[str, bytes]:
    parquet.write_table(table, out := pa.BufferOutputStream(), row_group_size=700)
    return {"a.parquet": change(out.getvalue().to_pybytes())}


def damaged(data: bytes) -> bytes:
    return data[: len(data) // 3] + b"\xff" * 99 + data[len(data) // 3 + 99 :]


WORDS = [  # files, arguments, exit code, what is said
    (second('{"text": null}'), "", 0, "a.jsonl line 2: no text, text is null"),
    (second('{"text": 5}'), "", 0, "a.jsonl line 2: no text, text is 5"),
    (second('{"body": "x"}'), "", 66, "a.jsonl line 2: no field text (--fields) but body"),
    (second('{"text": '), "", 66, "a.jsonl line 2: no JSON"),
    (second("[1]"), "", 66, "a.jsonl line 2: JSON, but not an object"),
    (second(DEEP), "", 66, "a.jsonl line 2: nested too deep"),
    (second('{"text": "\xff"}'), "", 66, "a.jsonl line 2: 'utf-8' codec can't decode byte"),
    ({"bad.txt": b"a\xff"}, "", 66, "bad.txt byte 1: not UTF-8 text"),
    (parquet_of(LISTS), "--fields=tags", 66, "a.parquet: its column tags is list<element: string>, no text"),
    (parquet_of(LISTS), "--fields=n", 66, "its column n is int64, no text"),
    (parquet_of(LISTS), "", 66, "no column text (--fields) but tags, n"),
    (parquet_of(LISTS), "--fields=tags.x", 66, "no column tags.x"),
    (parquet_of(TABLES["text"], damaged), "", 66, "a.parquet, row group 1: "),
    (parquet_of(LISTS, lambda data: data[:-9]), "", 66, "Parquet magic bytes not found"),
    ({"a.parquet": b""}, "", 66, "Parquet file size is 0 bytes"),
    ({"a.jsonl": UTF_16}, "--on_error=skip", 66, "is UTF-16; `iconv -f UTF-16 -t UTF-8 '@/a.jsonl' > NEW`"),
    ({"e.jsonl": b'{"body": ""}\n\n'}, "--fields=body", 66, "hold no text: 1 documents were skipped"),
    ({"a.pdf": b"x"}, "", 66, f"have {KINDS}, but 1 others such as a.pdf"),
    ({"a.csv": b"x"}, "", 66, CSV),
    ({"a.txt": b"x", "b.tar.gz": b"x"}, "", 0, f"left out, {KINDS}: b.tar.gz; `tar xf '@/b.tar.gz' -C '@'` makes text"),
    ({"a.json": b'{\n "text": "x"\n}\n'}, "", 66, f"have {KINDS}"),
    ({"a.txt": b"x", "s.json": b'{"a": 1}\n \n\n'}, "", 0, f"left out, {KINDS}: s.json, "),
    ({"a.json.gz": gzip.compress(b'{"n": "' + b"x" * (1 << 24) + b'", "text": "y"}\n')}, "", 0, ""),
    (NESTED, "--fields=a.b", 0, "a.jsonl line 2: no text, a.b is null"),
    ({"a.json": b'{"a": {"b": "x"}}'}, "--fields=a.b", 0, ""),
    ({"a.jsonl": b'{"text": "x"}'}, "--fields=text.x", 66, "a.jsonl line 1: no field text.x (--fields) but text"),
    (TWO, "--fields=title,_selftext", 0, ""),
    (TWO, "--fields=x --on_error=skip", 66, "hold no text"),
    (TWO | {"b.txt": b"x"}, "--on_error=skip", 66, "none of 1 lines has the field text (--fields); name"),
    (TWO, "--fields=_,_", 2, "names no field"),
    ({"a.txt": b"x"}, "--fields=body", 0, "--fields changes nothing: there are no lines of JSON"),
    ({"a.txt": b"x\n\ny"}, "--split=\\n\\n", 0, NOWHERE),
    ({"a.txt": b"x<|endoftext|>y"}, "--split=<|endoftext|>", 0, ""),
    ({"a.jsonl": LONG.encode()}, "--split=M", 0, "--split 'M' changes nothing: none of the files is a .txt"),
    ({"a.jsonl": b'{"text": "<|endoftext|>"}\n'}, "", 0, "note: 1 times <|endoftext|> became ordinary text\n"),
]


@pytest.mark.parametrize("files,arguments,code,words", WORDS, ids=range(len(WORDS)))
def test_what_cannot_be_read_or_is_not_there_is_said(tmp_path, data_py, files, arguments, code, words):
    """Lines, tables, fields, marks and kinds of files against an error or a word, with the place; so of a file alone.

    Where the error names --on_error skip, that passes over nothing but this. Files in commands are quoted and there.
    """
    (folder := tmp_path / "in 1").mkdir()
    words = words.replace("@", str(folder))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    options = [word.replace("_", " ") if "fields" in word else word for word in arguments.split()]
    to = (tmp_path / "out", "--tokenizer", "byte", *options)
    found, out, said = data_py("tokenize", folder, *to)
    assert found == code and words in said and ("note:" not in said or words), said
    if len(files) == 1 and "have no" in words:
        found, _, said = data_py("tokenize", folder / name, *to)
        assert found == 66 and f"{name} is {KINDS}" in said and "subfolders" not in said, said
    if "--on_error skip" in said:
        field = arguments.removeprefix("--fields=") or "text"
        (folder / "b.jsonl").write_text(json.dumps({field: "three"}))
        found, out, said = data_py("tokenize", folder, *to, "--on_error", "skip")
        assert found == 0 and f"skipped {folder / name}" in said and words in said, said
    if "line 2" in words:
        assert tokens_in(tmp_path / "out") == byte_ids(["one", "two", "three"] if code else ["one", "two"])
        assert "1 empty or bad ones skipped" in out


def test_what_a_tokenizer_has_no_token_for_is_counted(tmp_path, data_py):
    """A BPE without token for unknown text and without bytes, one with it, one of bytes that lacks some, a WordLevel."""
    vocab = {"</s>": 0, **{letter: i for i, letter in enumerate("abcd ", 1)}}
    bpe = {"type": "BPE", "vocab": vocab, "merges": []}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    lost = "note: {} letters or bytes are lost: t/tokenizer.json has no token for them"
    (source := tmp_path / "a.jsonl").write_text(json.dumps({"text": "ab 世界 cd €é"}))
    for i, (model, more, message) in enumerate((
        (bpe, {}, lost.format(4)),
        (bpe, {"pre_tokenizer": levels, "decoder": levels}, lost.format(14)),  # three blanks
        (bpe | {"vocab": vocab | {"<unk>": 9}, "unk_token": "<unk>"}, {}, "4 times the token for unknown text"),
        ({"type": "WordLevel", "vocab": vocab, "unk_token": "?"}, {}, "tokenizer.json cannot encode the text"),
        ({"vocab": vocab, "merges": []}, {}, lost.format(4)),  # as old files are, without the type
        ({"vocab": [[letter, 0.0] for letter in vocab], "unk_id": 0}, {}, "2 times the token for unknown text"),
    )):  # fmt: skip
        shards.plain_tokenizer(tmp_path / "t", model, 0, **more)
        find.cache_clear()
        code, _, said = data_py("tokenize", source, tmp_path / f"{i}", "--tokenizer", tmp_path / "t")
        assert message in said and code == 66 * ("cannot" in message), said


# ---- tables


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("suffix", readers.TABLES)
def test_a_table_is_a_document_a_row(tmp_path, suffix, name):
    """Every kind of text column in every kind of file, small row groups, stopped and continued: its rows in order.

    Null and empty rows are skipped and counted.
    """
    (tmp_path / "in").mkdir()
    for i in range(2):
        shards.write_table(tmp_path / f"in/{i}{suffix}", TABLES[name], 700)

    def tokenized() -> Counter:
        return tokenizing(tmp_path / "in", tmp_path / "out", "byte", 40_000, fields=[name.split(",")[0]])

    totals = tokenized()
    assert tokens_in(tmp_path / "out") == byte_ids(ROWS * 2)
    assert (totals["documents"], totals["skipped"], totals["records"]) == (6000, 4, 6004) and totals["files"] > 6
    goes_on(tmp_path / "out", 4, tokenized)


def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch):
    """A row group of 64 MB: the rows that are in memory at once have few bytes, however long each is."""
    monkeypatch.setattr(tables, "BYTES", 1 << 20)
    long = pa.table({"text": ["x" * 100_000] * 640})
    parquet.write_table(long, tmp_path / "a.parquet", use_dictionary=False, compression=None)
    _, groups = tables.opened(tmp_path / "a.parquet", ["text"])
    [(count, found)] = groups
    sizes = [batch.num_rows for batch in found]
    assert count == sum(sizes) == 640 and max(sizes) <= 10


def test_without_pyarrow(tmp_path, data_py, monkeypatch):
    """The sentence that names the package, where a table is met."""
    shards.write_table(tmp_path / "a.parquet", LISTS, 700)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "refocused.shards.tables", None)
    monkeypatch.delattr("refocused.shards.tables")
    code, _, said = data_py("tokenize", tmp_path, tmp_path / "out", "--tokenizer", "byte")
    assert code == 66 and re.search("a.parquet: `.*pip install pyarrow` makes it readable", said), said


# ---- from a bucket

LINES = "\n".join(json.dumps({"text": text}) for text in ROWS[:1000]).encode()


def test_texts_in_a_bucket(server, tmp_path, data_py):
    """A prefix of parquet, lines and text against the documents; nothing of them is left; again: nothing is fetched.

    One object by its name; a file that is another by then is refused; a prefix without texts.
    """
    shards.write_table(tmp_path / "x.parquet", TABLES["text"], 700)
    objects = {"c/00/a.parquet": (tmp_path / "x.parquet").read_bytes(), "c/00/b.jsonl.gz": gzip.compress(LINES)}
    objects |= {"c/01/c.json": LINES, "c/02/d.txt": b"one document"}
    others = {"c/02/settings.json": b'{"a": 1}', "c/readme.md": b"x", "c/02/": b"", "cc/other.txt": b"x"}
    for name, data in (objects | others).items():
        server.put(name, data)
    documents = [*ROWS, *ROWS[:1000], *ROWS[:1000], "one document"]

    def tokenized(url: str, target: str = "out") -> tuple[int, str]:
        code, *said = data_py("tokenize", url, tmp_path / target, "--tokenizer", "byte", "--shard_tokens", 40000)
        return code, "".join(said)

    code, said = tokenized("gs://bucket/c")
    assert code == 0 and f"{len(documents):,} documents" in said and "refused" not in said
    assert "left out readme.md" in said and "settings.json: no JSON lines and no array" in said
    assert tokens_in(tmp_path / "out") == byte_ids(documents) and not (tmp_path / "out" / texts.COMING).exists()
    before = server.count("GET", MEDIA)
    assert before == 5 and "0 were there" not in tokenized("gs://bucket/c")[1] and server.count("GET", MEDIA) == before
    assert tokenized("gs://bucket/c/02/d.txt", "one")[0] == 0
    assert tokens_in(tmp_path / "one") == byte_ids(["one document"])
    server.put("c/02/d.txt", b"another one")
    code, said = tokenized("gs://bucket/c")
    assert code == 66 and "was made from other sources" in said
    assert tokenized("gs://bucket/none")[0] == 66
    server.fault("GET", MEDIA, status=403)
    code, said = tokenized("gs://bucket/c", "refused")
    assert code == 66 and "403, the account may not do this" in said


def test_a_bounded_folder_and_kills(server, tmp_path):
    """Killed three times and continued, with room for two files: never more than that on the disk, and the same shards."""
    for i in range(12):
        server.put(f"c/{i:02d}.jsonl", LINES)
    server.fault("GET", MEDIA, rate=400_000, times=10**6)  # so that files come slowly
    command = ["tokenize", "gs://bucket/c", tmp_path / "out", "--tokenizer", "byte", "--shard_tokens", "100000"]
    most = [0]

    def reached(process: subprocess.Popen, shards: int) -> bool:
        most[0] = max(most[0], len([*(tmp_path / "out/.texts").glob("*.jsonl*")]))
        return process.poll() is not None or len([*(tmp_path / "out").glob("tokenized*")]) >= shards

    for kill in (3, 6, 9, 10**6):
        process = data_py_process(*command, "--cache_gb", str(2.5 * len(LINES) / 1e9))
        server.wait_until(lambda p=process, n=kill: reached(p, n))
        if kill < 10**6:
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=GUARD)
    assert process.returncode == 0, err
    assert tokens_in(tmp_path / "out") == byte_ids(ROWS[:1000] * 12) and 1 <= most[0] <= 3
    assert not (tmp_path / "out" / texts.COMING).exists()
