"""Nodes on this machine that connect to each other: in threads, and in their own processes."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

import medjob
from medjob.launch import nodes
from medjob.launch.nodes import Membership, Node
from tests.support.waiting import wait_until

CODE = Path(medjob.__file__).parents[1]
NODE_PROCESS = Path(__file__).with_name("node_process.py")
ATTEMPT = {"key": "k", "epoch": 3, "owner": "me"}
HEARTBEAT_TIMEOUT_S = 1.0
HEARTBEAT_INTERVAL_S = 0.1
Result = TypeVar("Result")


def never() -> bool:
    """The artifact is not published."""
    return False


class BackgroundCall(Generic[Result]):
    """A call in a thread."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._error: BaseException | None = None
        self._results: list[Result] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, timeout_s: float = 8.0) -> Result:
        """Wait, and return or raise what the call did."""
        self._thread.join(timeout_s)
        assert not self.running, f"still waiting after {timeout_s} s"
        if self._error:
            raise self._error
        return self._results[0]


class JoiningNode(BackgroundCall[Membership | None]):
    """A node that connects to the others in a thread."""

    def membership(self, timeout_s: float = 8.0) -> Membership:
        """Wait until the node has joined."""
        membership = self.result(timeout_s)
        assert membership
        return membership

    def close(self) -> None:
        for membership in self._results:
            if membership:
                membership.close()


class NodeGroup:
    """`count` nodes, whose leader listens on a free port."""

    def __init__(self, count: int, address: str = "127.0.0.1") -> None:
        self.count = count
        self.address = address
        with socket.create_server(("", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._joining: list[JoiningNode] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._clients: list[socket.socket] = []

    def node(self, rank: int) -> Node:
        return Node(rank, self.count, self.address, self.port)

    def start_leader(self) -> JoiningNode:
        leader = JoiningNode(lambda: nodes.accept_followers(self.node(0), ATTEMPT))
        self._joining.append(leader)
        time.sleep(0.1)  # a follower that connects before the leader listens retries a second later
        return leader

    def start_follower(self, rank: int, is_published: Callable[[], bool] = never) -> JoiningNode:
        follower = JoiningNode(lambda: nodes.connect_to_leader(self.node(rank), is_published))
        self._joining.append(follower)
        return follower

    def start_process(self, rank: int) -> subprocess.Popen[str]:
        """Start a node in its own process."""
        arguments = [rank, self.count, self.port, HEARTBEAT_TIMEOUT_S, HEARTBEAT_INTERVAL_S]
        process = subprocess.Popen(
            [sys.executable, str(NODE_PROCESS), *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(CODE)},
        )
        self._processes.append(process)
        assert process.stdout
        assert process.stdout.readline() == "started\n"
        if rank == 0:
            wait_until(lambda: is_listening(process), 5, "the leader listens")
        return process

    def connect_client(self, data: bytes = b"") -> socket.socket:
        """Connect to the leader as a program that is not a node, and send `data`."""
        client = socket.create_connection(("127.0.0.1", self.port))
        self._clients.append(client)
        client.sendall(data)
        return client

    def clean_up(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        for client in self._clients:
            client.close()
        for joining in self._joining:
            joining.close()


def _connection_states(process: subprocess.Popen[str]) -> set[str]:
    connections: list[Any] = psutil.Process(process.pid).net_connections("tcp")
    return {connection.status for connection in connections}


def is_listening(process: subprocess.Popen[str]) -> bool:
    return psutil.CONN_LISTEN in _connection_states(process)


def is_connected(process: subprocess.Popen[str]) -> bool:
    return psutil.CONN_ESTABLISHED in _connection_states(process)
