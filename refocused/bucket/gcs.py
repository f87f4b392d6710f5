"""A bucket as six calls: list, read, create, upload, download, delete. The only file that imports google.cloud.

    bucket = gcs.Bucket("my-bucket")
    for obj in bucket.list("tokens/"):
        bucket.download(obj, gcs.local_path(Path("data"), obj.name))

Credentials are Application Default Credentials; with STORAGE_EMULATOR_HOST set the same code talks to an emulator.
Every call retries what may pass (resets, 5xx, lost sessions, wrong bytes) until its patience ends, then raises
BucketError: one line that names the object, the reason and the fix, and holds no token and no session URL.
"""

import base64
import errno
import glob
import hashlib
import io
import itertools
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from google_crc32c import Checksum

from configs import bucket_problem, prefix_problem
from refocused import files

log = logging.getLogger("gcs")

CHUNK = 16 << 20  # bytes per request of a resumable upload; each stream holds two of them
SMALLEST_CHUNK = 256 << 10  # what the protocol allows
ONE_REQUEST = 8 << 20  # the client sends a file up to this size in one request
READ_SIZE = 1 << 20
FEW = 4  # tries for what is final unless the wire or the session was to blame
MANY = 10**9  # tries until patience ends


class BucketError(ValueError):
    """The bucket did not give, or take, what was asked; the message is one line for the user."""

    exit_code = 66
    same_on_all_ranks = True  # so one of them says it


class Refused(BucketError):
    """The bucket said no, and waiting does not change that."""


class Conflict(BucketError):
    """An object of that name exists with other bytes, or was changed in between."""


@dataclass(frozen=True)
class Object:
    """One object as the server lists it."""

    name: str
    size: int
    crc32c: str  # base64 of the big-endian checksum, as the server writes it
    generation: int
    updated: float  # seconds since the epoch
    encoded: bool  # stored with Content-Encoding: its bytes are not the file's


