"""Retry policy for remote stores: how long to retry, and what to raise afterwards.

The SDKs' own retries are switched off. They cover a request but not a response body that is cut off
while it is read, and each SDK counts attempts in its own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from medjob.errors import RetryError
from medjob.runtime import signals
from medjob.store.base import Blob, Conflict
from medjob.store.errors import NotFound, Transient

F = TypeVar("F", bound=Callable[..., Any])

_STOPPING_RETRY_S = 3.0  # a process that received a stop signal has seconds left, not minutes
# Full jitter, so that many ranks do not retry at the same moment.
_backoff = wait_random_exponential(multiplier=0.25, max=15)


class Remote(Protocol):
    """An object whose methods send requests to a store."""

    uri: str
    retry_seconds: float
    """How long a failing request is retried."""


def retry_transient(method: F) -> F:
    """Decorate a method to retry on Transient, and to raise RetryError after `retry_seconds`."""

    @functools.wraps(method)
    def call(self: Remote, /, *args: Any, **kwargs: Any) -> Any:
        retrying = Retrying(
            retry=retry_if_exception_type(Transient),
            wait=_wait,
            stop=lambda state: _should_stop(state, self.retry_seconds),
            reraise=True,
        )
        try:
            return retrying(method, self, *args, **kwargs)
        except Transient as error:
            raise RetryError(
                f"{self.uri}: {error} (retried for {self.retry_seconds:.0f} s)",
                "check that the store is reachable, then run the same command again to resume",
            ) from None

    return cast("F", call)


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


def _should_stop(state: RetryCallState, retry_seconds: float) -> bool:
    elapsed = state.seconds_since_start or 0
    stopping = signals.stop_requested() and elapsed > _STOPPING_RETRY_S
    return stopping or elapsed + (state.upcoming_sleep or 0) > retry_seconds
