"""Membership of the nodes that train together.

Node 0 is the leader. It owns the attempt, writes the manifest of each checkpoint, and publishes.
The other nodes are followers. They train, store their own part of each checkpoint, and end after
the leader has published. Each follower has one TCP connection to the leader.

Both ends send a heartbeat per second. A node that loses power closes no connection, so only its
missing heartbeats reveal that it is lost. NCCL would notice after its time-out of ten minutes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medjob.errors import ConfigError, RetryError
from medjob.launch.messages import receive, send
from medjob.runtime import peers

if TYPE_CHECKING:
    from medjob.launch.external import LocalRanks

_NUMBER = re.compile("[0-9]{1,5}")
_HOST = re.compile(r"[\w.:%-]{1,253}")  # with the zone of an IPv6 address
PORT = 29500  # torchrun's default
RENDEZVOUS_TIMEOUT_S = 900.0  # a cluster may schedule the nodes minutes apart
HEARTBEAT_TIMEOUT_S = 8.0
_HEARTBEAT_INTERVAL_S = 1.0
_JOIN_REQUEST_TIMEOUT_S = 1.0  # the longest time that an unrelated client can delay the rendezvous
_LOG_INTERVAL_S = 30.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Node:
    """This node's rank, and the address of the leader."""

    rank: int = 0
    count: int = 1
    address: str = "127.0.0.1"
    """Host name or address of node 0."""
    port: int = PORT
    """Port of node 0 for the parents. The training processes use the next port."""
    local_ranks: LocalRanks | None = None
    """Processes of this node that an external launcher has started, instead of this one."""

    @classmethod
    def from_environment(cls, stage: str, count: int) -> Node:
        """Read the variables that torchrun uses, or the index of a Kubernetes Job.

        Raises:
            ConfigError: a variable is missing or invalid, and `count` is more than 1.
        """
        if count == 1:
            return cls()
        rank = os.environ.get("NODE_RANK") or os.environ.get("JOB_COMPLETION_INDEX")
        address = os.environ.get("MASTER_ADDR")
        if rank is None or address is None:
            raise ConfigError(
                f"resources.{stage}.nodes is {count}, but NODE_RANK or MASTER_ADDR is not set",
                f"set NODE_RANK (0 to {count - 1}) and MASTER_ADDR and run `medjob {stage}` on "
                f"every node, or use --set resources.{stage}.nodes=1",
            )
        port = os.environ.get("MASTER_PORT", str(PORT))
        if not _NUMBER.fullmatch(rank) or int(rank) >= count:
            raise ConfigError(
                f"NODE_RANK must be 0 to {count - 1}, because resources.{stage}.nodes is {count} "
                f"(got {rank[:100]!r})"
            )
        if not _NUMBER.fullmatch(port) or not 0 < int(port) < 65535:
            raise ConfigError(
                "MASTER_PORT must be 1 to 65534, because the next port is used too "
                f"(got {port[:100]!r})"
            )
        return cls(int(rank), count, checked_host(address), int(port))


def checked_host(address: str) -> str:
    """Return MASTER_ADDR if it can be a host name or an address.

    Raises:
        ConfigError: it has a character that no host name has, or a part is too long.
    """
    if not _HOST.fullmatch(address) or max(map(len, address.split("."))) > 63:
        raise ConfigError(f"MASTER_ADDR must be a host name or an address (got {address[:100]!r})")
    return address


ONE_NODE = Node()


