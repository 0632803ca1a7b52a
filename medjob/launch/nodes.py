"""The parents of several nodes: they start together, see within seconds that one is gone, and end together.

Node 0 leads: it holds the attempt, stores the manifest of each checkpoint, and publishes. The others follow: they train,
store their own part of each checkpoint, and end once the leader has published. One TCP connection ties each of them to the
leader; a line a second keeps it alive, so that a node that lost its power is missed as surely as one that closed it.
(NCCL alone would notice after its time-out of ten minutes.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from medjob.errors import ConfigError, RetryError

PORT = 29500  # torchrun's default
GATHER_S = 900.0  # nodes are scheduled one by one
SILENCE_S = 8.0
_BEAT_S = 1.0
_HELLO_S = 1.0  # a stranger on the port holds up the gathering no longer
_LINE_BYTES = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Node:
    """This node among those that train together."""

    rank: int = 0
    count: int = 1
    address: str = "127.0.0.1"
    """Host of node 0."""
    port: int = PORT
    """Port of node 0 for the parents; their processes meet on the port after it."""

    @classmethod
    def from_environment(cls, stage: str, count: int) -> Node:
        """This node as torchrun's variables, or an indexed Job, name it.

        Raises:
            ConfigError: there are several nodes, and nothing says which one this is.
        """
        if count == 1:
            return cls()
        rank = os.environ.get("NODE_RANK") or os.environ.get("JOB_COMPLETION_INDEX")
        address = os.environ.get("MASTER_ADDR")
        if rank is None or address is None:
            raise ConfigError(
                f"resources.{stage}.nodes is {count}, but nothing says which node this is",
                f"run `medjob {stage}` on every node with NODE_RANK (0 to {count - 1}) and MASTER_ADDR set, "
                f"or --set resources.{stage}.nodes=1",
            )
        port = os.environ.get("MASTER_PORT", str(PORT))
        if not rank.isdigit() or int(rank) >= count:
            raise ConfigError(
                f"NODE_RANK: must be 0 to {count - 1}, as resources.{stage}.nodes is {count} (got {rank!r})"
            )
        if not port.isdigit() or not 0 < int(port) < 65535:
            raise ConfigError(
                f"MASTER_PORT: must be 1 to 65534, as the port after it is used too (got {port!r})"
            )
        return cls(int(rank), count, address, int(port))


class Peers:
    """This node's connections to the others: one to the leader, or one to each follower."""

    def __init__(self, offer: Mapping[str, Any], connections: Mapping[int, socket.socket]) -> None:
        self.offer = offer
        """What the leader told all: key, epoch and owner of the attempt."""
        self._connections = dict(connections)
        self._lost: int | None = None
        self._stopped: set[int] = set()
        self._published = threading.Event()
        self._closed = threading.Event()
        for node, connection in self._connections.items():
            connection.settimeout(SILENCE_S)
            for work in (self._listen, self._beat):
                threading.Thread(
                    target=work, args=(node, connection), daemon=True, name=f"node-{node}"
                ).start()

    @property
    def lost(self) -> RetryError | None:
        """What to end with if another node is gone."""
        if self._lost is None or self._published.is_set():
            return None
        return RetryError(
            f"node {self._lost} is gone", "all nodes start again together, from the last checkpoint"
        )

    def announce_published(self) -> None:
        """Leader: tell the others that the artifact is published."""
        self._tell({"published": True})

    def announce_stopped(self) -> None:
        """Tell the others that this node has stopped and stored its part: it will leave, and is not lost."""
        self._tell({"stopped": True})

    def _tell(self, message: Mapping[str, Any]) -> None:
        for connection in self._connections.values():
            _send(connection, message)

    def wait_until_published(self) -> None:
        """Follower: wait for the leader to publish. Raises RetryError if it is gone before."""
        while not self._published.wait(0.2):
            if self.lost:
                raise self.lost

    def close(self) -> None:
        """End all connections."""
        self._closed.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(
                    socket.SHUT_RDWR
                )  # close() alone waits for the thread that listens
            connection.close()

    def _listen(self, node: int, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if message.get("published"):
                        self._published.set()
                    if message.get("stopped"):
                        self._stopped.add(node)
        except (OSError, ValueError, AttributeError):
            pass  # cut off, or no message of ours: either way the node is missed, and whoever asks is told so
        finally:
            self._miss(node)

    def _miss(self, node: int) -> None:
        if not self._closed.is_set() and node not in self._stopped:
            self._lost = node

    def _beat(self, node: int, connection: socket.socket) -> None:
        while not self._closed.wait(_BEAT_S):
            if not _send(connection, {}):
                self._miss(node)
                return


def listen(address: str, port: int) -> socket.socket:
    """A listening socket; an empty address is every one of this host, IPv4 and IPv6. Raises RetryError where the port is taken."""
    try:
        if address or not socket.has_dualstack_ipv6():
            return socket.create_server((address, port))
        return socket.create_server((address, port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
        raise RetryError(
            f"port {port} cannot be opened: {error.strerror}",
            "set MASTER_PORT to another one on all nodes",
        ) from None


def lead(node: Node, offer: Mapping[str, Any]) -> Peers:
    """Wait for all followers and tell them `offer`. Raises RetryError if one does not come."""
    connections: dict[int, socket.socket] = {}
    deadline, told = time.monotonic() + GATHER_S, 0.0
    with listen("", node.port) as server:
        server.settimeout(_BEAT_S)
        while missing := sorted(set(range(1, node.count)) - set(connections)):
            if time.monotonic() > deadline:
                raise RetryError(
                    f"nodes {missing} did not come within {GATHER_S:.0f} s",
                    "look at their logs, and at their addresses",
                )
            if time.monotonic() > told + 30:
                _log.info("waiting for nodes %s", missing)
                told = time.monotonic()
            with contextlib.suppress(TimeoutError):
                _welcome(server.accept()[0], node.count, connections)
            for rank, connection in list(connections.items()):
                if not _send(
                    connection, {}
                ):  # a sign of life to those that wait; one that is gone will come again
                    del connections[rank]
    for connection in connections.values():
        _send(connection, offer)
    return Peers(offer, connections)


def _welcome(connection: socket.socket, count: int, connections: dict[int, socket.socket]) -> None:
    """Take a follower in, in place of an earlier connection of that node if it is gone. Strangers are sent away."""
    hello = _receive(connection, _HELLO_S)
    rank = hello.get("node") if hello else None
    if isinstance(rank, int) and rank in connections and not _is_gone(connections[rank]):
        _log.warning(
            "a second node says that it is node %d, and is sent away: check NODE_RANK on all of them",
            rank,
        )
        rank = None
    if not isinstance(rank, int) or not 0 < rank < count:
        connection.close()
        return
    connections[rank] = connection


def _is_gone(connection: socket.socket) -> bool:
    try:
        connection.settimeout(0.0)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False  # open, and silent
    except OSError:
        return True
    finally:
        connection.settimeout(SILENCE_S)


def follow(node: Node, published: Callable[[], bool]) -> Peers | None:
    """Connect to the leader; None if `published()` turns true first: then there is nothing to do.

    Raises:
        RetryError: the leader does not answer.
    """
    deadline = time.monotonic() + GATHER_S
    while time.monotonic() < deadline:
        if published():
            return None
        try:
            connection = socket.create_connection((node.address, node.port), timeout=5.0)
        except OSError:
            time.sleep(1.0)
            continue
        _send(connection, {"node": node.rank})
        while (offer := _receive(connection, SILENCE_S)) == {}:  # it lives, and waits for others
            pass
        if offer:
            return Peers(offer, {0: connection})
        connection.close()
        time.sleep(1.0)
    raise RetryError(
        f"node 0 ({node.address}:{node.port}) did not answer within {GATHER_S:.0f} s",
        "look at its log, and at MASTER_ADDR",
    )


def _send(connection: socket.socket, message: Mapping[str, Any]) -> bool:
    try:
        connection.sendall(json.dumps(dict(message)).encode() + b"\n")
    except OSError:
        return False
    return True


def _receive(connection: socket.socket, within_s: float) -> dict[str, Any] | None:
    """The next line, read byte by byte so that none of what follows is lost; None for anything but a JSON object in time."""
    line, deadline = b"", time.monotonic() + within_s
    try:
        while not line.endswith(b"\n"):
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            byte = connection.recv(1)
            if not byte or len(line) > _LINE_BYTES or time.monotonic() > deadline:
                return None
            line += byte
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
