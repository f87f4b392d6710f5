"""Preparing, unpacking, tokenizing and verifying shards: real files and real processes, compared with plain numpy."""

import dataclasses
import errno
import json
import multiprocessing.synchronize
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import shards
from launch import GUARD
from tokenizers import Tokenizer

import data
from configs import Config
from data import Dataset, open_dataset
from refocused.shards import formats, prepare, readers, tokenize, verify
from refocused.shards.formats import TokenFile
from refocused.shards.prepare import read_note, write_shard
from refocused.shards.readers import Rules
from refocused.shards.shard import DataError, PackedShard, Shard
from refocused.shards.tokenizers import find

ROOT = Path(__file__).parent.parent
V, END = 50257, shards.END_OF_TEXT


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=GUARD, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stream_of(file: Path, **options) -> tuple[list[int], dict]:
    report: dict = {}
    tokens = np.concatenate(list(TokenFile(file, V, END, **options).chunks(report))).tolist()
    assert len(tokens) == report["tokens"]
    return tokens, report


# ---- formats


@pytest.mark.parametrize("without", [(), ("attention_mask",), ("sequence_lengths",)])
def test_padding_is_dropped(tmp_path, without):
    """A padded file of several blocks against its rows put together one by one; the pad value never appears."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 1000, rng.integers(1, 701)) for _ in range(3000)] + [rng.integers(0, 1000, 700)]
    file = tmp_path / "a.npz"
    shards.write_padded(file, rows, 700, pad=-7, **dict.fromkeys(without))
    assert len(rows) * 700 * 4 > 2 * formats.BLOCK
    tokens, report = stream_of(file)
    assert tokens == shards.rows_to_stream(rows, 700).tolist()
    assert report["documents"] == 3001 and report["padding"] == 3001 * 700 - sum(map(len, rows))
    assert report["largest_id"] == END


def test_streams_and_full_rows_stay_as_they_are(tmp_path):
    """1-D arrays of each dtype, rows without padding arrays and nanoGPT's .bin against their own tokens."""
    tokens = np.random.default_rng(0).integers(0, V, 3000)
    tokens[[10, 20]] = END
    np.savez_compressed(tmp_path / "rows.npz", tokens=tokens.reshape(30, 100).astype(np.int32))
    tokens.astype(np.uint16).tofile(tmp_path / "train.bin")
    for dtype in ("<u2", "<u4", "<i4"):
        np.savez_compressed(tmp_path / f"{dtype[1:]}.npz", input_ids=tokens.astype(dtype))
    for name in ("rows.npz", "train.bin", "u2.npz", "u4.npz", "i4.npz"):
        found, report = stream_of(tmp_path / name)
        assert found == tokens.tolist() and report["documents"] == (tokens == END).sum()
    totals = prepare.prepare(tmp_path, tmp_path / "out", V, END, workers=1)
    assert totals["files"] == 5 and totals["tokens"] == 15000
    shard = Shard.open(tmp_path / "out", "train.npz")
    assert shard.stream.dtype == np.uint16 and shard.offset % 64 == 0 and (shard.tokens == tokens).all()
    assert TokenFile(tmp_path / "u4.npz", 65536, END).out_dtype == np.uint16
    assert TokenFile(tmp_path / "u4.npz", 65537, END).out_dtype == np.uint32


TOKENS = np.random.default_rng(0).integers(0, 257, 3000)


def bin_of(dtype: str, head: bytes = b"", tokens: np.ndarray = TOKENS):
    return lambda folder: (folder / "train.bin").write_bytes(head + tokens.astype(dtype).tobytes())


def megatron(folder: Path, code: int = 4, dtype: str = "<i4"):
    """As Megatron's IndexedDatasetBuilder writes 30 documents of 100 tokens."""
    bin_of(dtype)(folder)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 30, 31) + np.full(30, 100, "<i4").tobytes()
    index += (np.arange(30, dtype="<i8") * 100 * np.dtype(dtype).itemsize).tobytes()
    index += np.arange(31, dtype="<i8").tobytes()
    (folder / "train.idx").write_bytes(index)


def llm_c(magic: int, dtype: str, count: int = 3000):
    return bin_of(dtype, np.array([magic, 1, count] + [0] * 253, "<i4").tobytes())


def saved(save, dtype, name: str):
    arrays = {"arr" if save is np.save else "input_ids": TOKENS.astype(dtype)}
    return lambda folder: save(folder / name, **arrays)


def linked(folder: Path):
    shards.write_mapped(folder.parent / "disk", [])
    write_shard(folder.parent / "disk/tokenized_cleaned_0.npz", np.dtype("<u2"), [TOKENS], {})
    for name in ("here", "there", "disk"):
        (folder / name).symlink_to(folder.parent / "disk")
    (folder.parent / "disk/up").symlink_to(folder)


def write_npy(file: Path, version: tuple[int, int]):
    with open(file, "wb") as stream:
        np.lib.format.write_array(stream, TOKENS.astype("<i4"), (2, 0))
        stream.seek(6)
        stream.write(bytes(version))