class Bucket:
    """One bucket; safe to use from up to 10 threads (the client's connection pool).

    patience: seconds that one call may go on retrying; timeout: seconds without progress on one request.
    Raises BucketError when there are no credentials.
    """

    def __init__(self, name: str, patience: float = 300.0, timeout: float = 60.0):
        # Else the client reads the bucket's metadata in a background thread, for which a trainer needs no permission.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        # At DEBUG these two write upload session URLs, each of which is a credential, into the log.
        for library in ("urllib3", "google"):
            logging.getLogger(library).setLevel(logging.INFO)
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY

        try:
            client = storage.Client(project=None)
        except (GoogleAuthError, OSError) as error:
            raise Refused(_explain(error, f"gs://{name}")[0]) from None
        self.name, self.patience, self.timeout = name, patience, (timeout, timeout)
        self.bucket = client.bucket(name)
        # The client's own retry keeps a download's position and an upload's session; ours starts where it gives up.
        self.retry = DEFAULT_RETRY.with_timeout(min(2 * timeout, patience))

    def url(self, name: str = "") -> str:
        return f"gs://{self.name}/{name}"

    def list(self, prefix: str = "") -> list[Object]:
        """Every object whose name starts with prefix, sorted by name."""
        from google.api_core.exceptions import NotFound

        fields = "items(name,size,crc32c,generation,updated,contentEncoding),nextPageToken"

        def call(attempt: int) -> list[Object]:
            blobs = self.bucket.client.list_blobs(
                self.bucket, prefix=prefix, fields=fields, timeout=self.timeout, retry=self.retry
            )
            try:
                return sorted((_object(blob) for blob in blobs), key=lambda o: o.name)
            except NotFound:
                raise Refused(f"there is no bucket gs://{self.name}: create it, or mend the name") from None

        return self._persist(f"list {self.url(prefix)}", call)

    def find(self, name: str) -> Object | None:
        """The object of exactly this name, by its metadata alone; None if there is none."""
        call = lambda attempt: self.bucket.get_blob(name, timeout=self.timeout, retry=self.retry)  # noqa: E731
        blob = self._persist(f"look at {self.url(name)}", call)
        return _object(blob) if blob else None

    def read(self, name: str, limit: int = 64 << 20) -> tuple[bytes, int] | None:
        """A small object's bytes, checked, and its generation; None if there is none. At most limit bytes."""
        obj = self.find(name)
        if obj is None:
            return None
        if obj.size > limit:
            raise BucketError(
                f"{self.url(name)} has {obj.size:,} bytes; at most {limit:,} are read from such an object"
            )
        sink = io.BytesIO()
        self._receive(obj, sink)
        return sink.getvalue(), obj.generation

    def read_from(self, obj: Object, start: int) -> bytes:
        """An object's bytes from start on, unchecked: for a look at a file's directory."""
        blob = self.bucket.blob(obj.name, generation=obj.generation)

        def call(attempt: int) -> bytes:
            sink = io.BytesIO()
            blob.download_to_file(
                sink, start=start, raw_download=True, checksum=None, timeout=self.timeout, retry=self.retry
            )
            return sink.getvalue()

        return self._persist(f"read {self.url(obj.name)}", call)

    def create(self, name: str, data: bytes, generation: int = 0) -> int:
        """Write a small object whose present generation is as given (0: there is none); returns the new generation.

        Raises Conflict when it is not, unless the object holds exactly these bytes: then it was us, and the answer
        was lost on its way.
        """
        return self._send(name, io.BytesIO(data), len(data), checksum_of_bytes(data), generation)

    def upload(self, name: str, path: Path, size: int, crc32c: str) -> None:
        """Create an object from a file; the server refuses bytes whose CRC-32C is not the one given (base64).

        An object that is there with the same size and checksum is accepted; with others it raises Conflict.
        """
        with open(path, "rb") as file:
            actual = os.fstat(file.fileno()).st_size
            # The client lets the server check one-request uploads against what it read, not against what we know.
            if actual != size or size <= ONE_REQUEST and checksum_of(file) != crc32c:
                raise BucketError(f"{path} is not the file that its manifest describes; it stays out of the bucket")
            self._send(name, file, size, crc32c, 0)

    def _send(self, name: str, stream: BinaryIO, size: int, crc32c: str, generation: int) -> int:
        from google.api_core.exceptions import PreconditionFailed

        def call(attempt: int) -> int:
            # The socket's timeout covers the sending of a whole chunk: on a slow link only a smaller one gets through.
            chunk = max(CHUNK >> 2 * attempt, SMALLEST_CHUNK)
            blob = self.bucket.blob(name, chunk_size=chunk)
            try:
                blob.upload_from_file(
                    stream,
                    rewind=True,
                    size=size,
                    content_type="application/octet-stream",
                    if_generation_match=generation,
                    # Where the client itself compares, it deletes on a mismatch, without a generation.
                    checksum="crc32c" if size <= ONE_REQUEST else None,
                    crc32c_checksum_value=crc32c,
                    timeout=self.timeout,
                    retry=self.retry,
                )
                return blob.generation
            except PreconditionFailed:
                there = self.find(name)
                if there is None or (there.size, there.crc32c) != (size, crc32c):
                    raise Conflict(f"{self.url(name)} exists with other bytes; it was left as it is") from None
                return there.generation

        return self._persist(f"write {self.url(name)}", call)

    def download(self, obj: Object, path: Path, progress: Callable[[int], Any] | None = None) -> None:
        """One object to a file that appears complete and verified or not at all.

        Bytes go to `<name>.<generation>.part`, which a later call continues; progress gets the bytes as they come
        (negative where bytes turn out wrong and are fetched again).
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(path, obj)
        for stale in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
            if stale != part and stale.name.split(".")[-2].isdigit():  # another generation's
                files.remove(stale)
        try:
            with open(part, "a+b", buffering=READ_SIZE) as file:
                self._receive(obj, file, progress)
            files.sync(part)
            files.replace(part, path)
        except OSError as error:
            hint = (
                "; free some space, then it goes on from there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            )
            raise BucketError(f"{part}: {error.strerror or error}{hint}") from None
        files.sync_folder(path.parent)

    def sha256(self, obj: Object, progress: Callable[[int], Any] | None = None) -> str:
        """The SHA-256 of an object's bytes, which are all read and not kept."""
        return self._receive(obj, None, progress).sha.hexdigest()

    def _receive(self, obj: Object, file: BinaryIO | None, progress: Callable[[int], Any] | None = None) -> "_Sink":
        """The object's bytes behind those that file already holds; on return size and CRC-32C are the listed ones."""
        blob = self.bucket.blob(obj.name, generation=obj.generation)
        sink = _Sink(file, obj, progress)

        def call(attempt: int) -> None:
            if sink.size < obj.size:
                blob.download_to_file(
                    sink, start=sink.size, raw_download=True, checksum=None, timeout=self.timeout, retry=self.retry
                )
            if sink.size != obj.size or _base64(sink.crc) != obj.crc32c:
                sink.restart()
                raise _WrongBytes("the bytes do not have the checksum that the server lists")

        self._persist(f"read {self.url(obj.name)}", call)
        return sink

    def delete(self, name: str, generation: int) -> None:
        """Delete exactly that generation; good if it is already gone. Raises Conflict if it is another one now."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        def call(attempt: int) -> None:
            try:
                self.bucket.blob(name).delete(if_generation_match=generation, timeout=self.timeout, retry=self.retry)
            except NotFound:
                pass
            except PreconditionFailed:
                if self.find(name) is not None:
                    raise Conflict(f"{self.url(name)} was replaced in the meantime; it was left as it is") from None

        self._persist(f"delete {self.url(name)}", call)

    def _persist(self, doing: str, call: Callable[[int], Any]) -> Any:
        """call(attempt) until it succeeds, cannot succeed, or patience ends."""
        end = time.monotonic() + self.patience
        for attempt in itertools.count():
            try:
                return call(attempt)
            except BucketError:
                raise
            except Exception as error:
                # A full disk does not pass; errors of requests are OSErrors too, but have no errno.
                wire = isinstance(error, ConnectionError | TimeoutError)
                if isinstance(error, OSError) and error.errno and not wire:
                    raise
                problem = error
            reason, tries = _explain(problem, self.url().rstrip("/"))
            pause = random.uniform(0.5, 1.0) * min(0.5 * 2**attempt, 30.0)
            if attempt + 1 >= tries:
                raise Refused(f"cannot {doing}: {reason}") from None
            if time.monotonic() + pause > end:
                raise BucketError(f"cannot {doing}: {reason}") from None
            log.warning("cannot %s yet: %s; again in %.0f s", doing, reason, pause)
            time.sleep(pause)


class _WrongBytes(Exception):
    pass


class _Sink:
    """Takes a body: counts it, sums it, and refuses more than was listed (so an inflated or endless one ends here).

    Without a file it keeps no bytes, but their SHA-256.
    """

    def __init__(self, file: BinaryIO | None, obj: Object, progress: Callable[[int], Any] | None):
        self.file, self.obj, self.progress = file, obj, progress or (lambda count: None)
        self.size, self.crc, self.sha = 0, Checksum(), hashlib.sha256()
        if file:
            file.seek(0)
            while data := file.read(READ_SIZE):
                self.crc.update(data)
                self.size += len(data)
        self.progress(self.size)

    def write(self, data: bytes) -> int:
        if self.size + len(data) > self.obj.size:
            self.restart()
            raise _WrongBytes(f"the server sends more than the {self.obj.size:,} bytes that it lists")
        self.file.write(data) if self.file else self.sha.update(data)
        self.crc.update(data)
        self.size += len(data)
        self.progress(len(data))
        return len(data)

    def restart(self) -> None:
        if self.file:
            self.file.seek(0)
            self.file.truncate()
        self.progress(-self.size)
        self.size, self.crc, self.sha = 0, Checksum(), hashlib.sha256()


def part_of(path: Path, obj: Object) -> Path:
    """Where the bytes of a download lie until they are complete; another generation's are never continued."""
    return path.with_name(f"{path.name}.{obj.generation}.part")


