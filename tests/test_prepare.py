"""Foreign files -> shards: real files and real processes, compared with plain numpy."""

import dataclasses
import os
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
from conftest import ROOT
from launch import GUARD
from shards import config, content, data_py_process, flip, write_tokens

import data
from data import Dataset, open_dataset
from refocused.shards import formats, prepare, verify
from refocused.shards.formats import TokenFile
from refocused.shards.prepare import read_note
from refocused.shards.shard import DataError, PackedShard, Shard, WriteError

V, END = 50257, shards.END_OF_TEXT


def stream_of(file: Path, **options) -> tuple[list[int], dict]:
    report: dict = {}
    tokens = np.concatenate(list(TokenFile(file, V, END, **options).chunks(report))).tolist()
    assert len(tokens) == report["tokens"]
    return tokens, report


# ---- formats

WITHOUT: list[dict] = [{}, {"attention_mask": None}, {"sequence_lengths": None}]


@pytest.mark.parametrize("without", WITHOUT, ids=["both", "lengths", "mask"])
def test_padding_is_dropped(tmp_path, without):
    """A padded file of several blocks against its rows put together one by one; the pad value never appears.

    Rows of length zero are skipped and counted.
    """
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 1000, rng.integers(0, 701)) for _ in range(3000)] + [rng.integers(0, 1000, 700), []]
    file, filled = tmp_path / "a.npz", [row for row in rows if len(row)]
    shards.write_padded(file, rows, 700, pad=-7, **without)
    assert len(rows) * 700 * 4 > 2 * formats.BLOCK
    tokens, report = stream_of(file)
    assert tokens == shards.rows_to_stream(filled, 700).tolist()
    assert report["documents"] == len(filled) and report["skipped"] == len(rows) - len(filled) > 1
    assert report["padding"] == len(rows) * 700 - sum(map(len, rows)) and report["largest_id"] == END


NAME = "tokenized_cleaned_0.npz"
TOKENS = np.random.default_rng(0).integers(0, 257, 3000)


def bin_of(dtype: str, head: bytes = b"", tokens: np.ndarray = TOKENS):
    return lambda folder: (folder / "train.bin").write_bytes(head + tokens.astype(dtype).tobytes())


def megatron(folder: Path, code: int = 4, dtype: str = "<i4", tokens: np.ndarray = TOKENS):
    """As Megatron's IndexedDatasetBuilder writes 30 documents of 100 tokens."""
    bin_of(dtype, tokens=tokens)(folder)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 30, 31) + np.full(30, 100, "<i4").tobytes()
    index += (np.arange(30, dtype="<i8") * 100 * np.dtype(dtype).itemsize).tobytes()
    (folder / "train.idx").write_bytes(index + np.arange(31, dtype="<i8").tobytes())


def llm_c(magic: int, dtype: str):
    return bin_of(dtype, np.array([magic, 1, 3000] + [0] * 253, "<i4").tobytes())


def npy(dtype: str, version: tuple | None = None):
    return lambda folder: np.lib.format.write_array(open(folder / "train.npy", "wb"), TOKENS.astype(dtype), version)


def npz(save=np.savez, **arrays):
    arrays = arrays or {"input_ids": np.arange(5000, dtype=np.uint16)}
    return lambda folder: save(folder / NAME, **arrays)


