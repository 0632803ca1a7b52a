"""What the answers of an S3 store mean."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import urllib3
from botocore import exceptions as boto

from medjob.errors import ConfigError, InputError
from medjob.store.retry import Missing, Transient, denied, refused

_NO_CREDENTIALS = (
    *(
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.CredentialRetrievalError,
        boto.TokenRetrievalError,
    ),
    *(
        boto.SSOError,
        boto.UnauthorizedSSOTokenError,
        boto.MetadataRetrievalError,
        boto.NoAuthTokenError,
    ),
)


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn the SDK's exceptions into ours."""
    try:
        yield
    except boto.ClientError as error:
        answer = error.response
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        after = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "0")
        said = answer.get("Error", {})
        raise refused(
            status, str(said.get("Code", "")), str(said.get("Message", "")), uri, _seconds(after)
        ) from None
    except _NO_CREDENTIALS as error:
        raise denied(uri, str(error)) from None
    except (
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.ResponseStreamingError,
        boto.FlexibleChecksumError,
    ) as error:
        raise Transient(first_line(error)) from None
    except urllib3.exceptions.HTTPError as error:
        raise Transient(first_line(error)) from None
    except boto.NoRegionError:
        raise ConfigError(
            f"{uri}: no region is known", "set cluster.store.region, or AWS_REGION"
        ) from None
    except (boto.BotoCoreError, ValueError) as error:
        raise ConfigError(f"{uri}: {first_line(error)}", "check cluster.store") from None


def check_range(answer: urllib3.BaseHTTPResponse, start: int, length: int, where: str) -> None:
    """Raise unless `answer` to a ranged GET brings `length` bytes from `start` on.

    Raises:
        InputError: the object ends before that.
        ConfigError: the store, or a proxy before it, does not keep to ranges: that says nothing of the object.
    """
    if answer.status in {200, 206}:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
        if found and int(found[3]) < start + length:
            raise InputError(f"{where}: is shorter than it should be")
        if not found or (int(found[1]), int(found[2])) != (start, start + length - 1):
            raise ConfigError(
                f"{where}: the store, or a proxy before it, does not keep to ranges",
                "use another endpoint",
            )
        return
    if answer.status == 416:
        raise InputError(f"{where}: is shorter than it should be")
    text = answer.data.decode(errors="replace")
    error = refused(
        answer.status,
        _tag("Code", text),
        _tag("Message", text),
        where,
        _seconds(answer.headers.get("Retry-After", "0")),
    )
    if isinstance(error, Missing):
        raise InputError(f"{where}: is not there")
    raise error


def _seconds(text: str) -> float:
    return float(text) if text.isdigit() else 0.0  # the other form, a date, is not sent by stores


def first_line(error: object) -> str:
    """A message without the details that follow it."""
    return str(error).split("\n", maxsplit=1)[0]


def _tag(name: str, text: str) -> str:
    found = re.search(rf"<{name}>([^<]*)</{name}>", text)
    return found[1] if found else ""
