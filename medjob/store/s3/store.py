"""Amazon S3 and S3-compatible stores. ranged_get.py reads the content of files."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import google_crc32c
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from medjob.config.store import StoreRef
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
    AccessRefused,
    ErrorResponse,
    NotFound,
    Refused,
    Transient,
    error_from_response,
    no_paging,
)
from medjob.store.paging import Paging
from medjob.store.retry import Renewals, conditional_write, retry_transient
from medjob.store.s3.errors import region_in, translate_errors
from medjob.store.s3.ranged_get import RangedReader
from medjob.store.source_bucket import Stat

_MAX_PARTS = 10_000  # S3's limit for one object
_CONNECT_S = 10
_READ_S = 60
_CONNECTIONS = 64
# The parts do not add up to the file. Sending them again repairs that, completing again does not.
_BROKEN_UPLOAD_CODES = {
    "BadDigest",
    "InvalidPart",
    "InvalidPartOrder",
    "XAmzContentChecksumMismatch",
}


class S3Store:
    """`s3://BUCKET/PREFIX`. boto3 finds credentials: environment, files, IRSA, instance role."""

    def __init__(self, ref: StoreRef) -> None:
        self.uri = ref.uri.rstrip("/")
        self.retry_seconds = ref.retry_seconds
        self.accepted: set[str] = set()
        self.bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._ref = ref
        self._region = ref.region
        self._send_checksums = ref.request_checksum_calculation == "when_supported"
        self.common_arguments: dict[str, Any] = {"Bucket": self.bucket}
        if ref.requester_pays:
            self.common_arguments["RequestPayer"] = "requester"
        self._encryption: dict[str, str] = {}
        if ref.kms_key:
            self._encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": ref.kms_key}
        self._upload_ids: dict[str, str] = {}
        self.client: Any = None
        self._renewals = Renewals(self._connect)
        self._open()

    @retry_transient
    def _open(self) -> None:
        if self.client is None:  # a retry has already read the credentials again
            self._connect()

    def renew_credentials(self) -> None:
        """Read the credentials again. botocore keeps those of a file for the life of a session."""
        self._renewals.renew()

    def _connect(self) -> None:
        """Create a client with the credentials that are there now."""
        core = botocore.session.get_session()
        with translate_errors(self.uri):
            session = boto3.session.Session(botocore_session=core)
            if self._region is None and self._ref.endpoint is None:
                self._region = self._find_region(_client(session, self._ref, None))
            client = _client(session, self._ref, self._region)
            if self._use_virtual_host(client):
                client = _client(session, self._ref, self._region, virtual=True)
        self._reader = RangedReader(
            core, client, self.common_arguments, (_CONNECT_S, _READ_S), _CONNECTIONS
        )
        self.client = client

    def _use_virtual_host(self, client: Any) -> bool:
        """Whether to put the bucket's name into the host name.

        With `auto`, botocore signs URLs for the global endpoint, which does not serve the regions
        opened since 2019.
        """
        return (
            self._ref.addressing_style == "auto"
            and "." not in self.bucket
            and ".amazonaws.com" in client.meta.endpoint_url
        )

    def _find_region(self, client: Any) -> str | None:
        """Ask for the bucket's region. None leaves it to botocore.

        HeadBucket may be forbidden where the policy covers only the prefix. AWS names the region
        in that answer too; if not, listing the prefix is all that a store must allow.
        """
        try:
            return str(client.head_bucket(Bucket=self.bucket).get("BucketRegion") or "") or None
        except ClientError as error:
            if region := region_in(error):
                return region
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status == 404:
                missing = ErrorResponse(404, "NoSuchBucket", self.bucket)
                raise error_from_response(missing, self.uri) from None
            if status not in {400, 403, 405, 501}:
                raise
        try:
            listed = client.list_objects_v2(Prefix=self._prefix, MaxKeys=1, **self.common_arguments)
        except ClientError as error:
            if region := region_in(error):
                return region
            raise
        headers = listed["ResponseMetadata"]["HTTPHeaders"]
        return str(headers.get("x-amz-bucket-region") or "") or None

    @retry_transient
    def get(self, key: str) -> Blob | None:
        try:
            with translate_errors(self.uri):
                response = self.client.get_object(
                    Key=self.object_key(key), ChecksumMode="ENABLED", **self.common_arguments
                )
                if response["ContentLength"] > MAX_BLOB_SIZE:
                    response["Body"].close()
                    raise too_large(f"{self.uri}/{key}")
                data = response["Body"].read()
        except NotFound:
            return None
        # botocore verifies CRC32C only if the CRT is installed, so verify it here.
        actual = _crc32c(data)
        expected = response.get("ChecksumCRC32C", actual)
        if response.get("ChecksumType") != "COMPOSITE" and expected != actual:
            raise Transient(f"{key} was corrupted in transit")
        return Blob(data, response["ETag"])

    @retry_transient
    def stat(self, key: str) -> Stat | None:
        try:
            with translate_errors(self.uri):
                response = self.client.head_object(
                    Key=self.object_key(key), ChecksumMode="ENABLED", **self.common_arguments
                )
        except NotFound:
            return None
        return Stat(response["ContentLength"], response["ETag"], _whole_checksums(response))

    def put(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def create(self, key: str, data: bytes) -> str:
        return conditional_write(self.get, key, data, lambda: self._put(key, data, IfNoneMatch="*"))

    def swap(self, key: str, data: bytes, version: str) -> str:
        return conditional_write(self.get, key, data, lambda: self._put(key, data, IfMatch=version))

    @retry_transient
    def _put(self, key: str, data: bytes, **condition: str) -> str:
        arguments = (
            self.common_arguments | self._encryption | self.checksum_argument(data) | condition
        )
        with translate_errors(self.uri):
            response = self.client.put_object(Key=self.object_key(key), Body=data, **arguments)
            return str(response["ETag"])

    @retry_transient
    def read(self, key: str, start: int, into: memoryview) -> None:
        if len(into):
            self._reader.read(self.object_key(key), start, into, f"{self.uri}/{key}")

    def upload(self, key: str, size: int) -> _S3Upload:
        part_size = max(PART_SIZE, -(-size // _MAX_PARTS))
        known = self._upload_ids.get(key)
        stored_parts = self._list_parts(key, known) if known else {}
        if not stored_parts:
            self._upload_ids[key] = self._create_upload(key)
        return _S3Upload(self, key, self._upload_ids[key], part_size, stored_parts)

    def forget_upload(self, key: str) -> None:
        """Make the next upload of `key` start from the beginning."""
        self._upload_ids.pop(key, None)

    @retry_transient
    def _create_upload(self, key: str) -> str:
        checksum_type = {}
        if self._send_checksums:
            checksum_type = {"ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
        with translate_errors(self.uri):
            response = self.client.create_multipart_upload(
                Key=self.object_key(key),
                **self.common_arguments,
                **self._encryption,
                **checksum_type,
            )
        return str(response["UploadId"])

    @retry_transient
    def _list_parts(self, key: str, upload_id: str) -> dict[int, Mapping[str, Any]]:
        """Return the stored parts of an upload by number; none if the upload no longer exists."""
        try:
            with translate_errors(self.uri):
                pages = self.client.get_paginator("list_parts").paginate(
                    Key=self.object_key(key), UploadId=upload_id, **self.common_arguments
                )
                return {
                    part["PartNumber"]: part for page in pages for part in page.get("Parts", [])
                }
        except NotFound:
            return {}

    def local_path(self, key: str) -> Path | None:
        return None

    def list(self, prefix: str) -> Iterator[Entry]:
        token: str | None = None
        paging = Paging(self.uri, self.object_key(prefix))
        while True:
            page = self._list_page(prefix, token)
            items = page.get("Contents", [])
            paging.check([item["Key"] for item in items])
            for item in items:
                yield Entry(item["Key"].removeprefix(self._prefix), item["Size"])
            token = page.get("NextContinuationToken")
            if not paging.more(token, truncated=bool(page.get("IsTruncated"))):
                return

    @retry_transient
    def _list_page(self, prefix: str, token: str | None) -> Any:
        continuation = {"ContinuationToken": token} if token else {}
        with translate_errors(self.uri):
            return self.client.list_objects_v2(
                Prefix=self.object_key(prefix), **self.common_arguments, **continuation
            )

    @retry_transient
    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFound), translate_errors(self.uri):
            self.client.delete_object(Key=self.object_key(key), **self.common_arguments)

    def unfinished(self, prefix: str) -> Iterator[str]:
        return iter(sorted({key for key, _ in self._list_uploads(prefix)}))

    @retry_transient
    def _list_uploads(self, prefix: str) -> Sequence[tuple[str, str]]:
        """Return key and upload id of each unfinished upload below `prefix`."""
        with translate_errors(self.uri):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Prefix=self.object_key(prefix), **self.common_arguments
            )
            uploads = []
            for page in pages:
                uploads += page.get("Uploads", [])
        if uploads and page.get("IsTruncated"):
            raise no_paging(self.uri, "its list of unfinished uploads ends early")
        return [
            (upload["Key"].removeprefix(self._prefix), upload["UploadId"]) for upload in uploads
        ]

    def abandon(self, key: str) -> None:
        for found, upload_id in self._list_uploads(key):
            if found == key:
                self._abort_upload(key, upload_id)

    @retry_transient
    def _abort_upload(self, key: str, upload_id: str) -> None:
        with contextlib.suppress(NotFound), translate_errors(self.uri):
            self.client.abort_multipart_upload(
                Key=self.object_key(key), UploadId=upload_id, **self.common_arguments
            )

    def object_key(self, key: str) -> str:
        """Return the object's full key in the bucket."""
        return self._prefix + checked_key(key)

    def checksum_argument(self, data: bytes) -> dict[str, str]:
        """Return the checksum argument of a request, empty if the store accepts none."""
        return {"ChecksumCRC32C": _crc32c(data)} if self._send_checksums else {}

    def object_checksum_arguments(self, crc32c: str) -> dict[str, str]:
        """Return the checksum arguments that complete a multipart upload."""
        if not self._send_checksums:
            return {}
        encoded = base64.b64encode(bytes.fromhex(crc32c)).decode()
        return {"ChecksumCRC32C": encoded, "ChecksumType": "FULL_OBJECT"}


