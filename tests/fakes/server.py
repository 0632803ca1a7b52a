"""An in-process HTTP server with a request log and fault injection, for the S3 and GCS fakes."""

import base64
import hashlib
import re
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import google_crc32c

# Bytes of a body to read before choosing faults. GCS sends the name of an upload in the body.
PEEK = 64 << 10


def checksum(name: str, data: bytes) -> str:
    """Return the big-endian checksum in base64, the format of both stores."""
    if name in ("crc32", "crc32c"):
        value = zlib.crc32(data) if name == "crc32" else google_crc32c.value(data)
        return base64.b64encode(value.to_bytes(4, "big")).decode()
    return base64.b64encode(hashlib.new(name, data, usedforsecurity=False).digest()).decode()


def flipped(data: bytes, offset: int) -> bytes:
    """Return `data` with the lowest bit of one byte flipped."""
    return b"".join((data[:offset], bytes([data[offset] ^ 1]), data[offset + 1 :]))


@dataclass
class Request:
    """A received request. `status` stays None if no response is sent."""

    method: str
    target: str  # path and query as sent
    path: str  # unquoted
    query: dict[str, str]
    headers: dict[str, str]  # lower-case names
    operation: str = "Unknown"
    bucket: str = ""
    key: str = ""
    status: int | None = None
    size: int = 0  # of the received body
    body: bytes = field(default=b"", repr=False)  # cleared after the response
    data: bytes = field(default=b"", repr=False)  # the decoded body, also cleared
    checksums: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass
class Response:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Stored:
    """A stored object. `headers` are those of its download."""

    data: bytes
    headers: dict[str, str]
    resource: dict[str, Any] = field(default_factory=dict)


