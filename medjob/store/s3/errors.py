"""Translation of botocore's exceptions and of S3's error responses."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import urllib3
from botocore import exceptions as boto

from medjob.errors import ConfigError, InputError
from medjob.store.errors import (
    NotFound,
    Transient,
    access_denied,
    error_from_response,
    first_line,
    retry_after_seconds,
)

_CREDENTIALS_ERRORS = (
    boto.CredentialRetrievalError,
    boto.MetadataRetrievalError,
    boto.NoAuthTokenError,
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.SSOError,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
)
_TRANSIENT_ERRORS = (
    boto.ConnectionError,
    boto.FlexibleChecksumError,
    boto.HTTPClientError,
    boto.ResponseStreamingError,
    urllib3.exceptions.HTTPError,
)


@contextlib.contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Translate botocore's exceptions into those of medjob.errors and medjob.store.errors."""
    try:
        yield
    except boto.ClientError as error:
        raise _from_client_error(error, uri) from None
    except _CREDENTIALS_ERRORS as error:
        raise access_denied(uri, str(error)) from None
    except _TRANSIENT_ERRORS as error:
        raise Transient(first_line(error)) from None
    except boto.NoRegionError:
        raise ConfigError(
            f"{uri}: no region is configured", "set cluster.store.region, or AWS_REGION"
        ) from None
    except (boto.BotoCoreError, ValueError) as error:
        raise ConfigError(f"{uri}: {first_line(error)}", "check cluster.store") from None


def _from_client_error(error: boto.ClientError, uri: str) -> Exception:
    metadata = error.response.get("ResponseMetadata", {})
    details = error.response.get("Error", {})
    return error_from_response(
        int(metadata.get("HTTPStatusCode", 0)),
        str(details.get("Code", "")),
        str(details.get("Message", "")),
        uri,
        retry_after_seconds(metadata.get("HTTPHeaders", {}).get("retry-after")),
    )


def check_range(response: urllib3.BaseHTTPResponse, start: int, length: int, where: str) -> None:
    """Raise unless `response` to a ranged GET holds `length` bytes from offset `start`.

    Raises:
        InputError: the object does not exist or ends before the range does.
        ConfigError: the store, or a proxy in front of it, ignores Range headers. The object itself
            may be intact.
    """
    if response.status in {200, 206}:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        if found and int(found[3]) < start + length:
            raise InputError(f"{where} is shorter than expected")
        if not found or (int(found[1]), int(found[2])) != (start, start + length - 1):
            raise ConfigError(
                f"{where}: the store, or a proxy in front of it, ignores Range headers",
                "use another endpoint",
            )
        return
    if response.status == 416:
        raise InputError(f"{where} is shorter than expected")
    text = response.data.decode(errors="replace")
    error = error_from_response(
        response.status,
        _xml_tag("Code", text),
        _xml_tag("Message", text),
        where,
        retry_after_seconds(response.headers.get("Retry-After")),
    )
    if isinstance(error, NotFound):
        raise InputError(f"{where} does not exist")
    raise error


def _xml_tag(name: str, text: str) -> str:
    found = re.search(rf"<{name}>([^<]*)</{name}>", text)
    return found[1] if found else ""
