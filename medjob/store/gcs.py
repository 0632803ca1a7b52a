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
from medjob.store.base import PART, Blob, Entry, UploadLost, checked_key
from medjob.store.originals import Stat
from medjob.store.retry import Missing, Transient, denied, refused, retried, unless_ours

_CONNECTIONS = 64
_TIMEOUT_S = (10, 60)  # connect, read


class GCSStore:
    """`gs://BUCKET/PREFIX`. Credentials are the application-default ones: a login, a file, workload identity."""

    def __init__(self, ref: StoreRef) -> None:
        self.uri = ref.uri.rstrip("/")
        self.patience = ref.retry_seconds
        name, _, prefix = self.uri.removeprefix("gs://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._kms_key = ref.kms_key
        options = {"api_endpoint": ref.endpoint} if ref.endpoint else None
        credentials = AnonymousCredentials() if ref.anonymous else None
        with explained(self.uri):
            self._client = storage.Client(
                project=ref.user_project or "unused",
                credentials=credentials,
                client_options=options,
            )
            self._bucket = self._client.bucket(name, user_project=ref.user_project)
        self._sessions: dict[str, str] = {}
        self.plain = requests.Session()  # a session's URL is its own credential
        for session in (self.plain, self._client._http):  # noqa: SLF001 - the client offers no other way to size its pool
            session.mount("https://", HTTPAdapter(pool_maxsize=_CONNECTIONS))
            session.mount("http://", HTTPAdapter(pool_maxsize=_CONNECTIONS))

    @retried
    def get(self, key: str) -> Blob | None:
        blob = self._blob(key)
        try:
            with explained(self.uri):
                data = blob.download_as_bytes(raw_download=True, timeout=_TIMEOUT_S, retry=None)
        except Missing:
            return None
        return Blob(data, str(blob.generation))

    @retried
    def stat(self, key: str) -> Stat | None:
        blob = self._blob(key)
        try:
            with explained(self.uri):
                blob.reload(timeout=_TIMEOUT_S, retry=None)
        except Missing:
            return None
        checksums = {"crc32c": base64.b64decode(blob.crc32c).hex()} if blob.crc32c else {}
        return Stat(int(blob.size), str(blob.generation), checksums)

    def put(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def create(self, key: str, data: bytes) -> str:
        return unless_ours(self.get, key, data, lambda: self._put(key, data, 0))

    def swap(self, key: str, data: bytes, version: str) -> str:
        return unless_ours(self.get, key, data, lambda: self._put(key, data, int(version)))

    @retried
    def _put(self, key: str, data: bytes, generation: int | None = None) -> str:
        blob = self._blob(key)
        with explained(self.uri):
            blob.upload_from_string(
                data,
                content_type="application/octet-stream",
                checksum="crc32c",
                if_generation_match=generation,
                timeout=_TIMEOUT_S,
                retry=None,
            )
        return str(blob.generation)

    @retried
    def read(self, key: str, start: int, into: memoryview) -> None:
        if not len(into):
            return
        where, sink = f"{self.uri}/{key}", _Sink(into)
        try:
            with explained(self.uri):
                self._blob(key).download_to_file(
                    sink,
                    start=start,
                    end=start + len(into) - 1,
                    raw_download=True,
                    checksum=None,
                    timeout=_TIMEOUT_S,
                    retry=None,
                )
        except Missing:
            raise InputError(f"{where}: is not there") from None
        except _TooShort:
            raise InputError(f"{where}: is shorter than it should be") from None
        if sink.count != len(into):
            raise InputError(f"{where}: is shorter than it should be")

    def upload(self, key: str, size: int) -> _GCSUpload:
        known = self._sessions.get(key)
        session = self._sessions[key] = known or self._begin(key, size)
        return _GCSUpload(self, key, size, session, arrived=None if known else 0)

    @retried
    def _begin(self, key: str, size: int) -> str:
        with explained(self.uri):
            session = self._blob(key).create_resumable_upload_session(
                content_type="application/octet-stream",
                size=size,
                timeout=_TIMEOUT_S,
                checksum=None,
                retry=None,
            )
        return str(session)

    def forget(self, key: str) -> None:
        """Begin anew with the next upload of `key`."""
        self._sessions.pop(key, None)

    def local_path(self, key: str) -> Path | None:
        return None

    def list(self, prefix: str) -> Iterator[Entry]:
        token: str | None = None
        while True:
            entries, token = self._page(prefix, token)
            yield from entries
            if not token:
                return

    @retried
    def _page(self, prefix: str, token: str | None) -> tuple[Sequence[Entry], str | None]:
        with explained(self.uri):
            found = self._client.list_blobs(
                self._bucket,
                prefix=self._full(prefix),
                page_token=token,
                timeout=_TIMEOUT_S,
                retry=None,
            )
            page = next(found.pages, ())
            entries = [Entry(blob.name.removeprefix(self._prefix), int(blob.size)) for blob in page]
            return entries, found.next_page_token

    @retried
    def delete(self, key: str) -> None:
        with contextlib.suppress(Missing), explained(self.uri):
            self._blob(key).delete(timeout=_TIMEOUT_S, retry=None)

    def unfinished(self, prefix: str) -> Iterator[str]:
        return iter(
            ()
        )  # a session holds no space that is paid for, is listed nowhere, and ends after a week

    def abandon(self, key: str) -> None:
        self._sessions.pop(key, None)

    def _blob(self, key: str) -> Any:
        return self._bucket.blob(self._full(key), kms_key_name=self._kms_key)

    def _full(self, key: str) -> str:
        return self._prefix + checked_key(key)


class _GCSUpload:
    """A resumable upload: parts go one after another, and the store tells up to which byte it has them."""

    in_order = True
    part_size = PART

    def __init__(
        self, store: GCSStore, key: str, size: int, session: str, arrived: int | None
    ) -> None:
        self._store, self._key, self._size, self.session = store, key, size, session
        self.uri, self.patience = store.uri, store.patience
        self._arrived = arrived  # bytes that the store has; None when that has to be asked
        self._done = False

    def send(self, offset: int, data: bytes) -> None:
        if offset + len(data) < self._size:  # the last part waits for the checksum of the whole
            self._send(offset, data)
        else:
            self._last = offset, data

    def finish(self, crc32c: str) -> None:
        self._send(*self._last, base64.b64encode(bytes.fromhex(crc32c)).decode())
        self._store.forget(self._key)

    @retried
    def _send(self, offset: int, data: bytes, checksum: str | None = None) -> None:
        """Send bytes until the store has them all: it may take a part of a request. The last part is done when the object is."""
        end = offset + len(data)
        while True:
            arrived = self._ask() if self._arrived is None else self._arrived
            self._arrived = arrived
            if self._done or (arrived >= end and checksum is None):
                return
            if arrived < offset:
                raise self._lost("bytes that it had confirmed are gone")
            self._arrived = None  # until the answer says otherwise
            if arrived >= end:
                raise Transient(f"{self._key}: all bytes have arrived, and there is no object yet")
            headers = {"Content-Range": f"bytes {arrived}-{end - 1}/{self._size}"}
            if checksum:
                headers["X-Goog-Hash"] = f"crc32c={checksum}"
            self._arrived = self._sent(self._put(data[arrived - offset :], headers), checksum)
            if not self._done and self._arrived <= arrived:
                raise Transient(f"{self._key}: the store has taken none of {end - arrived} bytes")

    def _ask(self) -> int:
        return self._sent(self._put(b"", {"Content-Range": f"bytes */{self._size}"}), None)

    def _put(self, data: bytes, headers: dict[str, str]) -> requests.Response:
        try:
            return self._store.plain.put(
                self.session, data=data, headers=headers, timeout=_TIMEOUT_S, allow_redirects=False
            )
        except requests.RequestException as error:
            raise Transient(
                f"{self._key}: {type(error).__name__}"
            ) from None  # its text holds the session's URL

    def _sent(self, answer: requests.Response, checksum: str | None) -> int:
        if answer.status_code == 308:
            found = re.fullmatch(r"bytes=0-(\d+)", answer.headers.get("Range", ""))
            return int(found[1]) + 1 if found else 0
        if answer.ok:
            if checksum and answer.json().get("crc32c", checksum) != checksum:
                self._store.delete(self._key)
                raise self._lost("it was damaged on its way")
            self._done = True
            return self._size
        if answer.status_code in {404, 410} or (answer.status_code == 400 and checksum):
            raise self._lost(answer.text[:200])
        raise refused(
            answer.status_code,
            "",
            answer.text[:200],
            self.uri,
            _seconds(answer.headers.get("Retry-After", "0")),
        )

    def _lost(self, why: str) -> UploadLost:
        self._store.forget(self._key)
        return UploadLost(f"{self.uri}/{self._key}: {why}")


class _Sink(io.RawIOBase):
    """What the SDK writes a download to: a buffer of fixed length."""

    def __init__(self, into: memoryview) -> None:
        self._into, self.count = into, 0

    def write(self, data: Any) -> int:
        end = self.count + len(data)
        if end > len(self._into):
            raise ValueError("the store, or a proxy before it, does not keep to ranges")
        self._into[self.count : end] = data
        self.count = end
        return len(data)


class _TooShort(Exception):
    """The range begins after the object's end."""


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn the SDK's exceptions into ours."""
    try:
        yield
    except api.RequestRangeNotSatisfiable:
        raise _TooShort from None
    except api.GoogleAPICallError as error:
        after = (
            error.response.headers.get("Retry-After", "0") if error.response is not None else "0"
        )
        raise _refused(error.code or 0, error.message or "", uri, after) from None
    except media.InvalidResponse as error:
        after = error.response.headers.get("Retry-After", "0")
        raise _refused(error.response.status_code, _first_line(error), uri, after) from None
    except (auth.DefaultCredentialsError, auth.RefreshError) as error:
        raise denied(
            uri, f"{_first_line(error)}; `gcloud auth application-default login` makes credentials"
        ) from None
    except (
        requests.RequestException,
        api.RetryError,
        auth.TransportError,
        media.DataCorruption,
        urllib3.exceptions.HTTPError,
        ConnectionError,
    ) as error:
        raise Transient(_first_line(error)) from None
    except ValueError as error:
        raise ConfigError(f"{uri}: {_first_line(error)}", "check cluster.store") from None


def _refused(status: int, message: str, uri: str, after: str) -> Exception:
    missing_bucket = status == 404 and "bucket does not exist" in message
    return refused(status, "NoSuchBucket" if missing_bucket else "", message, uri, _seconds(after))


def _seconds(text: str) -> float:
    return float(text) if text.isdigit() else 0.0  # the other form, a date, is not sent by stores


def _first_line(error: object) -> str:
    return str(error).split("\n", maxsplit=1)[0]