class Refusal(Exception):
    """An error response. Each fake formats it like its store."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        headers: dict[str, str] | None = None,
        **extra: str,
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}
        self.extra = extra


@dataclass
class Fault:
    """A fault to inject: which requests it affects, and how often. `hits` counts the injections.

    Every due "slow" fault applies, and the first due fault of the other kinds.
    "kill_store" ignores `times`: it applies from its first hit until it is removed from the list.
    """

    kind: Literal["status", "cut", "flip", "slow", "lost", "duplicate", "kill_store", "break"]
    operation: str | None = None
    key: str | None = None  # substring
    after: int = 0
    times: int | None = 1
    status: int = 500
    code: str | None = None
    message: str = "injected fault"
    page: bool = False  # whether a proxy answers, with a web page
    retry_after: int | None = None
    seconds: float = 0.0
    seen: int = 0
    hits: int = 0

    def due(self, request: Request) -> bool:
        """Count the request if it matches, and return whether the fault applies to it."""
        if self.kind == "kill_store" and self.hits:
            return True
        if self.operation not in (None, request.operation) or (self.key or "") not in request.key:
            return False
        self.seen += 1
        return self.seen > self.after and (self.times is None or self.hits < self.times)


def download_response(request: Request, stored: Stored, unsatisfiable: str) -> Response:
    """Return the response to a download of the whole object or a range."""
    size = len(stored.data)
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    first, last = found.groups() if found else ("", "")
    if not (first or last) or (first and last and int(last) < int(first)):
        # An invalid Range header is ignored.
        return Response(200, dict(stored.headers), stored.data)
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last), size - 1) if first and last else size - 1
    if start >= size:
        raise Refusal(
            416,
            unsatisfiable,
            "The requested range is not satisfiable",
            {"Content-Range": f"bytes */{size}"},
        )
    return Response(
        206,
        {**stored.headers, "Content-Range": f"bytes {start}-{end}/{size}"},
        stored.data[start : end + 1],
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "_Server"

    def log_message(self, *_: Any) -> None:
        """Log nothing: `FakeServer.requests` is the log."""

    def _serve(self) -> None:
        fake = self.server.fake
        request, length = self._parse()
        faults = fake.register(request)
        kind = next((fault.kind for fault in faults if fault.kind != "slow"), None)
        # A kept-alive connection outlives a stopped server.
        dead = kind == "kill_store" or fake.live is not self.server
        self.close_connection |= dead or kind in ("break", "lost", "cut")
        if not dead:
            expected = length // 2 if kind == "break" else length
            if self._read(request, expected) < length or kind == "break":
                self.close_connection = True  # because of the fault, or because the client left
                fake.body_interrupted(request)
            else:
                response = fake.respond(request, faults)
                if kind != "lost":
                    self._send(request, response, kind)
        request.body = b""
        request.data = b""

    # The base class defines these names.
    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve  # noqa: N815

    def _parse(self) -> tuple[Request, int]:
        """Read the headers and the start of the body. Return the request and the body's length."""
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            self.command,
            self.path,
            unquote(parts.path),
            dict(parse_qsl(parts.query, True)),
            headers,
        )
        chunked = "chunked" in headers.get("transfer-encoding", "")
        request.body = self._dechunk() if chunked else b""
        length = len(request.body) if chunked else int(headers.get("content-length", 0))
        self._read(request, length if chunked else min(length, PEEK))
        return request, length

    def _read(self, request: Request, upto: int) -> int:
        request.body = (request.body + self.rfile.read(max(0, upto - len(request.body))))[:upto]
        request.size = len(request.body)
        return request.size

    def _dechunk(self) -> bytes:
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return bytes(body)

    def _send(self, request: Request, response: Response, kind: str | None) -> None:
        request.status = response.status
        body = (
            flipped(response.body, len(response.body) // 2)
            if kind == "flip" and response.body
            else response.body
        )
        length = {} if response.status in (204, 304) else {"Content-Length": str(len(body))}
        self.send_response(response.status)
        for name, value in (response.headers | length).items():
            self.send_header(name, value)
        self.end_headers()
        if request.method != "HEAD":
            self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes racing clients wait for seconds
    fake: "FakeServer"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(
            sys.exception(), ConnectionError | ValueError
        ):  # the client left, possibly in the middle of a chunk
            self.fake.crashes.append(traceback.format_exc())


class FakeServer:
    """The server, its log and its faults. It can be stopped and restarted on the same port.

    A subclass provides:
    - `identify`: set operation, bucket and key, given only the start of the body;
    - `process`: handle the request, under the lock;
    - `error_response`: format an error. The code may be empty for an injected fault.
    """

    identify: Callable[[Request], None]
    process: Callable[[Request], Response]
    error_response: Callable[[Request, Refusal], Response]

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.buckets: dict[str, dict[str, Stored]] = {bucket: {}}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.crashes: list[str] = []  # exceptions of the fake itself; `stop` reports them
        self.lock = threading.RLock()
        self.endpoint = ""
        self.live: _Server | None = None

    @property
    def operations(self) -> list[str]:
        """Names of the requested operations in order, including faulty ones."""
        return [request.operation for request in list(self.requests)]

    @property
    def objects(self) -> dict[str, bytes]:
        """Current content of the bucket by key."""
        return {
            key: stored.data for key, stored in self.buckets.get(self.bucket, {}).copy().items()
        }

    def corrupt(self, key: str, offset: int) -> None:
        """Flip a bit of a stored object, but keep its stored checksums."""
        stored = self.buckets[self.bucket][key]
        stored.data = flipped(stored.data, offset)

    def start(self) -> Self:
        self.live = _Server(("127.0.0.1", int(self.endpoint.rpartition(":")[2] or 0)), _Handler)
        self.live.fake = self
        self.endpoint = f"http://127.0.0.1:{self.live.server_port}"
        threading.Thread(target=self.live.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop the server. Raise AssertionError if the fake itself failed on a request."""
        server, self.live = self.live, None
        if server:
            server.shutdown()
            server.server_close()
        crashes, self.crashes = self.crashes, []
        assert not crashes, "\n".join(crashes)

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()

    def register(self, request: Request) -> list[Fault]:
        """Log the request, and return the faults that apply to it."""
        with self.lock:
            self.identify(request)
            self.requests.append(request)
            due = [fault for fault in list(self.faults) if fault.due(request)]
            slow = [fault for fault in due if fault.kind == "slow"]
            others = [fault for fault in due if fault.kind != "slow"]
            applied = slow + others[:1]
            for fault in applied:
                fault.hits += 1
            return applied

    def respond(self, request: Request, faults: list[Fault]) -> Response:
        time.sleep(sum(fault.seconds for fault in faults))
        for fault in faults:
            if fault.kind == "status":
                headers = (
                    {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                )
                if fault.page:
                    body = f"<html><body>{fault.message}</body></html>".encode()
                    return Response(fault.status, headers | {"Content-Type": "text/html"}, body)
                return self.error_response(
                    request, Refusal(fault.status, fault.code or "", fault.message, headers)
                )
            if fault.kind == "duplicate":
                self._process(request)
        return self._process(request)

    def _process(self, request: Request) -> Response:
        try:
            with self.lock:
                return self.process(request)
        except Refusal as refusal:
            return self.error_response(request, refusal)
        except Exception:  # a bug of the fake must not look like a network fault
            self.crashes.append(traceback.format_exc())
            return self.error_response(
                request, Refusal(500, "", "the fake failed; see FakeServer.crashes")
            )

    def body_interrupted(self, request: Request) -> None:
        """Handle a body that was cut off. By default, the store keeps nothing of it."""
