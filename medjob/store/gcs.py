"""Google Cloud Storage, through google-cloud-storage."""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import requests
import urllib3
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage import exceptions as media
from requests.adapters import HTTPAdapter

from medjob.config.store import StoreRef
from medjob.errors import ConfigError, InputError
from medjob.store.base import (
    MAX_BLOB_SIZE,
    PART_SIZE,
    Blob,
    Entry,
    UploadLost,
    checked_key,
    too_large,
)
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
from medjob.store.paging import Paging
from medjob.store.retry import Renewals, conditional_write, retry_transient
from medjob.store.source_bucket import Stat

_CONNECTIONS = 64
_TIMEOUT_S = (10, 60)  # connect, read
_SESSION_REFUSALS = 2  # refused requests after which a resumable upload starts again
_FEW_TRIES = 3  # to refresh a token
_TRANSIENT_ERRORS = (
    ConnectionError,
    api.RetryError,
    auth.TransportError,
    media.DataCorruption,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
)


class GCSStore:
    """`gs://BUCKET/PREFIX`, with application-default credentials.

    These come from a login, a key file or workload identity.
    """

    def __init__(self, ref: StoreRef) -> None:
        self.uri = ref.uri.rstrip("/")
        self.retry_seconds = ref.retry_seconds
        bucket_name, _, prefix = self.uri.removeprefix("gs://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._kms_key = ref.kms_key
        self._ref = ref
        self._bucket_name = bucket_name
        self.accepted: set[str] = set()
        self._upload_urls: dict[str, str] = {}
        # The URL of a resumable upload authorizes its requests, so they need no credentials.
        self.upload_http = _with_connections(requests.Session())
        self._client: Any = None
        self._renewals = Renewals(self._connect)
        self._open()

    @retry_transient
    def _open(self) -> None:
        if self._client is None:  # a retry has already read the credentials again
            self._connect()

    def renew_credentials(self) -> None:
        """Read the credentials again. The client keeps those of a key file until it ends."""
        self._renewals.renew()

    def _connect(self) -> None:
        """Create a client with the credentials that are there now."""
        options = {"api_endpoint": self._ref.endpoint} if self._ref.endpoint else None
        with translate_errors(self.uri), _malformed_credentials():
            client = storage.Client(
                project=self._ref.user_project or "unused",
                credentials=AnonymousCredentials() if self._ref.anonymous else None,
                client_options=options,
            )
            _check_scopes(client._credentials)  # noqa: SLF001
            self._bucket = client.bucket(self._bucket_name, user_project=self._ref.user_project)
        # The client offers no public way to size its connection pool.
        _with_connections(client._http)  # noqa: SLF001
        self._client = client

    @retry_transient
    def get(self, key: str) -> Blob | None:
        blob = self._blob(key)
        content = _BoundedBuffer(f"{self.uri}/{key}")
        try:
            with translate_errors(self.uri):
                blob.download_to_file(content, raw_download=True, timeout=_TIMEOUT_S, retry=None)
        except NotFound:
            return None
        return Blob(content.getvalue(), str(blob.generation))

    @retry_transient
    def stat(self, key: str) -> Stat | None:
        blob = self._blob(key)
        try:
            with translate_errors(self.uri):
                blob.reload(timeout=_TIMEOUT_S, retry=None)
        except NotFound:
            return None
        checksums = {"crc32c": base64.b64decode(blob.crc32c).hex()} if blob.crc32c else {}
        return Stat(int(blob.size), str(blob.generation), checksums)

    def put(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def create(self, key: str, data: bytes) -> str:
        return conditional_write(self.get, key, data, lambda: self._put(key, data, 0))

    def swap(self, key: str, data: bytes, version: str) -> str:
        return conditional_write(self.get, key, data, lambda: self._put(key, data, int(version)))

    @retry_transient
    def _put(self, key: str, data: bytes, generation: int | None = None) -> str:
        blob = self._blob(key)
        with translate_errors(self.uri):
            blob.upload_from_string(
                data,
                content_type="application/octet-stream",
                checksum="crc32c",
                if_generation_match=generation,
                timeout=_TIMEOUT_S,
                retry=None,
            )
        return str(blob.generation)

    @retry_transient
    def read(self, key: str, start: int, into: memoryview) -> None:
        if not len(into):
            return
        where = f"{self.uri}/{key}"
        writer = _BufferWriter(into)
        try:
            with translate_errors(self.uri):
                self._blob(key).download_to_file(
                    writer,
                    start=start,
                    end=start + len(into) - 1,
                    raw_download=True,
                    checksum=None,
                    timeout=_TIMEOUT_S,
                    retry=None,
                )
        except NotFound:
            raise InputError(f"{where} does not exist") from None
        except _RangeNotSatisfiable:
            raise InputError(f"{where} is shorter than expected") from None
        if writer.count != len(into):
            raise InputError(f"{where} is shorter than expected")

    def upload(self, key: str, size: int) -> _GCSUpload:
        url = self._upload_urls.get(key)
        if url is not None:
            return _GCSUpload(self, key, size, url, persisted=None)
        self._upload_urls[key] = self._create_upload(key, size)
        return _GCSUpload(self, key, size, self._upload_urls[key], persisted=0)

    @retry_transient
    def _create_upload(self, key: str, size: int) -> str:
        with translate_errors(self.uri):
            url = self._blob(key).create_resumable_upload_session(
                content_type="application/octet-stream",
                size=size,
                timeout=_TIMEOUT_S,
                checksum=None,
                retry=None,
            )
        return str(url)

    def forget_upload(self, key: str) -> None:
        """Make the next upload of `key` start from the beginning."""
        self._upload_urls.pop(key, None)

    def local_path(self, key: str) -> Path | None:
        return None

    def list(self, prefix: str) -> Iterator[Entry]:
        token: str | None = None
        paging = Paging(self.uri, self._object_name(prefix))
        while True:
            page, token = self._list_page(prefix, token)
            paging.check([name for name, _ in page])
            for name, size in page:
                yield Entry(name.removeprefix(self._prefix), size)
            if not paging.more(token, truncated=False):
                return

    @retry_transient
    def _list_page(
        self, prefix: str, token: str | None
    ) -> tuple[Sequence[tuple[str, int]], str | None]:
        """Return name and size of each object, and the token of the next page."""
        with translate_errors(self.uri):
            blobs = self._client.list_blobs(
                self._bucket,
                prefix=self._object_name(prefix),
                page_token=token,
                timeout=_TIMEOUT_S,
                retry=None,
            )
            page = next(blobs.pages, ())
            return [(blob.name, int(blob.size)) for blob in page], blobs.next_page_token

    @retry_transient
    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFound), translate_errors(self.uri):
            self._blob(key).delete(timeout=_TIMEOUT_S, retry=None)

    def unfinished(self, prefix: str) -> Iterator[str]:
        """Return nothing: GCS does not list or bill resumable uploads, and drops them in a week."""
        return iter(())

    def abandon(self, key: str) -> None:
        self.forget_upload(key)

    def _blob(self, key: str) -> Any:
        return self._bucket.blob(self._object_name(key), kms_key_name=self._kms_key)

    def _object_name(self, key: str) -> str:
        return self._prefix + checked_key(key)


class _GCSUpload:
    """A resumable upload. Parts are sent in order; the store reports how many bytes it persisted.

    `persisted` is that number of bytes, or None if the store must be asked.
    """

    in_order = True
    part_size = PART_SIZE

    def __init__(
        self, store: GCSStore, key: str, size: int, url: str, persisted: int | None
    ) -> None:
        self._store = store
        self._key = key
        self._size = size
        self._url = url
        self.uri = store.uri
        self.retry_seconds = store.retry_seconds
        self.accepted = store.accepted
        self.renew_credentials = store.renew_credentials
        self._persisted = persisted
        self._done = False
        self._refusals = 0

    def send(self, offset: int, data: bytes) -> None:
        if offset + len(data) < self._size:
            self._send(offset, data)
        else:  # `finish` sends the last part, together with the checksum of the whole file
            self._last_part = (offset, data)

    def finish(self, crc32c: str) -> None:
        offset, data = self._last_part
        self._send(offset, data, base64.b64encode(bytes.fromhex(crc32c)).decode())
        self._store.forget_upload(self._key)

    @retry_transient
    def _send(self, offset: int, data: bytes, checksum: str | None = None) -> None:
        """Send a part until the store has persisted all of it: a request may persist less.

        `checksum` marks the last part, which is done only when the object exists.
        """
        end = offset + len(data)
        while True:
            persisted = self._query() if self._persisted is None else self._persisted
            self._persisted = persisted
            if self._done or (persisted >= end and checksum is None):
                return
            if persisted < offset:
                raise self._lost("the store no longer has bytes that it had confirmed")
            self._persisted = None  # unknown until the next response
            if persisted >= end:
                raise Transient(f"{self._key}: all bytes are stored but the object does not exist")
            headers = {"Content-Range": f"bytes {persisted}-{end - 1}/{self._size}"}
            if checksum:
                headers["X-Goog-Hash"] = f"crc32c={checksum}"
            response = self._put(data[persisted - offset :], headers)
            self._persisted = self._parse(response, checksum)
            if not self._done and self._persisted <= persisted:
                remaining = end - persisted
                raise Transient(f"{self._key}: the store persisted none of {remaining} bytes")

    def _query(self) -> int:
        """Ask the store how many bytes it has persisted."""
        return self._parse(self._put(b"", {"Content-Range": f"bytes */{self._size}"}), None)

    def _put(self, data: bytes, headers: dict[str, str]) -> requests.Response:
        try:
            return self._store.upload_http.put(
                self._url, data=data, headers=headers, timeout=_TIMEOUT_S, allow_redirects=False
            )
        except requests.RequestException as error:
            # Name only the type: the message contains the upload URL, which is a credential.
            raise Transient(f"{self._key}: {type(error).__name__}") from None

    def _parse(self, response: requests.Response, checksum: str | None) -> int:
        """Return the number of persisted bytes, and set `_done` if the object exists."""
        if response.status_code == 308:
            found = re.fullmatch(r"bytes=0-(\d+)", response.headers.get("Range", ""))
            return int(found[1]) + 1 if found else 0
        if response.ok:
            if checksum and _stored_checksum(response, checksum) != checksum:
                self._store.delete(self._key)
                raise self._lost("the file was corrupted in transit")
            self._done = True
            return self._size
        error = _from_response(response, response.text[:200], self.uri)
        if response.status_code in {404, 410} or (response.status_code == 400 and checksum):
            raise self._lost(str(error))
        if isinstance(error, Refused):
            # The store has accepted the upload, so a refusal is about the request or the session.
            self._refusals += 1
            if self._refusals > _SESSION_REFUSALS:
                raise self._lost(str(error))
            raise Transient(str(error))
        raise error

    def _lost(self, reason: str) -> UploadLost:
        self._store.forget_upload(self._key)
        return UploadLost(f"{self.uri}/{self._key}: {reason}")


class _BufferWriter(io.RawIOBase):
    """File object that the SDK downloads into, backed by a buffer of fixed length."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self.count = 0

    def write(self, data: Any) -> int:
        end = self.count + len(data)
        if end > len(self._buffer):
            raise ValueError("the store, or a proxy in front of it, ignores Range headers")
        self._buffer[self.count : end] = data
        self.count = end
        return len(data)


class _BoundedBuffer(io.BytesIO):
    """The content of a small object, as far as the SDK has downloaded it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > MAX_BLOB_SIZE:
            raise too_large(self._where)
        return super().write(data)


class _RangeNotSatisfiable(Exception):
    """The range starts after the end of the object."""


@contextlib.contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Translate the SDK's exceptions into those of medjob.errors and medjob.store.errors."""
    try:
        yield
    except api.RequestRangeNotSatisfiable:
        raise _RangeNotSatisfiable from None
    except api.GoogleAPICallError as error:
        raise _from_api_error(error, uri) from None
    except media.InvalidResponse as error:
        raise _from_response(error.response, first_line(error), uri) from None
    except (auth.DefaultCredentialsError, auth.RefreshError, auth.MalformedError) as error:
        raise access_refused(
            uri,
            first_line(error.args[0]),  # the others can quote a private key
            "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
            tries=_FEW_TRIES if isinstance(error, auth.RefreshError) else 1,
        ) from None
    except _TRANSIENT_ERRORS as error:
        raise Transient(first_line(error)) from None
    except OSError as error:
        raise unreadable_file(uri, error) from None
    except ValueError as error:
        raise ConfigError(f"{uri}: {first_line(error)}", "check cluster.store") from None


def _check_scopes(credentials: Any) -> None:
    """Raise TypeError if the scopes of a key file are no texts: google-auth joins them only when it
    asks for a token."""
    " ".join(getattr(credentials, "scopes", None) or ())


@contextlib.contextmanager
def _malformed_credentials() -> Iterator[None]:
    """Translate the errors of google-auth for a key file whose JSON has values of a wrong type."""
    try:
        yield
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise auth.MalformedError(
            f"the credentials file has a value of a wrong type ({type(error).__name__})"
        ) from None


def _from_api_error(error: api.GoogleAPICallError, uri: str) -> Exception:
    if error.response is not None:
        return _from_response(error.response, error.message or "", uri)
    return error_from_response(ErrorResponse(error.code or 0, "", error.message or ""), uri)


def _from_response(response: requests.Response, message: str, uri: str) -> Exception:
    reason, text = _reason_and_message(response)
    message = (text or message)[:300]
    if response.status_code == 404 and "bucket does not exist" in message:
        reason = "NoSuchBucket"
    return error_from_response(
        ErrorResponse(
            status=response.status_code,
            code=reason,
            message=message,
            retry_after_s=retry_after_seconds(response.headers.get("Retry-After")),
            is_html=response.headers.get("Content-Type", "").startswith("text/html"),
        ),
        uri,
    )


def _reason_and_message(response: requests.Response) -> tuple[str, str]:
    """Read them from the JSON that the API answers with. Empty if the body is something else."""
    try:
        error = response.json()["error"]
        return str(error["errors"][0]["reason"]), str(error["message"])
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError):
        return "", ""


def _stored_checksum(response: requests.Response, default: str) -> str:
    """The crc32c of a new object; `default` if the store does not name it."""
    try:
        return str(response.json().get("crc32c", default))
    except (ValueError, AttributeError):
        raise Transient("the response to the last part is not JSON") from None


def _with_connections(http: requests.Session) -> requests.Session:
    for scheme in ("https://", "http://"):
        http.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))
    return http
