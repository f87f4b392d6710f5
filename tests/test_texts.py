"""Texts in tables and in a bucket -> shards: files made by pyarrow, and a real HTTP server as the bucket."""

import gzip
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT
from launch import GUARD
from pyarrow import feather, parquet
from shards import byte_ids, tokens_in

import data
from refocused.bucket import texts
from refocused.shards import tables, tokenize
from refocused.shards.readers import Rules
from refocused.shards.shard import DataError

TEXTS = [f"row {i}, naïve " + "word " * (i % 40) for i in range(3000)]
COLUMN = [*TEXTS[:5], None, "", *TEXTS[5:]]
MEDIA = "alt=media"


def streamed(table: pa.Table, file: Path) -> None:
    with pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, 700)


def parquet_of(table: pa.Table, file: Path) -> None:
    parquet.write_table(table, file, row_group_size=700)


WRITE = {".parquet": parquet_of, ".feather": feather.write_feather, ".arrow": streamed}
TABLES = {  # field that is named: the columns of the table
    "text": {"text": pa.array(COLUMN), "id": pa.array(range(3002))},
    "text, large": {"text": pa.array(COLUMN, pa.large_string())},
    "text, by a dictionary": {"text": pa.array(COLUMN).dictionary_encode()},
    "text, called content": {"content": pa.array(COLUMN), "url": pa.array(["x"] * 3002)},
    "raw.text": {"raw": pa.array([{"text": text, "n": 1} for text in COLUMN])},
    "a.b": {"a.b": pa.array(COLUMN)},
}


def tokenizing(source: Path, target: Path, field: str = "text", skip: bool = False) -> Counter:
    rules = Rules([field], "", skip)
    return tokenize.tokenize(tokenize.local(source, target, rules, 2), target, "byte", rules, 40_000, 2)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("suffix", WRITE)
def test_a_table_is_a_document_a_row(tmp_path, suffix, name):
    """Every kind of text column in every kind of file, small row groups, stopped and continued: its rows in order.

    Null and empty rows are skipped and counted.
    """
    (tmp_path / "in").mkdir()
    field = name.split(",")[0]
    for i in range(2):
        WRITE[suffix](pa.table(TABLES[name]), tmp_path / f"in/{i}{suffix}")
    totals = tokenizing(tmp_path / "in", tmp_path / "out", field)
    assert tokens_in(tmp_path / "out") == byte_ids(TEXTS * 2)
    assert (totals["documents"], totals["skipped"], totals["records"]) == (6000, 4, 6004) and totals["files"] > 6
    made = {file: file.read_bytes() for file in sorted((tmp_path / "out").glob("*.npz"))}
    for file in [*made][4:]:
        file.unlink()
    assert tokenizing(tmp_path / "in", tmp_path / "out", field)["kept"] == 4
    assert {file: file.read_bytes() for file in made} == made


LISTS = {"tags": pa.array([["a", "b"]] * 9), "n": pa.array(range(9))}
REFUSED = [
    (lambda b: b[:-9], "text", "Parquet magic bytes not found"),
    (lambda b: b"", "text", "Parquet file size is 0 bytes"),
    (
        lambda b: b[: len(b) // 3] + b"\xff" * 99 + b[len(b) // 3 + 99 :],
        "text",
        "cannot read .*a.parquet, row group 1: ",
    ),
    (LISTS, "tags", r"a.parquet: its column tags is list<element: string>, no text; --on_error skip"),
    (LISTS, "n", "its column n is int64, no text"),
    (LISTS, "text", r"no column text \(--fields\) but tags, n"),
    (LISTS, "tags.x", r"no column tags.x"),
]


@pytest.mark.parametrize("change,field,words", REFUSED, ids=[words for _, _, words in REFUSED])
def test_a_table_without_text(tmp_path, capsys, change, field, words):
    """Damage and other columns against an error with the file and the row group; --on_error skip passes the latter over."""
    (tmp_path / "in").mkdir()
    file = tmp_path / "in/a.parquet"
    parquet_of(pa.table(change if change is LISTS else TABLES["text"]), file)
    if change is not LISTS:
        file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=words):
        tokenizing(tmp_path / "in", tmp_path / "out", field)
    if change is LISTS:
        (tmp_path / "in/b.jsonl").write_text(json.dumps({field: "text"}))
        assert tokenizing(tmp_path / "in", tmp_path / "out", field, True)["documents"] == 1
        assert re.search(words.split("; ")[0], capsys.readouterr().err)


