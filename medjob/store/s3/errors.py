"""Translation of botocore's exceptions and of S3's error responses."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import urllib3
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from medjob.errors import ConfigError, InputError
from medjob.store.errors import (
    ErrorResponse,
    NotFound,
    Refused,
    Transient,
    access_refused,
    error_from_response,
    first_line,
    retry_after_seconds,
    unreadable_file,
)

_CREDENTIALS_ERRORS = (
    boto.CredentialRetrievalError,
    boto.LoginError,
    boto.MetadataRetrievalError,
    boto.NoAuthTokenError,
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.SSOError,
    boto.SSOTokenLoadError,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
)
_TRANSIENT_ERRORS = (
    boto.ConnectionError,
    boto.FlexibleChecksumError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    ResponseParserError,
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
        raise access_refused(uri, first_line(error)) from None
    except _TRANSIENT_ERRORS as error:
        raise Transient(first_line(error)) from None
    except OSError as error:
        raise unreadable_file(uri, error) from None
    except (boto.ConfigParseError, boto.ProfileNotFound) as error:
        # A program may be rewriting the file at this moment.
        raise Refused(first_line(error), _config_error(uri, error)) from None
    except boto.NoRegionError:
        raise ConfigError(
            f"{uri}: no region is configured", "set cluster.store.region, or AWS_REGION"
        ) from None
    except (boto.BotoCoreError, ValueError) as error:
        raise _config_error(uri, error) from None


def _config_error(uri: str, error: Exception) -> ConfigError:
    return ConfigError(f"{uri}: {first_line(error)}", "check cluster.store")


def _from_client_error(error: boto.ClientError, uri: str) -> Exception:
    details = error.response.get("Error", {})
    metadata = error.response.get("ResponseMetadata", {})
    headers = metadata.get("HTTPHeaders", {})
    return error_from_response(
        ErrorResponse(
            status=int(metadata.get("HTTPStatusCode", 0)),
            code=str(details.get("Code", "")),
            message=str(details.get("Message", "")),
            retry_after_s=retry_after_seconds(headers.get("retry-after")),
            region=region_in(error),
            is_html=headers.get("content-type", "").startswith("text/html"),
        ),
        uri,
    )


def region_in(error: boto.ClientError) -> str:
    """Return the bucket's region, which S3 names even when it refuses a request. Empty if not."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region")
    return str(region or "")


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
    headers = response.headers
    error = error_from_response(
        ErrorResponse(
            status=response.status,
            code=_xml_tag("Code", text),
            message=_xml_tag("Message", text),
            retry_after_s=retry_after_seconds(headers.get("Retry-After")),
            region=headers.get("x-amz-bucket-region") or _xml_tag("Region", text),
            is_html=headers.get("Content-Type", "").startswith("text/html"),
        ),
        where,
    )
    if isinstance(error, NotFound):
        raise InputError(f"{where} does not exist")
    raise error


def _xml_tag(name: str, text: str) -> str:
    found = re.search(rf"<{name}>([^<]*)</{name}>", text)
    return found[1] if found else ""