class Membership:
    """This node's connections to the other nodes: a follower has one, to the leader."""

    def __init__(
        self, attempt: Mapping[str, Any], connections: Mapping[int, socket.socket]
    ) -> None:
        self.attempt = attempt
        """Key, epoch and owner of the attempt, as the leader announced them."""
        self._connections = dict(connections)
        self._lost: int | None = None
        self._stopped: set[int] = set()
        self._published = threading.Event()
        self._closed = threading.Event()
        for rank, connection in self._connections.items():
            connection.settimeout(HEARTBEAT_TIMEOUT_S)
            for target in (self._receive_messages, self._send_heartbeats):
                threading.Thread(
                    target=target, args=(rank, connection), daemon=True, name=f"node-{rank}"
                ).start()

    @property
    def error(self) -> RetryError | None:
        """The error to raise if a node is lost before the publication, else None."""
        if self._lost is None or self._published.is_set():
            return None
        return RetryError(
            f"lost the connection to node {self._lost}",
            "restart all nodes together; they resume from the last checkpoint",
        )

    def announce_published(self) -> None:
        """Leader: tell the followers that the artifact is published."""
        self._broadcast({"published": True})

    def announce_stopped(self) -> None:
        """Announce that this node has stored its part. When it leaves, it is not lost."""
        self._broadcast({"stopped": True})

    def wait_until_published(self) -> None:
        """Follower: wait until the leader has published.

        Raises:
            RetryError: the leader is lost.
        """
        while not self._published.wait(0.2):
            if self.error:
                raise self.error

    def close(self) -> None:
        """Close all connections."""
        self._closed.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                # close() alone would wait for the thread that reads from the connection
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _broadcast(self, message: Mapping[str, Any]) -> None:
        for connection in self._connections.values():
            send(connection, message)

    def _receive_messages(self, rank: int, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if message.get("published"):
                        self._published.set()
                    if message.get("stopped"):
                        self._stopped.add(rank)
        except (OSError, ValueError, AttributeError):
            pass  # a time-out, a closed connection or an invalid message: the node is lost
        finally:
            self._mark_lost(rank)

    def _send_heartbeats(self, rank: int, connection: socket.socket) -> None:
        while not self._closed.wait(_HEARTBEAT_INTERVAL_S):
            if not send(connection, {}):
                self._mark_lost(rank)
                return

    def _mark_lost(self, rank: int) -> None:
        if not self._closed.is_set() and rank not in self._stopped:
            self._lost = rank


def listen(address: str, port: int) -> socket.socket:
    """Open a listening socket. An empty address means all addresses of this host, IPv4 and IPv6.

    Raises:
        RetryError: the port is in use.
    """
    try:
        if address or not socket.has_dualstack_ipv6():
            return socket.create_server((address, port))
        return socket.create_server((address, port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
        raise RetryError(
            f"cannot listen on port {port}: {error.strerror}",
            "set MASTER_PORT to a different port on all nodes",
        ) from None


def accept_followers(node: Node, attempt: Mapping[str, Any]) -> Membership:
    """Leader: wait until all followers are connected, and send them `attempt`.

    Raises:
        RetryError: a follower did not connect in time.
    """
    connections: dict[int, socket.socket] = {}
    token = peers.token_of()
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    next_log = 0.0
    with listen("", node.port) as server:
        server.settimeout(_HEARTBEAT_INTERVAL_S)
        while missing := sorted(set(range(1, node.count)) - set(connections)):
            now = time.monotonic()
            if now > deadline:
                raise RetryError(
                    f"nodes {missing} did not connect within {RENDEZVOUS_TIMEOUT_S:.0f} s",
                    "check the logs of these nodes, and their MASTER_ADDR and MASTER_PORT",
                )
            if now > next_log:
                _log.info("waiting for nodes %s", missing)
                next_log = now + _LOG_INTERVAL_S
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                _admit(connection, node.count, connections, token)
            _drop_disconnected(connections)
    for connection in connections.values():
        send(connection, attempt)
    return Membership(attempt, connections)


def _admit(
    connection: socket.socket, count: int, connections: dict[int, socket.socket], token: bytes
) -> None:
    """Add a follower to `connections`, or close the connection if its join request is invalid.

    A node that restarted replaces its earlier, closed connection.
    """
    request = receive(connection, _JOIN_REQUEST_TIMEOUT_S) or {}
    rank = request.get("node")
    if not isinstance(rank, int) or not 0 < rank < count:
        connection.close()
        return
    ends = _ends_of(connection, _JOIN_REQUEST_TIMEOUT_S)
    if not peers.admits(request, token, *ends):
        _log.warning("refused a node with NODE_RANK=%d: it has another %s", rank, peers.TOKEN)
        connection.close()
        return
    if rank in connections and not _is_closed(connections[rank]):
        _log.warning("refused a second node with NODE_RANK=%d: check NODE_RANK on all nodes", rank)
        connection.close()
        return
    connections[rank] = connection


def _drop_disconnected(connections: dict[int, socket.socket]) -> None:
    """Send a heartbeat to the followers that wait, and remove those that have disconnected."""
    for rank, connection in list(connections.items()):
        if not send(connection, {}):
            del connections[rank]


def _is_closed(connection: socket.socket) -> bool:
    try:
        connection.settimeout(0.0)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False  # open, without data to read
    except OSError:
        return True
    finally:
        connection.settimeout(HEARTBEAT_TIMEOUT_S)


def connect_to_leader(node: Node, is_published: Callable[[], bool]) -> Membership | None:
    """Follower: connect to the leader and receive the attempt.

    Returns None if `is_published()` is true before that: then there is nothing to do.

    Raises:
        RetryError: the leader did not answer in time.
    """
    token = peers.token_of()
    warned = False
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while time.monotonic() < deadline:
        if is_published():
            return None
        try:
            connection = socket.create_connection((node.address, node.port), timeout=5.0)
        except OSError:
            time.sleep(1.0)
            continue
        ends = _ends_of(connection, HEARTBEAT_TIMEOUT_S)
        proven = peers.prove_to_leader(node.rank, token, *ends)
        attempt = _receive_attempt(connection) if proven else None
        if not proven and not warned:
            _log.warning("%s:%d has another %s", node.address, node.port, peers.TOKEN)
            warned = True
        if attempt:
            return Membership(attempt, {0: connection})
        connection.close()
        time.sleep(1.0)
    raise RetryError(
        f"node 0 ({node.address}:{node.port}) did not answer within {RENDEZVOUS_TIMEOUT_S:.0f} s",
        f"check its log, and MASTER_ADDR, MASTER_PORT and {peers.TOKEN} on this node",
    )


def _receive_attempt(connection: socket.socket) -> dict[str, Any] | None:
    """Skip the heartbeats that the leader sends while it waits for other nodes.

    None if the connection is closed or silent.
    """
    while True:
        message = receive(connection, HEARTBEAT_TIMEOUT_S)
        if message != {}:
            return message


def _ends_of(connection: socket.socket, timeout_s: float) -> tuple[peers.Send, peers.Receive]:
    """Functions that send and receive one message over a connection."""
    return (
        lambda message: send(connection, message),
        lambda: receive(connection, timeout_s),
    )
