"""A bucket as a few calls: list, find, read, create, upload, download, delete. The only file that imports google.cloud.

    bucket = gcs.Bucket("my-bucket")
    for obj in bucket.list("tokens/"):
        bucket.download(obj, gcs.local_path(Path("data"), obj.name))

Credentials are Application Default Credentials; with STORAGE_EMULATOR_HOST set the same code talks to an emulator.
Every call retries what may pass (resets, 5xx, lost sessions, wrong bytes) until its patience ends, then raises
BucketError: one line that names the object, the reason and the fix, and holds no token and no session URL.
"""

import base64
import contextlib
import glob
import hashlib
import io
import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from google_crc32c import Checksum
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from configs import bucket_problem, prefix_problem
from refocused import files

log = logging.getLogger("gcs")
Progress = Callable[[int], Any]  # takes the number of bytes that came; negative where bytes are fetched again

CHUNK = 16 << 20  # bytes per request of a resumable upload; each stream holds two of them
SMALLEST_CHUNK = 256 << 10  # what the protocol allows
ONE_REQUEST = 8 << 20  # the client sends a file up to this size in one request
READ_SIZE = 1 << 20
FEW = 4  # tries for what is final unless the wire or the session was to blame
MANY = 10**9  # tries until patience ends
LOGIN = "run `gcloud auth application-default login`, or give the machine a service account"


class BucketError(ValueError):
    """The bucket did not give, or take, what was asked; the message is one line for the user."""

    exit_code = 66
    same_on_all_ranks = True  # so one of them says it


class Unavailable(BucketError):
    """The bucket did not answer as long as patience lasted: the same command may find it back."""

    exit_code = 70


class Refused(BucketError):
    """The bucket said no, and waiting does not change that."""


class Conflict(BucketError):
    """An object of that name exists with other bytes, or was changed in between."""


class Gone(BucketError):
    """An object was deleted or replaced after it was listed."""


