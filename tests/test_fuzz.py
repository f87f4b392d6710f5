"""Hostile and broken input: whatever the bytes, a parser takes them or says no in the project's own words.

Each case begins with a good file and changes it: bits, bytes, stretches, or a node of its JSON, signed again where a
signature would hide what comes behind it. Nothing may be executed: a payload's file must not come into being.
"""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import FUZZ_CASES, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from shards import write_table

import configs
from refocused.bucket import commands, gcs, remote
from refocused.checkpoint import huggingface, manifest, selection, tensors
from refocused.run.logs import Logs
from refocused.run.trace import Trace
from refocused.shards import tokenizers
from refocused.shards.formats import TokenFile
from refocused.shards.readers import TABLES, Rules, documents
from refocused.shards.shard import Shard

FUZZ = settings(
    max_examples=FUZZ_CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


SCALARS: Any = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["NaN", "../../x", "/etc/passwd", "\0", "-1", "1e308", "9" * 400, "float32", "\ud83d"]),
)  # fmt: skip
NODES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def mutated_bytes(good: bytes) -> st.SearchStrategy[bytes]:
    """`good` with up to three changes: a byte, a stretch cut, doubled or replaced, an end cut off."""
    place = st.integers(0, len(good))
    junk = st.one_of(st.binary(max_size=40), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"(300,(, }", b"1" * 300]))
    change = st.tuples(st.sampled_from(["byte", "cut", "double", "splice", "end"]), place, st.integers(1, 64), junk)

    def apply(changes: list[tuple[str, int, int, bytes]]) -> bytes:
        data = good
        for kind, at, size, with_ in changes:
            data = {
                "byte": data[:at] + with_[:1] + data[at + 1 :],
                "cut": data[:at] + data[at + size :],
                "double": data[: at + size] + data[at:],
                "splice": data[:at] + with_ + data[at + len(with_) :],
                "end": data[:at],
            }[kind]
        return data

    return st.lists(change, min_size=1, max_size=3).map(apply)


def mutated_json(good: Any) -> st.SearchStrategy[Any]:
    """`good` with one node, at any depth, replaced or removed."""
    changed = [NODES]
    for key in list(good) if isinstance(good, dict) else range(len(good) if isinstance(good, list) else 0):

        def put(new: Any, key: Any = key) -> Any:
            copy = good.copy()
            copy[key] = new
            return copy

        less = good.copy()
        del less[key]
        changed += [st.just(less), mutated_json(good[key]).map(put)]
    return st.one_of(changed)


def mutated(good: dict) -> st.SearchStrategy[bytes]:
    """The JSON of `good`, changed as an object or as bytes."""
    return st.one_of(mutated_json(good).map(json.dumps).map(str.encode), mutated_bytes(json.dumps(good).encode()))


def in_own_words(function: Callable[[], Any]) -> None:
    """It returns, or raises what a command would print as one sentence with an exit code."""
    try:
        function()
    except ValueError as error:
        assert hasattr(error, "exit_code"), f"a foreign {type(error).__name__}: {error}"
        assert str(error)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def nothing_was_executed(place):
    yield
    assert not list(place.rglob("executed*"))


def npz(**arrays: np.ndarray) -> bytes:
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def table(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"table{suffix}")
        write_table(file, pa.table({"text": [f"text {i}" for i in range(99)], "n": range(99)}), 40)
        return file.read_bytes()


ROWS = np.arange(40, dtype=np.int32).reshape(4, 10)
SHARDS = st.sampled_from([
    npz(input_ids=np.arange(300, dtype=np.uint16)),
    npz(input_ids=ROWS, sequence_lengths=np.array([10, 3, 5, 1], np.int32)),
    npz(input_ids=ROWS, attention_mask=(np.arange(10) < np.array([[10], [3], [5], [1]])).astype(np.int32)),
]).flatmap(mutated_bytes)  # fmt: skip
STATE = {
    "step": 10, "samples_seen": 40, "tokens": 1280, "global_batch": 4, "best_loss": 2.0, "loss": 2.5, "eval_loss": None,
    "recent_losses": [2.5], "scaler": {}, "spike_window": None, "config": vars(configs.Config()),
    "data": {"fingerprint": "00", "manifest": [{"path": "a", "tokens": 1, "dtype": "uint16", "crc32": 1}], "position": {}},
    "run": {"git_commit": None, "torch": "2", "python": "3", "device": "cpu", "world_size": 1},
}  # fmt: skip
HF = huggingface.to_config(configs.Config(vocab_size=257, hidden_size=128, num_hidden_layers=1)) | {"eos_token_id": 0}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}, "decoder": {"type": "ByteLevel"},
             "added_tokens": [{"id": 3, "content": "</s>", "special": True, "normalized": False}]}  # fmt: skip
SETTINGS = {"eos_token": {"content": "</s>"}, "unk_token": None, "chat_template": "x", tokenizers.OURS: ["byte", "00"]}
LINE = {"step": 3, "loss": 2.0, "loss_hex": "0x1p+1", "grad_norm": 1.0, "grad_norm_hex": "0x1p+0", "samples": "00"}
WHERE = {key: {"saved_offsets": [0, 0]} for key in ("model.a", "model.b")}
INFO = {"DCP_SHARDING_INFO": json.dumps(WHERE), "format": "pt"}
PART = save({"model.a": torch.zeros(2, 3), "model.b": torch.ones(3, 2)}, INFO)
SIZE = int.from_bytes(PART[:8], "little")
HEADER = json.loads(PART[8 : 8 + SIZE])


