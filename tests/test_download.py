"""`data.py download` against a real HTTP server that counts what is asked of it."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from launch import GUARD

import data
from refocused import locks
from refocused.bucket import download, gcs

RUN = "import sys, data; sys.exit(data.main(['download', *sys.argv[1:]]))"
MEDIA = "alt=media"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(f"data_dir = {str(tmp_path / 'shards')!r}\ntokenizer = 'byte'\nvocab_size = 257\n")
    return str(path)


def npz(save=np.savez, **arrays) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def shard(seed: int, tokens: int = 50_000) -> bytes:
    """A shard that can be mapped as it is."""
    return npz(input_ids=np.random.default_rng(seed).integers(0, 257, tokens, dtype=np.uint16))


def packed(rows: int = 300, width: int = 100) -> tuple[bytes, np.ndarray]:
    """A compressed and padded shard as the bucket's writer makes them, and the tokens that are in it."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, width + 1, rows).astype(np.int32)
    mask = np.arange(width) < lengths[:, None]
    ids = np.where(mask, rng.integers(0, 256, (rows, width)), 0).astype(np.int32)
    content = npz(np.savez_compressed, input_ids=ids, attention_mask=mask.astype(np.int32), sequence_lengths=lengths)
    ends = [np.append(row[:n], 256) if n < width else row for row, n in zip(ids, lengths, strict=True)]
    return content, np.concatenate(ends)


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RUN, *args], cwd=ROOT, stdout=subprocess.DEVNULL)


def run(*args: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert download.main(list(args)) == 0
    return out.getvalue()


def files(folder: Path) -> dict[str, str]:
    """{path: SHA-256} of everything below folder that is not our own bookkeeping."""
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".download")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def name(i: int) -> str:
    return f"part{i % 3}/deep{i % 5}/tokenized_cleaned_{i:02d}.npz"


def test_sixty_files_killed_ten_times(server, config, tmp_path):
    """60 nested files with 10 SIGKILLs at random moments end as the bytes in the bucket; a second run asks for none."""
    rng = random.Random(3)
    for i in range(60):
        server.put(f"tokens/{name(i)}", shard(i, 5_000 + 20_000 * (i % 4)))
    server.put("tokens/readme.txt", b"not a shard")
    want = {o.removeprefix("tokens/"): hashlib.sha256(server.data(o)).hexdigest() for o in server.names("tokens/part")}
    server.fault("GET", MEDIA, rate=500_000, times=10**6)  # so that a run takes longer than it is let live
    for _ in range(10):
        goal = server.count("GET", MEDIA) + rng.randrange(1, 8)
        process = start(config, "gs://bucket/tokens")
        server.wait_until(lambda g=goal, p=process: server.count("GET", MEDIA) >= g or p.poll() is not None)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    server.faults.clear()
    assert "60 files ready" in run(config, "gs://bucket/tokens")
    assert files(tmp_path / "shards") == want
    before = server.count("GET", MEDIA)
    assert "60 files ready, 0 of them new" in run(config, "gs://bucket/tokens")
    assert server.count("GET", MEDIA) == before
    assert 2 <= server.count("GET", r"/o\?") <= 12  # at most one LIST each; a kill may come before it


def test_index_and_what_happens_without(server, config, tmp_path):
    """Replaced in the bucket: only that one is fetched. Changed here: it is named and stays, and is fetched again once it
    is gone. Lost index: checksums are recomputed, nothing is fetched."""
    for i in range(4):
        server.put(name(i), shard(i))
    folder = tmp_path / "shards"
    run(config, "gs://bucket")
    [*_, entry] = [json.loads(line) for line in (folder / download.INDEX).read_text().split("\n") if line]
    assert entry["object"] == entry["crc32c"] == server.buckets["bucket"][entry["path"]].crc32c
    before, want = server.count("GET", MEDIA), files(folder)
    with open(folder / download.INDEX, "a") as index:
        index.write('\n{"path": "part0')  # a torn line
    os.utime(folder / name(1))  # another mtime, the same bytes
    server.put(name(3), shard(99))
    want[name(3)] = hashlib.sha256(server.data(name(3))).hexdigest()
    run(config, "gs://bucket")
    assert server.count("GET", MEDIA) == before + 1 and files(folder) == want
    damaged = bytearray((folder / name(2)).read_bytes())
    damaged[-1000] ^= 1
    (folder / name(2)).write_bytes(damaged)
    with pytest.raises(gcs.BucketError, match=f"1 of the 4 files already, such as {name(2)}, and not as this command"):
        run(config, "gs://bucket")
    assert (folder / name(2)).read_bytes() == damaged
    (folder / name(2)).unlink()
    run(config, "gs://bucket")
    (folder / download.INDEX).unlink()
    run(config, "gs://bucket")
    assert server.count("GET", MEDIA) == before + 2 and files(folder) == want


def test_files_that_this_command_did_not_write(server, config, tmp_path):
    """Padded originals, another file and a link that lie there stay, byte for byte, and nothing is fetched. A shard that
    needs no packing and has the object's bytes is ready, and stays when the bucket has another one."""
    server.put(name(0), packed()[0])
    server.put(name(1), shard(1))
    folder = tmp_path / "shards"
    (folder / name(0)).parent.mkdir(parents=True)
    (folder / name(1)).parent.mkdir(parents=True)
    for content in (packed()[0], b"notes", None):
        if content is None:
            (folder / name(0)).unlink()
            (folder / name(0)).symlink_to(folder / "other")
        else:
            (folder / name(0)).write_bytes(content)
        before = server.count("GET", MEDIA)
        with pytest.raises(gcs.BucketError, match=f"such as {name(0)}.*they stay.*data.py prepare SRC DST"):
            run(config, "gs://bucket")
        assert server.count("GET", MEDIA) == before
        assert content is None or (folder / name(0)).read_bytes() == content
    (folder / name(0)).unlink()
    (folder / name(1)).write_bytes(server.data(name(1)))
    assert "2 files ready" in run(config, "gs://bucket") and server.count("GET", MEDIA) == before + 1
    kept = (folder / name(1)).read_bytes()
    server.put(name(1), shard(99))
    with pytest.raises(gcs.BucketError, match=f"such as {name(1)}"):
        run(config, "gs://bucket")
    assert (folder / name(1)).read_bytes() == kept and not (folder / download.COMING).exists()


