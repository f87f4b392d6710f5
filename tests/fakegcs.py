"""A fake of the Google Cloud Storage JSON API: a real HTTP server with real preconditions, checksums and faults.

    with FakeGCS() as server:                            # listens on a free port of 127.0.0.1
        os.environ["STORAGE_EMULATOR_HOST"] = server.url
        server.fault("PUT", "upload_id", status=503)     # the next chunk of an upload is answered with 503

Objects live in memory. It knows what the official client uses: list, get, media with ranges, delete, both uploads.
"""

import base64
import contextlib
import itertools
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c
from launch import GUARD


@dataclass
class Stored:
    """One object."""

    name: str
    data: bytes
    crc32c: str
    generation: int
    updated: str
    encoding: str | None = None
    size: int | None = None  # what listings say where that is not len(data): an object too large to hold

    def metadata(self, server: str, bucket: str) -> dict:
        return {
            "bucket": bucket, "name": self.name, "size": str(len(self.data) if self.size is None else self.size),
            "crc32c": self.crc32c, "generation": str(self.generation), "metageneration": "1",
            "mediaLink": f"{server}/download/storage/v1/b/{bucket}/o/{quote(self.name, safe='')}?alt=media",
            "updated": self.updated, **({"contentEncoding": self.encoding} if self.encoding else {}),
        }  # fmt: skip


