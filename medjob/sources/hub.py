"""Translation of the Hugging Face hub's errors, shared by all code that uses the hub."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

from medjob.errors import InputError, MedjobError, RetryError, translate

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

RepoType = Literal["model", "dataset"]
# The hub's client does not wrap errors of its HTTP library, which depends on the client's version.
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_HINT = "try again, or name a local directory or file"


@contextlib.contextmanager
def hub_errors(name: str, repo_type: RepoType) -> Iterator[None]:
    """Translate the errors of a request to the hub about `name`.

    Raises:
        InputError: there is no such repository or revision, or access to it is gated or refused.
        RetryError: the hub cannot be reached.
    """
    import huggingface_hub  # noqa: F401  # adds its log handler

    # huggingface_hub prints its warnings itself and also passes them on to medjob's handler.
    logging.getLogger("huggingface_hub").handlers.clear()
    try:
        yield
    except Exception as error:
        translated = translate_hub_error(error, name, repo_type)
        if translated is None:
            raise
        raise translated from None


def translate_hub_error(error: Exception, name: str, repo_type: RepoType) -> MedjobError | None:
    """Translate an error that the hub caused, directly or through transformers or datasets, which
    wrap it. None for any other error, such as a full disk."""
    if isinstance(error, MedjobError) or translate(error) is not error:
        return None
    for each in _chain(error):
        translated = _translate_one(each, name, repo_type)
        if translated is not None:
            return translated
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, and the errors that it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _translate_one(error: BaseException, name: str, repo_type: RepoType) -> MedjobError | None:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{name}: access is gated",
            f"accept its terms at https://huggingface.co/{name} and set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        reason = str(error).splitlines()[0]
        return InputError(f"{name}: the hub has no such {repo_type}: {reason}")
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return RetryError(f"{name}: not in the hub's cache, and the hub cannot be reached", _HINT)
    if isinstance(error, errors.HfHubHTTPError):
        return _http_error(error, name)
    if isinstance(error, ConnectionError | TimeoutError) or _is_transport_error(error):
        return RetryError(f"{name}: the hub cannot be reached: {error}", _HINT)
    return None


def _http_error(error: HfHubHTTPError, name: str) -> MedjobError:
    status = error.response.status_code
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return InputError(
            f"{name}: the hub refuses access ({status})",
            "set HF_TOKEN to a token with the right to read it, or to write it for an upload",
        )
    return RetryError(f"{name}: the hub cannot be reached: {type(error).__name__}", _HINT)


def _is_transport_error(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _TRANSPORTS
