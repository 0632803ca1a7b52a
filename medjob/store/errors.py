"""Translation of a remote store's error responses. The same rules apply to S3 and GCS.

A response is one of:

- a missing object (NotFound) or a failed condition (Conflict);
- a permanent refusal that the store names, such as an archived object: ConfigError, StoreRefusal;
- a transient failure: Transient, which is retried;
- refused access or an unknown 4xx: Refused. It may be permanent, such as a wrong setting, or
  temporary, such as a rotated key or a body that a proxy cut off. `retry` decides by whether the
  store has accepted the same kind of request before.
"""

from __future__ import annotations

from dataclasses import dataclass

from medjob.config.addresses import redacted
from medjob.errors import ConfigError, InputError, MedjobError, RetryError
from medjob.store.base import Conflict

_TRANSIENT_STATUS = {408, 409, 423, 425, 429, 499}
_PERMANENT_STATUS = {400, 402, 403, 404, 405, 409, 411, 412, 413, 423, 507}
_TRANSIENT_CODES = {
    "BadDigest",
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "EC2ThrottledException",
    "IncompleteBody",
    "InternalError",
    "InvalidPart",
    "InvalidPartOrder",
    "KMS.InternalException",
    "KMS.KeyUnavailableException",
    "KMS.ThrottlingException",
    "LimitExceededException",
    "OperationAborted",
    "PriorRequestNotComplete",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "TemporaryRedirect",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
    # GCS
    "backendError",
    "internalError",
    "rateLimitExceeded",
    "requestTimeout",
    "uploadBrokenConnection",
    "userRateLimitExceeded",
}
_EXPIRED_CREDENTIALS_CODES = {
    "AuthorizationError",
    "ExpiredToken",
    "ExpiredTokenException",
    "IDPCommunicationError",
    "InvalidIdentityToken",
    "InvalidToken",
    "RequestExpired",
    "TokenRefreshRequired",
    "authError",
}
_CLOCK_SKEW_CODES = {"RequestInTheFuture", "RequestTimeTooSkewed"}
_WRONG_REGION_CODES = {
    "AuthorizationHeaderMalformed",
    "AuthorizationQueryParametersError",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
}
_FEW_TRIES = 3  # rule out a passing fault before an unknown refusal of a new store is final
_ACCESS_HINT = (
    "check the credentials on this machine and their permissions: get, put, list, delete; "
    "a requester-pays bucket needs cluster.store.requesterPays"
)


