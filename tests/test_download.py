"""`data.py download` against a real HTTP server that counts what is asked of it."""

import hashlib
import io
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import shards
from launch import GUARD
from shards import content, data_py_process, flip, tokens_in

from refocused.bucket import download

MEDIA = "alt=media"


def command(folder: Path, *args: str) -> list[str]:
    return ["download", "tokenizer=byte", "vocab_size=257", f"data_dir={folder}", *args]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def fetch(data_py, folder):
    """The command, which has to end with this exit code; what it says."""

    def run(*args: str, code: int = 0) -> str:
        found, *said = data_py(*command(folder, *args))
        assert found == code, said
        return "".join(said)

    return run


def shard(seed: int, tokens: int = 50_000) -> bytes:
    """A shard that can be mapped as it is."""
    file = io.BytesIO()
    np.savez(file, input_ids=np.random.default_rng(seed).integers(0, 257, tokens, dtype=np.uint16))
    return file.getvalue()


def packed(file: Path) -> tuple[bytes, list[int]]:
    """A compressed and padded shard as the bucket's writer makes them, and the tokens that are in it."""
    rng = np.random.default_rng(7)
    rows = [rng.integers(0, 256, rng.integers(1, 101)) for _ in range(300)]
    shards.write_padded(file, rows, 100)
    return file.read_bytes(), [256 if i == shards.END_OF_TEXT else i for i in shards.rows_to_stream(rows, 100).tolist()]


def files(folder: Path) -> dict[str, str]:
    """{path: SHA-256} of everything below folder that is not our own bookkeeping."""
    return {path: digest(data) for path, data in content(folder).items() if not Path(path).name.startswith(".download")}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def name(i: int) -> str:
    return f"part{i % 3}/deep{i % 5}/tokenized_cleaned_{i:02d}.npz"


def test_sixty_files_killed_ten_times(server, fetch, folder):
    """60 nested files with 10 SIGKILLs at random moments end as the bytes in the bucket; a second run asks for none."""
    rng = random.Random(3)
    for i in range(60):
        server.put(f"tokens/{name(i)}", shard(i, 5_000 + 20_000 * (i % 4)))
    server.put("tokens/readme.txt", b"not a shard")
    want = {path.removeprefix("tokens/"): digest(server.data(path)) for path in server.names("tokens/part")}
    server.fault("GET", MEDIA, rate=500_000, times=10**6)  # so that a run takes longer than it is let live
    for _ in range(10):
        goal = server.count("GET", MEDIA) + rng.randrange(1, 8)
        process = data_py_process(*command(folder, "gs://bucket/tokens"))
        server.wait_until(lambda g=goal, p=process: server.count("GET", MEDIA) >= g or p.poll() is not None)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    server.faults.clear()
    assert "60 files ready" in fetch("gs://bucket/tokens") and files(folder) == want
    before = server.count("GET", MEDIA)
    assert "60 files ready, 0 of them new" in fetch("gs://bucket/tokens") and server.count("GET", MEDIA) == before
    assert 2 <= server.count("GET", r"/o\?") <= 12  # at most one LIST each; a kill may come before it


def test_index_and_what_happens_without(server, fetch, folder):
    """Replaced in the bucket: only that one is fetched. Changed here: it is named and stays, and is fetched again once it
    is gone. Lost index: checksums are recomputed, nothing is fetched."""
    for i in range(4):
        server.put(name(i), shard(i))
    fetch("gs://bucket")
    index = folder / download.INDEX
    [*_, entry] = [json.loads(line) for line in index.read_text().split("\n") if line]
    assert entry["object"] == entry["crc32c"] == server.buckets["bucket"][entry["path"]].crc32c
    before = server.count("GET", MEDIA)
    index.write_text(index.read_text() + '\n{"path": "part0')  # a torn line
    os.utime(folder / name(1))  # another mtime, the same bytes
    server.put(name(3), shard(99))
    want = {name(i): digest(server.data(name(i))) for i in range(4)}
    fetch("gs://bucket")
    assert server.count("GET", MEDIA) == before + 1 and files(folder) == want
    damaged = flip(folder / name(2), -1000)
    assert f"1 of the 4 files already, such as {name(2)}, and not as this command" in fetch("gs://bucket", code=66)
    assert (folder / name(2)).read_bytes() == damaged
    (folder / name(2)).unlink()
    fetch("gs://bucket")
    index.unlink()
    fetch("gs://bucket")
    assert server.count("GET", MEDIA) == before + 2 and files(folder) == want