@dataclass(frozen=True)
class Object:
    """One object as the server lists it."""

    name: str
    size: int
    crc32c: str  # base64 of the big-endian checksum, as the server writes it
    generation: int
    updated: float  # seconds since the epoch
    encoded: bool  # stored with Content-Encoding: its bytes are not the file's

    @classmethod
    def of(cls, blob: Any) -> "Object":
        updated = blob.updated.timestamp() if blob.updated else 0.0
        generation, encoded = int(blob.generation or 0), bool(blob.content_encoding)
        return cls(blob.name, blob.size or 0, blob.crc32c or "", generation, updated, encoded)


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
        self.name, self.patience = name, patience
        self.bucket = client.bucket(name)
        # The client's own retry keeps a download's position and an upload's session; ours starts where it gives up.
        self.limits = {"timeout": (timeout, timeout), "retry": DEFAULT_RETRY.with_timeout(min(2 * timeout, patience))}

    def url(self, name: str = "") -> str:
        return f"gs://{self.name}/{name}"

    def list(self, prefix: str = "") -> list[Object]:
        """Every object whose name starts with prefix, sorted by name."""
        fields = "items(name,size,crc32c,generation,updated,contentEncoding),nextPageToken"

        def call(attempt: int) -> list[Object]:
            blobs = self.bucket.client.list_blobs(self.bucket, prefix=prefix, fields=fields, **self.limits)
            return sorted(map(Object.of, blobs), key=lambda o: o.name)

        def no_bucket() -> None:
            raise Refused(f"there is no bucket gs://{self.name}: create it, or mend the name")

        return self._persist(f"list {self.url(prefix)}", call, {404: no_bucket})

    def find(self, name: str) -> Object | None:
        """The object of exactly this name, by its metadata alone; None if there is none."""
        blob = self._persist(f"look at {self.url(name)}", lambda attempt: self.bucket.get_blob(name, **self.limits))
        return Object.of(blob) if blob else None

    def read(self, name: str) -> tuple[bytes, int] | None:
        """A small object's bytes, checked, and its generation; None if there is none."""
        while obj := self.find(name):
            with contextlib.suppress(Gone):  # replaced in between
                return self.content(obj), obj.generation
        return None

    def content(self, obj: Object, limit: int = 64 << 20) -> bytes:
        """A listed object's bytes, checked. Raises Gone."""
        if obj.size > limit:
            raise BucketError(f"{self.url(obj.name)} has {obj.size:,} bytes; at most {limit:,} are read of such a file")
        sink = io.BytesIO()
        self._receive(obj, sink)
        return sink.getvalue()

    def create(self, name: str, data: bytes, generation: int = 0) -> int:
        """Write a small object whose present generation is as given (0: there is none); returns the new generation.

        Raises Conflict when it is another, unless the object holds these bytes: then only our answer was lost.
        """
        return self._send(name, io.BytesIO(data), len(data), checksum(data), generation)

    def upload(self, name: str, path: Path, size: int, crc32c: str) -> None:
        """Create an object from a file of this size and CRC-32C. One that is there with both is accepted, else Conflict."""
        with open(path, "rb") as file:
            actual = os.fstat(file.fileno()).st_size
            # The client lets the server check one-request uploads against what it read, not against what we know.
            if actual != size or size <= ONE_REQUEST and checksum(file.read()) != crc32c:
                raise BucketError(f"{path} is not the file that its manifest describes; it stays out of the bucket")
            self._send(name, file, size, crc32c, 0)

    def _send(self, name: str, stream: BinaryIO, size: int, crc32c: str, generation: int) -> int:
        def call(attempt: int) -> int:
            # The socket's timeout covers the sending of a whole chunk: on a slow link only a smaller one gets through.
            blob = self.bucket.blob(name, chunk_size=max(CHUNK >> 2 * attempt, SMALLEST_CHUNK))
            # Where the client itself compares, it deletes on a mismatch, without a generation.
            checks: dict[str, Any] = {
                "checksum": "crc32c" if size <= ONE_REQUEST else None,
                "crc32c_checksum_value": crc32c,
            }
            checks |= {"if_generation_match": generation, "content_type": "application/octet-stream"}
            blob.upload_from_file(stream, rewind=True, size=size, **checks, **self.limits)
            return blob.generation

        def exists() -> int:
            there = self.find(name)
            if there is None or (there.size, there.crc32c) != (size, crc32c):
                raise Conflict(f"{self.url(name)} exists with other bytes; it was left as it is")
            return there.generation

        return self._persist(f"write {self.url(name)}", call, {412: exists})

    def download(self, obj: Object, path: Path, progress: Progress = lambda count: None) -> None:
        """One object to a file that appears complete and verified or not at all.

        Bytes go to `<name>.<generation>.part`, which a later call continues.
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
            os.replace(part, path)
        except OSError as error:
            raise BucketError(f"{part}: {files.why(error)}; once that is mended it goes on from there") from None
        files.sync_folder(path.parent)

    def sha256(self, obj: Object, progress: Progress) -> str:
        """The SHA-256 of an object's bytes, which are all read and not kept. Raises Gone."""

        def call(attempt: int) -> str:
            sha, crc = hashlib.sha256(), Checksum()
            with self.bucket.blob(obj.name, generation=obj.generation).open(
                "rb", raw_download=True, **self.limits
            ) as file:
                while data := file.read(CHUNK):
                    sha.update(data)
                    crc.update(data)
                    progress(len(data))
            if _base64(crc) != obj.crc32c:
                raise _WrongBytes
            return sha.hexdigest()

        return self._persist(f"read {self.url(obj.name)}", call, {404: lambda: self._gone(obj)})

    def _receive(self, obj: Object, file: BinaryIO, progress: Progress = lambda count: None) -> None:
        """The object's bytes behind those that file already holds; on return size and CRC-32C are the listed ones."""
        blob = self.bucket.blob(obj.name, generation=obj.generation)
        progress(file.seek(0, os.SEEK_END))

        def call(attempt: int) -> None:
            if (start := file.seek(0, os.SEEK_END)) < obj.size:
                sink = CallbackIOWrapper(progress, file, "write")
                # Of a download that was cut and continued the client compares no checksum.
                blob.download_to_file(sink, start=start, raw_download=True, checksum=None, **self.limits)
            size, crc = file.tell(), Checksum()
            file.seek(0)
            while data := file.read(READ_SIZE):
                crc.update(data)
            if size != obj.size or _base64(crc) != obj.crc32c:
                file.truncate(0)
                progress(-size)
                raise _WrongBytes

        self._persist(f"read {self.url(obj.name)}", call, {404: lambda: self._gone(obj)})

    def _gone(self, obj: Object) -> None:
        raise Gone(f"{self.url(obj.name)} was deleted or replaced in the meantime; start again")

    def delete(self, name: str, generation: int) -> None:
        """Delete exactly that generation; good if it is already gone. Raises Conflict if it is another one now."""

        def replaced() -> None:
            if self.find(name) is not None:
                raise Conflict(f"{self.url(name)} was replaced in the meantime; it was left as it is")

        def call(attempt: int) -> None:
            self.bucket.blob(name).delete(if_generation_match=generation, **self.limits)

        self._persist(f"delete {self.url(name)}", call, {404: lambda: None, 412: replaced})

    def _persist(self, doing: str, call: Callable[[int], Any], answers: Mapping[int, Callable[[], Any]] = {}) -> Any:
        """call(attempt) until it succeeds, cannot succeed, or patience ends; answers: what a status means here."""
        end = time.monotonic() + self.patience
        for attempt in itertools.count():
            try:
                return call(attempt)
            except Exception as error:
                # A full disk does not pass; errors of requests are OSErrors too, but have no errno.
                wire = isinstance(error, ConnectionError | TimeoutError)
                if isinstance(error, OSError) and error.errno and not wire:
                    raise
                problem = error
            if answer := answers.get(_status(problem)):
                return answer()
            reason, tries = _explain(problem, self.url().rstrip("/"))
            pause = random.uniform(0.5, 1.0) * min(0.5 * 2**attempt, 30.0)
            if attempt + 1 >= tries:
                raise Refused(f"cannot {doing}: {reason}")
            if time.monotonic() + pause > end:
                raise Unavailable(f"cannot {doing}: {reason}")
            log.warning("cannot %s yet: %s; again in %.0f s", doing, reason, pause)
            time.sleep(pause)