@pytest.mark.parametrize(
    "place, count", [("tokens/*.npz", 3), ("tokens/a.npz", 1), ("tokens/sub", 1), ("tokens/b*", 1)]
)
def test_places(server, config, tmp_path, place, count):
    """A folder, a pattern behind it, or one object, whatever tokenized_file_pattern says of the names."""
    for path in ("tokens/a.npz", "tokens/b.npz", "tokens/sub/tokenized_cleaned_c.npz", "tokens/readme.txt"):
        server.put(path, shard(1, 1000))
    assert f"{count} files ready" in run(config, f"gs://bucket/{place}") and len(files(tmp_path / "shards")) == count


def test_packed_shards_become_readable(server, config, tmp_path):
    """A compressed, padded shard arrives as one that data.Shard maps, with the tokens of its rows; a rerun keeps it."""
    content, tokens = packed()
    server.put("tokens/tokenized_cleaned_a.npz", content)
    said = run(config, "gs://bucket/tokens")
    assert re.search(
        r"of \d+ rows [\d.]+% ended with end-of-text, and 0.0% began with the end of the row before", said
    ), said
    assert "data.py download [CONFIG.py]" in run("--help")
    folder = tmp_path / "shards"
    opened = data.Shard.open(folder, "tokenized_cleaned_a.npz")
    assert opened.stream.dtype == np.uint16
    raw = np.memmap(opened.file, opened.stream.dtype, "r", opened.offset, (opened.num_tokens,))
    assert np.array_equal(raw, tokens)
    before = server.count("GET", MEDIA)
    assert "0 of them new" in run(config, "gs://bucket/tokens") and server.count("GET", MEDIA) == before


def test_list_and_max_files(server, config, tmp_path):
    """--list shows names and sizes without fetching a shard; max_files=2 brings the first two by name."""
    for i in range(5):
        server.put(name(i), shard(i))
    out = run(config, "--list", "gs://bucket")
    assert f"5 files, {5 * len(shard(0)):,} bytes" in out and name(4) in out
    assert not (tmp_path / "shards").exists() and server.count("GET", MEDIA) == 0
    run(config, "gs://bucket", "max_files=2")
    assert sorted(files(tmp_path / "shards")) == sorted(name(i) for i in range(5))[:2]


def test_hostile_and_encoded_objects(server, config, tmp_path, capsys):
    """Names that lead elsewhere and encoded objects are named and left out; the others arrive; the exit code is 66."""
    good, bad = shard(1), "tokenized_cleaned_x.npz"
    server.put("t/good/tokenized_cleaned_a.npz", good)
    for hostile in (f"../{bad}", f"/{bad}", f"a\\b/{bad}", f"a/../../{bad}", f"nul\0/{bad}", f"{'n' * 300}/{bad}"):
        server.put(f"t/{hostile}", good)
    server.put("t/gz/tokenized_cleaned_b.npz", good, encoding="gzip")
    assert download.main([config, "gs://bucket/t"]) == 66
    err = capsys.readouterr().err
    assert err.count("is refused as a file name") == 6 and "stored gzip-encoded" in err
    assert list(files(tmp_path / "shards")) == ["good/tokenized_cleaned_a.npz"]
    assert not list(tmp_path.glob("*.npz"))


def test_too_large_and_no_shard(server, config, tmp_path):
    """9 TB is refused before a byte is fetched; so are an empty place, no place at all, and no folder."""
    server.put("t/tokenized_cleaned_a.npz", shard(1), size=9 * 10**12)
    with pytest.raises(gcs.BucketError, match=r"9,000\.00 GB are still to come"):
        download.main([config, "gs://bucket/t"])
    assert server.count("GET", MEDIA) == 0
    with pytest.raises(gcs.BucketError, match="has no object like"):
        download.main([config, "gs://bucket/none"])
    with pytest.raises(ValueError, match="no bucket: name one"):
        download.main([config])


def test_not_an_npz(server, config, tmp_path):
    """An object that is no shard is named as such, after the checksum of its bytes was found right."""
    server.put("tokenized_cleaned_a.npz", b"hello")
    with pytest.raises(data.DataError, match="tokenized_cleaned_a.npz"):
        download.main([config, "gs://bucket"])
    assert not zipfile.is_zipfile(tmp_path / "shards/tokenized_cleaned_a.npz")


def test_one_downloader_per_folder(server, config, tmp_path):
    """While one process fills a folder, a second one refuses with its pid and harms nothing."""
    server.put("tokenized_cleaned_a.npz", shard(1))
    slow = server.fault("GET", MEDIA, rate=10_000)
    first = start(config, "gs://bucket")
    server.wait_until(lambda: slow.hits > 0)
    with pytest.raises(locks.Taken, match=f"is in use by host .*, pid {first.pid}; "):
        download.main([config, "gs://bucket"])
    assert first.wait(GUARD) == 0 and len(files(tmp_path / "shards")) == 1
