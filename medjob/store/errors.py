"""Translation of a remote store's error responses. The same rules apply to S3 and GCS."""

from __future__ import annotations

from medjob.errors import ConfigError, MedjobError, RetryError
from medjob.store.base import Conflict

_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}
_EXPIRED_CREDENTIALS_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "IDPCommunicationError",
    "InvalidIdentityToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
_CLOCK_SKEW_CODES = {"RequestInTheFuture", "RequestTimeTooSkewed"}
_WRONG_REGION_CODES = {
    "AuthorizationHeaderMalformed",
    "AuthorizationQueryParametersError",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
}


class Transient(Exception):
    """A request failed and may succeed when it is repeated."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotFound(Exception):
    """The object or the upload does not exist."""


def error_from_response(
    status: int, code: str, message: str, uri: str, retry_after_s: float = 0.0
) -> Exception:
    """Return the exception for an HTTP error response with the store's own error `code`."""
    response = f"{status} {code}: {message}".rstrip(": ")
    if code in _TRANSIENT_CODES or status in {408, 429} or (status >= 500 and status != 501):
        return Transient(response, retry_after_s)
    if code in _EXPIRED_CREDENTIALS_CODES:
        return access_denied(uri, response)
    if code in _CLOCK_SKEW_CODES:
        return RetryError(
            f"{uri}: this machine's clock is wrong ({response})",
            "set the clock, for example with NTP",
        )
    if code in _WRONG_REGION_CODES or status == 301:
        return ConfigError(
            f"{uri}: the bucket is in another region ({response})", "set cluster.store.region"
        )
    if code == "NoSuchBucket":
        return ConfigError(
            f"{uri}: there is no such bucket", "create the bucket, or correct cluster.store"
        )
    return _error_from_status(status, response, uri)


def _error_from_status(status: int, response: str, uri: str) -> Exception:
    if status == 404:
        return NotFound(response)
    if status == 412:
        return Conflict(response)
    if status in {401, 403}:
        return access_denied(uri, response)
    return ConfigError(
        f"{uri}: the store rejected the request ({response})",
        "an S3-compatible store may need cluster.store.requestChecksumCalculation: when_required, "
        "addressingStyle: path, or singleWriter: true",
    )


def access_denied(uri: str, reason: str) -> MedjobError:
    """Return the error for denied access.

    It is a RetryError (exit code 75): denied access does not mean that a checkpoint is missing,
    and new permissions can take a while to become effective.
    """
    return RetryError(
        f"{uri}: access denied ({reason})",
        "check the credentials on this machine and their permissions: get, put, list, delete",
    )


def retry_after_seconds(header: str | None) -> float:
    """Parse a Retry-After header. Stores send seconds; the HTTP date form is read as 0."""
    return float(header) if header and header.isdigit() else 0.0


def first_line(error: object) -> str:
    """Return the first line of an error message. SDKs append details in further lines."""
    return str(error).split("\n", maxsplit=1)[0]