def test_files_that_this_command_did_not_write(server, fetch, folder, monkeypatch):
    """Padded originals, another file and a link that lie there stay, byte for byte, and nothing is fetched. A shard that
    needs no packing and has the object's bytes is ready, and stays when the bucket has another one."""
    padded, taken, mapped = packed(folder / name(0))[0], folder / name(0), folder / name(1)
    server.put(name(0), padded)
    server.put(name(1), shard(1))
    for what in ("padded", "notes", "link"):
        if what == "notes":
            taken.write_bytes(b"notes")
        elif what == "link":
            taken.unlink()
            taken.symlink_to(folder / "other")
        was = os.readlink(taken) if what == "link" else taken.read_bytes()
        said = fetch("gs://bucket", code=66)
        assert f"such as {name(0)}" in said and "they stay" in said and "data.py prepare SRC DST" in said
        assert was == (os.readlink(taken) if what == "link" else taken.read_bytes())
    assert server.count("GET", MEDIA) == 0
    taken.unlink()
    mapped.parent.mkdir(parents=True)
    mapped.write_bytes(shard(1))
    assert "2 files ready" in fetch("gs://bucket") and server.count("GET", MEDIA) == 1
    server.put(name(1), shard(99))
    assert f"such as {name(1)}" in fetch("gs://bucket", code=66)
    assert mapped.read_bytes() == shard(1) and not (folder / download.COMING).exists()
    server.put(name(1), shard(1))
    server.put(name(2), padded)
    prepare = download.prepare_in_place

    def prepare_late(*args) -> dict:
        (folder / name(2)).parent.mkdir(parents=True)
        (folder / name(2)).write_bytes(b"put there meanwhile")
        return prepare(*args)

    monkeypatch.setattr(download, "prepare_in_place", prepare_late)
    assert "was put there while it was fetched, and stays" in fetch("gs://bucket", code=66)
    assert (folder / name(2)).read_bytes() == b"put there meanwhile"


PLACES = {"": 2, "/*.npz": 4, "/a.npz": 1, "/sub": 1, "/b*": 1, " max_files=1": 1}


@pytest.mark.parametrize("place", PLACES)
def test_places(server, fetch, folder, place):
    """A folder, a pattern behind it, or one object, whatever tokenized_file_pattern says of the names; the first by name.

    --list shows their names and sizes without fetching one.
    """
    for path in ("a.npz", "b.npz", "sub/tokenized_cleaned_c.npz", "tokenized_cleaned_d.npz", "readme.txt"):
        server.put(f"tokens/{path}", shard(1, 1000))
    words, count = f"gs://bucket/tokens{place}".split(), PLACES[place]
    said = fetch("--list", *words)
    assert f"{count} files, {count * len(shard(1, 1000)):,} bytes" in said and not folder.exists()
    assert server.count("GET", MEDIA) == 0 and f"{count} files ready" in fetch(*words)
    assert len(found := files(folder)) == count and all(f"  {path}\n" in said for path in found)


def test_packed_shards_become_readable(server, fetch, folder, tmp_path):
    """A compressed, padded shard arrives as one that is mapped, with the tokens of its rows; a rerun keeps it."""
    data, tokens = packed(tmp_path / "a.npz")
    server.put("tokens/tokenized_cleaned_a.npz", data)
    assert "ended with end-of-text, and 0.0% began with the end of the row before" in fetch("gs://bucket/tokens")
    assert "0 of them new" in fetch("gs://bucket/tokens") and server.count("GET", MEDIA) == 1
    (folder / download.INDEX).unlink()
    assert tokens_in(folder) == tokens


def test_hostile_and_encoded_objects(server, fetch, folder, tmp_path):
    """Names that lead elsewhere and encoded objects are named and left out; the others arrive; the exit code is 66."""
    good, bad = shard(1), "tokenized_cleaned_x.npz"
    server.put("t/good/tokenized_cleaned_a.npz", good)
    for hostile in (f"../{bad}", f"/{bad}", f"a\\b/{bad}", f"a/../../{bad}", f"nul\0/{bad}", f"{'n' * 300}/{bad}"):
        server.put(f"t/{hostile}", good)
    server.put("t/gz/tokenized_cleaned_b.npz", good, encoding="gzip")
    said = fetch("gs://bucket/t", code=66)
    assert said.count("is refused as a file name") == 6 and "stored gzip-encoded" in said
    assert list(files(folder)) == ["good/tokenized_cleaned_a.npz"] and not list(tmp_path.glob("*.npz"))


def test_what_cannot_be_fetched(server, fetch, folder):
    """9 TB are refused before a byte is fetched; so are an empty place and no place at all. What is no shard is named."""
    server.put("t/tokenized_cleaned_a.npz", shard(1), size=9 * 10**12)
    server.put("no/tokenized_cleaned_a.npz", b"hello")
    assert "9,000.00 GB are still to come" in fetch("gs://bucket/t", code=66)
    assert "has no object like" in fetch("gs://bucket/none", code=66)
    assert "no bucket: name one" in fetch(code=2) and "cannot make sense of" in fetch("--lsit", code=2)
    assert server.count("GET", MEDIA) == 0 and "data.py download [CONFIG.py]" in fetch("--help")
    assert "tokenized_cleaned_a.npz is not an .npz file" in fetch("gs://bucket/no", code=66)
    assert not list(folder.glob("*.npz"))


def test_one_downloader_per_folder(server, fetch, folder):
    """While one process fills a folder, a second one refuses with its pid and harms nothing."""
    server.put("tokenized_cleaned_a.npz", shard(1))
    slow = server.fault("GET", MEDIA, rate=10_000)
    first = data_py_process(*command(folder, "gs://bucket"))
    server.wait_until(lambda: slow.hits > 0)
    said = fetch("gs://bucket", code=2)
    assert "is in use by host " in said and f", pid {first.pid}; " in said
    assert first.wait(GUARD) == 0 and len(files(folder)) == 1