class _S3Upload:
    """A multipart upload. `stored_parts` are those that the store already has, by number."""

    in_order = False

    def __init__(
        self,
        store: S3Store,
        key: str,
        upload_id: str,
        part_size: int,
        stored_parts: dict[int, Mapping[str, Any]],
    ) -> None:
        self._store = store
        self._key = key
        self.part_size = part_size
        self.uri = store.uri
        self.retry_seconds = store.retry_seconds
        self.accepted = store.accepted
        self.renew_credentials = store.renew_credentials
        self._target = {
            "Key": store.object_key(key),
            "UploadId": upload_id,
            **store.common_arguments,
        }
        self._stored_parts = stored_parts
        self._completed: dict[int, dict[str, Any]] = {}

    def send(self, offset: int, data: bytes) -> None:
        number = offset // self.part_size + 1
        checksum = self._store.checksum_argument(data)
        etag = _matching_etag(self._stored_parts.get(number), data, checksum)
        if etag is None:
            etag = self._upload_part(number, data, checksum)
        self._completed[number] = {"PartNumber": number, "ETag": etag, **checksum}

    @retry_transient
    def _upload_part(self, number: int, data: bytes, checksum: dict[str, str]) -> str:
        try:
            with translate_errors(self.uri):
                response = self._store.client.upload_part(
                    PartNumber=number, Body=data, **self._target, **checksum
                )
                return str(response["ETag"])
        except NotFound as error:
            raise self._lost(error) from None
        except Refused as error:
            raise self._retried(error) from None

    @retry_transient
    def finish(self, crc32c: str) -> None:
        parts = {"Parts": [self._completed[number] for number in sorted(self._completed)]}
        checksum = self._store.object_checksum_arguments(crc32c)
        try:
            with translate_errors(self.uri):
                self._store.client.complete_multipart_upload(
                    MultipartUpload=parts, **self._target, **checksum
                )
        except Refused as error:
            raise self._retried(error) from None
        except Transient as error:
            if error.code in _BROKEN_UPLOAD_CODES:
                raise self._lost(error) from None
            raise
        except NotFound as error:
            # Either an earlier try succeeded and its response was lost, or the upload was aborted.
            if not any(entry.key == self._key for entry in self._store.list(self._key)):
                raise self._lost(error) from None
        self._store.forget_upload(self._key)

    def _lost(self, error: Exception) -> UploadLost:
        self._store.forget_upload(self._key)
        return UploadLost(f"{self.uri}/{self._key}: {error}")

    def _retried(self, error: Refused) -> Transient:
        """The store has accepted the upload, so a refusal is about this one request."""
        return error if isinstance(error, AccessRefused) else Transient(str(error))