@dataclass
class Session:
    """A resumable upload under way."""

    bucket: str
    metadata: dict
    precondition: str | None
    received: bytearray = field(default_factory=bytearray)
    stored: Stored | None = None


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match, after `skip` that do not suffer it."""

    method: str
    pattern: str
    times: int = 1
    skip: int = 0
    status: int = 0  # answer this instead of doing anything
    reset: bool = False  # break the connection before anything is read
    lost: bool = False  # do it, then break the connection instead of answering
    cut: int = 0  # break the connection after so many bytes of the body, request's or response's
    corrupt: bool = False  # flip one bit of the body, request's or response's
    keep: int = -1  # a chunk of an upload: keep only so many bytes, and say so
    stall: float = 0.0  # seconds of silence before the answer
    rate: float = 0.0  # bytes per second of the body
    hits: int = 0


class Refused(Exception):
    """An HTTP error answer: its status and message."""


class Reset(Exception):
    """The connection is to be broken."""


def checksum(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(bytes(data)).digest()).decode()


class FakeGCS:
    """The server; a context manager. `requests` lists (method, path with query)."""

    def __init__(self, buckets: tuple[str, ...] = ("bucket",), host: str = "127.0.0.1"):
        self.buckets: dict[str, dict[str, Stored]] = {name: {} for name in buckets}
        self.sessions: dict[str, Session] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.violations: list[str] = []  # files for which a manifest spoke while they were not there, or not as it says
        self.stored: list[str] = []  # names, one for each time
        self.page_size = 1000
        self.lock = threading.RLock()
        self.came = threading.Condition(self.lock)  # notified by every request
        self.generations = itertools.count(int(time.time() * 1e6))
        self.session_ids = itertools.count(1)
        self.server = _Server((host, 0), type("BoundHandler", (_Handler,), {"gcs": self}))
        self.url = f"http://{host}:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeGCS":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, name: str, data: bytes, bucket: str = "bucket", **fields) -> Stored:
        """Store an object directly."""
        with self.lock:
            now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
            stored = Stored(name, bytes(data), checksum(data), next(self.generations), now, **fields)
            self.buckets[bucket][name] = stored
            return stored

    @property
    def commits(self) -> list[str]:
        """Names of checkpoints whose manifest was written, one for each time."""
        return [name.split("/")[-2] for name in self.stored if name.endswith("/MANIFEST.json")]

    def names(self, prefix: str = "", bucket: str = "bucket") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def data(self, name: str, bucket: str = "bucket") -> bytes:
        return self.buckets[bucket][name].data

    def fault(self, method: str, pattern: str, **what) -> Fault:
        """Arm a fault for requests whose method and path with query match; see Fault for what it can be."""
        with self.lock:
            self.faults.append(fault := Fault(method, pattern, **what))
            return fault

    def count(self, method: str, pattern: str) -> int:
        """How many such requests there were."""
        with self.lock:
            return sum(m == method and bool(re.search(pattern, path)) for m, path in self.requests)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Until happened(), which is asked after every request and now and then besides."""
        end = time.monotonic() + GUARD
        with self.came:
            while not happened():
                assert time.monotonic() < end, f"it did not happen in {GUARD} s"
                self.came.wait(0.1)

    def next_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.fullmatch(fault.method, method) and re.search(fault.pattern, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    fault.hits += 1
                    return fault
        return Fault(method, path)

    def check(self, bucket: str, name: str, wanted: str | None) -> Stored | None:
        """The object of that name, after its generation was compared with the precondition (0: none exists)."""
        present = self.buckets[bucket].get(name)
        if wanted is not None and int(wanted) != (present.generation if present else 0):
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        return present

    def store(self, bucket: str, metadata: dict, data: bytes, precondition: str | None) -> Stored:
        """Create or replace an object, in one step, if the precondition holds and the checksum is right."""
        if metadata.get("crc32c") not in (None, checksum(data)):
            raise Refused(400, "Provided CRC32C doesn't match calculated CRC32C.")
        with self.lock:
            self.check(bucket, metadata["name"], precondition)
            stored = self.put(metadata["name"], data, bucket)
            self.stored.append(stored.name)
            self.look(bucket)
            return stored

    def remove(self, bucket: str, name: str) -> None:
        with self.lock:
            del self.buckets[bucket][name]
            self.look(bucket)

    def look(self, bucket: str) -> None:
        for name, stored in self.buckets[bucket].items():
            with contextlib.suppress(ValueError):  # somebody's file that is no manifest
                told = json.loads(stored.data)["manifest"] if name.endswith("/MANIFEST.json") else {"files": {}}
                for file, entry in told["files"].items():
                    there = self.buckets[bucket].get(f"{name.removesuffix('MANIFEST.json')}{told['save_id']}/{file}")
                    if there is None or (len(there.data), there.crc32c) != (entry["size"], entry["crc32c"]):
                        self.violations.append(f"{name}: {file}")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_) -> None:
        pass  # clients that are killed in the middle of a request are the point of these tests


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    gcs: FakeGCS
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    rbufsize = 1 << 18

    def log_message(self, *_) -> None:
        pass

    def handle_request(self) -> None:
        self.fault = self.gcs.next_fault(self.command, self.path)
        with self.gcs.lock:
            self.gcs.requests.append((self.command, self.path))
            self.gcs.came.notify_all()
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.unread = int(self.headers.get("Content-Length") or 0)
        try:
            time.sleep(self.fault.stall)
            if self.fault.reset:
                raise Reset
            if self.fault.status:
                raise Refused(self.fault.status, "injected")
            self.route(url.path)
        except Refused as refusal:
            self.fault.lost = False
            with contextlib.suppress(OSError):
                status, message = refusal.args
                return self.answer({"error": {"code": status, "message": message}}, status)
            self.close_connection = True
        except (Reset, OSError):
            self.break_connection()

    do_GET = do_PUT = do_POST = do_DELETE = handle_request

    def route(self, path: str) -> None:
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)/o(?:/(.*))?", path)
        if not match:
            raise Refused(501, f"{self.command} {path} is not known here")
        kind, bucket, name = match[1], unquote(match[2]), match[3] and unquote(match[3])
        if bucket not in self.gcs.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        if kind == "/upload":
            self.upload(bucket)
        elif name is None:
            self.list(bucket)
        elif self.command == "DELETE":
            with self.gcs.lock:
                self.find(bucket, name)
                self.gcs.remove(bucket, name)
            self.answer(None, 204)
        elif kind == "/download" or self.query.get("alt") == "media":
            self.media(self.find(bucket, name))
        else:
            self.answer(self.find(bucket, name).metadata(self.gcs.url, bucket))

    def find(self, bucket: str, name: str) -> Stored:
        with self.gcs.lock:
            present = self.gcs.check(bucket, name, self.query.get("ifGenerationMatch"))
            if present is None or int(self.query.get("generation", present.generation)) != present.generation:
                raise Refused(404, f"No such object: {bucket}/{name}")
            return present

    def list(self, bucket: str) -> None:
        with self.gcs.lock:
            after = self.query.get("pageToken", "")
            names = [name for name in self.gcs.names(self.query.get("prefix", ""), bucket) if name > after]
            shown = names[: self.gcs.page_size]
            items = [self.gcs.buckets[bucket][name].metadata(self.gcs.url, bucket) for name in shown]
        self.answer({"items": items, **({"nextPageToken": shown[-1]} if len(names) > len(shown) else {})})

    def media(self, stored: Stored) -> None:
        """The object's bytes from Range's start on, with what GCS says about them in the headers."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        size = len(stored.data)
        start = int(match[1]) if match else 0
        end = min(int(match[2]) + 1 if match and match[2] else size, size)
        if match and start >= size:
            raise Refused(416, "The requested range cannot be satisfied.")
        body = memoryview(stored.data)[start:end]
        headers = {"X-Goog-Hash": f"crc32c={stored.crc32c}", "X-Goog-Generation": stored.generation}
        headers |= {"X-Goog-Stored-Content-Length": size, "Content-Length": len(body)}
        if stored.encoding:
            headers |= {"Content-Encoding": stored.encoding, "X-Goog-Stored-Content-Encoding": stored.encoding}
        if match:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.begin(206 if match else 200, headers)
        if self.fault.corrupt:
            body = flip(body)
        if self.fault.rate:
            for at in range(0, len(body), 1 << 16):
                self.wfile.write(body[at : at + (1 << 16)])
                time.sleep((1 << 16) / self.fault.rate)
        elif self.fault.cut and self.fault.cut < len(body):
            self.wfile.write(body[: self.fault.cut])
            raise Reset
        else:
            self.wfile.write(body)

    def upload(self, bucket: str) -> None:
        if self.command == "PUT":
            self.upload_chunk()
        elif self.query.get("uploadType") == "multipart":
            self.upload_at_once(bucket)
        else:
            metadata = json.loads(self.body() or b"{}")
            precondition = self.query.get("ifGenerationMatch")
            with self.gcs.lock:
                self.gcs.check(bucket, metadata["name"], precondition)  # checked now, and again at the end
                upload_id = f"secret-session-{next(self.gcs.session_ids)}"
                self.gcs.sessions[upload_id] = Session(bucket, metadata, precondition)
            location = f"{self.gcs.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload_id}"
            self.answer({}, headers={"Location": location})

    def upload_at_once(self, bucket: str) -> None:
        """Metadata and bytes as the two parts of one multipart/related body."""
        boundary = re.search(r"boundary=[\"']?([^;\"']+)", self.headers["Content-Type"])[1].encode()
        parts = bytes(self.body()).split(b"--" + boundary)
        metadata = json.loads(parts[1].partition(b"\r\n\r\n")[2])
        data = (b"--" + boundary).join(parts[2:-1]).partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        stored = self.gcs.store(bucket, metadata, data, self.query.get("ifGenerationMatch"))
        self.answer(stored.metadata(self.gcs.url, bucket))

    def upload_chunk(self) -> None:
        session = self.gcs.sessions.get(self.query.get("upload_id", ""))
        if session is None:
            raise Refused(404, "No such upload session.")
        match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes */*"))
        received, broken = session.received, False
        if match[1] is not None and session.stored is None:
            start = int(match[1])
            if start > len(received):
                raise Refused(400, f"the chunk starts at {start}, but {len(received)} bytes are here")
            try:
                chunk = self.body()
            except Reset:
                chunk, broken = self.partial, True  # what arrived before the break is kept, as GCS does
            chunk = chunk[len(received) - start :]
            received += chunk if self.fault.keep < 0 else chunk[: self.fault.keep]
        if broken:
            raise Reset
        if session.stored is None and match[2] != "*" and len(received) == int(match[2]):
            if wanted := re.search(r"crc32c=([^,]+)", self.headers.get("X-Goog-Hash", "")):
                session.metadata["crc32c"] = wanted[1]
            session.stored = self.gcs.store(session.bucket, session.metadata, received, session.precondition)
            session.received = bytearray()
        if session.stored is not None:
            self.answer(session.stored.metadata(self.gcs.url, session.bucket))
        else:
            self.answer(None, 308, {"Range": f"bytes=0-{len(received) - 1}"} if received else {})

    def body(self) -> bytearray:
        """The request's body; raises Reset where a fault or the client breaks it, with the rest in self.partial."""
        self.partial = received = bytearray()
        while self.unread:
            limit = self.fault.cut - len(received) if self.fault.cut else self.unread
            piece = self.rfile.read(min(self.unread, 1 << 18, limit))
            if not piece:
                raise Reset
            received += piece
            self.unread -= len(piece)
            if self.fault.rate:
                time.sleep(len(piece) / self.fault.rate)
        return bytearray(flip(received)) if self.fault.corrupt else received

    def answer(self, content: dict | None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        while self.unread and (dropped := self.rfile.read(min(self.unread, 1 << 18))):
            self.unread -= len(dropped)
        if self.fault.lost:
            raise Reset
        body = b"" if content is None else json.dumps(content).encode()
        self.begin(status, {**(headers or {}), "Content-Type": "application/json", "Content-Length": len(body)})
        self.wfile.write(body)

    def begin(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def break_connection(self) -> None:
        """Send RST rather than FIN: what a dying network looks like."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def flip(data: bytes | memoryview) -> bytes:
    return bytes([data[0] ^ 1]) + bytes(data[1:]) if len(data) else b""
