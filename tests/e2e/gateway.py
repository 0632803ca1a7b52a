"""A door before the S3 server that pods go through: it keeps a log of who asked for what, and it can be shut."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "expect"}


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as the log has it."""

    at: float
    client: str
    method: str
    path: str
    status: int


@dataclass(slots=True)
class Gateway:
    """What the tests see of it."""

    endpoint: str
    requests: list[Request] = field(default_factory=list)
    away: threading.Event = field(default_factory=threading.Event)
    """While set, every connection is dropped."""
    held: threading.Event = field(default_factory=threading.Event)
    """Set once a request waits at the door."""
    _keep: tuple[str, str] | None = None
    _go: threading.Event = field(default_factory=threading.Event)

    def hold(self, client: str, part: str) -> None:
        """From here on, have this client's writes to keys that contain `part` wait at the door, until `let_go`."""
        self.held.clear()
        self._go.clear()
        self._keep = (client, part)

    def let_go(self) -> None:
        """Let them in."""
        self._keep = None
        self._go.set()

    def wait_at_the_door(self, client: str, method: str, path: str) -> None:
        """Called for every request."""
        keep = self._keep
        if keep is not None and method == "PUT" and client == keep[0] and keep[1] in path:
            self.held.set()
            self._go.wait(600)

    def writes(self, part: str, since: float = 0.0) -> list[Request]:
        """Successful and refused writes to keys that contain `part`."""
        return [
            r
            for r in self.requests
            if r.method in ("PUT", "POST") and part in r.path and r.at >= since
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gateway: Gateway
    target: tuple[str, int]

    def _forward(self) -> None:
        if self.gateway.away.is_set():
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.gateway.wait_at_the_door(self.client_address[0], self.command, self.path)
        upstream = http.client.HTTPConnection(*self.target, timeout=120)
        with contextlib.closing(upstream):
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in _HOP
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
                if name.lower() not in (*_HOP, "content-length"):
                    self.send_header(name, value)
            size = (
                response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            )
            self.send_header("Content-Length", size or "0")
            self.end_headers()
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Our own log is kept instead."""


@contextlib.contextmanager
def gateway(endpoint: str, host: str) -> Iterator[Gateway]:
    """Listen on `host` and hand on to `endpoint`, with every header as it came: the signature covers the host's name."""
    upstream = urlsplit(endpoint)
    handler = type("Handler", (_Handler,), {"target": (upstream.hostname, upstream.port)})
    server = ThreadingHTTPServer((host, 0), handler)
    server.daemon_threads = True
    door = Gateway(f"http://{host}:{server.server_address[1]}")
    handler.gateway = door  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield door
    finally:
        server.shutdown()