def write_checkpoint(where: Path, state: bytes = json.dumps(STATE).encode(), part: bytes = PART) -> Path:
    """A checkpoint whose manifest vouches for whatever these bytes are."""
    final = where / manifest.name(0, 10, 0)
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    (final / "shard-00000-00000.safetensors").write_bytes(part)
    (final / manifest.STATE).write_bytes(state)
    told = {"format": manifest.FORMAT, "name": final.name, "save_id": "ab" * 8, "step": 10, "generation": 1, "time": 1}
    told["files"] = {path.name: manifest.digest(path) for path in final.iterdir()}
    (final / manifest.MANIFEST).write_bytes(manifest.encode_manifest(told))
    return final


def part_with(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + PART[8 + SIZE :]


def part_of(where: Any) -> bytes:
    return part_with(HEADER | {"__metadata__": INFO | {"DCP_SHARDING_INFO": json.dumps(where)}})


PARTS = st.one_of(mutated_bytes(PART), mutated_json(HEADER).map(part_with), mutated_json(WHERE).map(part_of))
with tempfile.TemporaryDirectory() as folder:
    MANIFEST = (write_checkpoint(Path(folder)) / manifest.MANIFEST).read_bytes()
MANIFESTS = st.one_of(
    mutated_bytes(MANIFEST), mutated_json(json.loads(MANIFEST)["manifest"]).map(manifest.encode_manifest)
)


def read_table(file: Path, _: bytes) -> None:
    for piece in documents(file, Rules(["text"], "", True)):
        assert piece.text or not piece.complete


def read_source(file: Path, _: bytes) -> None:
    for _ in TokenFile(file, 1 << 16, 0).chunks({}):
        pass


def read_tokenizer(file: Path, files: tuple[bytes, Any]) -> None:
    file.write_bytes(files[0])
    file.with_name(tokenizers.SETTINGS).write_text(json.dumps(files[1]))
    known = tokenizers.File(file)
    assert 0 <= known.end < known.size and known.identity
    assert json.loads(known.files(64)[tokenizers.SETTINGS])["model_max_length"] == 64
    known.byte_lengths()


def read_name(file: Path, name: str) -> None:
    assert gcs.local_path(file.parent, name).resolve().is_relative_to(file.parent.resolve())


def read_trace(file: Path, line: bytes) -> None:
    """Whatever stands in a trace, a run starts; what can be read is compared."""
    file.write_bytes(json.dumps({**LINE, "step": 2}).encode() + b"\n" + line + b"\n")
    assert 2 in Trace(Logs(str(file.parent), str(file.parent)).file(file.name), 1).expected


def read_part(file: Path, part: bytes) -> None:
    into = {"model.a": torch.zeros(2, 3), "model.b": torch.zeros(3, 2)}
    tensors.load(write_checkpoint(file.parent, part=part), into)


def read_state(file: Path, state: bytes) -> None:
    write_checkpoint(file.parent, state)
    selection.choose(file.parent, "latest")


def read_manifest(file: Path, content: bytes) -> None:
    final = write_checkpoint(file.parent)
    (final / manifest.MANIFEST).write_bytes(content)
    in_own_words(lambda: selection.choose(file.parent, "latest"))
    in_own_words(lambda: commands.list_command([str(file.parent)]))
    remote.decode(content, final.name, "gs://bucket/it")


KEYS = st.tuples(st.sampled_from(sorted(configs.KEYS)), st.one_of(SCALARS.map(str), st.text(max_size=20)))
BIN = st.one_of(st.binary(max_size=3000), mutated_bytes(np.arange(900, dtype="<u4").tobytes()))
CASES: dict[str, tuple[st.SearchStrategy, Callable[[Path, Any], object]]] = {  # by the name of the file that is read
    "shard.npz": (SHARDS, lambda file, _: Shard.open(file.parent, file.name).check_unchanged()),
    "source.npz": (SHARDS, read_source),
    "source.bin": (BIN, read_source),
    **{f"table{kind}": (mutated_bytes(table(kind)), read_table) for kind in TABLES},
    "config.json": (mutated(HF), lambda file, _: huggingface.source(file.parent)),
    "part.safetensors": (PARTS, read_part),
    "state": (mutated(STATE), read_state),
    "manifest": (MANIFESTS, read_manifest),
    "trace.jsonl": (mutated(LINE), read_trace),
    "tokenizer.json": (st.tuples(mutated(TOKENIZER), st.just(SETTINGS) | mutated_json(SETTINGS)), read_tokenizer),
    "command line": (KEYS, lambda _, pair: configs.load(["=".join(pair)])),
    "object name": (st.one_of(st.text(max_size=40), st.text("./\\\0a", max_size=12)), read_name),
}


def read(file: Path, case: Any) -> None:
    if isinstance(case, bytes):
        file.write_bytes(case)
    in_own_words(lambda: CASES[file.name][1](file, case))


@pytest.mark.parametrize("name", CASES)
@FUZZ
@given(st.data())
def test_parser(place, name, data):
    """What a parser makes of changed input: a result, or an error of ours."""
    read(place / name, data.draw(CASES[name][0]))


def test_pickles_are_never_opened(place):
    """A pickle that makes a file, under every name that is read: an error of ours, and no file."""
    hostile = pickle.dumps(Payload(str(place / "executed")))
    for name in list(CASES)[:-3]:
        read(place / name, hostile)
    np.save(place / "object.npy", np.array([Payload(str(place / "executed"))], object), allow_pickle=True)
    in_own_words(lambda: TokenFile(place / "object.npy", 1 << 16, 0))


@pytest.mark.slow
def test_a_hundred_thousand_cases():
    """Of each parser, hours: this file once more."""
    command = [sys.executable, "-m", "pytest", "-q", __file__]
    assert subprocess.run(command, cwd=ROOT, env={**os.environ, "FUZZ_CASES": "100000"}).returncode == 0