def split(url: str) -> tuple[str, str]:
    """("bucket", "prefix") of gs://bucket/prefix; the prefix has no slash at either end."""
    name, _, prefix = url.removeprefix("gs://").partition("/")
    prefix = prefix.strip("/")
    if not url.startswith("gs://") or (wrong := bucket_problem(name) or prefix_problem(prefix)):
        raise BucketError(f"{url!r} {wrong if url.startswith('gs://') else 'is no place'}; write gs://BUCKET/PREFIX")
    return name, prefix


def safe_name(name: str) -> str:
    """The name, if it can be a relative path below any folder; names in a bucket are whatever someone wrote."""
    parts = name.split("/")
    bad = (
        "is absolute or has an empty part" if "" in parts
        else "has a part . or .." if {".", ".."} & set(parts)
        else "has a backslash" if "\\" in name
        else "has a control character" if not name.isprintable()
        else "has a part of more than 200 bytes" if max(len(part.encode()) for part in parts) > 200
        else ""
    )  # fmt: skip
    if bad:
        raise BucketError(f"the object name {name[:100]!r} {bad}; it is refused as a file name")
    return name


def local_path(folder: Path, name: str) -> Path:
    """Where an object goes below folder; refuses a name that leaves it, also through a link that is there."""
    path = folder / PurePosixPath(safe_name(name))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BucketError(f"the object name {name!r} leads out of {folder}; it is refused as a file name")
    return path


