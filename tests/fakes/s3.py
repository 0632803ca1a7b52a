"""A strict fake of S3 that follows the AWS documentation.

It supports path-style addressing and one owner. It checks which headers are signed, but does not
compute SigV4 signatures.
"""

import base64
import hashlib
import re
import uuid
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

from tests.fakes.s3_wire import (
    Upload,
    bad_request,
    check_parts,
    check_payload,
    check_signed,
    checksum_tags,
    completed_parts,
    encode_key,
    header_or_query,
    iso_time,
    object_checksums,
    operation,
    xml_response,
)
from tests.fakes.server import (
    FakeServer,
    Refusal,
    Request,
    Response,
    Stored,
    checksum,
    download_response,
)

SSE = "x-amz-server-side-encryption"
KEPT = ("content-type", "content-encoding", "content-disposition", "cache-control")
READS = ("HeadBucket", "ListObjectsV2", "GetObject", "HeadObject")
NO_PAYER = ("HeadBucket", "CreateBucket")  # these have no x-amz-request-payer header
CODES = {
    400: "RequestTimeout",
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    429: "SlowDown",
    503: "SlowDown",
}


class FakeS3(FakeServer):
    """The S3 fake.

    `encryption` has the SSE headers of the last write of each key; `uploads` has the unfinished
    multipart uploads.
    """

    def __init__(
        self,
        bucket: str = "bucket",
        access_key: str = "test",
        ignore_conditions: bool = False,
        page_size: int = 1000,
        public: bool = False,
        requester_pays: bool = False,
        clock_skew: bool = False,
        region: str | None = None,
    ) -> None:
        super().__init__(bucket)
        self.access_key = access_key
        self.ignore_conditions = ignore_conditions
        self.page_size = page_size
        self.public = public
        self.requester_pays = requester_pays
        self.clock_skew = clock_skew
        self.region = region
        self.encryption: dict[str, dict[str, str]] = {}
        self.uploads: dict[str, Upload] = {}

    def identify(self, request: Request) -> None:
        request.bucket, _, request.key = request.path[1:].partition("/")
        request.operation = operation(request)

    def error_response(self, request: Request, refusal: Refusal) -> Response:
        code = refusal.code or CODES.get(refusal.status, "InternalError")
        error = {
            "Code": code,
            "Message": refusal.message,
            **refusal.extra,
            "Resource": request.path,
            "RequestId": uuid.uuid4().hex,
        }
        answer = xml_response("Error", error)
        return Response(
            refusal.status,
            answer.headers | refusal.headers,
            b"" if refusal.status == 304 else answer.body,
        )

    def process(self, request: Request) -> Response:
        self._authenticate(request)
        if request.operation == "Unknown":
            raise Refusal(
                501,
                "NotImplemented",
                "A header or parameter you provided implies functionality that is not implemented",
            )
        if request.operation != "CreateBucket" and request.bucket not in self.buckets:
            raise Refusal(
                404,
                "NoSuchBucket",
                "The specified bucket does not exist",
                BucketName=request.bucket,
            )
        if (
            self.requester_pays
            and request.operation not in NO_PAYER
            and header_or_query(request, "x-amz-request-payer") != "requester"
        ):
            raise Refusal(403, "AccessDenied", "Access Denied")
        check_payload(request)
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", request.operation).lower()
        response: Response = getattr(self, f"_{name}")(request)
        return response

    def _authenticate(self, request: Request) -> None:
        if self.clock_skew:
            raise Refusal(
                403,
                "RequestTimeTooSkewed",
                "The difference between the request time and the current time is too large.",
            )
        header = request.headers.get("authorization", "")
        named = re.search(r"Credential=([^,\s]+)", header)
        listed = re.search(r"SignedHeaders=([^,\s]+)", header)
        credential = named[1] if named else request.query.get("X-Amz-Credential", "")
        signed = (listed[1] if listed else request.query.get("X-Amz-SignedHeaders", "")).split(";")
        if credential:
            self._check_scope(request, credential.split("/"))
            check_signed(request, signed)
        elif not (self.public and request.operation in READS):
            raise Refusal(403, "AccessDenied", "Access Denied")

    def _check_scope(self, request: Request, scope: list[str]) -> None:
        if scope[0] != self.access_key:
            raise Refusal(
                403,
                "InvalidAccessKeyId",
                "The AWS Access Key Id you provided does not exist in our records.",
            )
        if self.region is None or scope[2:3] == [self.region]:
            return
        where = {"x-amz-bucket-region": self.region}
        if request.operation == "HeadBucket":
            raise Refusal(
                301,
                "PermanentRedirect",
                "The bucket must be addressed using its own endpoint.",
                where,
            )
        message = (
            f"The authorization header is malformed; the region is wrong; expecting '{self.region}'"
        )
        raise Refusal(400, "AuthorizationHeaderMalformed", message, where, Region=self.region)

    def _head_bucket(self, request: Request) -> Response:
        return Response(200, {"x-amz-bucket-region": self.region or "us-east-1"})

    def _create_bucket(self, request: Request) -> Response:
        self.buckets.setdefault(request.bucket, {})
        return Response(200, {"Location": f"/{request.bucket}"})

    def _page(
        self, request: Request, parameter: str, items: list[Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        limit = min(int(request.query.get(parameter, 1000)), self.page_size)
        return items[:limit], {"IsTruncated": 0 < limit < len(items)}

    def _list_objects_v2(self, request: Request) -> Response:
        query, held = request.query, self.buckets[request.bucket]
        token = query.get("continuation-token")
        start = (
            query.get("start-after", "")
            if token is None
            else base64.urlsafe_b64decode(token).decode()
        )
        prefix = query.get("prefix", "")
        keys = sorted(key for key in held if key.startswith(prefix) and key > start)
        page, listing = self._page(request, "max-keys", keys)
        if listing["IsTruncated"]:
            listing["NextContinuationToken"] = base64.urlsafe_b64encode(page[-1].encode()).decode()
        listing |= {
            "Name": request.bucket,
            "Prefix": encode_key(request, prefix),
            "KeyCount": len(page),
        }
        listing |= {"EncodingType": "url"} if "encoding-type" in query else {}
        return xml_response(
            "ListBucketResult",
            {**listing, "Contents": [self._listed(request, key, held[key]) for key in page]},
        )

    def _listed(self, request: Request, key: str, stored: Stored) -> dict[str, Any]:
        facts = {
            "ETag": stored.headers["ETag"],
            "Size": len(stored.data),
            "StorageClass": "STANDARD",
        }
        return {
            "Key": encode_key(request, key),
            "LastModified": iso_time(stored.resource["modified"]),
            **facts,
        }

    def _check_conditions(self, request: Request) -> None:
        """Check If-Match and If-None-Match against the current object."""
        stored = self.buckets[request.bucket].get(request.key)
        etag = stored.headers["ETag"].strip('"') if stored else None
        match, no_match = (
            request.headers.get(name, "").strip('"') for name in ("if-match", "if-none-match")
        )
        reading = request.operation in READS
        if self.ignore_conditions:
            return
        if no_match not in ("", "*") and not reading:
            raise Refusal(
                501,
                "NotImplemented",
                "A header you provided implies functionality that is not implemented",
                Header="If-None-Match",
            )
        if no_match and etag and no_match in ("*", etag):
            raise self._condition_failed(304 if reading else 412, "If-None-Match")
        if match and etag is None:
            raise self._missing(request)
        if match and match not in ("*", etag):
            raise self._condition_failed(412, "If-Match")

    def _condition_failed(self, status: int, condition: str) -> Refusal:
        message = "At least one of the pre-conditions you specified did not hold"
        return Refusal(status, "PreconditionFailed", message, Condition=condition)

    def _missing(self, request: Request) -> Refusal:
        return Refusal(404, "NoSuchKey", "The specified key does not exist.", Key=request.key)

    def _get_object(self, request: Request) -> Response:
        stored = self.buckets[request.bucket].get(request.key)
        if stored is None:
            raise self._missing(request)
        self._check_conditions(request)
        response = download_response(request, stored, "InvalidRange")
        if (
            response.status == 200
            and header_or_query(request, "x-amz-checksum-mode").upper() == "ENABLED"
        ):
            response.headers.update(stored.resource["checksums"])
        return response

    _head_object = _get_object

    def _put_object(self, request: Request) -> Response:
        self._check_conditions(request)
        etag = self._etag(request.data, request.headers)
        stored = self._store(
            request, request.data, request.headers, etag, request.checksums, "FULL_OBJECT"
        )
        return Response(
            200, {"ETag": etag, **stored.resource["checksums"], **stored.resource["sse"]}
        )

    def _etag(self, data: bytes, headers: dict[str, str]) -> str:
        encrypted = headers.get(SSE) == "aws:kms" or f"{SSE}-customer-key" in headers
        # The ETag is the MD5 of the data only for objects that are not encrypted in these ways.
        salt = b"sealed" if encrypted else b""
        return f'"{hashlib.md5(data + salt).hexdigest()}"'

    def _store(
        self,
        at: Request | Upload,
        data: bytes,
        sent: dict[str, str],
        etag: str,
        sums: dict[str, str],
        kind: str,
    ) -> Stored:
        kept = {
            name: value
            for name, value in sent.items()
            if name in KEPT or name.startswith("x-amz-meta-")
        }
        coding = ",".join(
            part
            for part in kept.pop("content-encoding", "").split(",")
            if part.strip() not in ("", "aws-chunked")
        )
        sse = {name: value for name, value in sent.items() if name.startswith(SSE)}
        shown = {name: value for name, value in sse.items() if name != f"{SSE}-customer-key"}
        now = datetime.now(UTC)
        headers = {
            "content-type": "binary/octet-stream",
            **kept,
            **shown,
            **({"content-encoding": coding} if coding else {}),
        }
        headers |= {
            "ETag": etag,
            "Last-Modified": format_datetime(now, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        checksums = {f"x-amz-checksum-{name}": value for name, value in sums.items()}
        checksums |= {"x-amz-checksum-type": kind} if sums else {}
        stored = Stored(data, headers, {"modified": now, "checksums": checksums, "sse": shown})
        self.buckets[at.bucket][at.key] = stored
        self.encryption[at.key] = sse
        return stored

    def _delete_object(self, request: Request) -> Response:
        self._check_conditions(request)
        self.buckets[request.bucket].pop(request.key, None)
        return Response(204)

    def _create_multipart_upload(self, request: Request) -> Response:
        algorithm = header_or_query(request, "x-amz-checksum-algorithm").lower()
        asked = header_or_query(request, "x-amz-checksum-type").upper()
        if asked and (not algorithm or asked not in ("COMPOSITE", "FULL_OBJECT")):
            raise bad_request(
                "InvalidRequest",
                "The x-amz-checksum-type header can only be used with the "
                "x-amz-checksum-algorithm header.",
            )
        if asked == "FULL_OBJECT" and not algorithm.startswith("crc"):
            raise bad_request(
                "InvalidRequest",
                f"The FULL_OBJECT checksum type cannot be used with the {algorithm} checksum "
                "algorithm.",
            )
        upload = Upload(
            request.bucket,
            request.key,
            request.headers,
            algorithm,
            asked or ("COMPOSITE" if algorithm else "FULL_OBJECT"),
        )
        self.uploads[upload.id] = upload
        response = xml_response(
            "InitiateMultipartUploadResult",
            {"Bucket": upload.bucket, "Key": upload.key, "UploadId": upload.id},
        )
        if algorithm:
            response.headers |= {
                "x-amz-checksum-algorithm": algorithm.upper(),
                "x-amz-checksum-type": upload.kind,
            }
        return response

    def _upload(self, request: Request) -> Upload:
        upload = self.uploads.get(request.query["uploadId"])
        if upload is None or (upload.bucket, upload.key) != (request.bucket, request.key):
            raise Refusal(
                404,
                "NoSuchUpload",
                "The specified upload does not exist. It may have been aborted or completed.",
            )
        return upload

    def _upload_part(self, request: Request) -> Response:
        upload, number = self._upload(request), request.query.get("partNumber", "")
        if not number.isdigit() or not 1 <= int(number) <= 10_000:
            raise bad_request(
                "InvalidArgument", "Part number must be an integer between 1 and 10000, inclusive"
            )
        actual = next(iter(request.checksums), "")
        if actual != upload.algorithm and (actual or upload.kind == "COMPOSITE"):
            raise bad_request(
                "InvalidRequest",
                "Checksum Type mismatch occurred, "
                f"expected checksum Type: {upload.algorithm or 'null'}, "
                f"actual checksum Type: {actual or 'null'}",
            )
        sums = (
            {upload.algorithm: checksum(upload.algorithm, request.data)} if upload.algorithm else {}
        )
        etag = self._etag(request.data, upload.headers)
        upload.parts[int(number)] = Stored(
            request.data, {"ETag": etag}, {"modified": datetime.now(UTC), "checksums": sums}
        )
        return Response(
            200, {"ETag": etag, **{f"x-amz-checksum-{name}": value for name, value in sums.items()}}
        )

    def _list_parts(self, request: Request) -> Response:
        upload, marker = self._upload(request), int(request.query.get("part-number-marker", 0))
        page, listing = self._page(
            request, "max-parts", sorted(number for number in upload.parts if number > marker)
        )
        listing |= {
            "Bucket": upload.bucket,
            "Key": upload.key,
            "UploadId": upload.id,
            "PartNumberMarker": marker,
        }
        listing |= {"NextPartNumberMarker": page[-1]} if page else {}
        listing |= (
            {"ChecksumAlgorithm": upload.algorithm.upper(), "ChecksumType": upload.kind}
            if upload.algorithm
            else {}
        )
        return xml_response(
            "ListPartsResult", {**listing, "Part": [self._part(upload, number) for number in page]}
        )

    def _part(self, upload: Upload, number: int) -> dict[str, Any]:
        part = upload.parts[number]
        facts = {
            "PartNumber": number,
            "LastModified": iso_time(part.resource["modified"]),
            "ETag": part.headers["ETag"],
            "Size": len(part.data),
        }
        return facts | checksum_tags(part.resource["checksums"])

    def _complete_multipart_upload(self, request: Request) -> Response:
        upload = self._upload(request)
        parts = check_parts(upload, completed_parts(request.data))
        sums = object_checksums(request, upload, parts)
        self._check_conditions(request)
        joined = hashlib.md5(
            b"".join(bytes.fromhex(part.headers["ETag"].strip('"')) for part in parts)
        ).hexdigest()
        etag = f'"{joined}-{len(parts)}"'
        self._store(
            upload, b"".join(part.data for part in parts), upload.headers, etag, sums, upload.kind
        )
        del self.uploads[upload.id]
        result = {
            "Location": request.path,
            "Bucket": upload.bucket,
            "Key": upload.key,
            "ETag": etag,
            **checksum_tags(sums),
        }
        return xml_response(
            "CompleteMultipartUploadResult",
            result | ({"ChecksumType": upload.kind} if sums else {}),
        )

    def _abort_multipart_upload(self, request: Request) -> Response:
        del self.uploads[self._upload(request).id]
        return Response(204)

    def _list_multipart_uploads(self, request: Request) -> Response:
        query, prefix = request.query, request.query.get("prefix", "")
        # Without an upload id, the page starts after all uploads of the key: "~" sorts last.
        after = (query.get("key-marker", ""), query.get("upload-id-marker", "~"))
        found = {
            (upload.key, upload.id): upload
            for upload in self.uploads.values()
            if upload.bucket == request.bucket
        }
        page, listing = self._page(
            request,
            "max-uploads",
            sorted(at for at in found if at[0].startswith(prefix) and at > after),
        )
        if listing["IsTruncated"]:
            listing |= {
                "NextKeyMarker": encode_key(request, page[-1][0]),
                "NextUploadIdMarker": page[-1][1],
            }
        uploads = [
            {
                "Key": encode_key(request, key),
                "UploadId": id_,
                "Initiated": iso_time(found[key, id_].started),
            }
            for key, id_ in page
        ]
        return xml_response(
            "ListMultipartUploadsResult",
            {"Bucket": request.bucket, "Prefix": prefix, **listing, "Upload": uploads},
        )
