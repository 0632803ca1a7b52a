"""Nodes that train together: in threads of this process, and in processes of their own."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import medjob
from medjob.launch import nodes
from medjob.launch.nodes import Node, Peers

CODE = Path(medjob.__file__).parents[1]
OFFER = {"key": "k", "epoch": 3, "owner": "me"}
SILENCE_S, BEAT_S = 1.0, 0.1
VARIABLES = ("NODE_RANK", "JOB_COMPLETION_INDEX", "MASTER_ADDR", "MASTER_PORT")
_OTHER = f"""
import sys, time
from medjob.launch import nodes

nodes.SILENCE_S, nodes._BEAT_S = {SILENCE_S}, {BEAT_S}
node = nodes.Node(int(sys.argv[1]), int(sys.argv[2]), "127.0.0.1", int(sys.argv[3]))
print("starts", flush=True)
peers = nodes.follow(node, lambda: False) if node.rank else nodes.lead(node, {{"epoch": 3}})
print("there", flush=True)
time.sleep(60)
"""


class Later:
    """A call in the background."""

    def __init__(self, work: Callable[[], Peers | None]) -> None:
        self._work, self._error = work, None
        self.peers: Peers | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.peers = self._work()
        except BaseException as error:
            self._error = error

    def result(self, within_s: float = 8.0) -> Peers | None:
        self._thread.join(within_s)
        assert not self._thread.is_alive(), f"still waiting after {within_s} s"
        if self._error:
            raise self._error
        return self.peers


class Site:
    """Nodes on one free port: in threads of this process, and in processes of their own."""

    def __init__(self, count: int, address: str = "127.0.0.1") -> None:
        self.count, self.address = count, address
        with socket.create_server(("", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._later: list[Later] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._strangers: list[socket.socket] = []

    def node(self, rank: int) -> Node:
        return Node(rank, self.count, self.address, self.port)

    def lead(self) -> Later:
        self._later.append(Later(lambda: nodes.lead(self.node(0), OFFER)))
        time.sleep(
            0.1
        )  # a follower that comes before the leader listens tries again a second later
        return self._later[-1]

    def follow(self, rank: int, published: Callable[[], bool] = lambda: False) -> Later:
        self._later.append(Later(lambda: nodes.follow(self.node(rank), published)))
        return self._later[-1]

    def process(self, rank: int) -> subprocess.Popen[str]:
        """A node in a process of its own."""
        command = [sys.executable, "-c", _OTHER, str(rank), str(self.count), str(self.port)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(CODE)}
        )
        self._processes.append(process)
        assert process.stdout
        assert process.stdout.readline() == "starts\n"
        if rank == 0:
            until(
                lambda: any(each.status == psutil.CONN_LISTEN for each in connections(process)),
                5,
                "a leader that listens",
            )
        return process

    def stranger(self, says: bytes = b"") -> socket.socket:
        """Someone who connects to the leader."""
        self._strangers.append(socket.create_connection(("127.0.0.1", self.port)))
        self._strangers[-1].sendall(says)
        return self._strangers[-1]

    def clean_up(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        for stranger in self._strangers:
            stranger.close()
        for later in self._later:
            if later.peers:
                later.peers.close()


def until(condition: Callable[[], object], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.02)


def connections(process: subprocess.Popen[str]) -> list[Any]:
    return list(psutil.Process(process.pid).net_connections("tcp"))


def connected(process: subprocess.Popen[str]) -> bool:
    return any(each.status == psutil.CONN_ESTABLISHED for each in connections(process))


def whole(peers: Peers | None) -> Peers:
    assert peers
    return peers
