"""Amazon S3 and S3-compatible stores, through boto3; the bodies of files are read by s3_get.py."""

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

from medjob.config.store import StoreRef
from medjob.store.base import PART, Blob, Entry, UploadLost, checked_key
from medjob.store.originals import Stat
from medjob.store.retry import Missing, Transient, refused, retried, unless_ours
from medjob.store.s3.errors import explained
from medjob.store.s3.get import RangedGets

_MOST_PARTS = 10_000  # of one object, in S3
_CONNECT_S, _READ_S = 10, 60
_CONNECTIONS = 64


class S3Store:
    """`s3://BUCKET/PREFIX`. Credentials come from the SDK's own chain: environment, files, IRSA, instance role."""

    def __init__(self, ref: StoreRef) -> None:
        self.uri = ref.uri.rstrip("/")
        self.patience = ref.retry_seconds
        self.bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._checksums = ref.request_checksum_calculation == "when_supported"
        self.common: dict[str, Any] = {"Bucket": self.bucket} | (
            {"RequestPayer": "requester"} if ref.requester_pays else {}
        )
        self._encryption = (
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": ref.kms_key} if ref.kms_key else {}
        )
        core = botocore.session.get_session()
        with explained(self.uri):
            session = boto3.session.Session(botocore_session=core)
            self.client = _client(session, ref, ref.region)
            self.client = _client(session, ref, self._region(ref), virtual=self._is_aws(ref))
        self._gets = RangedGets(core, self.client, self.common, (_CONNECT_S, _READ_S), _CONNECTIONS)
        self._uploads: dict[str, str] = {}

    def _is_aws(self, ref: StoreRef) -> bool:
        """Whether the bucket can stand in the name of Amazon's host.

        With `auto`, botocore signs URLs for the global endpoint, which the regions opened since 2019 do not answer.
        """
        return (
            ref.addressing_style == "auto"
            and "." not in self.bucket
            and ".amazonaws.com" in self.client.meta.endpoint_url
        )

    @retried
    def _region(self, ref: StoreRef) -> str | None:
        if ref.region is not None or ref.endpoint is not None:
            return ref.region
        try:
            with explained(self.uri):
                answer = self.client.head_bucket(Bucket=self.bucket)
        except Missing:
            raise refused(404, "NoSuchBucket", self.bucket, self.uri) from None
        return str(answer["BucketRegion"]) if "BucketRegion" in answer else None

    @retried
    def get(self, key: str) -> Blob | None:
        try:
            with explained(self.uri):
                answer = self.client.get_object(
                    Key=self.full(key), ChecksumMode="ENABLED", **self.common
                )
                data = answer["Body"].read()
        except Missing:
            return None
        ours = _crc32c(data)  # botocore looks at a CRC32C only where the CRT is installed
        if answer.get("ChecksumType") != "COMPOSITE" and answer.get("ChecksumCRC32C", ours) != ours:
            raise Transient(f"{key}: was damaged on its way")
        return Blob(data, answer["ETag"])

    @retried
    def stat(self, key: str) -> Stat | None:
        try:
            with explained(self.uri):
                answer = self.client.head_object(
                    Key=self.full(key), ChecksumMode="ENABLED", **self.common
                )
        except Missing:
            return None
        kept = {name: answer.get(f"Checksum{name.upper()}", "-") for name in ("crc32c", "crc32")}
        whole = {
            name: base64.b64decode(value).hex() for name, value in kept.items() if "-" not in value
        }  # of many parts' sums: "x-3"
        return Stat(
            answer["ContentLength"],
            answer["ETag"],
            whole if answer.get("ChecksumType") != "COMPOSITE" else {},
        )

    def put(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def create(self, key: str, data: bytes) -> str:
        return unless_ours(self.get, key, data, lambda: self._put(key, data, IfNoneMatch="*"))

    def swap(self, key: str, data: bytes, version: str) -> str:
        return unless_ours(self.get, key, data, lambda: self._put(key, data, IfMatch=version))

    @retried
    def _put(self, key: str, data: bytes, **condition: str) -> str:
        with explained(self.uri):
            arguments = self.common | self._encryption | self.checksum(data) | condition
            return str(self.client.put_object(Key=self.full(key), Body=data, **arguments)["ETag"])

    @retried
    def read(self, key: str, start: int, into: memoryview) -> None:
        if len(into):
            self._gets.fill(self.full(key), start, into, f"{self.uri}/{key}")

    def upload(self, key: str, size: int) -> _S3Upload:
        part_size = max(PART, -(-size // _MOST_PARTS))
        known = self._uploads.get(key)
        arrived = self._arrived(key, known) if known else {}
        if not known or not arrived:
            self._uploads[key] = self._begin(key)
        return _S3Upload(self, key, self._uploads[key], part_size, arrived)

    def forget(self, key: str) -> None:
        """Begin anew with the next upload of `key`."""
        self._uploads.pop(key, None)

    @retried
    def _begin(self, key: str) -> str:
        kind = (
            {"ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
            if self._checksums
            else {}
        )
        with explained(self.uri):
            answer = self.client.create_multipart_upload(
                Key=self.full(key), **self.common, **self._encryption, **kind
            )
        return str(answer["UploadId"])

    @retried
    def _arrived(self, key: str, upload: str) -> dict[int, Mapping[str, Any]]:
        """Parts that the store has of an upload, by number; none if it is forgotten."""
        try:
            with explained(self.uri):
                pages = self.client.get_paginator("list_parts").paginate(
                    Key=self.full(key), UploadId=upload, **self.common
                )
                return {
                    part["PartNumber"]: part for page in pages for part in page.get("Parts", [])
                }
        except Missing:
            return {}

    def local_path(self, key: str) -> Path | None:
        return None

    def list(self, prefix: str) -> Iterator[Entry]:
        token: str | None = None
        while True:
            page = self._page(prefix, token)
            for item in page.get("Contents", []):
                yield Entry(item["Key"].removeprefix(self._prefix), item["Size"])
            token = page.get("NextContinuationToken")
            if not token:
                return

    @retried
    def _page(self, prefix: str, token: str | None) -> Any:
        more = {"ContinuationToken": token} if token else {}
        with explained(self.uri):
            return self.client.list_objects_v2(Prefix=self.full(prefix), **self.common, **more)

    @retried
    def delete(self, key: str) -> None:
        with contextlib.suppress(Missing), explained(self.uri):
            self.client.delete_object(Key=self.full(key), **self.common)

    def unfinished(self, prefix: str) -> Iterator[str]:
        return iter(sorted({key for key, _ in self._unfinished(prefix)}))

    @retried
    def _unfinished(self, prefix: str) -> Sequence[tuple[str, str]]:
        with explained(self.uri):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Prefix=self.full(prefix), **self.common
            )
            found = [upload for page in pages for upload in page.get("Uploads", [])]
        return [(upload["Key"].removeprefix(self._prefix), upload["UploadId"]) for upload in found]

    def abandon(self, key: str) -> None:
        for found, upload in self._unfinished(key):
            if found == key:
                self._abort(key, upload)

    @retried
    def _abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(Missing), explained(self.uri):
            self.client.abort_multipart_upload(Key=self.full(key), UploadId=upload, **self.common)

    def full(self, key: str) -> str:
        """The object's name in the bucket."""
        return self._prefix + checked_key(key)

    def checksum(self, data: bytes) -> dict[str, str]:
        """The checksum that a request carries, if the store takes any."""
        return {"ChecksumCRC32C": _crc32c(data)} if self._checksums else {}

    def whole_checksum(self, crc32c: str) -> dict[str, str]:
        """The checksum of a whole object of many parts."""
        return (
            {
                "ChecksumCRC32C": base64.b64encode(bytes.fromhex(crc32c)).decode(),
                "ChecksumType": "FULL_OBJECT",
            }
            if self._checksums
            else {}
        )


class _S3Upload:
    in_order = False

    def __init__(
        self,
        store: S3Store,
        key: str,
        upload: str,
        part_size: int,
        arrived: dict[int, Mapping[str, Any]],
    ) -> None:
        self._store, self._key, self.part_size = store, key, part_size
        self.uri, self.patience = store.uri, store.patience
        self._target = {"Key": store.full(key), "UploadId": upload, **store.common}
        self._arrived = arrived
        self._parts: dict[int, dict[str, Any]] = {}

    def send(self, offset: int, data: bytes) -> None:
        number, checksum = offset // self.part_size + 1, self._store.checksum(data)
        etag = _known_etag(self._arrived.get(number), data, checksum) or self._send(
            number, data, checksum
        )
        self._parts[number] = {"PartNumber": number, "ETag": etag, **checksum}

    @retried
    def _send(self, number: int, data: bytes, checksum: dict[str, str]) -> str:
        try:
            with explained(self.uri):
                return str(
                    self._store.client.upload_part(
                        PartNumber=number, Body=data, **self._target, **checksum
                    )["ETag"]
                )
        except Missing as error:
            raise self._lost(error) from None

    @retried
    def finish(self, crc32c: str) -> None:
        parts = {"Parts": [self._parts[number] for number in sorted(self._parts)]}
        try:
            with explained(self.uri):
                self._store.client.complete_multipart_upload(
                    MultipartUpload=parts, **self._target, **self._store.whole_checksum(crc32c)
                )
        except (
            Missing
        ) as error:  # the answer to an earlier try was lost; or someone has aborted the upload
            if not any(entry.key == self._key for entry in self._store.list(self._key)):
                raise self._lost(error) from None
        self._store.forget(self._key)

    def _lost(self, error: Exception) -> UploadLost:
        self._store.forget(self._key)
        return UploadLost(f"{self.uri}/{self._key}: {error}")


def _client(session: Any, ref: StoreRef, region: str | None, virtual: bool = False) -> Any:
    checksums = ref.request_checksum_calculation
    config = Config(
        signature_version=UNSIGNED
        if ref.anonymous
        else "s3v4",  # presigned URLs are made with version 2 otherwise
        # A body's own checksum travels with it; where the store takes none, the signature over its sha256 stands in.
        s3={
            "addressing_style": "virtual" if virtual else ref.addressing_style,
            "payload_signing_enabled": checksums == "when_required",
        },
        request_checksum_calculation="when_required",  # ours is given; the SDK must not add another
        response_checksum_validation=checksums,
        retries={"total_max_attempts": 1},
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        max_pool_connections=_CONNECTIONS,
    )
    return session.client("s3", endpoint_url=ref.endpoint, region_name=region, config=config)


def _known_etag(
    part: Mapping[str, Any] | None, data: bytes, checksum: Mapping[str, str]
) -> str | None:
    """The ETag of a part that the store has already, if it is the same as ours."""
    if part is None or part["Size"] != len(data):
        return None
    if "ChecksumCRC32C" in part and checksum:
        return str(part["ETag"]) if part["ChecksumCRC32C"] == checksum["ChecksumCRC32C"] else None
    return (
        str(part["ETag"])
        if part["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
        else None
    )


def _crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