def _client(session: Any, ref: StoreRef, region: str | None, virtual: bool = False) -> Any:
    checksums = ref.request_checksum_calculation
    config = Config(
        # By default, boto3 presigns URLs with signature version 2.
        signature_version=UNSIGNED if ref.anonymous else "s3v4",
        s3={
            "addressing_style": "virtual" if virtual else ref.addressing_style,
            # If the store accepts no checksums, the signature covers the body's sha256 instead.
            "payload_signing_enabled": checksums == "when_required",
        },
        # Requests carry a CRC32C computed here, so the SDK must not add a second checksum.
        request_checksum_calculation="when_required",
        response_checksum_validation=checksums,
        retries={"total_max_attempts": 1},
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        max_pool_connections=_CONNECTIONS,
    )
    return session.client("s3", endpoint_url=ref.endpoint, region_name=region, config=config)


def _whole_checksums(response: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksums of a whole object in hex.

    The checksum of a COMPOSITE object, such as "x-3", is computed from the checksums of its parts.
    """
    if response.get("ChecksumType") == "COMPOSITE":
        return {}
    checksums = {}
    for name in ("crc32c", "crc32"):
        value = response.get(f"Checksum{name.upper()}")
        if value is not None and "-" not in value:
            checksums[name] = base64.b64decode(value).hex()
    return checksums


def _matching_etag(
    part: Mapping[str, Any] | None, data: bytes, checksum: Mapping[str, str]
) -> str | None:
    """Return the ETag of a stored part if it holds `data`."""
    if part is None or part["Size"] != len(data):
        return None
    if "ChecksumCRC32C" in part and checksum:
        same = part["ChecksumCRC32C"] == checksum["ChecksumCRC32C"]
    else:
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        same = part["ETag"].strip('"') == md5
    return str(part["ETag"]) if same else None


def _crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
