"""A gateway between the pods and the S3 server.

It logs every request. Tests use it to delay writes and to make the store unavailable.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP_BY_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "expect"}


@dataclass(frozen=True, slots=True)
class Request:
    """One logged request."""

    at: float
    client: str
    method: str
    path: str
    status: int


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
            self.gateway.requests.append(
                Request(
                    time.time(), self.client_address[0], self.command, self.path, response.status
                )
            )
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in (*_HOP_BY_HOP_HEADERS, "content-length"):
                    self.send_header(name, value)
            size = (
                response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            )
            self.send_header("Content-Length", size or "0")
            self.end_headers()
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
