"""Nodes prove to each other that they know the token of their training."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from medjob.launch import nodes
from medjob.runtime import peers
from tests.support.node_group import ATTEMPT, NodeGroup


def pair() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Send and receive functions of both ends of a connection."""
    first, second = socket.socketpair()
    return nodes._ends_of(first, 2.0), nodes._ends_of(second, 2.0)


def handshake(leader_token: bytes, node_token: bytes) -> tuple[bool, bool]:
    """Whether the leader admits the node, and whether the node accepts the leader."""
    leader, node = pair()
    accepted: list[bool] = []

    def join() -> None:
        accepted.append(peers.prove_to_leader(1, node_token, *node))
        if not accepted[0]:
            node[0]({})

    thread = threading.Thread(target=join)
    thread.start()
    request = leader[1]()
    assert request["node"] == 1
    admitted = peers.admits(request, leader_token, *leader)
    thread.join()
    return admitted, accepted[0]


def test_peers_with_the_same_token_accept_each_other() -> None:
    assert handshake(b"token", b"token") == (True, True)
    assert handshake(b"", b"") == (True, True)


@pytest.mark.parametrize("tokens", [(b"a", b"b"), (b"a", b""), (b"", b"b")])
def test_peers_with_different_tokens_refuse_each_other(tokens: tuple[bytes, bytes]) -> None:
    assert handshake(*tokens) == (False, False)


@pytest.mark.parametrize("proof", [None, "", "0" * 64, 7, "\u2042", ["x"]])
def test_node_without_the_right_proof_is_refused(proof: Any) -> None:
    leader, node = pair()
    node[0]({"proof": proof})
    assert peers.admits({"node": 1, "nonce": "n"}, b"token", *leader) is False


def test_proof_of_one_node_does_not_serve_another() -> None:
    token, nonce = b"token", "n"
    proof = peers._proof(token, "node 1", nonce)
    assert peers._proves({"proof": proof}, token, "node 1", nonce)
    assert not peers._proves({"proof": proof}, token, "node 2", nonce)
    assert not peers._proves({"proof": proof}, token, "leader", nonce)


def test_unrelated_client_cannot_take_the_place_of_a_node(
    make_group: Callable[..., NodeGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(peers.TOKEN, "uid-of-the-job")
    group = make_group(2)
    leading = group.start_leader()
    client = group.connect_client(b'{"node": 1, "nonce": "n"}\n')
    client.settimeout(2)
    challenge = json.loads(client.recv(300))
    guess = peers._proof(b"wrong", "node 1", challenge["nonce"])
    client.sendall(json.dumps({"proof": guess}).encode() + b"\n")
    time.sleep(0.3)
    following = group.start_follower(1)
    assert following.membership().attempt == ATTEMPT
    assert leading.membership().error is None


def test_store_of_the_processes_has_an_unguessable_prefix() -> None:
    assert peers.store_prefix({}) == ""
    first, second = (peers.store_prefix({peers.TOKEN: text}) for text in ("a", "b"))
    assert first != second
    assert len(first) == 64
