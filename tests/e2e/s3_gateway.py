"""A gateway between the pods and the S3 server.

It logs every request. Tests use it to delay writes and to make the store unavailable.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_SIGNED_BY = re.compile(r"Credential=([^/%]+)")
_ERROR = "<Error><Code>{}</Code><Message>refused by the test</Message></Error>"
_HOP_BY_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "expect"}


@dataclass(frozen=True, slots=True)
class Request:
    """One logged request."""

    at: float
    client: str
    method: str
    path: str
    key: str
    """Access key that signed it; empty if none did."""
    status: int = 0

    @property
    def target(self) -> str:
        """Bucket and key. For a listing, bucket and prefix."""
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if "list-type" in query:
            return f"{url.path.rstrip('/')}/{query.get('prefix', [''])[0]}"
        return unquote(url.path)


@dataclass(slots=True)
class S3Gateway:
    """Controls the gateway and reads its log."""

    endpoint: str
    requests: list[Request] = field(default_factory=list)
    unavailable: threading.Event = field(default_factory=threading.Event)
    """While set, every connection is dropped."""
    held: threading.Event = field(default_factory=threading.Event)
    """Set once `hold` has delayed a request."""
    _held_writes: tuple[str, str] | None = None
    """Client and part of the key of the writes to delay."""
    _refused: Callable[[Request], bool] | None = None
    _refusal: str = ""
    _released: threading.Event = field(default_factory=threading.Event)

    def hold(self, client: str, part: str) -> None:
        """Delay this client's writes to keys that contain `part`, until `release`."""
        self.held.clear()
        self._released.clear()
        self._held_writes = (client, part)

    def release(self) -> None:
        """Forward the delayed writes."""
        self._held_writes = None
        self._released.set()

    def refuse(self, refused: Callable[[Request], bool] | None, code: str = "") -> None:
        """Answer requests with a 403 and this error code; None refuses no more requests."""
        self._refusal = code
        self._refused = refused

    def refusal(self, request: Request) -> str:
        """The error code for a request, or nothing. The handler calls it for every request."""
        return self._refusal if self._refused and self._refused(request) else ""

    def key_of(self, client: str) -> str:
        """Access key of this client's last request."""
        return next(each.key for each in reversed(self.requests) if each.client == client)

    def wait_if_held(self, client: str, method: str, path: str) -> None:
        """Block while this request is to be delayed. The handler calls it for every request."""
        if self._held_writes is None:
            return
        held_client, part = self._held_writes
        if method == "PUT" and client == held_client and part in path:
            self.held.set()
            self._released.wait(600)

    def writes(self, part: str, since: float = 0.0) -> list[Request]:
        """Return the writes to keys that contain `part`, including refused ones."""
        return [
            request
            for request in self.requests
            if request.method in ("PUT", "POST") and part in request.path and request.at >= since
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gateway: S3Gateway
    target: tuple[str, int]

    def _forward(self) -> None:
        if self.gateway.unavailable.is_set():
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.gateway.wait_if_held(self.client_address[0], self.command, self.path)
        signed = _SIGNED_BY.search(self.headers.get("Authorization") or self.path)
        request = Request(
            time.time(),
            self.client_address[0],
            self.command,
            self.path,
            unquote(signed[1]) if signed else "",
        )
        if code := self.gateway.refusal(request):
            self.gateway.requests.append(replace(request, status=403))
            self._answer(403, {"Content-Type": "application/xml"}, _ERROR.format(code).encode())
            return
        upstream = http.client.HTTPConnection(*self.target, timeout=120)
        with contextlib.closing(upstream):
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in _HOP_BY_HOP_HEADERS
            }
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            data = response.read()
            self.gateway.requests.append(replace(request, at=time.time(), status=response.status))
            size = response.getheader("Content-Length") if self.command == "HEAD" else None
            self._answer(response.status, dict(response.getheaders()), data, size)

    def _answer(
        self, status: int, headers: Mapping[str, str], data: bytes, size: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in (*_HOP_BY_HOP_HEADERS, "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", size or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing; `S3Gateway.requests` is the log."""


@contextlib.contextmanager
def s3_gateway(endpoint: str, host: str) -> Iterator[S3Gateway]:
    """Listen on `host` and forward requests to `endpoint`.

    All headers are forwarded unchanged, because the signature covers the name of the host.
    """
    upstream = urlsplit(endpoint)
    handler = type("Handler", (_Handler,), {"target": (upstream.hostname, upstream.port)})
    server = ThreadingHTTPServer((host, 0), handler)
    server.daemon_threads = True
    gateway = S3Gateway(f"http://{host}:{server.server_address[1]}")
    handler.gateway = gateway  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield gateway
    finally:
        server.shutdown()