def checksum_of(file: BinaryIO | Path) -> str:
    """CRC-32C of a whole file, in base64 as servers write it."""
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            return checksum_of(opened)
    crc = Checksum()
    file.seek(0)
    while data := file.read(READ_SIZE):
        crc.update(data)
    return _base64(crc)


def checksum_of_bytes(data: bytes) -> str:
    return _base64(Checksum(data))


def _base64(crc: Any) -> str:
    return base64.b64encode(crc.digest()).decode()


def _object(blob: Any) -> Object:
    updated = blob.updated.timestamp() if blob.updated else 0.0
    encoded = blob.content_encoding not in (None, "")
    return Object(blob.name, blob.size or 0, blob.crc32c or "", int(blob.generation or 0), updated, encoded)


LOGIN = "run `gcloud auth application-default login`, or give the machine a service account"


def _explain(error: BaseException, place: str) -> tuple[str, int]:
    """(the reason in one line without secrets, how many tries it is worth)."""
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth import exceptions as auth
    from google.cloud.storage.exceptions import InvalidResponse

    if isinstance(error, RetryError) and error.cause is not None:
        return _explain(error.cause, place)
    if isinstance(error, auth.DefaultCredentialsError):
        return f"no credentials for {place}; {LOGIN}", 1
    if isinstance(error, auth.RefreshError):
        return f"the credentials could not be refreshed; {LOGIN}", MANY if error.retryable else 1
    status = int(error.code or 0) if isinstance(error, GoogleAPICallError) else 0
    if isinstance(error, InvalidResponse):
        status = error.response.status_code
    reasons = {
        400: ("400, the server refused the request or the bytes' checksum", FEW),
        401: (f"401, the credentials were not accepted; {LOGIN}", 1),
        403: (
            f"403, the account may not do this; grant it roles/storage.objectUser on {place} (objectViewer to read)",
            1,
        ),
        404: (f"404, no such bucket or object in {place}, or the upload's session was lost", FEW),
        410: ("410, the upload's session was lost", FEW),
    }
    if status:
        return reasons.get(status, (f"the server answers {status}", MANY))
    if isinstance(error, _WrongBytes):
        return str(error), FEW
    return _root_cause(error), MANY


def _root_cause(error: BaseException | None) -> str:
    """The innermost reason of a transport error; the outer ones quote whole URLs."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        inner = getattr(error, "reason", None) or next(
            (a for a in error.args[::-1] if isinstance(a, BaseException)), None
        )
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
    for deepest in reversed(seen):
        if isinstance(deepest, OSError) and deepest.strerror:
            return f"{type(deepest).__name__}: {deepest.strerror}"
    return type(seen[-1]).__name__