class Transient(Exception):
    """A request failed and may succeed when it is repeated."""

    def __init__(self, message: str, retry_after_s: float = 0.0, code: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.code = code
        """The store's own error code."""


class Refused(Transient):
    """A request was refused, perhaps for good."""

    def __init__(
        self, response: str, final: MedjobError, tries: int = _FEW_TRIES, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(response, retry_after_s)
        self.final = final
        """The error to raise if the store has never accepted this kind of request."""
        self.tries = tries
        """How often to try a kind of request that the store has never accepted."""


class AccessRefused(Refused):
    """The credentials are missing, expired or insufficient.

    They are read again before the next try.
    """


class NotFound(Exception):
    """The object or the upload does not exist."""


class StoreRefusal(InputError):
    """The store refuses a request for good. The object may be intact, and is not quarantined."""


@dataclass(frozen=True, slots=True)
class _Permanent:
    """A permanent refusal: how to recognize it, and what to tell the user."""

    codes: tuple[str, ...]
    """Error codes, or prefixes of them that end with a dot or an asterisk."""
    texts: tuple[str, ...]
    """Parts of the message in lower case, for stores that use a general code. Each has several
    words: messages also contain the names of users and objects."""
    error: type[MedjobError]
    problem: str
    hint: str

    def matches(self, code: str, message: str) -> bool:
        """Whether it is this refusal."""
        prefixes = tuple(each.rstrip("*") for each in self.codes if each.endswith((".", "*")))
        named = code in self.codes or (bool(prefixes) and code.startswith(prefixes))
        return named or any(text in message.lower() for text in self.texts)


_PERMANENT = (
    _Permanent(
        ("InvalidObjectState", "ObjectArchived", "ObjectNotRestored", "AccessTierNotSupported"),
        (),
        StoreRefusal,
        "the object is archived",
        "restore it from the archive (aws s3api restore-object), then run the same command again",
    ),
    _Permanent(
        (
            "BucketLocked",
            "FileImmutable",
            "ObjectLocked",
            "objectUnderActiveHold",
            "retentionPolicyNotMet",
        ),
        (
            "object lock",
            "worm protected",
            "retention polic",
            "retention period",
            "legal hold",
            "temporary hold",
            "event-based hold",
        ),
        StoreRefusal,
        "a retention policy, a hold or an object lock forbids to replace or delete objects",
        "medjob replaces and deletes objects; use a bucket or a prefix without retention",
    ),
    _Permanent(
        (
            "KMS.",
            "KMSKey*",
            "Kms*",
            "XMinioKMS*",
            "cloudKms*",
            "customerEncryptionKey*",
            "resourceIsEncryptedWithCustomerEncryptionKey",
            "resourceNotEncryptedWithCustomerEncryptionKey",
            "kms*",
        ),
        (),
        StoreRefusal,
        "the encryption key cannot be used",
        "enable or restore the key, or correct cluster.store.kmsKey",
    ),
    _Permanent(
        (
            "QuotaExceeded",
            "StorageQuotaExceeded",
            "XMinioAdminBucketQuotaExceeded",
            "XMinioStorageFull",
            "InsufficientStorage",
            "dailyLimitExceeded",
            "quotaExceeded",
        ),
        ("quota exceeded", "exceeded your quota", "exceeds quota"),
        StoreRefusal,
        "the quota is used up",
        "raise the quota or delete objects (`medjob gc` lists unused ones), then run the same "
        "command again",
    ),
    _Permanent(
        (
            "AccountProblem",
            "AccountSuspended",
            "AllAccessDisabled",
            "InsufficientBalance",
            "InvalidPayer",
            "NotSignedUp",
            "UnderDebt",
            "UserDisable",
            "UserSuspended",
            "accountDisabled",
            "billingDisabled",
        ),
        (
            "billing account",
            "billing is disabled",
            "billing must be enabled",
            "account is disabled",
        ),
        StoreRefusal,
        "the account or its billing is disabled",
        "enable billing for the account or project that owns the bucket",
    ),
    _Permanent(
        (
            "AuthenticationRequiredRequesterPays",
            "UserProjectMissing",
            "required.userProject",
            "userProjectMissing",
        ),
        ("requester pays",),
        ConfigError,
        "the bucket's requesters pay, and no payer is named",
        "set cluster.store.userProject for GCS, or cluster.store.requesterPays for S3",
    ),
    _Permanent(
        ("UserProjectInvalid", "UserProjectInconsistent", "userProjectInvalid"),
        (),
        ConfigError,
        "the project to bill is not valid",
        "correct cluster.store.userProject",
    ),
    _Permanent(
        ("EntityTooLarge", "RequestEntityTooLarge", "MaxMessageLengthExceeded", "uploadTooLarge"),
        ("request entity too large",),
        ConfigError,
        "the store, or a proxy in front of it, refuses a request of this size",
        "allow request bodies of at least 9 MiB (nginx: client_max_body_size), or use another "
        "endpoint",
    ),
    _Permanent(
        ("KeyTooLongError", "KeyTooLong"),
        ("object name is too long", "name must be at most 1024"),
        ConfigError,
        "the name of an object is too long",
        "choose a shorter prefix for cluster.store, or rename the file",
    ),
    _Permanent(
        ("InvalidBucketName", "InvalidBucketState", "InvalidLocationConstraint"),
        (),
        ConfigError,
        "the bucket cannot be used",
        "correct cluster.store",
    ),
    _Permanent(
        ("orgPolicyConstraintFailed",),
        ("violates constraint", "organization policy"),
        StoreRefusal,
        "a policy of the organization forbids the request",
        "use a bucket that complies with it (location, encryption key), or change the policy",
    ),
)


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """An HTTP error response of a store."""

    status: int
    code: str
    """The store's own error code. Empty, or the status, if the body has none."""
    message: str
    retry_after_s: float = 0.0
    region: str = ""
    """The bucket's region, if the store names it."""
    is_html: bool = False
    """Whether the body is a web page: then a proxy wrote it, and not the store."""

    def __str__(self) -> str:
        return redacted(f"{self.status} {self.code}: {self.message}".rstrip(": "))


def error_from_response(response: ErrorResponse, uri: str) -> Exception:
    """Return the exception for an error response about `uri`."""
    status, code = response.status, response.code
    if code in _TRANSIENT_CODES:
        return Transient(str(response), response.retry_after_s, code)
    permanent = _permanent(response, uri)
    if permanent is not None:
        return permanent
    if status in _TRANSIENT_STATUS or (status >= 500 and status != 501):
        return Transient(str(response), response.retry_after_s, code)
    if code in _CLOCK_SKEW_CODES:
        return Refused(
            str(response),
            RetryError(
                f"{uri}: this machine's clock is wrong ({response})",
                "set the clock, for example with NTP",
            ),
            tries=1,
        )
    return _error_from_status(response, uri)


def _permanent(response: ErrorResponse, uri: str) -> MedjobError | None:
    code = response.code
    if code in _WRONG_REGION_CODES or response.status == 301:
        return ConfigError(
            f"{uri}: the bucket is in another region ({response})",
            f"set cluster.store.region to {response.region}"
            if response.region
            else "set cluster.store.region",
        )
    if code == "NoSuchBucket":
        return ConfigError(
            f"{uri}: there is no such bucket", "create the bucket, or correct cluster.store"
        )
    if response.status == 413:
        code = "EntityTooLarge"
    if response.status not in _PERMANENT_STATUS:
        return None
    for refusal in _PERMANENT:
        if refusal.matches(code, response.message):
            return refusal.error(f"{uri}: {refusal.problem} ({response})", refusal.hint)
    return None


def _error_from_status(response: ErrorResponse, uri: str) -> Exception:
    # "Not found" from a proxy says nothing about the object.
    if response.status == 404 and not response.is_html:
        return NotFound(str(response))
    if response.status == 412:
        return Conflict(str(response))
    if response.code in _EXPIRED_CREDENTIALS_CODES or response.status == 401:
        return access_refused(uri, str(response), tries=_FEW_TRIES)
    if response.status == 403:
        return access_refused(uri, str(response))
    # The answer to HEAD has no body, so it may be any error, also expired credentials.
    kind = AccessRefused if response.status == 400 and response.code in {"", "400"} else Refused
    return kind(
        str(response),
        ConfigError(
            f"{uri}: the store rejected the request ({response})",
            "an S3-compatible store may need cluster.store.requestChecksumCalculation: "
            "when_required, addressingStyle: path, or singleWriter: true",
        ),
        tries=1 if response.status == 501 else _FEW_TRIES,
        retry_after_s=response.retry_after_s,
    )


def access_refused(uri: str, reason: str, hint: str = _ACCESS_HINT, tries: int = 1) -> Refused:
    """Return the exception for refused access.

    It ends as a RetryError (exit code 75): denied access does not mean that a checkpoint is
    missing, and new permissions can take a while to become effective.
    """
    reason = redacted(reason)
    return AccessRefused(reason, RetryError(f"{uri}: access denied ({reason})", hint), tries)


def unreadable_file(uri: str, error: OSError) -> Transient:
    """Return the exception for a file of credentials that cannot be read, or not yet.

    An error without a file is one of the network.
    """
    if error.filename is None:
        return Transient(first_line(error))
    return access_refused(uri, f"{error.filename}: {error.strerror}")


def no_paging(uri: str, problem: str) -> ConfigError:
    """Return the error for a list that the store cuts off: the rest would seem not to exist."""
    return ConfigError(
        f"{uri}: the store does not support paging: {problem}",
        "update the store, or use another one; its lists are incomplete",
    )


def retry_after_seconds(header: str | None) -> float:
    """Parse a Retry-After header. Stores send seconds; the HTTP date form is read as 0."""
    return float(header) if header and header.isdigit() else 0.0


def first_line(error: object) -> str:
    """Return the first line of an error message. SDKs append details in further lines."""
    return redacted(str(error).split("\n", maxsplit=1)[0])