class _WrongBytes(Exception):
    """What came has another size or CRC-32C than the server lists."""


def part_of(path: Path, obj: Object) -> Path:
    """Where the bytes of a download lie until they are complete; another generation's are never continued."""
    return path.with_name(f"{path.name}.{obj.generation}.part")


def check_space(folder: Path, coming: Mapping[Path, Object]) -> None:
    """Raise BucketError unless the folder's disk has room for what is still to come of these files."""
    parts = [part for path, obj in coming.items() if (part := part_of(path, obj)).exists()]
    need = sum(obj.size for obj in coming.values()) - sum(part.stat().st_size for part in parts)
    if lack := files.too_small(folder, need):
        raise BucketError(
            f"{need / 1e9:,.2f} GB are still to come and {lack}; free some space, or choose another folder"
        )


def in_parallel(
    function: Callable[[Any, Progress], Any], items: Iterable[Any], streams: int, size: int | None = None
) -> None:
    """function(item, progress) for every item, in daemon threads; the first exception stops the rest and is raised.

    size: all bytes, for a bar; None for none. Not a ThreadPoolExecutor, because the interpreter waits for its threads at
    exit, however long a transfer takes.
    """
    queue, lock = iter([*items]), threading.Lock()  # all threads take from one iterator: a list's is safe
    problems: list[BaseException] = []
    bar = tqdm(total=size, unit="B", unit_scale=True, smoothing=0.1, disable=None if size else True)

    def progress(count: int) -> None:
        with lock:
            bar.update(count)

    def work() -> None:
        try:
            for item in queue:
                if problems:
                    return
                function(item, progress)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(streams)]
    with bar:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if problems:
        raise problems[0]


