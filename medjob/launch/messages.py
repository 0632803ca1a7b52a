"""Messages between processes that train together: JSON objects, one per line, over a socket."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import Any

_MAX_MESSAGE_BYTES = 4096


def send(connection: socket.socket, message: Mapping[str, Any]) -> bool:
    """Send one message; False if the connection is closed."""
    try:
        connection.sendall(json.dumps(dict(message)).encode() + b"\n")
    except OSError:
        return False
    return True


def receive(connection: socket.socket, timeout_s: float | None) -> dict[str, Any] | None:
    """Receive one message; None if the next line is late, or is not a JSON object.

    Reads single bytes, because a buffer would take bytes of the following messages with it.

    Args:
        timeout_s: None waits as long as the connection is open.
    """
    line = b""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        while not line.endswith(b"\n"):
            connection.settimeout(deadline and max(0.01, deadline - time.monotonic()))
            byte = connection.recv(1)
            late = deadline is not None and time.monotonic() > deadline
            if not byte or len(line) > _MAX_MESSAGE_BYTES or late:
                return None
            line += byte
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