FOREIGN = {
    "uint16 .bin": bin_of("<u2"),
    "uint32 .bin": bin_of("<u4"),
    "int64 .bin": bin_of("<i8"),
    "Megatron .bin with .idx, int32": megatron,
    "Megatron .bin with .idx, uint16": lambda folder: megatron(folder, 8, "<u2"),
    "llm.c": llm_c(20240520, "<u2"),
    "llm.c, Llama 3": llm_c(20240801, "<u4"),
    ".npy": npy("<i8"),
    ".npy, version 3": npy("<i4", (3, 0)),
    "big-endian .npy": npy(">u2"),
    "mapped uint32 .npz": npz(tokens=TOKENS.astype("<u4"), other=np.arange(3)),
    "mapped int32 .npz": npz(arr_0=TOKENS.astype("<i4")),
    "int64 .npz": npz(np.savez, input_ids=TOKENS),
    "int16 .npz": npz(np.savez_compressed, input_ids=TOKENS.astype("<i2")),
    "big-endian .npz": npz(np.savez, input_ids=TOKENS.astype(">i4")),
    "2-D .npz": npz(np.savez_compressed, tokens=TOKENS.reshape(30, 100)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_every_format_gives_the_tokens_that_are_in_it(tmp_path, kind):
    """verify and training on tokens in somebody else's file: the same ones, or a sentence that names prepare; then those."""
    folder, out, cache = tmp_path / "set", tmp_path / "set/prepared", tmp_path / "set/cache"
    folder.mkdir()
    FOREIGN[kind](folder)
    settings = {"cache_dir": str(cache), "tokenizer": "byte", "vocab_size": 257, "eval_files": 0}

    def trains_on(place: Path) -> bool:
        for _ in range(2):  # the second start finds what the first one left
            dataset = open_dataset(config(place, **settings))
            assert [shard.num_tokens for shard in dataset.shards] == [3000] and len(dataset.notes) == ("2-D" in kind)
            windows = dataset.gather(np.arange(dataset.num_samples))
            assert windows[:, :-1].ravel().tolist() == TOKENS[: 187 * 16].tolist()
        return verify.verify(place, 257) == 0

    if kind.endswith(".npz"):
        assert trains_on(folder) and cache.exists() != ("mapped" in kind)
        return
    with pytest.raises(DataError, match=r"no \.npz file; `python data.py prepare SRC DST` makes shards of its 1 such"):
        verify.verify(folder, 257)
    with pytest.raises(DataError, match=r"is no .npz; `python data.py prepare"):
        open_dataset(config(folder, tokenized_file_pattern="train.[bBnN]*", **settings))
    totals = prepare.prepare(folder, out, 257, 256)
    assert (totals["tokens"], totals["documents"]) == (3000, (TOKENS == 256).sum())
    shard = Shard.open(out, "train.npz")
    assert shard.stream.dtype == np.uint16 and shard.offset % 64 == 0
    again = prepare.prepare(folder, out, 257, 256)  # its own output is no source
    assert (again["files"], again["kept"], again["tokens"]) == (1, 1, 3000)
    os.rename(out / "train.npz", out / "tokenized_cleaned_0.npz")
    assert trains_on(out) and not cache.exists()


# ---- rows that overlap


def windows(text: np.ndarray, width: int, step: int, to_the_end: bool) -> list[np.ndarray]:
    """A long text as rows that overlap: a window each `step` tokens, up to the one that reaches its end or to the end."""
    starts = range(0, len(text) if to_the_end else max(1, len(text) - width + step), step)
    return [text[start : start + width] for start in starts]


@pytest.mark.parametrize("to_the_end", [False, True])
@pytest.mark.parametrize("step", [48, 24, 64])
@pytest.mark.parametrize("ends", [[END], []], ids=["with end-of-text", "without"])
def test_rows_of_long_texts(tmp_path, data_py, ends, step, to_the_end):
    """Windows of texts of any length, as tokenizers cut them, against the texts: each token once, one end-of-text each.

    The shares of rows that ended so and that overlapped are right, and --overlap 0 keeps all; with lengths, mask or both.
    """
    rng = np.random.default_rng(step)
    sizes = [95] * 66 + rng.integers(0, 500, 120).tolist()  # of one window each, then of any length
    texts = [np.array([*rng.integers(0, END, size), *(ends or [7])]) for size in [*sizes, 89]]
    texts.append(texts[-1][step:])  # no window of the one before
    cut = [windows(text, 96, step, to_the_end) for text in texts]
    rows = [row for parts in cut for row in parts]
    expected = []
    for text, parts in zip(texts, cut, strict=True):  # an end-of-text follows a short last row that has none
        expected += [*text, *([END] if not ends and len(parts[-1]) < 96 else [])]
    repeated = sum(map(len, rows)) - sum(map(len, texts))
    for without in WITHOUT:
        shards.write_padded(tmp_path / "in/a.npz", rows, 96, pad=5, **without)
        tokens, report = stream_of(tmp_path / "in/a.npz")
        assert tokens == expected
        assert report["rows"] == len(rows) and report["ended"] == sum(row[-1] == END for row in rows)
        assert (report["repeats"], report["repeated"]) == (len(rows) - len(texts), repeated)
    kept = stream_of(tmp_path / "in/a.npz", overlap=0)[0]
    assert len(kept) == sum(map(len, rows)) + sum(len(row) < 96 and row[-1] != END for row in rows)
    code, out, _ = data_py("prepare", tmp_path / "in", tmp_path / "out")
    said = f"of {len(rows):,} rows {report['ended'] / len(rows):.1%} ended with end-of-text, and "
    said += f"{report['repeats'] / len(rows):.1%} began with the end of the row before: {repeated:,}"
    assert code == 0 and said in out
    [note] = Dataset.open(config(tmp_path / "out", tokenized_file_pattern="a.npz")).notes
    assert note.startswith(said)


def alike(kind: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    if kind == "a text that repeats itself":
        return [np.resize([1, 2, 3], 96), np.resize([1, 2, 3], 96), *[np.full(96, 9)] * 4, np.arange(5)]
    if kind == "a table":  # its lines are 60 tokens long, and all alike
        return windows(np.resize(rng.integers(0, END, 60), 96 * 20 + 50), 96, 96, True)
    parts = [rng.integers(0, END, 96) for _ in range(20)]
    for before, after in zip(parts, parts[1:], strict=False):
        if kind == "few tokens":
            after[:31] = before[-31:]
        elif rng.random() < 0.4:  # now and then, or at another distance each time
            count = 48 if kind == "a minority" else int(rng.integers(32, 90))
            after[:count] = before[-count:]
    return [*parts, np.arange(40)]


ALIKE = ["a text that repeats itself", "a table", "few tokens", "a minority", "many distances"]


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
    [note] = Dataset.open(config(tmp_path / "set")).notes
    assert "rows of 1 of 1 shards begin with the last 48 tokens of the row before" in note and "prepare" in note


# ---- bad input


ROWS = [np.arange(1, 4), np.arange(1, 9), np.arange(1, 6)]


def padded(**arrays):
    return lambda folder: shards.write_padded(folder / NAME, ROWS, 8, **arrays)


def ids(value: int) -> np.ndarray:
    found = np.ones((3, 8), np.int64)
    found[2, 4] = value
    return found


def declared(size: int):
    """A directory that claims another uncompressed size than the header's shape makes."""

    def save(folder: Path):
        npz(np.savez_compressed, input_ids=np.arange(1000, dtype=np.int32))(folder)
        honest, wrong = (n.to_bytes(4, "little") for n in (4128, size))
        (folder / NAME).write_bytes((folder / NAME).read_bytes().replace(honest, wrong))

    return save


def member(content: bytes, packing: int = zipfile.ZIP_DEFLATED):
    return lambda folder: zipfile.ZipFile(folder / NAME, "w", packing).writestr("input_ids.npy", content)


def changed(change):
    """A file whose bytes are others."""
    return lambda folder: [npz()(folder), (folder / NAME).write_bytes(change((folder / NAME).read_bytes()))]


def encrypted(content: bytes) -> bytes:
    at = content.rfind(b"PK\1\2") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]


def twice(folder: Path):
    npz()(folder)
    with zipfile.ZipFile(folder / NAME, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("input_ids.npy", b"")


def flipped(folder: Path):
    shards.write_padded(folder / NAME, list(np.random.default_rng(0).integers(0, V, (2, 500))), 500)
    flip(folder / NAME, 200)


cut = changed(lambda content: content[: len(content) // 2])
CLAIMS = b"\x93NUMPY\1\0v\0" + b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,)}".ljust(117) + b"\n"
LEFT_PADDED = np.array([[1] * 3 + [0] * 5, [0, 1, 1, 1] + [0] * 4, [1] * 5 + [0] * 3])
BAD = [  # no shards at all, for whoever opens them
    (npz(input_ids=np.array([1, "x", None], object)), "pickled objects"),
    (npz(input_ids=np.zeros(100, np.float32)), "dtype <f4"),
    (npz(input_ids=np.asfortranarray(np.ones((20, 30), np.int32))), "Fortran order; a shard is a 1-D stream or 2-D"),
    (npz(input_ids=np.ones((2, 3, 4), np.int32)), "shape (2, 3, 4) in C order; a shard is a 1-D stream or 2-D rows"),
    (npz(arr_0=ids(1), arr_1=ids(1)), "exactly one of input_ids and tokens; save it as np.savez(file, input_ids="),
    (npz(input_ids=ids(1), tokens=ids(1)), "holds input_ids, tokens; a shard holds exactly one of"),
    (npz(**{f"a{i}": np.ones(1) for i in range(17)}), "has 17 members; a shard has at most 16"),
    (cut, "not an .npz file or ends early"),
    (changed(lambda content: content[:300] + content[600:]), "ends early"),  # with a whole directory
    (changed(lambda content: content.replace(b"(5000,)", b"(9000,)")), "damaged or ends early: input_ids.npy"),
    (changed(encrypted), "encrypted"),
    (twice, "names a member twice"),
    (member(b"not numpy", zipfile.ZIP_STORED), "no readable .npy header"),
]
BAD_SOURCES = [
    (padded(input_ids=ids(-1)), "id -1 at row 2, column 4"),
    (padded(input_ids=ids(1).astype(np.uint64) + np.uint64(1 << 63)), "id 9223372036854775809 at row 0, column 0"),
    (padded(input_ids=np.ones(24, np.int32)), "one dimension, which attention_mask does not fit"),
    (npz(input_ids=np.ones((3, 0), np.int32)), "rows of length zero"),
    (padded(sequence_lengths=np.array([3, 9, 5])), "row 1 has length 9; a row has 0 to 8 tokens"),
    (padded(sequence_lengths=np.array([3, -1, 5])), "row 1 has length -1"),
    (padded(sequence_lengths=np.array([3, 8])), "sequence_lengths has shape (2,) beside tokens of shape (3, 8)"),
    (padded(sequence_lengths=np.array([3, 8, 4])), "row 2 has length 4 and 5 ones in attention_mask"),
    (padded(sequence_lengths=np.ones(3)), "sequence_lengths.npy holds dtype <f8"),
    (padded(sequence_lengths=None, attention_mask=LEFT_PADDED), "row 1 has length 3 and 3 ones"),
    (padded(sequence_lengths=None, attention_mask=np.zeros((3, 8), np.int32)), "all of its 3 rows are empty"),
    (padded(attention_mask=np.ones((3, 7), np.int32)), "attention_mask has shape (3, 7)"),
    (declared(10**9), "claims 1000000000 bytes; its shape (1000,) and int32 make 4128"),
    (declared(200), "damaged or ends early: input_ids.npy"),
    (member(CLAIMS + bytes(4000)), "shape (1000000000000,) and int32 make 4000000000128"),
    (member(b"\x93NUMPY\2\0" + (1 << 31).to_bytes(4, "little") + bytes(1 << 21)), "no readable .npy header"),  # 2 GB
    (member(CLAIMS, zipfile.ZIP_LZMA), "packed by method 14, not deflate"),
    (flipped, "damaged or ends early: input_ids.npy"),
    (bin_of("<u4", tokens=TOKENS + V), "unclear how wide its ids are. Name it with --bin_dtype"),
    (bin_of("<i4", tokens=np.where(TOKENS % 9, TOKENS, -1)), "unclear how wide"),
    (bin_of(">u4"), "unclear how wide"),
    (bin_of("<u4", tokens=TOKENS[:9]), "unclear how wide"),
    (bin_of("<u2", tokens=TOKENS * 0), "unclear how wide"),
    (
        bin_of("<u2", b"LITPKDS" + struct.pack("<QBQ", 1, 8, 3000)),
        "is a chunk as litgpt's PackedDataset or litdata writes",
    ),
    (bin_of("<u2", struct.pack("<3I", 1, 12, 6012)), "`python data.py tokenize SRC DST` makes shards of the texts"),
    (bin_of("|u1", tokens=TOKENS[:9] % 256), "has 9 bytes"),
    (llm_c(20240520, "<u4"), "13024 bytes; 3000 tokens of uint16 from byte 1024 on"),
    (lambda folder: megatron(folder, tokens=TOKENS[1:]), "11996 bytes; 3000 tokens of int32"),
    (lambda folder: [bin_of("<u2")(folder), (folder / "train.idx").write_bytes(b"TNTIDX")], "no Megatron index"),
    (lambda folder: megatron(folder, 99), "of version 1, with dtype 99"),
    (lambda folder: megatron(folder, 8), "its sequences do not lie one behind the other"),
    (lambda folder: np.save(folder / "a.npy", np.array([None, 1])), "pickled objects"),
]


@pytest.mark.parametrize("save,message", BAD + BAD_SOURCES, ids=[message for _, message in BAD + BAD_SOURCES])
def test_bad_source(tmp_path, save, message):
    """Opening and converting a bad file against an error with its name and the reason; nothing is left of it.

    --bin_dtype decides where that is what is missing.
    """
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    save(folder)
    [file] = (path for path in folder.iterdir() if path.suffix != ".idx")
    uses = [lambda: prepare.convert(file, out, file.name, {"vocab_size": V, "end_of_text": END})]
    if (save, message) in BAD:
        uses.append(lambda: Shard.open(folder, file.name))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in uses:
        with pytest.raises(DataError) as caught:
            use()
        assert message in str(caught.value) and str(folder) in str(caught.value) and caught.value.exit_code == 66
        assert not isinstance(caught.value, PackedShard)
    assert content(out) == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "memory grew by 100 MB"
    if "--bin_dtype" in message:
        assert [TokenFile(file, n, 256, bin_dtype="uint32").out_dtype for n in (65536, 65537)] == ["<u2", "<u4"]
        assert TokenFile(file, 2 * V, 256, bin_dtype="uint32").held == 3000


def test_usage_errors(tmp_path, data_py):
    """Wrong folders and options against messages; exit code 66 for data, 2 for the command line."""
    shards.write_seed_shards(tmp_path / "in", files=1)
    IN, OUT, TEXTS, TWICE, EMPTY = (tmp_path / name for name in ("in", "out", "texts", "twice", "empty"))
    for file in (TEXTS / "a.TXT", TWICE / "a.bin", TWICE / "a.npz"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("text")
    EMPTY.mkdir()
    tokenizes = "`python data.py tokenize SRC DST` makes shards of its 1 such as a.TXT"
    for arguments, code, message in (
        (("prepare", tmp_path / "nowhere", OUT), 66, "nowhere is no file and no folder"),
        (("prepare", EMPTY, OUT), 66, "have no .npz, .npy or .bin file"),
        (("prepare", TEXTS, OUT), 66, tokenizes),
        (("tokenize", IN, OUT), 66, "`python data.py prepare SRC DST` makes shards of its 1"),
        (("verify", TEXTS), 66, tokenizes),
        (("bench", EMPTY), 66, "have no .npz file"),
        (("verify", tmp_path / "nowhere"), 66, "nowhere is no folder"),
        (("prepare", TWICE, OUT), 66, "a.npz and a.bin would become one shard"),
        (("bench", IN), 66, "is padded (it has attention_mask and sequence_lengths); `python data.py prepare SRC DST`"),
        (("tokenize", "gs:/b/texts", OUT), 2, "gs:/b/texts is in a bucket, and this reads from a disk"),
        (("prepare", IN, IN), 66, "is the source"),
        (("prepare", IN, OUT, "--end_of_text", 60000), 66, "no id below vocab_size=50257"),
        (("prepare", IN, OUT, "--vocab_size", 65), 66, "name one with --end_of_text"),
        (("prepare", IN, OUT, "--workers", -1), 2, "--workers: -1 is not at least 1"),
    ):
        found, _, said = data_py(*arguments)
        assert (found, message in said) == (code, True), said


# ---- interruptions


def test_disk_full(tmp_path):
    """A file size limit hit while writing, as a full disk would: an error with the name, nothing left behind."""
    shards.write_padded(tmp_path / "in/a.npz", list(np.random.default_rng(0).integers(0, V, (40, 3000))), 3000)
    limit = (resource.RLIMIT_FSIZE, (100_000, 100_000))
    process = data_py_process(
        "prepare", tmp_path / "in", tmp_path / "out", preexec_fn=lambda: resource.setrlimit(*limit)
    )
    _, said = process.communicate(timeout=GUARD)
    assert process.returncode == 66 and "cannot write" in said and "File too large" in said
    assert content(tmp_path / "out") == {}


def shards_made(folder: Path) -> int:
    """How many are there; folders come and go meanwhile."""
    return sum(name.endswith(".npz") and name[0] != "." for _, _, names in os.walk(folder) for name in names)


def test_killed_and_restarted(tmp_path):
    """Three SIGKILLs while 40 files are prepared, then a run to the end, against the bytes of an uninterrupted run."""
    expected = shards.write_seed_shards(tmp_path / "in", files=40, rows=60, width=600)
    prepare.prepare(tmp_path / "in", tmp_path / "whole", V, END)
    for kill in range(1, 4):
        process = data_py_process("prepare", tmp_path / "in", tmp_path / "out", "--workers", "2")
        while shards_made(tmp_path / "out") < 10 * kill:
            assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    totals = prepare.prepare(tmp_path / "in", tmp_path / "out", V, END)
    assert totals["kept"] >= 30 and content(tmp_path / "out") == content(tmp_path / "whole")
    assert set(content(tmp_path / "out")) == set(expected)


def test_what_is_there_and_intact_is_kept(tmp_path, data_py):
    """Bad files among good ones are named, and do not stop the others, which are right. A second run keeps what is there;
    a damaged result, a changed source and another vocabulary are done again."""
    source, out = tmp_path / "in", tmp_path / "out"
    expected = shards.write_seed_shards(source, files=4)
    for name, save in (("cut", cut), ("flipped", flipped)):
        (source / name).mkdir()
        save(source / name)
    code, _, said = data_py("prepare", source, out)
    assert code == 66 and "2 of 6 files failed" in said
    assert f"cut/{NAME} is not an .npz" in said and f"flipped/{NAME} is damaged" in said
    whole = content(out)
    assert {path: Shard.open(out, path).stream.tolist() for path in whole} == {
        p: s.tolist() for p, s in expected.items()
    }
    for name in ("cut", "flipped"):
        (source / name / NAME).unlink()

    def again(vocab_size: int = V) -> Counter:
        return prepare.prepare(source, out, vocab_size, END, 1)

    assert ((kept := again())["kept"], kept["documents"]) == (4, 200) and kept["padding"] > 0
    flip(out / min(whole), 500)
    assert again()["kept"] == 3 and content(out) == whole
    shards.write_padded(source / max(whole), ROWS, 8)
    assert again()["kept"] == 3
    assert (Shard.open(out, max(whole)).stream == shards.rows_to_stream(ROWS, 8)).all()
    assert again(70000)["kept"] == 0 and Shard.open(out, max(whole)).stream.dtype == np.uint32


# ---- training on what is not mapped


def test_unpacked_once_and_never_again(tmp_path, monkeypatch):
    """Two processes that open a compressed set at once: one unpacks, both see the same; later calls write nothing. A disk
    without room for all of it is refused before anything is unpacked."""
    expected = shards.write_seed_shards(tmp_path / "in", files=5)
    cfg = config(tmp_path / "in")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))
        with pytest.raises(WriteError, match=r"5 shards of .* unpack to .* GB free; point cache_dir at a larger disk"):
            open_dataset(cfg)
    assert not list(Path(cfg.cache_dir).rglob("*.npz"))
    code = f"import data; from configs import Config; d = data.open_dataset({cfg});print(d.fingerprint, d.num_samples)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    jobs = [subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) for _ in range(2)]
    outputs = [job.communicate(timeout=GUARD) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and sum("unpacking 5 shards" in err for _, err in outputs) == 1
    before = {p: p.stat().st_mtime_ns for p in Path(cfg.cache_dir).rglob("*")}
    dataset = open_dataset(config(tmp_path / "in", max_files=3))
    assert [s.path for s in (*dataset.shards, *dataset.eval_shards)] == sorted(expected)[:3]
    assert {p: p.stat().st_mtime_ns for p in Path(cfg.cache_dir).rglob("*")} == before
    first = sorted(expected)[0]
    assert dataset.gather(np.array([0]))[0].tolist() == expected[first][:17].tolist()
    shards.write_padded(tmp_path / "in" / first, ROWS * 20, 8)  # the source changes: unpacked again
    assert open_dataset(cfg).gather(np.array([0]))[0].tolist() == shards.rows_to_stream(ROWS * 20, 8)[:17].tolist()
    opened = TokenFile(tmp_path / "in" / first, V, END)
    (tmp_path / "in" / first).unlink()
    (tmp_path / "in" / first).symlink_to("gone")
    for use in (lambda: open_dataset(cfg), lambda: list(opened.chunks({}))):
        with pytest.raises(DataError, match=f"cannot read .*{first}: No such file"):
            use()


def test_a_cache_of_an_older_version(tmp_path):
    """Shards unpacked by the rule before, of rows that end with end-of-text and of such as do not: both are made again.

    The first differ then, so a resume on them is refused and says so; the others are the same.
    """
    for name, rows in (("a", [[1, 2, END]] * 60), ("b", [[1, 2, 3]] * 60)):
        shards.write_padded(tmp_path / f"in/tokenized_cleaned_{name}.npz", rows, 8)
    cfg = config(tmp_path / "in")
    open_dataset(cfg)
    for file in data.cache_folder(cfg).glob("*.npz"):
        tokens = np.array(([1, 2, END] if "_a" in file.name else [1, 2, 3]) + [END]).tolist() * 60
        write_tokens(file, tokens, **{key: value for key, value in read_note(file).items() if key != "rule"})
    before, after = Dataset.open(cfg, data.cache_folder(cfg)), open_dataset(cfg)
    assert after.shards[0].stream.tolist() == [1, 2, END] * 60
    changed = data.explain_change(before.manifest, after.manifest)
    assert changed.startswith("changed 1: tokenized_cleaned_a.npz (tokens 240 -> 180, crc32")


def test_without_a_tokenizer(tmp_path, data_py):
    """tokenizer=none: packed shards without padding are unpacked; padded ones are refused, and the command is named."""
    (tmp_path / "a").mkdir()
    np.savez_compressed(tmp_path / "a/tokenized_cleaned_0.npz", np.arange(900) % 65)
    cfg = config(tmp_path / "a", tokenizer=None, vocab_size=65)
    assert open_dataset(cfg).gather(np.array([0]))[0].tolist() == list(range(17))
    os.rename(tmp_path / "a/tokenized_cleaned_0.npz", tmp_path / "a/A.NPZ")  # a cache has the source's name, as it is
    assert open_dataset(dataclasses.replace(cfg, tokenized_file_pattern="*.NPZ")).num_samples
    shards.write_padded(tmp_path / "b/tokenized_cleaned_0.npz", ROWS * 9, 8)
    with pytest.raises(DataError, match="is padded .* tokenizer=none does not say it; name the tokenizer"):
        open_dataset(config(tmp_path / "b", tokenizer=None))
    code, out, _ = data_py("prepare", tmp_path / "a", tmp_path / "c", "--vocab_size", 65, "--end_of_text", 0)
    assert code == 0 and " tokenizer=none vocab_size=65" in out and [*content(tmp_path / "c")] == ["A.npz"]


def test_verify_names_what_is_wrong(tmp_path, data_py):
    """A flipped byte, a truncated file, an id of 60000 and a copy, each named; exit code 66; 0 once they are gone."""
    shards.write_mapped(tmp_path, [20000] * 6)
    files = sorted(tmp_path.rglob("*.npz"))
    flip(files[0], 30000)
    os.truncate(files[1], 10000)
    write_tokens(files[2], np.where(np.arange(20000) == 77, 60000, 0))
    files[4].write_bytes(files[3].read_bytes())
    shards.write_seed_shards(tmp_path / "packed", files=2)  # verified as they are
    code, out, _ = data_py("verify", tmp_path)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 66 and "8 shards" in out and "4 wrong" in out
    for file, words in (
        (files[0], "Bad CRC-32"),
        (files[1], "ends early"),
        (files[2], "id 60000 at token 77; vocab_size=50257"),
        (files[4], f"same content as {files[3].relative_to(tmp_path)}"),
        (files[5], "ok"),
    ):
        assert words in lines[str(file.relative_to(tmp_path))], out
    code, out, _ = data_py("verify", tmp_path, "--fast")
    assert code == 66 and "2 wrong" in out  # a flipped byte and an id need reading
    for file in files[:3] + files[4:5]:
        file.unlink()
    for largest, code in ((100276, 0), (100277, 66)):  # without an option, as the shard notes it
        write_tokens(files[0], np.array([1, largest]), "<u4", tokenizer="cl100k_base")
        assert data_py("verify", tmp_path)[0] == code
    assert data_py("verify", tmp_path, "--vocab_size", 100278)[0] == 0