def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch):
    """A row group of 64 MB: the rows that are in memory at once have few bytes, however long each is."""
    monkeypatch.setattr(tables, "BYTES", 1 << 20)
    long = pa.table({"text": ["x" * 100_000] * 640})
    parquet.write_table(long, tmp_path / "a.parquet", use_dictionary=False, compression=None)
    _, groups = tables.opened(tmp_path / "a.parquet", ["text"])
    [(count, found)] = groups
    sizes = [batch.num_rows for batch in found]
    assert count == sum(sizes) == 640 and max(sizes) <= 10


def test_without_pyarrow(tmp_path):
    """The sentence that names the package, where a table is met."""
    parquet_of(pa.table(TABLES["text"]), tmp_path / "a.parquet")
    code = f"import sys; sys.modules['pyarrow'] = None; import data; sys.argv[1:] = ['tokenize', {str(tmp_path)!r}, "
    code += f"{str(tmp_path / 'out')!r}, '--tokenizer', 'byte']; sys.exit(data.main(sys.argv[1:]))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=GUARD)
    assert out.returncode == 66 and re.search("a.parquet: `.*pip install pyarrow` makes it readable", out.stderr), out


# ---- from a bucket


def fill(server, tmp_path: Path) -> list[str]:
    """Texts of four kinds below a prefix, and other things; the documents in order."""
    parquet_of(pa.table(TABLES["text"]), tmp_path / "x.parquet")
    server.put("c/00/a.parquet", (tmp_path / "x.parquet").read_bytes())
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS[:500]).encode()
    server.put("c/00/b.jsonl.gz", gzip.compress(lines))
    server.put("c/01/c.json", lines)
    server.put("c/02/d.txt", b"one document")
    server.put("c/02/settings.json", b'{"a": 1}')
    server.put("c/readme.md", b"x")
    server.put("c/02/", b"")
    server.put("cc/other.txt", b"x")
    return [*TEXTS, *TEXTS[:500], *TEXTS[:500], "one document"]


def test_texts_in_a_bucket(server, tmp_path, capsys):
    """A prefix of parquet, lines and text against the documents; nothing of them is left; again: nothing is fetched.

    One object by its name; a file that is another by then is refused; a prefix without texts.
    """
    documents = fill(server, tmp_path)

    def tokenized(url: str, target: str = "out") -> tuple[int, str]:
        arguments = ["tokenize", url, str(tmp_path / target), "--tokenizer", "byte", "--shard_tokens", "40000"]
        return data.main(arguments), "".join(capsys.readouterr())

    code, said = tokenized("gs://bucket/c")
    assert code == 0 and f"{len(documents):,} documents" in said
    assert (
        "left out readme.md" in said and "refused" not in said and "settings.json: no JSON lines and no array" in said
    )
    assert tokens_in(tmp_path / "out") == byte_ids(documents) and not (tmp_path / "out" / texts.COMING).exists()
    before = server.count("GET", MEDIA)
    assert before == 5 and "0 were there" not in tokenized("gs://bucket/c")[1] and server.count("GET", MEDIA) == before
    assert tokenized("gs://bucket/c/02/d.txt", "one")[0] == 0
    assert tokens_in(tmp_path / "one") == byte_ids(["one document"])
    server.put("c/02/d.txt", b"another one")
    code, said = tokenized("gs://bucket/c")
    assert code == 66 and "was made from other sources" in said
    assert tokenized("gs://bucket/none")[0] == 66


def test_a_bounded_folder_and_kills(server, tmp_path):
    """Killed three times and continued, with room for two files: never more than that on the disk, and the same shards."""
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS[:1000]).encode()
    for i in range(12):
        server.put(f"c/{i:02d}.jsonl", lines)
    server.fault("GET", MEDIA, rate=400_000, times=10**6)  # so that files come slowly
    command = [sys.executable, ROOT / "data.py", "tokenize", "gs://bucket/c", tmp_path / "out", "--tokenizer", "byte"]
    command += ["--shard_tokens", "100000", "--cache_gb", str(2.5 * len(lines) / 1e9)]
    most = [0]

    def reached(process: subprocess.Popen, shards: int) -> bool:
        most[0] = max(most[0], len([*(tmp_path / "out/.texts").glob("*.jsonl*")]))
        return process.poll() is not None or len([*(tmp_path / "out").glob("tokenized*")]) >= shards

    for kill in (3, 6, 9, 10**6):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        server.wait_until(lambda p=process, n=kill: reached(p, n))
        if kill < 10**6:
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=GUARD)
    assert process.returncode == 0, err
    assert tokens_in(tmp_path / "out") == byte_ids(TEXTS[:1000] * 12) and 1 <= most[0] <= 3
    assert not (tmp_path / "out" / texts.COMING).exists()
