"""Authenticate the nodes of a training: each proves that it knows a token, without sending it.

A pod of another user that reaches the leader's port could otherwise join, or pose as the leader.
The token is in `MEDJOB_PEER_TOKEN`. The chart sets it to the uid of the stage's Job, which only the
API server hands out. Without it, every client that reaches the ports is trusted.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

TOKEN = "MEDJOB_PEER_TOKEN"
_log = logging.getLogger(__name__)

Message = Mapping[str, Any]
Send = Callable[[Message], object]
Receive = Callable[[], dict[str, Any] | None]


def token_of(environment: Mapping[str, str] = os.environ) -> bytes:
    """The token of this training, or nothing. Logs that peers are not authenticated then."""
    token = environment.get(TOKEN, "")
    if not token:
        _log.info("%s is not set: any client that reaches the ports of the nodes can join", TOKEN)
    return token.encode()


def store_prefix(environment: Mapping[str, str] = os.environ) -> str:
    """Prefix of all keys in the rendezvous store of torch, which authenticates nobody itself."""
    token = environment.get(TOKEN, "")
    return hashlib.sha256(b"store:" + token.encode()).hexdigest() if token else ""


def prove_to_leader(rank: int, token: bytes, send: Send, receive: Receive) -> bool:
    """Follower: ask to join as node `rank`. Return whether the leader knows the token."""
    nonce = secrets.token_hex(16)
    send({"node": rank, "nonce": nonce})
    answer = receive() or {}
    if not _proves(answer, token, "leader", nonce):
        return False
    send({"proof": _proof(token, f"node {rank}", str(answer.get("nonce")))})
    return True


def admits(request: Message, token: bytes, send: Send, receive: Receive) -> bool:
    """Leader: answer a request to join. Return whether the node knows the token."""
    nonce = secrets.token_hex(16)
    send({"nonce": nonce, "proof": _proof(token, "leader", str(request.get("nonce")))})
    return _proves(receive() or {}, token, f"node {request.get('node')}", nonce)


def _proves(message: Message, token: bytes, who: str, nonce: str) -> bool:
    return hmac.compare_digest(
        str(message.get("proof")).encode(), _proof(token, who, nonce).encode()
    )


def _proof(token: bytes, who: str, nonce: str) -> str:
    """Without a token, a proof only shows that the peer speaks this protocol."""
    return hmac.digest(token or b"none", f"{who}:{nonce}".encode(), "sha256").hex()
