"""Errors of the hub are translated, and other errors are not."""

import errno
from typing import Any

import httpx2 as httpx  # the HTTP library of the installed huggingface_hub
import pytest
from huggingface_hub import errors

from medjob.errors import InputError, MedjobError, RetryError
from medjob.sources.hub import hub_errors, translate_hub_error

NAME = "org/model"


def translated(error: Exception) -> MedjobError | None:
    return translate_hub_error(error, NAME, "model")


def http_error(error_type: type[Exception], status: int, text: str) -> Exception:
    request = httpx.Request("GET", f"https://huggingface.co/{NAME}")
    response: Any = httpx.Response(status, request=request)
    return error_type(text, response=response)  # type: ignore[call-arg]


def wrapped_as_transformers_does(error: Exception) -> OSError:
    try:
        raise OSError(f"{NAME} is not a local folder") from error
    except OSError as wrapped:
        return wrapped


def wrapped_implicitly(error: Exception) -> OSError:
    """Raise an OSError while `error` is handled, so that only `__context__` names it."""
    try:
        try:
            raise error
        except Exception:
            raise OSError("cannot load")  # noqa: B904
    except OSError as wrapped:
        return wrapped


def test_gated_repository_names_the_page_with_its_terms() -> None:
    found = translated(http_error(errors.GatedRepoError, 403, "403 Client Error"))
    assert type(found) is InputError
    assert found.message == f"{NAME}: access is gated"
    assert f"https://huggingface.co/{NAME}" in found.hint
    assert "HF_TOKEN" in found.hint


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_unknown_id_is_an_input_error_with_the_first_line_of_its_reason(repo_type: Any) -> None:
    error = http_error(errors.RepositoryNotFoundError, 404, "404 Client Error.\nIf you are logged")
    found = translate_hub_error(error, NAME, repo_type)
    assert type(found) is InputError
    assert found.message == f"{NAME}: the hub has no such {repo_type}: 404 Client Error."


def test_unknown_revision_is_an_input_error() -> None:
    found = translated(http_error(errors.RevisionNotFoundError, 404, "Invalid rev id: v9"))
    assert type(found) is InputError
    assert found.message == f"{NAME}: the hub has no such model: Invalid rev id: v9"


@pytest.mark.parametrize(
    "error",
    [
        errors.LocalEntryNotFoundError("cannot find the requested files in the disk cache"),
        errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"),
    ],
    ids=["not in the cache", "offline mode"],
)
def test_offline_cache_miss_can_be_retried(error: Exception) -> None:
    found = translated(error)
    assert type(found) is RetryError
    assert found.message == f"{NAME}: not in the hub's cache, and the hub cannot be reached"
    assert "local directory" in found.hint


def test_server_error_can_be_retried() -> None:
    found = translated(http_error(errors.HfHubHTTPError, 500, "500 Server Error"))
    assert type(found) is RetryError
    assert found.message == f"{NAME}: the hub cannot be reached: HfHubHTTPError"


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("no route to host"),
        httpx.ReadTimeout("no route to host"),
        ConnectionResetError("no route to host"),
        TimeoutError("no route to host"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_transport_error_can_be_retried(error: Exception) -> None:
    found = translated(error)
    assert type(found) is RetryError
    assert found.message == f"{NAME}: the hub cannot be reached: no route to host"


@pytest.mark.parametrize("wrap", [wrapped_as_transformers_does, wrapped_implicitly])
def test_cause_of_a_wrapped_error_is_translated(wrap: Any) -> None:
    unknown = wrap(http_error(errors.RepositoryNotFoundError, 404, "404 Client Error"))
    assert type(translated(unknown)) is InputError
    assert type(translated(wrap(httpx.ConnectError("no route")))) is RetryError


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/cache/blob"),
        wrapped_as_transformers_does(ValueError("unknown format")),
        OSError("no file named model.safetensors"),
        ValueError("unknown split 'test'"),
        InputError("already translated"),
    ],
    ids=["full disk", "wrapped ValueError", "missing file", "ValueError", "MedjobError"],
)
def test_other_errors_are_not_translated(error: Exception) -> None:
    assert translated(error) is None
    with pytest.raises(type(error)) as caught, hub_errors(NAME, "model"):
        raise error
    assert caught.value is error


def test_full_disk_during_a_failed_request_is_not_blamed_on_the_hub() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/cache/blob")
    full.__context__ = httpx.ReadTimeout("slow")
    assert translated(full) is None


def test_hub_errors_raises_the_translation() -> None:
    with pytest.raises(RetryError, match="no route"), hub_errors(NAME, "model"):
        raise httpx.ConnectError("no route")
