"""Preparing, unpacking, tokenizing and verifying shards: real files and real processes, compared with plain numpy."""

import dataclasses
import json
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
from shards import byte_ids, tokens_in
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


def here(capsys, *arguments) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    try:
        code = data.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse's own
        code = error.code
    return code, *capsys.readouterr()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(file: Path, at: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 1
    file.write_bytes(damaged)


def stream_of(file: Path, **options) -> tuple[list[int], dict]:
    report: dict = {}
    tokens = np.concatenate(list(TokenFile(file, V, END, **options).chunks(report))).tolist()
    assert len(tokens) == report["tokens"]
    return tokens, report


def config(folder: Path, cache: Path, **changes) -> Config:
    return dataclasses.replace(Config(), data_dir=str(folder), cache_dir=str(cache), sequence_length=16, **changes)


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


def saved(save, dtype, name: str = "tokenized_cleaned_0.npz"):
    arrays = {"arr" if save is np.save else "input_ids": TOKENS.astype(dtype)}
    return lambda folder: save(folder / name, **arrays)


def linked(folder: Path):
    write_shard(folder.parent / "disk/tokenized_cleaned_0.npz", np.dtype("<u2"), [TOKENS], {})
    for name in ("here", "there", "disk"):
        (folder / name).symlink_to(folder.parent / "disk")
    (folder.parent / "disk/up").symlink_to(folder)


def version_3(folder: Path):
    with open(folder / "train.npy", "wb") as stream:
        np.lib.format.write_array(stream, TOKENS.astype("<i4"), (2, 0))
        stream.seek(6)
        stream.write(bytes((3, 0)))


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
    ".npy, version 3": version_3,
    "big-endian .npy": saved(np.save, ">u2", "train.npy"),
    "int64 .npz": saved(np.savez, "<i8"),
    "2-D .npz": lambda folder: np.savez_compressed(folder / "tokenized_cleaned_0.npz", tokens=TOKENS.reshape(30, 100)),
    "int16 .npz": saved(np.savez_compressed, "<i2"),
    "big-endian .npz": saved(np.savez, ">i4"),
    "a linked tree": linked,
    "a cache inside": saved(np.savez_compressed, "<i4"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_every_format_gives_the_tokens_that_are_in_it(tmp_path, kind):
    """verify and training on tokens in somebody else's file: the same ones, or a sentence that names prepare; then those."""
    folder, out, cache = tmp_path / "set", tmp_path / "set/prepared", tmp_path / "set/cache"
    folder.mkdir()
    FOREIGN[kind](folder)
    settings = {"tokenizer": "byte", "vocab_size": 257, "eval_files": 0}

    def trains_on(place: Path) -> bool:
        for _ in range(2):  # the second start finds what the first one left
            dataset = open_dataset(config(place, cache, **settings))
            assert [shard.num_tokens for shard in dataset.shards] == [3000] and len(dataset.notes) == ("2-D" in kind)
            windows = dataset.gather(np.arange(dataset.num_samples))
            assert windows[:, :-1].ravel().tolist() == TOKENS[: 187 * 16].tolist()
        return verify.verify(place, 257) == 0

    if kind.endswith((".npz", "tree", "inside")):
        assert trains_on(folder)
        return
    with pytest.raises(DataError, match=r"no \.npz file; `python data.py prepare SRC DST` makes shards of its 1 such"):
        verify.verify(folder, 257)
    with pytest.raises(DataError, match=r"is no .npz; `python data.py prepare"):
        open_dataset(config(folder, cache, tokenized_file_pattern="train.[bBnN]*", **settings))
    totals = prepare.prepare(folder, out, 257, 256)
    assert (totals["tokens"], totals["documents"]) == (3000, (TOKENS == 256).sum())
    shard = Shard.open(out, "train.npz")
    assert shard.stream.dtype == np.uint16 and shard.offset % 64 == 0
    again = prepare.prepare(folder, out, 257, 256)  # its own output is no source
    assert (again["files"], again["kept"], again["tokens"]) == (1, 1, 3000)
    os.rename(out / "train.npz", out / "tokenized_cleaned_0.npz")
    assert trains_on(out) and not cache.exists()


NONE_OF_IT = [
    (bin_of("<u4", tokens=TOKENS + 300), 257, "unclear how wide its ids are. Name it with --bin_dtype"),
    (bin_of("<i4", tokens=np.where(TOKENS % 9, TOKENS, -1)), 65536, "unclear how wide"),
    (bin_of(">u4"), 257, "unclear how wide"),
    (bin_of("<u4", tokens=TOKENS[:9]), 257, "unclear how wide"),
    (bin_of("<u2", tokens=TOKENS * 0), 257, "unclear how wide"),
    (llm_c(20240520, "<u4"), 65536, "13024 bytes; 3000 tokens of uint16 from byte 1024 on"),
    (bin_of("|u1", tokens=TOKENS[:9] % 256), 257, "has 9 bytes"),
    (lambda folder: megatron(folder, tokens=TOKENS[1:]), 257, "11996 bytes; 3000 tokens of int32"),
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
        assert [TokenFile(file, n, 256, bin_dtype="uint32").out_dtype for n in (65536, 65537)] == ["<u2", "<u4"]
        assert TokenFile(file, 1000, 256, bin_dtype="uint32").held == 3000


def windows(text: np.ndarray, width: int, step: int, to_the_end: bool) -> list[np.ndarray]:
    """A long text as rows that overlap: a window each `step` tokens, up to the one that reaches its end or to the end."""
    starts = range(0, len(text) if to_the_end else max(1, len(text) - width + step), step)
    return [text[start : start + width] for start in starts]


@pytest.mark.parametrize("to_the_end", [False, True])
@pytest.mark.parametrize("step", [48, 24, 64])
@pytest.mark.parametrize("ends", [[END], []], ids=["with end-of-text", "without"])
def test_rows_of_long_texts(tmp_path, capsys, ends, step, to_the_end):
    """Windows of texts of any length, as tokenizers cut them, against the texts: each token once, one end-of-text each.

    The shares of rows that ended so and that overlapped are right, and --overlap 0 keeps all; with lengths, mask or both.
    """
    rng = np.random.default_rng(step)
    sizes = [95] * 66 + rng.integers(0, 500, 120).tolist()  # of one window each, then of any length
    texts = [np.array([*rng.integers(0, END, size), *(ends or [7])]) for size in sizes]
    short = np.array([*rng.integers(0, END, 89), *(ends or [7])])
    texts += [short, short[step:]]  # the second is no window of the first
    cut = [windows(text, 96, step, to_the_end) for text in texts]
    rows = [row for parts in cut for row in parts]
    expected = []
    for text, parts in zip(texts, cut, strict=True):  # an end-of-text follows a short last row that has none
        expected += [*text, *([END] if not ends and len(parts[-1]) < 96 else [])]
    for without in WITHOUT:
        shards.write_padded(tmp_path / "in/a.npz", rows, 96, pad=5, **without)
        tokens, report = stream_of(tmp_path / "in/a.npz")
        assert tokens == expected
        assert report["rows"] == len(rows) and report["ended"] == sum(row[-1] == END for row in rows)
        repeated = sum(map(len, rows)) - sum(map(len, texts))
        assert (report["repeats"], report["repeated"]) == (len(rows) - len(texts), repeated)
    kept = stream_of(tmp_path / "in/a.npz", overlap=0)[0]
    assert len(kept) == sum(map(len, rows)) + sum(len(row) < 96 and row[-1] != END for row in rows)
    code, out, _ = here(capsys, "prepare", tmp_path / "in", tmp_path / "out")
    ended, repeats = report["ended"] / len(rows), report["repeats"] / len(rows)
    said = f"of {len(rows):,} rows {ended:.1%} ended with end-of-text, and {repeats:.1%}"
    said += f" began with the end of the row before: {report['repeated']:,}"
    assert code == 0 and said in out
    notes = Dataset.open(config(tmp_path / "out", tmp_path, tokenized_file_pattern="a.npz")).notes
    assert len(notes) == 1 and notes[0].startswith(said)


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


# ---- bad input


ROWS = [np.arange(1, 4), np.arange(1, 9), np.arange(1, 6)]


def padded(**arrays):
    return lambda file: shards.write_padded(file, ROWS, 8, **arrays)


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


def member(content: bytes, packing: int = zipfile.ZIP_DEFLATED):
    return lambda file: zipfile.ZipFile(file, "w", packing).writestr("input_ids.npy", content)


CLAIMS = b"\x93NUMPY\1\0v\0" + b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,)}".ljust(117) + b"\n"


def stored(**arrays):
    arrays = arrays or {"input_ids": np.arange(5000, dtype=np.uint16)}
    return lambda file: np.savez(file, **arrays)


def changed(change, save=None):
    """A file whose bytes are others."""
    return lambda file: [(save or stored())(file), file.write_bytes(change(file.read_bytes()))]


def encrypted(content: bytes) -> bytes:
    at = content.rfind(b"PK\1\2") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]


