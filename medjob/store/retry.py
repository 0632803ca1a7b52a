"""What is tried again, for how long, and what is said when it was of no use. One rule for all buckets.

The SDKs' own retries are switched off: they cover a request, but not a body that is cut while it is read, and each
counts in its own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from medjob.errors import ConfigError, MedjobError, RetryError
from medjob.runtime import signals
from medjob.store.base import Blob, Conflict

F = TypeVar("F", bound=Callable[..., Any])

_WHEN_LEAVING_S = 3.0  # a process that was told to stop has seconds, not minutes
_backoff = wait_random_exponential(
    multiplier=0.25, max=15
)  # full jitter, so that many ranks do not come back as one
_CLOCK = ("RequestTimeTooSkewed", "RequestInTheFuture")
_REGION = (
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "AuthorizationQueryParametersError",
    "IllegalLocationConstraintException",
)
_PASSING = (
    *(
        "BadDigest",
        "RequestTimeout",
        "SlowDown",
        "InternalError",
        "ConditionalRequestConflict",
        "OperationAborted",
    ),
    *("Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException"),
)
_EXPIRED = (
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidIdentityToken",
    "IDPCommunicationError",
)


class Transient(Exception):
    """A request that may succeed when it is sent again."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class Missing(Exception):
    """There is no such object."""


class Remote(Protocol):
    """What a store has that sends requests."""

    uri: str
    patience: float
    """Seconds for which a failing request is tried again."""


def retried(method: F) -> F:
    """Send a store's request again while it raises Transient, and raise RetryError once the store's patience is out."""

    @functools.wraps(method)
    def tried(self: Remote, /, *args: Any, **kwargs: Any) -> Any:
        retrying = Retrying(
            retry=retry_if_exception_type(Transient),
            wait=_wait,
            stop=lambda state: _enough(state, self.patience),
            reraise=True,
        )
        try:
            return retrying(method, self, *args, **kwargs)
        except Transient as error:
            raise RetryError(
                f"{self.uri}: {error} (tried for {self.patience:.0f} s)",
                "is the store up and reachable? the same command goes on from here",
            ) from None

    return cast("F", tried)


def unless_ours(
    get: Callable[[str], Blob | None], key: str, data: bytes, write: Callable[[], str]
) -> str:
    """The version that a conditional `write` of `data` has made, now or in a try whose answer was lost. Raises Conflict."""
    try:
        return write()
    except (Conflict, Missing):
        current = get(key)
        if current is None or current.data != data:
            raise Conflict(key) from None
        return current.version


def refused(status: int, code: str, message: str, uri: str, after_s: float = 0.0) -> Exception:
    """What an HTTP answer means, by status and the store's own error code."""
    said = f"{status} {code}: {message}".rstrip(": ")
    if code in _PASSING or status in {408, 429} or (status >= 500 and status != 501):
        return Transient(said, after_s)
    if code in _EXPIRED:
        return denied(uri, said)
    if code in _CLOCK:
        return RetryError(
            f"{uri}: this machine's clock is wrong ({said})", "set it, for example with NTP"
        )
    if code in _REGION or status == 301:
        return ConfigError(
            f"{uri}: the bucket is in another region ({said})", "set cluster.store.region"
        )
    if code == "NoSuchBucket":
        return ConfigError(f"{uri}: there is no such bucket", "create it, or correct cluster.store")
    return _by_status(status, said, uri)


def _by_status(status: int, said: str, uri: str) -> Exception:
    if status == 404:
        return Missing(said)
    if status == 412:
        return Conflict(said)
    if status in {401, 403}:
        return denied(uri, said)
    return ConfigError(
        f"{uri}: the store refuses the request ({said})",
        "an S3-compatible store may need cluster.store.requestChecksumCalculation: when_required, addressingStyle: path, or singleWriter",
    )


def denied(uri: str, said: str) -> MedjobError:
    """Access refused. It is no reason to think that a checkpoint is not there, and rights may take a while to arrive: 75."""
    return RetryError(
        f"{uri}: access is denied ({said})",
        "check this machine's credentials and their rights: get, put, list, delete",
    )


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return max(_backoff(state), error.after_s if isinstance(error, Transient) else 0.0)


def _enough(state: RetryCallState, patience: float) -> bool:
    leaving = signals.stop_requested() and (state.seconds_since_start or 0) > _WHEN_LEAVING_S
    return leaving or (state.seconds_since_start or 0) + (state.upcoming_sleep or 0) > patience
