"""The parents of several nodes: they start together, see within seconds that one is gone, and end together.

Node 0 leads: it holds the attempt, stores the manifest of each checkpoint, and publishes. The others follow: they train,
store their own part of each checkpoint, and end once the leader has published. One TCP connection ties each of them to the
leader; a line a second keeps it alive, so that a node that lost its power is missed as surely as one that closed it.
(NCCL alone would notice after its time-out of ten minutes.)
"""

from __future__ import annotations

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
            raise ConfigError(f"NODE_RANK: must be 0 to {count - 1}, as resources.{stage}.nodes is {count} (got {rank!r})")
        if not port.isdigit():
            raise ConfigError(f"MASTER_PORT: must be a number (got {port!r})")
        return cls(int(rank), count, address, int(port))


class Peers:
    """This node's connections to the others: one to the leader, or one to each follower."""

    def __init__(self, offer: Mapping[str, Any], connections: Mapping[int, socket.socket]) -> None:
        self.offer = offer
        """What the leader told all: key, epoch and owner of the attempt."""
        self._connections = dict(connections)
        self._lost: int | None = None
        self._published = threading.Event()
        self._closed = threading.Event()
        for node, connection in self._connections.items():
            connection.settimeout(SILENCE_S)
            for work in (self._listen, self._beat):
                threading.Thread(target=work, args=(node, connection), daemon=True, name=f"node-{node}").start()

    @property
    def lost(self) -> RetryError | None:
        """What to end with if another node is gone."""
        if self._lost is None or self._published.is_set():
            return None
        return RetryError(f"node {self._lost} is gone", "all nodes start again together, from the last checkpoint")

    def announce_published(self) -> None:
        """Leader: tell the others that the artifact is published."""
        for connection in self._connections.values():
            _send(connection, {"published": True})

    def wait_until_published(self) -> None:
        """Follower: wait for the leader to publish. Raises RetryError if it is gone before."""
        while not self._published.wait(0.2):
            if self.lost:
                raise self.lost

    def close(self) -> None:
        """End all connections."""
        self._closed.set()
        for connection in self._connections.values():
            connection.close()

    def _listen(self, node: int, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    if json.loads(line).get("published"):
                        self._published.set()
        except (OSError, ValueError):
            pass
        if not self._closed.is_set():
            self._lost = node

    def _beat(self, node: int, connection: socket.socket) -> None:
        while not self._closed.wait(_BEAT_S):
            if not _send(connection, {}):
                self._lost = node if not self._closed.is_set() else self._lost
                return


def listen(address: str, port: int) -> socket.socket:
    """A listening socket. Raises RetryError where the port is taken."""
    try:
        return socket.create_server((address, port), reuse_port=False)
    except OSError as error:
        raise RetryError(f"port {port} cannot be opened: {error.strerror}", "set MASTER_PORT to another one on all nodes") from None


def lead(node: Node, offer: Mapping[str, Any]) -> Peers:
    """Wait for all followers and tell them `offer`. Raises RetryError if one does not come."""
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + GATHER_S
    with listen("", node.port) as server:
        server.settimeout(5.0)
        while len(connections) < node.count - 1:
            missing = sorted(set(range(1, node.count)) - set(connections))
            if time.monotonic() > deadline:
                raise RetryError(f"nodes {missing} did not come within {GATHER_S:.0f} s", "look at their logs, and at their addresses")
            try:
                connection, _ = server.accept()
            except TimeoutError:
                _log.info("waiting for nodes %s", missing)
                continue
            hello = _receive(connection)
            if hello and hello.get("node") in missing:
                connections[hello["node"]] = connection
    for connection in connections.values():
        _send(connection, offer)
    return Peers(offer, connections)


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
        connection.settimeout(GATHER_S)  # it answers once all are there
        offer = _receive(connection)
        if offer:
            return Peers(offer, {0: connection})
        connection.close()
    raise RetryError(f"node 0 ({node.address}:{node.port}) did not answer within {GATHER_S:.0f} s", "look at its log, and at MASTER_ADDR")


def _send(connection: socket.socket, message: Mapping[str, Any]) -> bool:
    try:
        connection.sendall(json.dumps(dict(message)).encode() + b"\n")
    except OSError:
        return False
    return True


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """The first line, read byte by byte so that none of what follows is lost."""
    line = b""
    try:
        while not line.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                return None
            line += byte
        return dict(json.loads(line))
    except (OSError, ValueError):
        return None