FOREIGN = {
    "uint16 .bin": bin_of("<u2"),
    "uint32 .bin": bin_of("<u4"),
    "int32 .bin": bin_of("<i4"),
    "int64 .bin": bin_of("<i8"),
    "Megatron .bin with .idx, int32": megatron,
    "Megatron .bin with .idx, uint16": lambda folder: megatron(folder, 8, "<u2"),
    "llm.c": llm_c(20240520, "<u2"),
    "llm.c, Llama 3": llm_c(20240801, "<u4"),
    ".npy": saved(np.save, "<i8", "train.npy"),
    ".npy, version 3": lambda folder: write_npy(folder / "train.npy", (3, 0)),
    "big-endian .npy": saved(np.save, ">u2", "train.npy"),
    "int64 .npz": saved(np.savez, "<i8", "tokenized_cleaned_0.npz"),
    "int16 .npz": saved(np.savez_compressed, "<i2", "tokenized_cleaned_0.npz"),
    "big-endian .npz": saved(np.savez, ">i4", "tokenized_cleaned_0.npz"),
    "a linked tree": linked,
    "a cache inside": saved(np.savez_compressed, "<i4", "tokenized_cleaned_0.npz"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_every_format_gives_the_tokens_that_are_in_it(tmp_path, kind):
    """verify and training on tokens in somebody else's file: the same ones, or a sentence that names prepare; then those."""
    folder, out = tmp_path / "set", tmp_path / "set/prepared"
    folder.mkdir()
    FOREIGN[kind](folder)
    settings = {"tokenizer": "byte", "vocab_size": 257, "eval_files": 0}
    cache = tmp_path / "set/cache"

    def trains_on(place: Path) -> bool:
        for _ in range(2):  # the second start finds what the first one left
            dataset = open_dataset(config(place, cache, **settings))
            assert [shard.num_tokens for shard in dataset.shards] == [3000]
            assert dataset.notes == []
            windows = dataset.gather(np.arange(dataset.num_samples))
            assert windows[:, :-1].ravel().tolist() == TOKENS[: 187 * 16].tolist()
        return True

    if kind.endswith((".npz", "tree", "inside")):
        assert trains_on(folder)
        assert verify.verify(folder, 257, workers=1) == 0
        return
    with pytest.raises(DataError, match=r"no \.npz file; `python data.py prepare SRC DST` makes shards of its 1 such"):
        verify.verify(folder, 257)
    with pytest.raises(DataError, match=r"is no .npz; `python data.py prepare"):
        open_dataset(config(folder, cache, tokenized_file_pattern="train.[bBnN]*", **settings))
    assert prepare.prepare(folder, out, 257, 256, workers=1)["tokens"] == 3000
    again = prepare.prepare(folder, out, 257, 256, workers=1)  # its own output is no source
    assert (again["files"], again["kept"], again["tokens"]) == (1, 1, 3000)
    os.rename(out / "train.npz", out / "tokenized_cleaned_0.npz")
    assert trains_on(out) and verify.verify(out, 257, workers=1) == 0 and not cache.exists()


NONE_OF_IT = [
    (bin_of("<u4", tokens=TOKENS + 300), 257, "unclear how wide its ids are. Name it with --bin_dtype"),
    (bin_of("<i4", tokens=np.where(TOKENS % 9, TOKENS, -1)), 65536, "unclear how wide"),
    (bin_of(">u4"), 257, "unclear how wide"),
    (bin_of("<u4", tokens=TOKENS[:9]), 257, "unclear how wide"),
    (bin_of("<u2", tokens=TOKENS * 0), 257, "unclear how wide"),
    (llm_c(20240520, "<u4"), 65536, "13024 bytes; 3000 tokens of uint16 from byte 1024 on"),
    (bin_of("|u1", tokens=TOKENS[:9] % 256), 257, "has 9 bytes"),
    (
        lambda folder: [megatron(folder), bin_of("<i4", tokens=TOKENS[1:])(folder)],
        257,
        "11996 bytes; 3000 tokens of int32",
    ),
    (lambda folder: [bin_of("<u2")(folder), (folder / "train.idx").write_bytes(b"TNTIDX")], 257, "no Megatron index"),
    (lambda folder: np.save(folder / "a.npy", np.array([None, 1])), 257, "pickled objects"),
    (lambda folder: np.save(folder / "a.npy", np.ones(9)), 257, "dtype <f8"),
    (lambda folder: np.save(folder / "a.npy", np.ones((0, 3), int)), 257, "rows of length zero"),
]


@pytest.mark.parametrize("save,vocab_size,message", NONE_OF_IT, ids=[message for _, _, message in NONE_OF_IT])
def test_what_a_file_holds_is_clear_or_it_is_refused(tmp_path, save, vocab_size, message):
    """Ids wider than they seem, cut or foreign against a sentence; --bin_dtype decides where that is what is missing."""
    save(tmp_path)
    file = next(path for path in tmp_path.iterdir() if path.suffix != ".idx")
    with pytest.raises(DataError) as caught:
        TokenFile(file, vocab_size, 256)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    if "--bin_dtype" in message:
        assert TokenFile(file, 1000, 256, bin_dtype="uint32").held == 3000


def test_empty_documents_are_skipped(tmp_path):
    """Rows of length zero, by lengths or by the mask, against the stream of the others; they are counted.

    One long row among short ones is refused with the option named, and converted with it.
    """
    rows = [np.arange(3), np.arange(0), np.arange(8), np.arange(5), np.arange(0)]
    expected = shards.rows_to_stream([row for row in rows if len(row)], 8).tolist()
    for without in ({}, {"attention_mask": None}, {"sequence_lengths": None}):
        shards.write_padded(tmp_path / "a.npz", rows, 8, **without)
        tokens, report = stream_of(tmp_path / "a.npz")
        assert tokens == expected and (report["documents"], report["skipped"], report["padding"]) == (3, 2, 24)
    rows = [np.arange(1, 3)] * 2000 + [np.arange(5000)]
    shards.write_padded(tmp_path / "a.npz", rows, 5000)
    with pytest.raises(DataError, match="larger --max_ratio"):
        stream_of(tmp_path / "a.npz")
    assert stream_of(tmp_path / "a.npz", max_ratio=2000)[0] == shards.rows_to_stream(rows, 5000).tolist()


def windows(text: np.ndarray, width: int, step: int, to_the_end: bool) -> list[np.ndarray]:
    """A long text as rows that overlap: a window each `step` tokens, up to the one that reaches its end or to the end."""
    starts = range(0, len(text) if to_the_end else max(1, len(text) - width + step), step)
    return [text[start : start + width] for start in starts]


@pytest.mark.parametrize("to_the_end", [False, True])
@pytest.mark.parametrize("step", [48, 24, 64])
@pytest.mark.parametrize("ends", [[END], []], ids=["with end-of-text", "without"])
def test_rows_of_long_texts(tmp_path, ends, step, to_the_end):
    """Windows of texts of any length, as tokenizers cut them, against the texts: each token once, one end-of-text each.

    The shares of rows that ended so and that overlapped are right, and --overlap 0 keeps all; with lengths, mask or both.
    """
    rng = np.random.default_rng(step)
    sizes = [95] * 66 + rng.integers(0, 500, 120).tolist()  # of one window each, then of any length
    texts = [np.array([*rng.integers(0, END, size), *(ends or [7])]) for size in sizes]
    short = np.array([*rng.integers(0, END, 89), *(ends or [7])])
    texts += [short, short[step:]]  # the second is no window of the first
    rows = [row for text in texts for row in windows(text, 96, step, to_the_end)]
    cut = [windows(text, 96, step, to_the_end) for text in texts]
    expected = [token for text, rows in zip(texts, cut, strict=True) for token in (*text, *windows_end(rows, ends))]
    for without in ({}, {"attention_mask": None}, {"sequence_lengths": None}):
        shards.write_padded(tmp_path / "in/a.npz", rows, 96, pad=5, **without)
        tokens, report = stream_of(tmp_path / "in/a.npz")
        assert tokens == expected
        assert report["rows"] == len(rows) and report["ended"] == sum(row[-1] == END for row in rows)
        assert report["repeats"] == len(rows) - len(texts) and report["repeated"] == sum(map(len, rows)) - sum(
            map(len, texts)
        )
    kept = stream_of(tmp_path / "in/a.npz", overlap=0)[0]
    assert len(kept) == sum(map(len, rows)) + sum(len(row) < 96 and row[-1] != END for row in rows)
    out = run("prepare", tmp_path / "in", tmp_path / "out", "--workers", 1)
    ended, repeats = report["ended"] / len(rows), report["repeats"] / len(rows)
    said = f"of {len(rows):,} rows {ended:.1%} ended with end-of-text, and {repeats:.1%}"
    said += f" began with the end of the row before: {report['repeated']:,}"
    assert out.returncode == 0 and said in out.stdout, out
    notes = Dataset.open(config(tmp_path / "out", tmp_path, tokenized_file_pattern="a.npz")).notes
    assert len(notes) == 1 and notes[0].startswith(said)


def windows_end(rows: list[np.ndarray], ends: list[int]) -> list[int]:
    """What follows a text's last row: an end-of-text where it has none and is shorter than the width."""
    return [END] if not ends and len(rows[-1]) < 96 else []


def alike(kind: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    if kind == "a text that repeats itself":
        return [np.resize([1, 2, 3], 96), np.resize([1, 2, 3], 96), *[np.full(96, 9)] * 4, np.arange(5)]
    if kind in ("a table", "zeros"):  # its lines are 60 tokens long, or one, and all alike
        text = np.resize(rng.integers(0, END, 60) if kind == "a table" else [0], 96 * 20 + 50)
        return [text[i : i + 96] for i in range(0, len(text), 96)]
    parts = [rng.integers(0, END, 96) for _ in range(20)]
    for before, after in zip(parts, parts[1:], strict=False):
        if kind == "few tokens":
            after[:31] = before[-31:]
        elif rng.random() < 0.4:  # now and then, or at another distance each time
            count = 48 if kind == "a minority" else int(rng.integers(32, 90))
            after[:count] = before[-count:]
    return [*parts, np.arange(40)]


ALIKE = ["a text that repeats itself", "a table", "zeros", "few tokens", "a minority", "many distances"]


@pytest.mark.parametrize("kind", ALIKE)
def test_rows_that_only_look_alike_stay(tmp_path, kind):
    """Rows equal to their neighbours' ends by chance, by fewer tokens, seldom or irregularly: nothing is dropped."""
    shards.write_padded(tmp_path / "a.npz", alike(kind), 96)
    tokens, report = stream_of(tmp_path / "a.npz")
    assert tokens == shards.rows_to_stream(alike(kind), 96).tolist() and report["repeated"] == 0


def test_overlap_that_is_named_or_not_padded(tmp_path):
    """Overlaps of 8 tokens, too few to be found, by name; rows without padding arrays, packed, as .npy, and mapped."""
    text = np.random.default_rng(0).integers(0, END, 16 + 8 * 20)
    shards.write_padded(tmp_path / "a.npz", windows(text, 16, 8, False), 16)
    assert len(stream_of(tmp_path / "a.npz")[0]) > len(text)
    assert stream_of(tmp_path / "a.npz", overlap=8)[0] == text.tolist()
    with pytest.raises(DataError, match="overlap=16 is not below the width of .*a.npz's rows, 16"):
        TokenFile(tmp_path / "a.npz", V, END, overlap=16)
    text = np.random.default_rng(0).integers(0, END, 96 + 48 * 20).astype(np.int32)
    rows = np.stack(windows(text, 96, 48, False))
    np.save(tmp_path / "b.npy", rows)
    np.savez_compressed(tmp_path / "c.npz", input_ids=rows)
    (tmp_path / "set").mkdir()
    np.savez(tmp_path / "set/tokenized_cleaned_d.npz", input_ids=rows)
    for name in ("b.npy", "c.npz", "set/tokenized_cleaned_d.npz"):
        assert stream_of(tmp_path / name)[0] == text.tolist()
    [note] = Dataset.open(config(tmp_path / "set", tmp_path)).notes
    assert "rows of 1 of 1 shards begin with the last 48 tokens of the row before" in note and "prepare" in note


def test_without_shared_memory(tmp_path, monkeypatch, capsys):
    """A machine on which no lock of a process pool can be made, against verify's own work in one process."""
    shards.write_mapped(tmp_path, [100, 100])

    def refuse(*args, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", refuse)
    assert verify.verify(tmp_path, V) == 0
    out = capsys.readouterr()
    assert "working in one process: /dev/shm cannot be written (Read-only file system)" in out.err
    assert "0 wrong" in out.out


# ---- bad input


ROWS = [np.arange(1, 4), np.arange(1, 9), np.arange(1, 6)]


def padded(**arrays):
    return lambda file: shards.write_padded(file, ROWS, 8, **arrays)


def mask(row: int, *ones: int) -> np.ndarray:
    found = (np.arange(8) < np.array([[3], [8], [5]])).astype(np.int32)
    found[row] = [i in ones for i in range(8)]
    return found


def ids(value: int) -> np.ndarray:
    found = np.ones((3, 8), np.int32)
    found[2, 4] = value
    return found


def declared(size: int):
    """A directory that claims another uncompressed size than the header's shape makes."""

    def save(file: Path):
        np.savez_compressed(file, input_ids=np.arange(1000, dtype=np.int32))
        with zipfile.ZipFile(file) as archive:
            honest = archive.infolist()[0].file_size.to_bytes(4, "little")
        file.write_bytes(file.read_bytes().replace(honest, size.to_bytes(4, "little")))

    return save


def claimed_shape(file: Path):
    """A header whose shape is larger than what was deflated after it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("input_ids.npy", "w") as member:
        header = {"descr": "<i4", "fortran_order": False, "shape": (10**12,)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(4000))


def long_header(file: Path):
    """A header that says it is 2 GB long, in 2 MB of zeros deflated."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("input_ids.npy", b"\x93NUMPY\2\0" + (1 << 31).to_bytes(4, "little") + bytes(1 << 21))


def flipped(file: Path):
    shards.write_padded(file, [np.random.default_rng(0).integers(0, V, 500)] * 2, 500)
    damaged = bytearray(file.read_bytes())
    damaged[200] ^= 8
    file.write_bytes(damaged)


def cut(file: Path):
    shards.write_padded(file, ROWS, 8)
    file.write_bytes(file.read_bytes()[:-40])


def stored(**arrays):
    arrays = arrays or {"input_ids": np.arange(5000, dtype=np.uint16)}
    return lambda file: np.savez(file, **arrays)


def changed(change):
    """A stored shard whose bytes are others."""

    def save(file: Path):
        stored()(file)
        file.write_bytes(change(file.read_bytes()))

    return save


def encrypted(content: bytes) -> bytes:
    at = content.rfind(b"PK\1\2") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]


def twice(file: Path):
    stored()(file)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("input_ids.npy", b"")


def lzma(file: Path):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive, archive.open("input_ids.npy", "w") as member:
        np.lib.format.write_array(member, np.arange(10, dtype=np.int32))


BAD = [  # no shards at all, for whoever opens them
    (stored(input_ids=np.array([1, "x", None], object)), "pickled objects"),
    (stored(input_ids=np.zeros(100, np.float32)), "dtype <f4"),
    (stored(input_ids=np.asfortranarray(np.ones((20, 30), np.int32))), "Fortran order; a shard is a 1-D stream or 2-D"),
    (
        stored(input_ids=np.ones((2, 3, 4), np.int32)),
        "shape (2, 3, 4) in C order; a shard is a 1-D stream or 2-D rows in C",
    ),
    (stored(arr_0=np.ones(9, int), arr_1=np.ones(9, int)), "exactly one of input_ids and tokens"),
    (stored(input_ids=ids(1), tokens=ids(1)), "holds input_ids, tokens; a shard holds exactly one of"),
    (stored(ids=np.ones(100, np.int32)), "save it as np.savez(file, input_ids=tokens)"),
    (stored(**{f"a{i}": np.ones(1) for i in range(17)}), "has 17 members; a shard has at most 16"),
    (changed(lambda content: content[: len(content) // 2]), "not an .npz file or ends early"),
    (changed(lambda content: content[:300] + content[600:]), "ends early"),  # with a whole directory
    (changed(lambda content: content.replace(b"(5000,)", b"(9000,)")), "damaged or ends early: input_ids.npy"),
    (changed(encrypted), "encrypted"),
    (twice, "names a member twice"),
    (lambda file: zipfile.ZipFile(file, "w").writestr("input_ids.npy", b"not numpy"), "no readable .npy header"),
]
BAD_SOURCES = [
    (padded(input_ids=ids(-1)), "id -1 at row 2, column 4"),
    (padded(input_ids=ids(60000)), "id 60000 at row 2, column 4; vocab_size=50257"),
    (padded(input_ids=np.ones(24, np.int32)), "one dimension, which attention_mask does not fit"),
    (lambda file: np.savez(file, input_ids=np.ones((3, 0), np.int32)), "rows of length zero"),
    (padded(sequence_lengths=np.array([3, 9, 5])), "row 1 has length 9; a row has 0 to 8 tokens"),
    (padded(sequence_lengths=np.array([3, 8, 0])), "row 2 has length 0 and 5 ones in attention_mask"),
    (padded(sequence_lengths=np.array([3, -1, 5])), "row 1 has length -1"),
    (padded(sequence_lengths=None, attention_mask=np.zeros((3, 8), np.int32)), "all of its 3 rows are empty"),
    (padded(input_ids=ids(-1).astype(np.int64)), "id -1 at row 2, column 4"),
    (padded(input_ids=ids(1).astype(np.uint64) + np.uint64(1 << 63)), "id 9223372036854775809 at row 0, column 0"),
    (lambda file: np.savez(file, input_ids=np.full(9, 70000)), "id 70000 at token 0"),
    (padded(sequence_lengths=np.array([3, 8])), "sequence_lengths has shape (2,) beside tokens of shape (3, 8)"),
    (padded(sequence_lengths=np.array([3, 8, 4])), "row 2 has length 4 and 5 ones in attention_mask"),
    (padded(sequence_lengths=None, attention_mask=mask(1, 1, 2, 3)), "row 1 has length 3 and 3 ones"),  # left-padded
    (padded(attention_mask=np.ones((3, 7), np.int32)), "attention_mask has shape (3, 7)"),
    (padded(sequence_lengths=np.ones(3)), "sequence_lengths.npy holds dtype <f8"),
    (lambda file: np.savez_compressed(file, input_ids=np.zeros(10**6, np.int32)), "a ratio over 200"),
    (declared(10**9), "claims 1000000000 bytes; its shape (1000,) and int32 make 4128"),
    (declared(200), "damaged or ends early: input_ids.npy"),
    (claimed_shape, "shape (1000000000000,) and int32 make 4000000000128"),
    (long_header, "no readable .npy header"),
    (lzma, "packed by method 14, not deflate"),
    (flipped, "damaged or ends early: input_ids.npy"),
    (cut, "not an .npz file or ends early"),
    (lambda file: file.write_bytes(b"123"), "not an .npz file"),
]


@pytest.mark.parametrize("save,message", BAD + BAD_SOURCES, ids=[message for _, message in BAD + BAD_SOURCES])
def test_bad_source(tmp_path, save, message):
    """Opening and converting a bad file against an error with its name and the reason; nothing is left of it."""
    (tmp_path / "in").mkdir()
    save(tmp_path / "in/bad.npz")
    if (save, message) in BAD:
        with pytest.raises(DataError) as caught:
            Shard.open(tmp_path / "in", "bad.npz")
        assert message in str(caught.value) and "bad.npz" in str(caught.value) and caught.value.exit_code == 66
        assert not isinstance(caught.value, PackedShard)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError) as caught:
        prepare.convert(tmp_path / "in/bad.npz", tmp_path / "out", "bad.npz", {"vocab_size": V, "end_of_text": END})
    assert message in str(caught.value) and "bad.npz" in str(caught.value)
    assert content(tmp_path / "out") == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "memory grew by 100 MB"


def test_one_bad_file_does_not_stop_the_others(tmp_path):
    """A set with two bad files among good ones: both are named, exit code 66, the others are there and right."""
    expected = shards.write_seed_shards(tmp_path / "in", files=6)
    cut(tmp_path / "in/bad_1.npz")
    flipped(tmp_path / "in/bad_2.npz")
    out = run("prepare", tmp_path / "in", tmp_path / "out")
    assert out.returncode == 66 and "2 of 8 files failed" in out.stderr
    assert "bad_1.npz is not an .npz" in out.stderr and "bad_2.npz is damaged" in out.stderr
    for path, stream in expected.items():
        assert (Shard.open(tmp_path / "out", path).tokens == stream).all()
    assert set(content(tmp_path / "out")) == set(expected)


def test_usage_errors(tmp_path, capsys):
    """Wrong folders and options against messages; exit code 66 for data, 2 for the command line."""
    shards.write_seed_shards(tmp_path / "in", files=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.TXT").write_text("text")
    IN, OUT, TEXTS = tmp_path / "in", tmp_path / "out", tmp_path / "texts"
    tokenizes = "`python data.py tokenize SRC DST` makes shards of its 1 such as a.TXT"
    for arguments, code, message in (
        (("prepare", tmp_path / "nowhere", OUT), 66, "nowhere is no file and no folder"),
        (("prepare", tmp_path / "empty", OUT), 66, "have no .npz, .npy or .bin file"),
        (("prepare", TEXTS, OUT), 66, tokenizes),
        (("tokenize", IN, OUT), 66, "`python data.py prepare SRC DST` makes shards of its 1"),
        (("verify", TEXTS), 66, tokenizes),
        (("bench", tmp_path / "empty"), 66, "have no .npz file"),
        (("tokenize", "gs://b/texts", OUT), 2, "gs://b/texts is in a bucket, and this reads from a disk"),
        (("verify", "gs:/b/texts"), 2, "`gcloud storage cp -r gs://BUCKET/PREFIX DEST` other files"),
        (("prepare", IN, IN), 66, "is the source"),
        (("prepare", IN, OUT, "--end_of_text", 60000), 66, "no id below vocab_size=50257"),
        (("prepare", IN, OUT, "--vocab_size", 65), 66, "name one with --end_of_text"),
        (("prepare", IN), 2, "DST"),
        (("prepare", IN, OUT, "--fats"), 2, "--fats"),
        (("prepare", IN, OUT, "--workers", -1), 2, "--workers: -1 is not at least 1"),
        (("verify", IN, "--workers", 0), 2, "--workers: 0 is not at least 1"),
        (("tokenize", IN, OUT, "--shard_tokens", 0), 2, "--shard_tokens: 0 is not"),
    ):
        try:
            found = data.main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's own
            found = error.code
        said = capsys.readouterr().err
        assert (found, message in said) == (code, True), said


def test_disk_full(tmp_path):
    """A file size limit hit while writing, as a full disk would: an error with the name, nothing left behind."""
    rows = [np.random.default_rng(i).integers(0, V, 3000) for i in range(40)]
    shards.write_padded(tmp_path / "in/tokenized_cleaned_0.npz", rows, 3000)
    limit = (resource.RLIMIT_FSIZE, (100_000, 100_000))
    out = run("prepare", tmp_path / "in", tmp_path / "out", preexec_fn=lambda: resource.setrlimit(*limit))
    assert out.returncode == 66 and "cannot write" in out.stderr and "File too large" in out.stderr
    assert content(tmp_path / "out") == {}


# ---- interruptions


def test_killed_and_restarted(tmp_path):
    """Five SIGKILLs while 40 files are prepared, then a run to the end, against the bytes of an uninterrupted run."""
    expected = shards.write_seed_shards(tmp_path / "in", files=40, rows=60, width=600)
    assert run("prepare", tmp_path / "in", tmp_path / "whole").returncode == 0
    for kill in range(1, 6):
        command = [sys.executable, ROOT / "data.py", "prepare", tmp_path / "in", tmp_path / "out", "--workers", "2"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while len(content_names(tmp_path / "out")) < 6 * kill:
            assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    out = run("prepare", tmp_path / "in", tmp_path / "out")
    assert out.returncode == 0, out.stderr
    assert int(out.stdout.split("(")[1].split()[0]) >= 30, out.stdout  # were there already
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert set(content(tmp_path / "out")) == set(expected)


def content_names(folder: Path) -> list[str]:
    return [name for _, _, names in os.walk(folder) for name in names if name.endswith(".npz")]


def test_done_and_intact_is_kept_everything_else_redone(tmp_path):
    """A second run keeps all; a damaged result, a changed source and another vocabulary are done again."""
    shards.write_seed_shards(tmp_path / "in", files=4)
    arguments = (tmp_path / "in", tmp_path / "out", V, END, 1)
    assert prepare.prepare(*arguments)["kept"] == 0
    whole = content(tmp_path / "out")
    again = prepare.prepare(*arguments)
    assert again["kept"] == 4 and again["documents"] == 200 and again["padding"] > 0
    victim = tmp_path / "out" / min(whole)
    damaged = bytearray(whole[min(whole)])
    damaged[500] ^= 1
    victim.write_bytes(damaged)
    assert prepare.prepare(*arguments)["kept"] == 3 and content(tmp_path / "out") == whole
    shards.write_padded(tmp_path / "in" / max(whole), ROWS, 8)
    assert prepare.prepare(*arguments)["kept"] == 3
    assert (Shard.open(tmp_path / "out", max(whole)).tokens == shards.rows_to_stream(ROWS, 8)).all()
    assert prepare.prepare(tmp_path / "in", tmp_path / "out", 70000, END, 1)["kept"] == 0
    assert Shard.open(tmp_path / "out", max(whole)).stream.dtype == np.uint32


# ---- training on what is not mapped


def config(folder: Path, cache: Path, **changes) -> Config:
    return dataclasses.replace(Config(), data_dir=str(folder), cache_dir=str(cache), sequence_length=16, **changes)


def test_unpacked_once_and_never_again(tmp_path):
    """Two processes that open a compressed set at once: one unpacks, both see the same; later calls write nothing."""
    expected = shards.write_seed_shards(tmp_path / "in", files=5)
    code = f"""
import dataclasses, data
from configs import Config
if __name__ == "__main__":
    cfg = Config(data_dir={str(tmp_path / "in")!r}, cache_dir={str(tmp_path / "cache")!r}, sequence_length=16)
    dataset = data.open_dataset(cfg)
    print(dataset.fingerprint, dataset.num_samples)
"""
    (tmp_path / "job.py").write_text(code)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    jobs = [subprocess.Popen([sys.executable, tmp_path / "job.py"], text=True, **pipes) for _ in range(2)]
    outputs = [job.communicate(timeout=GUARD) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and sum("unpacking 5 shards" in err for _, err in outputs) == 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    dataset = open_dataset(config(tmp_path / "in", tmp_path / "cache", max_files=3))
    assert [s.path for s in (*dataset.shards, *dataset.eval_shards)] == sorted(expected)[:3]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == before
    first = sorted(expected)[0]
    assert dataset.gather(np.array([0]))[0].tolist() == expected[first][:17].tolist()
    shards.write_padded(tmp_path / "in" / first, ROWS * 20, 8)  # the source changes: unpacked again
    dataset = open_dataset(config(tmp_path / "in", tmp_path / "cache"))
    assert dataset.gather(np.array([0]))[0].tolist() == shards.rows_to_stream(ROWS * 20, 8)[:17].tolist()


def test_a_cache_of_an_older_version(tmp_path):
    """Shards unpacked by the rule before, of rows that end with end-of-text and of such as do not: both are made again.

    The first differ then, so a resume on them is refused and says so; the others are the same.
    """
    for name, rows in (("a", [[1, 2, END]] * 60), ("b", [[1, 2, 3]] * 60)):
        shards.write_padded(tmp_path / f"in/tokenized_cleaned_{name}.npz", rows, 8)
    cfg = config(tmp_path / "in", tmp_path / "cache")
    open_dataset(cfg)
    for file in data.cache_folder(cfg).glob("*.npz"):
        tokens = np.array(([1, 2, END] if "_a" in file.name else [1, 2, 3]) + [END]).tolist() * 60
        note = {key: value for key, value in read_note(file).items() if key != "rule"}
        write_shard(file, np.dtype("<u2"), [tokens], note)
    before = Dataset.open(cfg, data.cache_folder(cfg))
    assert [text for text in before.notes if "2 of 2 shards were unpacked by an older version" in text]
    after = open_dataset(cfg)
    assert after.shards[0].tokens.tolist() == [1, 2, END] * 60
    changed = data.explain_change(before.manifest, after.manifest)
    assert changed.startswith("changed 1: tokenized_cleaned_a.npz (tokens 240 -> 180, crc32")


def test_without_a_tokenizer(tmp_path):
    """tokenizer=none: packed shards without padding are unpacked; padded ones are refused, and the command is named."""
    (tmp_path / "a").mkdir()
    np.savez_compressed(tmp_path / "a/tokenized_cleaned_0.npz", np.arange(900) % 65)
    cfg = config(tmp_path / "a", tmp_path / "cache", tokenizer=None, vocab_size=65)
    assert open_dataset(cfg).gather(np.array([0]))[0].tolist() == list(range(17))
    shards.write_padded(tmp_path / "b/tokenized_cleaned_0.npz", ROWS * 9, 8)
    with pytest.raises(DataError, match="is padded .* tokenizer=none does not say it; name the tokenizer"):
        open_dataset(config(tmp_path / "b", tmp_path / "cache", tokenizer=None))
    name = "x" * 245 + ".npz"
    (tmp_path / "c").mkdir()
    os.rename(tmp_path / "a/tokenized_cleaned_0.npz", tmp_path / "c" / name)
    out = run("prepare", tmp_path / "c", tmp_path / "d", "--vocab_size", 65, "--end_of_text", 0, "--workers", 1)
    assert out.returncode == 0 and " tokenizer=none vocab_size=65 " in out.stdout, out
    assert (tmp_path / "d" / name).exists()


# ---- verify


def test_verify_names_what_is_wrong(tmp_path):
    """A flipped byte, a truncated file, an id of 60000 and a copy, each named; exit code 66; 0 once they are gone."""
    shards.write_mapped(tmp_path, [20000] * 6)
    files = sorted(tmp_path.rglob("*.npz"))
    damaged = bytearray(files[0].read_bytes())
    damaged[30000] ^= 1
    files[0].write_bytes(damaged)
    os.truncate(files[1], 10000)
    tokens = np.zeros(20000)
    tokens[77] = 60000
    write_shard(files[2], np.dtype("<u2"), [tokens], {})
    files[4].write_bytes(files[3].read_bytes())
    shards.write_seed_shards(tmp_path / "packed", files=2)  # verified as they are
    out = run("verify", tmp_path)
    lines = {line.split()[0]: line for line in out.stdout.splitlines()}
    assert out.returncode == 66 and "8 shards" in out.stdout and "4 wrong" in out.stdout
    for file, words in (
        (files[0], "Bad CRC-32"),
        (files[1], "ends early"),
        (files[2], "id 60000 at token 77; vocab_size=50257"),
        (files[4], f"same content as {files[3].relative_to(tmp_path)}"),
        (files[5], "ok"),
    ):
        assert words in lines[str(file.relative_to(tmp_path))], out.stdout
    fast = run("verify", tmp_path, "--fast")
    assert fast.returncode == 66 and "2 wrong" in fast.stdout  # a flipped byte and an id need reading
    for file in files[:3] + files[4:5]:
        file.unlink()
    assert run("verify", tmp_path).returncode == 0


# ---- tokenize


def write_texts(folder: Path) -> list[str]:
    """Text files and JSON lines, some lines empty or gone; the documents in the order of tokenize."""
    (folder / "b").mkdir(parents=True)
    texts = [f"naïve comment number {i} <|endoftext|> " + "word " * (i % 50) for i in range(300)]
    lines = [json.dumps({"body": text, "score": i}) for i, text in enumerate(texts)]
    lines[5:5] = ["", json.dumps({"body": "[deleted]"}), json.dumps({"body": ""})]
    (folder / "b/comments.jsonl").write_text("\n".join(lines))
    (folder / "a.txt").write_text("one whole document\n")
    (folder / "c.jsonl").write_text(json.dumps({"title": "A title", "selftext": "and a text"}) + "\n")
    return ["one whole document\n", *texts, "A title\n\nand a text"]


FIELDS = ["body", "title", "selftext"]


def tokens_in(folder: Path) -> list[int]:
    return np.concatenate([Shard.open(folder, name).stream for name in sorted(content(folder))]).tolist()


def test_tokenize(tmp_path):
    """Shards of text files against the byte encoding of each document; stopped and continued, the same bytes."""
    expected_documents = write_texts(tmp_path / "in")
    arguments = ("byte", Rules(FIELDS), 5000)
    totals = tokenize.tokenize(tmp_path / "in", tmp_path / "out", *arguments, workers=3)
    encoding = find("byte").known
    expected = [token for document in expected_documents for token in [*encoding.encode_ordinary(document), 256]]
    names = sorted(content(tmp_path / "out"))
    assert tokens_in(tmp_path / "out") == expected and len(names) == totals["files"] > 3
    assert (totals["documents"], totals["tokens"]) == (len(expected_documents), len(expected))
    assert totals["largest_id"] == 256
    whole = content(tmp_path / "out")
    for name in names[2:]:  # as if killed while the third was written
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / f".tmp-0123456789abcdef-{names[2]}").write_bytes(b"half")
    assert tokenize.tokenize(tmp_path / "in", tmp_path / "out", *arguments, workers=1)["kept"] == 2
    assert content(tmp_path / "out") == whole
    damaged = bytearray(whole[names[1]])
    damaged[-2000] ^= 1
    (tmp_path / "out" / names[1]).write_bytes(damaged)
    assert tokenize.tokenize(tmp_path / "in", tmp_path / "out", *arguments)["kept"] == 1
    assert content(tmp_path / "out") == whole
    with pytest.raises(DataError, match="made from other shard_tokens; name another folder"):
        tokenize.tokenize(tmp_path / "in", tmp_path / "out", "byte", Rules(FIELDS), 6000)
    source = tmp_path / "in/b/comments.jsonl"  # a redaction of equal size, its time put back
    before = source.stat()
    source.write_text(source.read_text().replace("number 7 ", "number X "))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_size == before.st_size
    with pytest.raises(DataError, match="made from other sources; name another folder"):
        tokenize.tokenize(tmp_path / "in", tmp_path / "out", *arguments)


def test_tokenize_by_a_file(tmp_path, monkeypatch):
    """A tokenizer.json, and one of more ids than 16 bits hold: the shards against each whole document's ids, in pieces,
    and what is special in a text is text. They note it, and keep the note when they are prepared once more."""
    monkeypatch.setattr(readers, "PIECE", 1000)
    monkeypatch.setattr(tokenize, "BATCH", 3000)
    words = "naïve words <|endoftext|> and don't  stop\n\n日本語 12.5\t" * 200
    for name in ("in", "own", "large"):
        (tmp_path / name).mkdir()
    (tmp_path / "in/a.txt").write_text(words)
    shards.own_tokenizer(tmp_path / "own", [words], 400)
    large = {"type": "WordLevel", "vocab": {"[UNK]": 0, "stop": 70_000, "and": 1}, "unk_token": "[UNK]"}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {"model": large, "added_tokens": [{"id": 9, "content": "</s>", **special}]}
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "large/tokenizer.json").write_text(json.dumps(content))
    for name, end, dtype in (("own", 0, "uint16"), ("large", 9, "uint32")):
        known = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        known.no_truncation()
        known.no_padding()
        known.encode_special_tokens = True
        tokenize.tokenize(tmp_path / "in", tmp_path / f"{name} out", str(tmp_path / name), Rules([]), 4000)
        assert tokens_in(tmp_path / f"{name} out") == [*known.encode(words, add_special_tokens=False).ids, end]
        first = Shard.open(tmp_path / f"{name} out", "tokenized_cleaned_00000.npz")
        assert first.stream.dtype == dtype and find(str(tmp_path / name)).identity == first.tokenizer[0]
        assert first.tokenizer[1] == f"{name}/tokenizer.json"
    shutil.copytree(tmp_path / "own", tmp_path / "moved")
    again = tokenize.tokenize(tmp_path / "in", tmp_path / "own out", str(tmp_path / "moved"), Rules([]), 4000)
    assert again["kept"] == again["files"], "it is the same tokenizer"
    with pytest.raises(DataError, match="made from other tokenizer"):
        tokenize.tokenize(tmp_path / "in", tmp_path / "own out", "byte", Rules([]), 4000)

    args = ["prepare", str(tmp_path / "large out"), str(tmp_path / "prepared")]
    assert prepare.main([*args[1:], "--vocab_size", "80000"]) == 0
    name = "tokenized_cleaned_00000.npz"
    assert Shard.open(tmp_path / "prepared", name).tokenizer == Shard.open(tmp_path / "large out", name).tokenizer
    shards.write_padded(tmp_path / "bucket/a.npz", [np.arange(50)], 64)
    for command, maker in (
        ([], None),
        (["--tokenizer", "byte"], None),
        (["--tokenizer", "r50k_base"], ("r50k_base",) * 2),
    ):
        ends = [] if maker else ["--end_of_text", "0", "--vocab_size", "64"]
        assert prepare.main([str(tmp_path / "bucket"), str(tmp_path / "p"), *command, *ends]) == 0
        assert Shard.open(tmp_path / "p", "a.npz").tokenizer == maker, "what nobody named is not known"


def test_the_command_after_an_import(tmp_path, monkeypatch):
    """What is printed behind `tokenize --tokenizer IMPORTED` trains that model, with its keys, and not the demo's."""
    monkeypatch.chdir(tmp_path)
    model = Config(vocab_size=320, hidden_size=64, num_attention_heads=8, rotary_pct=0.5, tokenizer=None)
    state = {"imported_from": "x", "config": dataclasses.asdict(model)}
    place = tmp_path / "imported/x/checkpoint-epoch0-step0-files0"
    place.mkdir(parents=True)
    shards.own_tokenizer(place, ["some text"], 300)
    (tmp_path / "set").mkdir()
    assert "init_from" not in prepare.training_command(Path("set"), "imported/x", None)
    (place / "state.json").write_text(json.dumps(state))
    words = prepare.training_command(Path("set"), "imported/x", None).split()
    assert {"init_from=imported/x", "tokenizer=imported/x", "vocab_size=320", "hidden_size=64"} <= {*words}
    assert {"num_hidden_layers=24", "sequence_length=1024", "data_dir=set"} <= {*words}


def split_whole(words: str, mark: str) -> list[str]:
    """The documents between marks, without the line breaks next to a mark."""
    parts = words.split(mark)
    parts = [parts[0], *(part.lstrip("\r\n") for part in parts[1:])]
    return [part for part in (*(part.rstrip("\r\n") for part in parts[:-1]), parts[-1]) if part]


@pytest.mark.parametrize("split", ["", "<|endoftext|>"])
def test_a_long_text_is_read_in_pieces(tmp_path, monkeypatch, split):
    """A .txt of many pieces, by gpt2 and with marks at the cuts: its tokens against those of each whole document."""
    shards.use_gpt2(tmp_path, monkeypatch)
    monkeypatch.setattr(readers, "PIECE", 1000)
    monkeypatch.setattr(tokenize, "BATCH", 3000)
    rng = np.random.default_rng(0)
    parts = [*"word~ ~ ~\n~\n\n~it's~ 12~.~naïve~日本語~\t~\r\n~🙂~\u3000".split("~"), "x" * 40]
    words = "".join(rng.choice(parts, 20_000)) + " end\n"
    marks = sorted(rng.integers(0, len(words), 40), reverse=True)
    for place in marks:
        words = words[:place] + "\n<|endoftext|>\n" + words[place:]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(b"\xef\xbb\xbf" + words.encode())
    encoding = find("gpt2").known
    whole = split_whole(words, split) if split else [words]
    totals = tokenize.tokenize(tmp_path / "in", tmp_path / "out", "gpt2", Rules([], split), 4000, workers=2)
    expected = [token for document in whole for token in [*encoding.encode_ordinary(document), 50256]]
    found = tokens_in(tmp_path / "out")
    assert encoding.decode(found) == encoding.decode(expected)
    assert found == expected and totals["documents"] == len(whole) and totals["files"] > 5
    made = content(tmp_path / "out")
    for name in sorted(made)[3:]:
        (tmp_path / "out" / name).unlink()
    assert tokenize.tokenize(tmp_path / "in", tmp_path / "out", "gpt2", Rules([], split), 4000)["kept"] == 3
    assert content(tmp_path / "out") == made


def packed(name: str, data: bytes) -> bytes:
    """As the suffix says, in two parts one behind the other, as parallel compressors write."""
    module = readers.PACKED.get(name[name.rfind(".") :].lower())
    if not module:
        return data
    compress = pytest.importorskip(module).compress
    return compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :])


NAMES = ["a.jsonl", "a.JSONL.gz", "RC_2020-01.zst", "a.txt.gz", "a.TXT.zst", "a.txt.xz", "a.ndjson.bz2"]
NAMES += ["c4-train.00000-of-01024.json.gz", "a.json", "array.json", "array.json.xz", "bom-array.json"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_as_people_have_them(tmp_path, name):
    """Compressed and plain, stopped and continued: the same tokens; a file cut short is an error and not a shorter set."""
    lines = [json.dumps({"text": f"comment {i}, naïve", "n": 0}) for i in range(500)]
    data = (",\n".join(lines).join("[]") if "array" in name else "\n".join(lines)).encode() + b"\n"
    data = b"\xef\xbb\xbf\n" * ("bom" in name) + data
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(packed(name, data))
    plain = ".txt" in name.lower()
    texts = [data.decode()] if plain else [json.loads(line)["text"] for line in lines]
    totals = tokenize.tokenize(tmp_path / "in", tmp_path / "out", "byte", Rules(["text"]), 3000)
    assert totals["documents"] == len(texts)
    assert tokens_in(tmp_path / "out") == [t for document in texts for t in [*document.encode(), 256]]
    made = content(tmp_path / "out")
    for path in sorted(made)[2:]:
        (tmp_path / "out" / path).unlink()
    tokenize.tokenize(tmp_path / "in", tmp_path / "out", "byte", Rules(["text"]), 3000)
    assert content(tmp_path / "out") == made
    broken = [(packed(name, data)[:-20], "ended before")] if readers.PACKED.get(Path(name).suffix.lower()) else []
    broken += [(packed(name, data) + b"more", "no gzip; cut it off")] if name.endswith(".gz") else []
    broken += [(data[:-20], "is not one whole array: no JSON: ")] if name == "array.json" else []
    for content_, message in broken:
        (tmp_path / "in" / name).write_bytes(content_)
        with pytest.raises(DataError, match=f"{name}.* ?{message}"):
            tokenize.tokenize(tmp_path / "in", tmp_path / "cut", "byte", Rules(["text"]), 10**6)


TEXTS = ["    return x\n", " \t\n", "\u3000wide\r\n\r\n", "\ufeffbom", "\x00\x1f", "plain", "[deleted] by me", "\n"]


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2", "file"])
def test_a_text_is_what_its_file_says(tmp_path, monkeypatch, capsys, tokenizer):
    """Odd texts in a .jsonl, a .json array and as marked .txt: each whole, by every kind of tokenizer; only what Reddit
    deleted and what is empty is left out, and counted."""
    shards.use_gpt2(tmp_path, monkeypatch)
    if tokenizer == "file":
        shards.own_tokenizer(tmp_path, TEXTS, 300)
    known = find(str(tmp_path) if tokenizer == "file" else tokenizer)
    (tmp_path / "in").mkdir()
    gone = ["", "[deleted]", " [removed]\n"]
    records = [{"text": text} for text in (*TEXTS, *gone)]
    (tmp_path / "in/a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "in/b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "in/c.txt").write_bytes("<mark>".join(TEXTS[:1] + TEXTS[5:7]).encode())
    totals = tokenize.tokenize(tmp_path / "in", tmp_path / "out", known.name if tokenizer != "file" else str(tmp_path),
                               Rules(["text"], "<mark>"), 10**6)  # fmt: skip
    marked = [text.rstrip("\n") for text in TEXTS[:1] + TEXTS[5:7]]
    ids = tokenize.encode_documents(known, [*TEXTS, *TEXTS, *marked], Counter())
    assert tokens_in(tmp_path / "out") == [token for document in ids for token in (*document.tolist(), known.end)]
    assert (totals["documents"], totals["skipped"], totals["blank"]) == (2 * len(TEXTS) + 3, 6, 4)
    assert known.decode(ids[0].tolist()) == TEXTS[0]
    assert "note: 4 documents are nothing but white space" in capsys.readouterr().err


HALF = '{"text": "cut \\ud83d"}'
DEEP = '{"text":"x","m":' + "[" * 100_000 + "]" * 100_000 + "}"
RECORDS = [
    ('{"text": null}', "text is null", True),
    ('{"text": 5}', "text is 5", True),
    ('{"body": "x"}', "no field text (--fields) but body", False),
    ('{"text": ', "no JSON", False),
    ("[1]", "JSON, but not an object", False),
    (DEEP, "nested too deep", False),
    ('{"text": "\xff"}', "can't decode byte", False),
]


@pytest.mark.parametrize("record,words,usual", RECORDS, ids=[words for _, words, _ in RECORDS])
def test_records_without_text(tmp_path, capsys, record, words, usual):
    """A hole is skipped and said with its line; a line that cannot be read stops the work, or with --on_error skip too."""
    (tmp_path / "a.jsonl").write_bytes("\n".join(['{"text": "one"}', record, HALF]).encode("latin-1"))
    expected = [*b"one", 256, *"cut \ufffd".encode(), 256]
    if not usual:
        with pytest.raises(DataError) as caught:
            tokenize.tokenize(tmp_path / "a.jsonl", tmp_path / "out", "byte", Rules(["text"]), 100)
        assert f"{tmp_path}/a.jsonl line 2: " in str(caught.value) and words in str(caught.value)
        assert "--on_error skip" in str(caught.value)
    totals = tokenize.tokenize(tmp_path / "a.jsonl", tmp_path / "out", "byte", Rules(["text"], "", not usual), 100)
    assert f"skipped {tmp_path}/a.jsonl line 2: " in (said := capsys.readouterr().err) and words in said
    assert tokens_in(tmp_path / "out") == expected and (totals["documents"], totals["skipped"]) == (2, 1)


def test_tokenize_command(tmp_path):
    """The command on Reddit-like lines, then training's view of its shards, and its words and errors."""
    write_texts(tmp_path / "in/x")
    (tmp_path / "in/x/c.jsonl").unlink()
    (tmp_path / "in/x/notes.json").write_text("{}")
    (tmp_path / "in/x/stories.txt").write_text("One.\n<|endoftext|>\n  Two.\n<|endoftext|>\n")
    command = ("tokenize", tmp_path / "in", tmp_path / "out", "--tokenizer", "byte", "--fields", "body")
    out = run(*command)
    assert out.returncode == 0 and "1 shards (0 were there)" in out.stdout and "302 documents" in out.stdout, out.stderr
    assert "2 empty or bad ones" in out.stdout
    assert "train on it: python " in out.stdout and f"data_dir={tmp_path}/out " in out.stdout
    assert f"left out, {KINDS}: x/n" in out.stderr
    assert "note: 302 times <|endoftext|> became ordinary text; in .txt files --split '<|endoftext|>'" in out.stderr
    stories = next((tmp_path / "in/x").glob("s*.txt"))
    alone = run("tokenize", stories, tmp_path / "alone", "--tokenizer", "byte", "--split", "<|endoftext|>")
    assert alone.returncode == 0 and "2 documents" in alone.stdout and "note" not in alone.stderr, alone.stderr
    assert tokens_in(tmp_path / "alone") == [*b"One.", 256, *b"  Two.", 256]
    assert Dataset.open(config(tmp_path / "out", tmp_path / "cache", vocab_size=257, tokenizer="byte")).num_samples > 9


def tokenizing(capsys, source: Path, *more: str) -> tuple[int, str]:
    """The command in this process; (exit code, stderr)."""
    target = source.parent / f"{source.name} out{len(list(source.parent.iterdir()))}"
    try:
        code = data.main(["tokenize", str(source), str(target), "--tokenizer", "byte", *more])
    except SystemExit as error:  # argparse's own
        code = error.code
    return code, capsys.readouterr().err


LONG = '{"text": "b", "n": ' + "9" * 4301 + "}\n"
TWO = {"a.jsonl": b'{"title": "T", "selftext": "b"}\n'}
KINDS = "no .txt, .jsonl or .json file (of lines or one array; also as .gz, .bz2, .xz or .zst)"
PARQUET = "pandas.read_parquet('a.parquet').to_json('a.parquet.jsonl', orient='records', lines=True)"
NOWHERE = "the mark is nowhere in them, in which backslashes are no escapes: bash has $'\\n\\n' for"
WORDS = [  # files, arguments, exit code, what is said
    ({"bad.txt": b"\xff\xfe"}, "", 66, "bad.txt byte 0: not UTF-8 text"),
    ({"e.jsonl": b'{"body": ""}\n\n'}, "--fields=body", 66, "hold no text: 1 documents were skipped"),
    ({"e.txt": b""}, "", 66, "hold no text"),
    ({"a.pdf": b"x"}, "", 66, f"have {KINDS}, but 1 others such as a.pdf"),
    ({"a.parquet": b"x"}, "", 66, PARQUET),
    ({"a.tar.gz": b"x"}, "", 66, "`tar xf a.tar.gz` makes text of a.tar.gz"),
    ({"a.txt": b"x", "b.zip": b"x"}, "", 0, f"left out, {KINDS}: b.zip; `unzip b.zip`"),
    ({"settings.json": b'{"a": 1}\n', "a.txt": b"x"}, "", 0, "): settings.json"),
    ({"a.json": b'{\n "text": "x"\n}\n'}, "", 66, f"have {KINDS}"),
    (TWO, "--fields=title,_selftext", 0, ""),
    (TWO, "--fields=title,selfttext", 0, "none of 1 lines has the field selfttext"),
    (TWO, "--fields=x --on_error=skip", 66, "hold no text"),
    (TWO | {"b.txt": b"x"}, "--on_error=skip", 66, "none of 1 lines has the field text (--fields); name"),
    (TWO, "--fields=_,_", 2, "names no field"),
    ({"a.txt": b"x"}, "--fields=body", 0, "--fields changes nothing: there are no lines of JSON"),
    ({"a.txt": b"x\n\ny"}, "--split=\\n\\n", 0, NOWHERE),
    ({"a.jsonl": LONG.encode()}, "--split=M", 0, "--split 'M' changes nothing: none of the files is a .txt"),
    ({"a.jsonl": b'{"text": "<|endoftext|>"}\n'}, "", 0, "note: 1 times <|endoftext|> became ordinary text\n"),
]


@pytest.mark.parametrize("files,arguments,code,words", WORDS, ids=range(len(WORDS)))
def test_what_the_sources_have_not_is_said(tmp_path, capsys, files, arguments, code, words):
    """Fields, marks and kinds of files that are named or expected and not there: an error, or a word; a file alone."""
    for name, text in files.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(text)
    words_of = [word.replace("_", " ") if "fields" in word else word for word in arguments.split()]
    found, said = tokenizing(capsys, tmp_path / "in", *words_of)
    assert found == code and words in said and ("note:" not in said or words), said
    if len(files) == 1 and "have no" in words:
        found, said = tokenizing(capsys, tmp_path / "in" / name)
        assert found == 66 and f"{name} is {KINDS}" in said and "subfolders" not in said, said


def test_what_a_tokenizer_has_no_token_for_is_counted(tmp_path, capsys):
    """A BPE without token for unknown text and without bytes, one with it, one of bytes that lacks some, a WordLevel."""
    vocab = {"</s>": 0, **{letter: i for i, letter in enumerate("abcd ", 1)}}
    rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end = {"id": 0, "content": "</s>", "special": True, **rules}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    lost = "note: {} letters or bytes are lost: t/tokenizer.json has no token for them"
    (tmp_path / "t").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text(json.dumps({"text": "ab 世界 cd €é"}))
    unknown, words = (
        model | {"vocab": vocab | {"<unk>": 9}, "unk_token": "<unk>"},
        {"type": "WordLevel", "vocab": vocab},
    )
    for content, message in (
        ({"model": model}, lost.format(4)),
        ({"model": model, "pre_tokenizer": levels, "decoder": levels}, lost.format(14)),  # three blanks
        ({"model": unknown}, "4 times the token for unknown text stands"),
        ({"model": words | {"unk_token": "?"}}, "tokenizer.json cannot encode the text"),
    ):
        (tmp_path / "t/tokenizer.json").write_text(json.dumps({"added_tokens": [end], **content}))
        find.cache_clear()
        code, said = tokenizing(capsys, tmp_path / "in", "--tokenizer", str(tmp_path / "t"))
        assert message in said and code == 66 * ("cannot" in message), said


def test_bench_runs(tmp_path):
    """The bench command on a small set against the line it promises; no speed is asserted."""
    shards.write_mapped(tmp_path, [200_000] * 2)
    out = run("bench", tmp_path, "--sequence_length", 128, "--workers", 1, "--seconds", 0.1)
    assert out.returncode == 0 and re.fullmatch(r"[\d.]+M tok/s by 1 workers from 2 shards\n", out.stdout), out
