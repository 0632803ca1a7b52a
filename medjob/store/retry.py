"""Retry policy for remote stores: what to retry, for how long, and what to raise afterwards.

Stores refuse requests for reasons that no list covers: a body that was cut off, a part that is not
visible yet, a rotated key. Therefore no refusal is final if the store has accepted the same kind of
request before. It is retried like a 5xx, and then ends with exit code 75. A refusal of a new kind
of request, such as the first conditional write, is most likely permanent.

The SDKs' own retries are switched off. They cover a request but not a response body that is cut off
while it is read, and each SDK counts attempts in its own way.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from medjob.errors import InputError, MedjobError, RetryError
from medjob.runtime import secrets, signals
from medjob.store.base import Blob, Conflict
from medjob.store.errors import AccessRefused, NotFound, Refused, Transient

F = TypeVar("F", bound=Callable[..., Any])

_STOPPING_RETRY_S = 3.0  # a process that received a stop signal has seconds left, not minutes
_RENEWAL_INTERVAL_S = 1.0
# Full jitter, so that many ranks do not retry at the same moment.
_backoff = wait_random_exponential(multiplier=0.25, max=15)


class Remote(Protocol):
    """An object whose methods send requests to a store."""

    uri: str
    retry_seconds: float
    """How long a failing request is retried."""
    accepted: set[str]
    """The kinds of requests that the store has accepted."""

    def renew_credentials(self) -> None:
        """Read the credentials again: they may have been rotated, or have arrived only now."""
        ...


class Renewals:
    """Renews the credentials of a store, once for all threads whose requests fail together."""

    def __init__(self, connect: Callable[[], None]) -> None:
        """`connect` reads the credentials and creates a client."""
        self._connect = connect
        self._lock = threading.Lock()
        self._renewed_at = -math.inf

    def renew(self) -> None:
        """Read the credentials, unless another thread has just done so."""
        with self._lock:
            if time.monotonic() - self._renewed_at < _RENEWAL_INTERVAL_S:
                return
            # A file of the mounted secret may have arrived only now, or may be half written.
            with contextlib.suppress(InputError):
                secrets.install()
            self._connect()
            self._renewed_at = time.monotonic()


def retry_transient(method: F) -> F:
    """Decorate a method to retry on Transient, and to raise RetryError after `retry_seconds`.

    The method's name and the names of its keyword arguments identify the kind of request.
    """

    @functools.wraps(method)
    def call(self: Remote, /, *args: Any, **kwargs: Any) -> Any:
        kind = "+".join((method.__qualname__, *sorted(kwargs)))
        refusals: list[Refused] = []

        def send() -> Any:
            try:
                if refusals and isinstance(refusals[-1], AccessRefused):
                    self.renew_credentials()
                return method(self, *args, **kwargs)
            except Refused as error:
                refusals.append(error)
                raise

        def should_stop(state: RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            is_final = isinstance(error, Refused) and len(refusals) >= error.tries
            may_be_final = kind not in self.accepted and not _is_late(error)
            return (is_final and may_be_final) or _is_time_over(state, self.retry_seconds)

        retrying = Retrying(
            retry=retry_if_exception_type(Transient), wait=_wait, stop=should_stop, reraise=True
        )
        try:
            answer = retrying(send)
        except (Conflict, NotFound):
            self.accepted.add(kind)
            raise
        except Transient as error:
            raise _final_error(error, self, kind) from None
        self.accepted.add(kind)
        return answer

    return cast("F", call)


def _final_error(error: Transient, remote: Remote, kind: str) -> MedjobError:
    """The error to raise when there are no more tries."""
    if isinstance(error, Refused) and kind not in remote.accepted:
        return error.final
    hint = "check that the store is reachable, then run the same command again to resume"
    if isinstance(error, Refused) and isinstance(error.final, RetryError):
        hint = error.final.hint
    message = error.final.message if isinstance(error, AccessRefused) else f"{remote.uri}: {error}"
    return RetryError(f"{message} (retried for {remote.retry_seconds:.0f} s)", hint)


def conditional_write(
    get: Callable[[str], Blob | None], key: str, data: bytes, write: Callable[[], str]
) -> str:
    """Run `write`, a conditional write of `data`, and return the object's version.

    A failed condition counts as success if the object holds `data`: then an earlier try of the same
    write succeeded and its response was lost.

    Raises:
        Conflict: the object holds other data.
    """
    try:
        return write()
    except (Conflict, NotFound):
        current = get(key)
        if current is None or current.data != data:
            raise Conflict(key) from None
        return current.version


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    requested = error.retry_after_s if isinstance(error, Transient) else 0.0
    return max(_backoff(state), requested)


def _is_time_over(state: RetryCallState, retry_seconds: float) -> bool:
    elapsed = state.seconds_since_start or 0
    stopping = signals.stop_requested() and elapsed > _STOPPING_RETRY_S
    return stopping or elapsed + (state.upcoming_sleep or 0) > retry_seconds


def _is_late(error: BaseException | None) -> bool:
    """Whether the identity of a new pod may only not have arrived yet.

    On a new node, the metadata server, the agent that hands out credentials, or the permissions
    can be some seconds late.
    """
    return isinstance(error, AccessRefused) and "KUBERNETES_SERVICE_HOST" in os.environ