def split(url: str) -> tuple[str, str]:
    """("bucket", "prefix") of gs://bucket/prefix; the prefix has no slash at either end."""
    name, _, prefix = url.removeprefix("gs://").partition("/")
    prefix = prefix.strip("/")
    wrong = "is no place"
    if url.startswith("gs://"):
        no_bucket = bucket_problem(name)
        wrong = f"cannot be: {name!r} {no_bucket}" if no_bucket else prefix_problem(prefix)
    if wrong:
        raise BucketError(f"{url!r} {wrong}; write gs://BUCKET/PREFIX")
    return name, prefix


def safe_name(name: str) -> str:
    """The name, if it can be a relative path below any folder; names in a bucket are whatever someone wrote."""
    wrong = prefix_problem(name) or (
        "has an empty part" if not name or name.endswith("/")
        else "has a backslash" if "\\" in name
        else "has a part of more than 200 bytes" if max(len(part.encode()) for part in name.split("/")) > 200
        else ""
    )  # fmt: skip
    if wrong:
        raise BucketError(f"the object name {name[:100]!r} {wrong}; it is refused as a file name")
    return name


def local_path(folder: Path, name: str) -> Path:
    """Where an object goes below folder; refuses a name that leaves it, also through a link that is there."""
    path = folder / PurePosixPath(safe_name(name))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BucketError(f"the object name {name!r} leads out of {folder}; it is refused as a file name")
    return path


def checksum(data: bytes) -> str:
    """CRC-32C in base64, as servers write it."""
    return _base64(Checksum(data))


def _base64(crc: Any) -> str:
    return base64.b64encode(crc.digest()).decode()


def _status(error: BaseException) -> int:
    """The HTTP status that an error of the client stands for; 0 if it stands for none."""
    response = getattr(error, "response", None)
    return int(getattr(error, "code", None) or getattr(response, "status_code", None) or 0)


def _explain(error: BaseException, place: str) -> tuple[str, int]:
    """(the reason in one line without secrets, how many tries it is worth)."""
    from google.auth.exceptions import DefaultCredentialsError, RefreshError

    error = getattr(error, "cause", None) or error  # of a retry of the client that gave up
    if isinstance(error, DefaultCredentialsError):
        return f"no credentials for {place}; {LOGIN}", 1
    if isinstance(error, RefreshError):
        return f"the credentials could not be refreshed; {LOGIN}", MANY if error.retryable else 1
    if isinstance(error, _WrongBytes):
        return "the bytes do not have the checksum that the server lists", FEW
    role = f"grant it roles/storage.objectUser on {place} (objectViewer to read)"
    reasons = {
        400: ("400, the server refused the request or the bytes' checksum", FEW),
        401: (f"401, the credentials were not accepted; {LOGIN}", 1),
        403: (f"403, the account may not do this; {role}", 1),
        404: (f"404, no such bucket or object in {place}, or the upload's session was lost", FEW),
        410: ("410, the upload's session was lost", FEW),
    }
    if status := _status(error):
        return reasons.get(status, (f"the server answers {status}", MANY))
    return _root_cause(error), MANY


def _root_cause(error: BaseException) -> str:
    """The innermost reason of a transport error; the outer ones quote whole URLs."""
    reason = ""
    for _ in range(20):  # no chain is that long, and one may be a ring
        if isinstance(error, OSError) and error.strerror:
            reason = f"{type(error).__name__}: {error.strerror}"
        within = [getattr(error, "reason", None), *error.args[::-1], error.__cause__, error.__context__]
        error = next((inner for inner in within if isinstance(inner, BaseException)), error)
    return reason or type(error).__name__