def twice(file: Path):
    stored()(file)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("input_ids.npy", b"")


noise = np.random.default_rng(0).integers(0, V, 1000)
flipped = changed(lambda content: content[:200] + bytes([content[200] ^ 8]) + content[201:],
                  lambda file: shards.write_padded(file, [noise[:500], noise[500:]], 500))  # fmt: skip
cut = changed(lambda content: content[:-40], padded())
BAD = [  # no shards at all, for whoever opens them
    (stored(input_ids=np.array([1, "x", None], object)), "pickled objects"),
    (stored(input_ids=np.zeros(100, np.float32)), "dtype <f4"),
    (stored(input_ids=np.asfortranarray(np.ones((20, 30), np.int32))), "Fortran order; a shard is a 1-D stream or 2-D"),
    (stored(input_ids=np.ones((2, 3, 4), np.int32)), "shape (2, 3, 4) in C order; a shard is a 1-D stream or 2-D rows"),
    (stored(arr_0=np.ones(9, int), arr_1=np.ones(9, int)), "exactly one of input_ids and tokens"),
    (stored(input_ids=ids(1), tokens=ids(1)), "holds input_ids, tokens; a shard holds exactly one of"),
    (stored(ids=np.ones(100, np.int32)), "save it as np.savez(file, input_ids=tokens)"),
    (stored(**{f"a{i}": np.ones(1) for i in range(17)}), "has 17 members; a shard has at most 16"),
    (changed(lambda content: content[: len(content) // 2]), "not an .npz file or ends early"),
    (changed(lambda content: content[:300] + content[600:]), "ends early"),  # with a whole directory
    (changed(lambda content: content.replace(b"(5000,)", b"(9000,)")), "damaged or ends early: input_ids.npy"),
    (changed(encrypted), "encrypted"),
    (twice, "names a member twice"),
    (member(b"not numpy", zipfile.ZIP_STORED), "no readable .npy header"),
]
LEFT_PADDED = np.array([[1] * 3 + [0] * 5, [0, 1, 1, 1] + [0] * 4, [1] * 5 + [0] * 3])
BAD_SOURCES = [
    (padded(input_ids=ids(-1)), "id -1 at row 2, column 4"),
    (padded(input_ids=ids(60000)), "id 60000 at row 2, column 4; vocab_size=50257"),
    (padded(input_ids=np.ones(24, np.int32)), "one dimension, which attention_mask does not fit"),
    (stored(input_ids=np.ones((3, 0), np.int32)), "rows of length zero"),
    (padded(sequence_lengths=np.array([3, 9, 5])), "row 1 has length 9; a row has 0 to 8 tokens"),
    (padded(sequence_lengths=np.array([3, 8, 0])), "row 2 has length 0 and 5 ones in attention_mask"),
    (padded(sequence_lengths=np.array([3, -1, 5])), "row 1 has length -1"),
    (padded(sequence_lengths=None, attention_mask=np.zeros((3, 8), np.int32)), "all of its 3 rows are empty"),
    (padded(input_ids=ids(-1).astype(np.int64)), "id -1 at row 2, column 4"),
    (padded(input_ids=ids(1).astype(np.uint64) + np.uint64(1 << 63)), "id 9223372036854775809 at row 0, column 0"),
    (stored(input_ids=np.full(9, 70000)), "id 70000 at token 0"),
    (padded(sequence_lengths=np.array([3, 8])), "sequence_lengths has shape (2,) beside tokens of shape (3, 8)"),
    (padded(sequence_lengths=np.array([3, 8, 4])), "row 2 has length 4 and 5 ones in attention_mask"),
    (padded(sequence_lengths=None, attention_mask=LEFT_PADDED), "row 1 has length 3 and 3 ones"),
    (padded(attention_mask=np.ones((3, 7), np.int32)), "attention_mask has shape (3, 7)"),
    (padded(sequence_lengths=np.ones(3)), "sequence_lengths.npy holds dtype <f8"),
    (declared(10**9), "claims 1000000000 bytes; its shape (1000,) and int32 make 4128"),
    (declared(200), "damaged or ends early: input_ids.npy"),
    (member(CLAIMS + bytes(4000)), "shape (1000000000000,) and int32 make 4000000000128"),
    (member(b"\x93NUMPY\2\0" + (1 << 31).to_bytes(4, "little") + bytes(1 << 21)), "no readable .npy header"),  # 2 GB
    (member(CLAIMS, zipfile.ZIP_LZMA), "packed by method 14, not deflate"),
    (flipped, "damaged or ends early: input_ids.npy"),
    (cut, "not an .npz file or ends early"),
    (lambda file: file.write_bytes(b"123"), "not an .npz file"),
]


@pytest.mark.parametrize("save,message", BAD + BAD_SOURCES, ids=[message for _, message in BAD + BAD_SOURCES])
def test_bad_source(tmp_path, save, message):
    """Opening and converting a bad file against an error with its name and the reason; nothing is left of it."""
    (tmp_path / "in").mkdir()
    save(tmp_path / "in/bad.npz")
    settings = {"vocab_size": V, "end_of_text": END}
    uses = [lambda: prepare.convert(tmp_path / "in/bad.npz", tmp_path / "out", "bad.npz", settings)]
    if (save, message) in BAD:
        uses.append(lambda: Shard.open(tmp_path / "in", "bad.npz"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in uses:
        with pytest.raises(DataError) as caught:
            use()
        assert message in str(caught.value) and "bad.npz" in str(caught.value) and caught.value.exit_code == 66
        assert not isinstance(caught.value, PackedShard)
    assert content(tmp_path / "out") == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "memory grew by 100 MB"


def test_one_bad_file_does_not_stop_the_others(tmp_path, capsys):
    """A set with two bad files among good ones: both are named, exit code 66, the others are there and right."""
    expected = shards.write_seed_shards(tmp_path / "in", files=6)
    cut(tmp_path / "in/bad_1.npz")
    flipped(tmp_path / "in/bad_2.npz")
    code, _, said = here(capsys, "prepare", tmp_path / "in", tmp_path / "out")
    assert code == 66 and "2 of 8 files failed" in said
    assert "bad_1.npz is not an .npz" in said and "bad_2.npz is damaged" in said
    for path, stream in expected.items():
        assert (Shard.open(tmp_path / "out", path).stream == stream).all()
    assert set(content(tmp_path / "out")) == set(expected)


def test_usage_errors(tmp_path, capsys):
    """Wrong folders and options against messages; exit code 66 for data, 2 for the command line."""
    shards.write_seed_shards(tmp_path / "in", files=1)
    IN, OUT, TEXTS, EMPTY = (tmp_path / name for name in ("in", "out", "texts", "empty"))
    EMPTY.mkdir()
    TEXTS.mkdir()
    (TEXTS / "a.TXT").write_text("text")
    tokenizes = "`python data.py tokenize SRC DST` makes shards of its 1 such as a.TXT"
    for arguments, code, message in (
        (("prepare", tmp_path / "nowhere", OUT), 66, "nowhere is no file and no folder"),
        (("prepare", EMPTY, OUT), 66, "have no .npz, .npy or .bin file"),
        (("prepare", TEXTS, OUT), 66, tokenizes),
        (("tokenize", IN, OUT), 66, "`python data.py prepare SRC DST` makes shards of its 1"),
        (("verify", TEXTS), 66, tokenizes),
        (("bench", EMPTY), 66, "have no .npz file"),
        (("tokenize", "gs:/b/texts", OUT), 2, "gs:/b/texts is in a bucket, and this reads from a disk"),
        (("verify", "gs:/b/texts"), 2, "`gcloud storage cp -r gs://BUCKET/PREFIX DEST` other files"),
        (("prepare", IN, IN), 66, "is the source"),
        (("prepare", IN, OUT, "--end_of_text", 60000), 66, "no id below vocab_size=50257"),
        (("prepare", IN, OUT, "--vocab_size", 65), 66, "name one with --end_of_text"),
        (("prepare", IN), 2, "DST"),
        (("prepare", IN, OUT, "--fats"), 2, "--fats"),
        (("prepare", IN, OUT, "--workers", -1), 2, "--workers: -1 is not at least 1"),
        (("tokenize", IN, OUT, "--shard_tokens", 0), 2, "--shard_tokens: 0 is not"),
    ):
        found, _, said = here(capsys, *arguments)
        assert (found, message in said) == (code, True), said


# ---- interruptions


def test_disk_full(tmp_path):
    """A file size limit hit while writing, as a full disk would: an error with the name, nothing left behind."""
    rows = [np.random.default_rng(i).integers(0, V, 3000) for i in range(40)]
    shards.write_padded(tmp_path / "in/tokenized_cleaned_0.npz", rows, 3000)
    limit = (resource.RLIMIT_FSIZE, (100_000, 100_000))
    out = run("prepare", tmp_path / "in", tmp_path / "out", preexec_fn=lambda: resource.setrlimit(*limit))
    assert out.returncode == 66 and "cannot write" in out.stderr and "File too large" in out.stderr
    assert content(tmp_path / "out") == {}


def shards_made(folder: Path) -> int:
    """How many are there; folders come and go meanwhile."""
    return sum(name.endswith(".npz") and name[0] != "." for _, _, names in os.walk(folder) for name in names)


def test_killed_and_restarted(tmp_path):
    """Three SIGKILLs while 40 files are prepared, then a run to the end, against the bytes of an uninterrupted run."""
    expected = shards.write_seed_shards(tmp_path / "in", files=40, rows=60, width=600)
    prepare.prepare(tmp_path / "in", tmp_path / "whole", V, END)
    for kill in range(1, 4):
        command = [sys.executable, ROOT / "data.py", "prepare", tmp_path / "in", tmp_path / "out", "--workers", "2"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while shards_made(tmp_path / "out") < 10 * kill:
            assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    totals = prepare.prepare(tmp_path / "in", tmp_path / "out", V, END)
    assert totals["kept"] >= 30 and content(tmp_path / "out") == content(tmp_path / "whole")
    assert set(content(tmp_path / "out")) == set(expected)


def test_done_and_intact_is_kept_everything_else_redone(tmp_path):
    """A second run keeps all; a damaged result, a changed source and another vocabulary are done again."""
    shards.write_seed_shards(tmp_path / "in", files=4)
    arguments = (tmp_path / "in", tmp_path / "out", V, END, 1)
    assert prepare.prepare(*arguments)["kept"] == 0
    whole = content(tmp_path / "out")
    again = prepare.prepare(*arguments)
    assert again["kept"] == 4 and again["documents"] == 200 and again["padding"] > 0
    flip(tmp_path / "out" / min(whole), 500)
    assert prepare.prepare(*arguments)["kept"] == 3 and content(tmp_path / "out") == whole
    shards.write_padded(tmp_path / "in" / max(whole), ROWS, 8)
    assert prepare.prepare(*arguments)["kept"] == 3
    assert (Shard.open(tmp_path / "out", max(whole)).stream == shards.rows_to_stream(ROWS, 8)).all()
    assert prepare.prepare(tmp_path / "in", tmp_path / "out", 70000, END, 1)["kept"] == 0
    assert Shard.open(tmp_path / "out", max(whole)).stream.dtype == np.uint32


# ---- training on what is not mapped


def test_unpacked_once_and_never_again(tmp_path):
    """Two processes that open a compressed set at once: one unpacks, both see the same; later calls write nothing."""
    expected = shards.write_seed_shards(tmp_path / "in", files=5)
    keys = f"data_dir={str(tmp_path / 'in')!r}, cache_dir={str(tmp_path / 'cache')!r}, sequence_length=16"
    code = f"import data; from configs import Config; d = data.open_dataset(Config({keys}));"
    code += "print(d.fingerprint, d.num_samples)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    jobs = [subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) for _ in range(2)]
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
    before, after = Dataset.open(cfg, data.cache_folder(cfg)), open_dataset(cfg)
    assert after.shards[0].stream.tolist() == [1, 2, END] * 60
    changed = data.explain_change(before.manifest, after.manifest)
    assert changed.startswith("changed 1: tokenized_cleaned_a.npz (tokens 240 -> 180, crc32")


def test_without_a_tokenizer(tmp_path, capsys):
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
    code, out, _ = here(capsys, "prepare", tmp_path / "c", tmp_path / "d", "--vocab_size", 65, "--end_of_text", 0)
    assert code == 0 and " tokenizer=none vocab_size=65 " in out and (tmp_path / "d" / name).exists()


def test_verify_names_what_is_wrong(tmp_path, capsys):
    """A flipped byte, a truncated file, an id of 60000 and a copy, each named; exit code 66; 0 once they are gone."""
    shards.write_mapped(tmp_path, [20000] * 6)
    files = sorted(tmp_path.rglob("*.npz"))
    flip(files[0], 30000)
    os.truncate(files[1], 10000)
    tokens = np.zeros(20000)
    tokens[77] = 60000
    write_shard(files[2], np.dtype("<u2"), [tokens], {})
    files[4].write_bytes(files[3].read_bytes())
    shards.write_seed_shards(tmp_path / "packed", files=2)  # verified as they are
    code, out, _ = here(capsys, "verify", tmp_path)
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
    code, out, _ = here(capsys, "verify", tmp_path, "--fast")
    assert code == 66 and "2 wrong" in out  # a flipped byte and an id need reading
    for file in files[:3] + files[4:5]:
        file.unlink()
    assert here(capsys, "verify", tmp_path)[0] == 0


# ---- tokenize


def tokenizing(
    source: Path, target: Path, tokenizer: str, rules: Rules, shard_tokens: int, workers: int = 2
) -> Counter:
    sources = tokenize.local(source, target, rules, workers)
    return tokenize.tokenize(sources, target, tokenizer, rules, shard_tokens, workers)


def drop_shards(folder: Path, kept: int) -> dict[str, bytes]:
    """All but the first shards away, as if the run was killed there; what was there."""
    made = content(folder)
    for name in sorted(made)[kept:]:
        (folder / name).unlink()
    return made


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


def test_tokenize(tmp_path):
    """Shards of text files against the byte encoding of each document; stopped and continued, the same bytes."""
    documents, rules = write_texts(tmp_path / "in"), Rules(["body", "title", "selftext"])

    def again(shard_tokens: int = 5000, workers: int = 1) -> Counter:
        return tokenizing(tmp_path / "in", tmp_path / "out", "byte", rules, shard_tokens, workers)

    totals, expected = again(workers=3), byte_ids(documents)
    assert tokens_in(tmp_path / "out") == expected and len(content(tmp_path / "out")) == totals["files"] > 3
    assert (totals["documents"], totals["tokens"], totals["largest_id"]) == (len(documents), len(expected), 256)
    whole = drop_shards(tmp_path / "out", 2)
    (tmp_path / "out/.tmp-0123456789abcdef-tokenized_cleaned_00002.npz").write_bytes(b"half")
    assert again()["kept"] == 2 and content(tmp_path / "out") == whole
    flip(tmp_path / "out/tokenized_cleaned_00001.npz", -2000)
    assert again()["kept"] == 1 and content(tmp_path / "out") == whole
    with pytest.raises(DataError, match="made from other shard_tokens; name another folder"):
        again(6000)
    source = tmp_path / "in/b/comments.jsonl"  # a redaction of equal size, its time put back
    before = source.stat()
    source.write_text(source.read_text().replace("number 7 ", "number X "))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_size == before.st_size
    with pytest.raises(DataError, match="made from other sources; name another folder"):
        again()


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
    first = "tokenized_cleaned_00000.npz"
    for name, end, dtype in (("own", 0, "uint16"), ("large", 9, "uint32")):
        known = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        known.no_truncation()
        known.no_padding()
        known.encode_special_tokens = True
        tokenizing(tmp_path / "in", tmp_path / f"{name} out", str(tmp_path / name), Rules([]), 4000)
        assert tokens_in(tmp_path / f"{name} out") == [*known.encode(words, add_special_tokens=False).ids, end]
        shard = Shard.open(tmp_path / f"{name} out", first)
        assert shard.stream.dtype == dtype
        assert shard.tokenizer == (find(str(tmp_path / name)).identity, f"{name}/tokenizer.json")
    shutil.copytree(tmp_path / "own", tmp_path / "moved")
    again = tokenizing(tmp_path / "in", tmp_path / "own out", str(tmp_path / "moved"), Rules([]), 4000)
    assert again["kept"] == again["files"], "it is the same tokenizer"
    with pytest.raises(DataError, match="made from other tokenizer"):
        tokenizing(tmp_path / "in", tmp_path / "own out", "byte", Rules([]), 4000)

    assert prepare.main([str(tmp_path / "large out"), str(tmp_path / "prepared"), "--vocab_size", "80000"]) == 0
    assert Shard.open(tmp_path / "prepared", first).tokenizer == Shard.open(tmp_path / "large out", first).tokenizer
    shards.write_padded(tmp_path / "bucket/a.npz", [np.arange(50)], 64)
    ends = ["--end_of_text", "0", "--vocab_size", "64"]
    for more, maker in (
        (ends, None),
        (["--tokenizer", "byte", *ends], None),
        (["--tokenizer", "r50k_base"], ("r50k_base",) * 2),
    ):
        assert prepare.main([str(tmp_path / "bucket"), str(tmp_path / "p"), *more]) == 0
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
    for place in sorted(rng.integers(0, len(words), 40), reverse=True):
        words = words[:place] + "\n<|endoftext|>\n" + words[place:]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(b"\xef\xbb\xbf" + words.encode())
    encoding = find("gpt2").known
    whole = split_whole(words, split) if split else [words]
    totals = tokenizing(tmp_path / "in", tmp_path / "out", "gpt2", Rules([], split), 4000, workers=2)
    expected = [token for document in whole for token in [*encoding.encode_ordinary(document), 50256]]
    found = tokens_in(tmp_path / "out")
    assert encoding.decode(found) == encoding.decode(expected)
    assert found == expected and totals["documents"] == len(whole) and totals["files"] > 5
    made = drop_shards(tmp_path / "out", 3)
    assert tokenizing(tmp_path / "in", tmp_path / "out", "gpt2", Rules([], split), 4000)["kept"] == 3
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
    texts = [data.decode()] if ".txt" in name.lower() else [json.loads(line)["text"] for line in lines]

    def tokenized(target: str) -> Counter:
        return tokenizing(tmp_path / "in", tmp_path / target, "byte", Rules(["text"]), 3000)

    assert tokenized("out")["documents"] == len(texts) and tokens_in(tmp_path / "out") == byte_ids(texts)
    made = drop_shards(tmp_path / "out", 2)
    tokenized("out")
    assert content(tmp_path / "out") == made
    broken = [(packed(name, data)[:-20], "ended before")] if readers.PACKED.get(Path(name).suffix.lower()) else []
    broken += [(packed(name, data) + b"more", "no gzip; cut it off")] if name.endswith(".gz") else []
    broken += [(data[:-20], "is not one whole array: no JSON: ")] if name == "array.json" else []
    for content_, message in broken:
        (tmp_path / "in" / name).write_bytes(content_)
        with pytest.raises(DataError, match=f"{name}.* ?{message}"):
            tokenized(f"cut{len(content_)}")


TEXTS = ["    return x\n", " \t\n", "\u3000wide\r\n\r\n", "\ufeffbom", "\x00\x1f", "plain", "[deleted] by me", "\n"]


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
    records = [{"text": text} for text in (*TEXTS, "", "[deleted]", " [removed]\n")]
    (tmp_path / "in/a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "in/b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "in/c.txt").write_bytes("<mark>".join(TEXTS[:1] + TEXTS[5:7]).encode())
    totals = tokenizing(tmp_path / "in", tmp_path / "out", tokenizer, Rules(["text"], "<mark>"), 10**6)
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
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes("\n".join(['{"text": "one"}', record, HALF]).encode("latin-1"))
    if not usual:
        with pytest.raises(DataError) as caught:
            tokenizing(source, out, "byte", Rules(["text"]), 100)
        assert f"{source} line 2: " in str(caught.value) and words in str(caught.value)
        assert "--on_error skip" in str(caught.value)
    totals = tokenizing(source, out, "byte", Rules(["text"], "", not usual), 100)
    assert f"skipped {source} line 2: " in (said := capsys.readouterr().err) and words in said
    assert tokens_in(out) == byte_ids(["one", "cut \ufffd"]) and (totals["documents"], totals["skipped"]) == (2, 1)


def test_tokenize_command(tmp_path, capsys):
    """The command on Reddit-like lines, then training's view of its shards, and its words and errors."""
    write_texts(tmp_path / "in/x")
    (tmp_path / "in/x/c.jsonl").unlink()
    (tmp_path / "in/x/notes.json").write_text("{}")
    (stories := tmp_path / "in/x/stories.txt").write_text("One.\n<|endoftext|>\n  Two.\n<|endoftext|>\n")
    common = ("--tokenizer", "byte")
    code, out, said = here(capsys, "tokenize", tmp_path / "in", tmp_path / "out", *common, "--fields", "body")
    assert code == 0 and "1 shards (0 were there)" in out and "302 documents" in out, said
    assert "2 empty or bad ones" in out
    assert "train on it: python " in out and f"data_dir={tmp_path}/out " in out
    assert f"left out, {KINDS}: x/n" in said
    assert "note: 302 times <|endoftext|> became ordinary text; in .txt files --split '<|endoftext|>'" in said
    code, out, said = here(capsys, "tokenize", stories, tmp_path / "alone", *common, "--split", "<|endoftext|>")
    assert code == 0 and "2 documents" in out and "note" not in said
    assert tokens_in(tmp_path / "alone") == byte_ids(["One.", "  Two."])
    assert Dataset.open(config(tmp_path / "out", tmp_path / "cache", vocab_size=257, tokenizer="byte")).num_samples > 9


LONG = '{"text": "b", "n": ' + "9" * 4301 + "}\n"
TWO = {"a.jsonl": b'{"title": "T", "selftext": "b"}\n'}
KINDS = f"no {readers.READ}"
CSV = "pandas.read_csv('a.csv').to_json('a.csv.jsonl', orient='records', lines=True)"
NOWHERE = "the mark is nowhere in them, in which backslashes are no escapes: bash has $'\\n\\n' for"
UTF_16 = '{"text": "x"}\n'.encode("utf-16")
WORDS = [  # files, arguments, exit code, what is said
    ({"bad.txt": b"a\xff"}, "", 66, "bad.txt byte 1: not UTF-8 text"),
    ({"a.jsonl": UTF_16}, "--on_error=skip", 66, "is UTF-16; `iconv -f UTF-16 -t UTF-8 a.jsonl > NEW`"),
    ({"a.txt": UTF_16}, "", 66, "is UTF-16; `iconv -f UTF-16 -t UTF-8 a.txt > NEW`"),
    ({"e.jsonl": b'{"body": ""}\n\n'}, "--fields=body", 66, "hold no text: 1 documents were skipped"),
    ({"e.txt": b""}, "", 66, "hold no text"),
    ({"a.pdf": b"x"}, "", 66, f"have {KINDS}, but 1 others such as a.pdf"),
    ({"a.csv": b"x"}, "", 66, CSV),
    ({"a.tar.gz": b"x"}, "", 66, "`tar xf a.tar.gz` makes text of a.tar.gz"),
    ({"a.txt": b"x", "b.zip": b"x"}, "", 0, f"left out, {KINDS}: b.zip; `unzip b.zip`"),
    ({"settings.json": b'{"a": 1}\n', "a.txt": b"x"}, "", 0, f"{readers.READ}: settings.json"),
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
    (tmp_path / "in").mkdir()
    for name, text in files.items():
        (tmp_path / "in" / name).write_bytes(text)
    words_of = [word.replace("_", " ") if "fields" in word else word for word in arguments.split()]
    out = (tmp_path / "out", "--tokenizer", "byte")
    found, _, said = here(capsys, "tokenize", tmp_path / "in", *out, *words_of)
    assert found == code and words in said and ("note:" not in said or words), said
    if len(files) == 1 and "have no" in words:
        found, _, said = here(capsys, "tokenize", tmp_path / "in" / name, *out)
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
    (source := tmp_path / "a.jsonl").write_text(json.dumps({"text": "ab 世界 cd €é"}))
    for i, (content, message) in enumerate((
        ({"model": model}, lost.format(4)),
        ({"model": model, "pre_tokenizer": levels, "decoder": levels}, lost.format(14)),  # three blanks
        ({"model": model | {"vocab": vocab | {"<unk>": 9}, "unk_token": "<unk>"}}, "4 times the token for unknown text"),
        ({"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"}}, "tokenizer.json cannot encode the text"),
    )):  # fmt: skip
        (tmp_path / "t/tokenizer.json").write_text(json.dumps({"added_tokens": [end], **content}))
        find.cache_clear()
        code, _, said = here(capsys, "tokenize", source, tmp_path / f"{i}", "--tokenizer", tmp_path / "t")
        assert message in said and code == 66 * ("cannot" in message), said


def test_bench_runs(tmp_path, capsys):
    """The bench command on a small set against the line it promises; no speed is asserted."""
    shards.write_mapped(tmp_path, [200_000] * 2)
    code, out, _ = here(capsys, "bench", tmp_path, "--sequence_length", 128, "--workers", 1, "--seconds", 0.1)
    assert code == 0 and re.fullmatch(r"[\d.]+M tok/s by 1 workers from 2 shards\n", out), out
