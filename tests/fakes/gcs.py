"""A strict fake of the Google Cloud Storage JSON API that follows Google's documentation.

It covers checksums, generations and resumable uploads.
"""

import base64
import json
import re
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote, urlencode

from tests.fakes.server import (
    FakeServer,
    Refusal,
    Request,
    Response,
    Stored,
    checksum,
    download_response,
)

QUANTUM = 256 << 10  # every chunk of a resumable upload except the last is a multiple of this
HASHES = {"crc32c": "crc32c", "md5Hash": "md5"}
PARAMETERS = {
    "alt",
    "fields",
    "projection",
    "prettyPrint",
    "userProject",
    "project",
    "name",
    "uploadType",
    "upload_id",
    "generation",
}
PARAMETERS |= {
    "ifGenerationMatch",
    "ifGenerationNotMatch",
    "kmsKeyName",
    "prefix",
    "pageToken",
    "maxResults",
    "key",
}
SESSION = ("PutChunk", "QueryUpload", "CancelUpload")
REASONS = {
    400: "invalid",
    403: "forbidden",
    404: "notFound",
    408: "requestTimeout",
    412: "conditionNotMet",
    429: "rateLimitExceeded",
}


@dataclass
class Session:
    """A resumable upload. `done` is the response once the object exists."""

    start: Request
    metadata: dict[str, Any]
    total: int | None
    data: bytearray = field(default_factory=bytearray)
    done: Response | None = None
    cancelled: bool = False


def _invalid(message: str) -> Refusal:
    return Refusal(400, "invalid", message)


def _json(
    value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(
        status,
        {"Content-Type": "application/json; charset=UTF-8", **(headers or {})},
        json.dumps(value).encode(),
    )


def _content_range(request: Request) -> tuple[int | None, int | None]:
    """Return the offset of the chunk (None for a status query) and the object's size if known."""
    text = request.headers.get("content-range")
    length = int(request.headers.get("content-length", len(request.body)))
    if text is None:  # the whole object in one request
        return 0, length
    found = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(?:\*|(\d+))", text)
    if not found:
        raise _invalid(f"Failed to parse Content-Range header {text!r}")
    first, last, total = (None if part is None else int(part) for part in found.groups())
    if (
        first is not None
        and last is not None
        and (last - first + 1 != length or last >= (total or last + 1))
    ):
        raise _invalid(f"Content-Range {text!r} does not fit {length} bytes")
    return first, total


def _peek(body: bytes) -> dict[str, Any]:
    """Return the first JSON object of a body that may be incomplete."""
    try:
        metadata: dict[str, Any] = json.JSONDecoder().raw_decode(
            body[body.index(b"{") :].decode(errors="replace")
        )[0]
    except ValueError:
        return {}
    return metadata


def _related(request: Request) -> tuple[dict[str, Any], bytes]:
    """Split a multipart/related body into the metadata, including the media type, and the media."""
    boundary = re.search(r'boundary="?([^";]+)"?', request.headers.get("content-type", ""))
    if not boundary:
        raise _invalid("Missing boundary")
    mark = b"--" + boundary[1].encode()
    head, _, rest = request.body.removeprefix(mark).partition(b"\r\n" + mark)
    data, closing, _ = rest.rpartition(b"\r\n" + mark + b"--")
    types, separator, data = data.partition(b"\r\n\r\n")
    if not closing or not separator:
        raise _invalid("Missing end boundary in multipart body")
    metadata: dict[str, Any] = json.loads(head.partition(b"\r\n\r\n")[2])
    kind = re.search(rb"content-type: *([^\r\n]+)", types, re.IGNORECASE)
    return {
        "contentType": kind[1].decode() if kind else "application/octet-stream",
        **metadata,
    }, data


class FakeGCS(FakeServer):
    """The GCS fake. `encryption` has the `kmsKeyName` of the last write of each key, if any."""

    def __init__(
        self,
        bucket: str = "bucket",
        ignore_conditions: bool = False,
        page_size: int = 1000,
        requester_pays: bool = False,
    ) -> None:
        super().__init__(bucket)
        self.ignore_conditions = ignore_conditions
        self.page_size = page_size
        self.requester_pays = requester_pays
        self.encryption: dict[str, str] = {}
        self.sessions: dict[str, Session] = {}
        self._generation = 1_700_000_000_000_000

    def identify(self, request: Request) -> None:
        found = re.fullmatch(
            r"(/upload|/download|)/storage/v1/b(?:/([^/]+)(?:/o(?:/([^/]+))?)?)?",
            request.target.partition("?")[0],
        )
        if not found or request.query.keys() - PARAMETERS:
            return
        endpoint, bucket, name = found.groups()
        request.bucket, request.key = unquote(bucket or ""), unquote(name or "")
        if endpoint == "/upload":
            request.operation, request.key = self._upload_operation(request)
            return
        if name:
            level = "object"
        elif found[0].endswith("/o"):
            level = "objects"
        else:
            level = "bucket" if bucket else "buckets"
        request.operation = {
            ("GET", "bucket", False): "GetBucket",
            ("POST", "buckets", False): "CreateBucket",
            ("GET", "objects", False): "ListObjects",
            ("GET", "object", False): "StatObject",
            ("GET", "object", True): "GetObject",
            ("DELETE", "object", False): "DeleteObject",
        }.get((request.method, level, request.query.get("alt") == "media"), "Unknown")

    def _upload_operation(self, request: Request) -> tuple[str, str]:
        session = self.sessions.get(request.query.get("upload_id", ""))
        if "upload_id" in request.query:
            query = request.headers.get("content-range", "").startswith("bytes */")
            operation = {
                "PUT": "QueryUpload" if query else "PutChunk",
                "DELETE": "CancelUpload",
            }.get(request.method, "Unknown")
            return operation, session.start.key if session else ""
        kind = (request.method, request.query.get("uploadType", ""))
        name = request.query.get("name") or (
            "" if kind[1] == "media" else _peek(request.body).get("name", "")
        )
        kinds = {
            ("POST", "multipart"): "PutObject",
            ("POST", "media"): "PutObject",
            ("POST", "resumable"): "StartUpload",
        }
        return kinds.get(kind, "Unknown"), name

    def error_response(self, request: Request, refusal: Refusal) -> Response:
        reason = refusal.code or REASONS.get(refusal.status, "backendError")
        detail = {"message": refusal.message, "domain": "global", "reason": reason}
        error = {"error": {"code": refusal.status, "message": refusal.message, "errors": [detail]}}
        return (
            Response(304)
            if refusal.status == 304
            else _json(error, refusal.status, refusal.headers)
        )

    def process(self, request: Request) -> Response:
        if request.operation == "Unknown":
            raise Refusal(
                501, "notImplemented", f"The fake does not know {request.method} {request.target}"
            )
        if request.operation not in ("CreateBucket", *SESSION):
            if request.bucket not in self.buckets:
                raise Refusal(404, "notFound", "The specified bucket does not exist.")
            if self.requester_pays and not request.query.get("userProject"):
                raise Refusal(
                    400,
                    "UserProjectMissing",
                    "Bucket is a requester pays bucket but no user project provided.",
                )
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", request.operation).lower()
        response: Response = getattr(self, f"_{name}")(request)
        return response

    def _get_bucket(self, request: Request) -> Response:
        name = request.bucket or json.loads(request.body)["name"]
        return _json(
            {
                "kind": "storage#bucket",
                "id": name,
                "name": name,
                "location": "US",
                "storageClass": "STANDARD",
            }
        )

    def _create_bucket(self, request: Request) -> Response:
        name = json.loads(request.body)["name"]
        if name in self.buckets:
            raise Refusal(
                409,
                "conflict",
                "Your previous request to create the named bucket succeeded and you already "
                "own it.",
            )
        self.buckets[name] = {}
        return self._get_bucket(request)

    def _list_objects(self, request: Request) -> Response:
        query, held = request.query, self.buckets[request.bucket]
        after = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        keys = sorted(
            key for key in held if key.startswith(query.get("prefix", "")) and key > after
        )
        page = keys[: max(1, min(int(query.get("maxResults", 1000)), self.page_size))]
        listing: dict[str, Any] = {"kind": "storage#objects"}
        listing |= {"items": [held[key].resource for key in page]} if page else {}
        listing |= (
            {"nextPageToken": base64.urlsafe_b64encode(page[-1].encode()).decode()}
            if len(page) < len(keys)
            else {}
        )
        return _json(listing)

    def _check_conditions(self, request: Request, *, reading: bool = False) -> None:
        stored = self.buckets[request.bucket].get(request.key)
        current = stored.resource["generation"] if stored else "0"
        unwanted = request.query.get("ifGenerationNotMatch") == current
        if not self.ignore_conditions and (
            unwanted or request.query.get("ifGenerationMatch", current) != current
        ):
            status = 304 if reading and unwanted else 412
            raise Refusal(
                status,
                "conditionNotMet",
                "At least one of the pre-conditions you specified did not hold.",
            )

    def _find(self, request: Request) -> Stored:
        stored = self.buckets[request.bucket].get(request.key)
        if (
            not stored
            or request.query.get("generation", stored.resource["generation"])
            != stored.resource["generation"]
        ):
            raise Refusal(404, "notFound", f"No such object: {request.bucket}/{request.key}")
        self._check_conditions(request, reading=request.method == "GET")
        return stored

    def _stat_object(self, request: Request) -> Response:
        return _json(self._find(request).resource)

    def _get_object(self, request: Request) -> Response:
        return download_response(request, self._find(request), "requestedRangeNotSatisfiable")

    def _delete_object(self, request: Request) -> Response:
        self._find(request)
        del self.buckets[request.bucket][request.key]
        return Response(204)

    def _put_object(self, request: Request) -> Response:
        metadata, data = (
            {"contentType": request.headers.get("content-type", "application/octet-stream")},
            request.body,
        )
        if request.query["uploadType"] == "multipart":
            metadata, data = _related(request)
        return self._store(request, metadata, data, request.headers.get("x-goog-hash", ""))

    def _store(
        self, start: Request, metadata: dict[str, Any], data: bytes, claims: str
    ) -> Response:
        """Store an object as requested by `start`, if all checksums match."""
        sums = {name: checksum(kind, data) for name, kind in HASHES.items()}
        claimed = [(name, metadata[name]) for name in HASHES if name in metadata]
        pairs = (claim.strip().partition("=") for claim in claims.split(",") if claim.strip())
        claimed += [("md5Hash" if name == "md5" else name, value) for name, _, value in pairs]
        for name, value in claimed:
            if sums.get(name) != value:
                raise _invalid(
                    f'Provided {name} "{value}" doesn\'t match '
                    f'calculated {name} "{sums.get(name)}".'
                )
        if not start.key:
            raise Refusal(400, "required", "Required")
        self._check_conditions(start)
        resource = self._resource(start, metadata | sums, len(data))
        self.buckets[start.bucket][start.key] = Stored(
            data, self._media_headers(resource), resource
        )
        self.encryption.pop(start.key, None)
        if "kmsKeyName" in start.query:
            self.encryption[start.key] = start.query["kmsKeyName"]
        return _json(resource)

    def _resource(self, start: Request, metadata: dict[str, Any], size: int) -> dict[str, Any]:
        self._generation += 1
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        generation = str(self._generation)
        url = f"{self.endpoint}/download/storage/v1/b/{start.bucket}/o/{quote(start.key, safe='')}"
        ids = {
            "kind": "storage#object",
            "storageClass": "STANDARD",
            "timeCreated": now,
            "updated": now,
        }
        ids |= {
            "id": f"{start.bucket}/{start.key}/{generation}",
            "name": start.key,
            "bucket": start.bucket,
        }
        version = {
            "generation": generation,
            "metageneration": "1",
            "etag": base64.b64encode(generation.encode()).decode(),
        }
        key = (
            {"kmsKeyName": start.query["kmsKeyName"] + "/cryptoKeyVersions/1"}
            if "kmsKeyName" in start.query
            else {}
        )
        link = {
            "mediaLink": f"{url}?{urlencode({'generation': generation, 'alt': 'media'})}",
            "size": str(size),
        }
        return metadata | ids | version | key | link

    def _media_headers(self, resource: dict[str, Any]) -> dict[str, str]:
        headers = {
            "Content-Type": resource["contentType"],
            "ETag": resource["etag"],
            "Accept-Ranges": "bytes",
        }
        headers |= {
            "x-goog-generation": resource["generation"],
            "x-goog-hash": f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
        }
        return headers | {
            "x-goog-stored-content-encoding": "identity",
            "x-goog-stored-content-length": resource["size"],
        }

    def _start_upload(self, request: Request) -> Response:
        headers, session = request.headers, uuid.uuid4().hex
        metadata = {
            "contentType": headers.get("x-upload-content-type", "application/octet-stream"),
            **json.loads(request.body or b"{}"),
        }
        self.sessions[session] = Session(
            request, metadata, int(headers.get("x-upload-content-length", 0)) or None
        )
        url = f"{self.endpoint}/upload/storage/v1/b/{request.bucket}/o"
        url = f"{url}?uploadType=resumable&upload_id={session}"
        return Response(200, {"Location": url, "X-GUploader-UploadID": session})

    def _session(self, request: Request) -> Session:
        session = self.sessions.get(request.query["upload_id"])
        if session is None or session.cancelled:
            raise Refusal(
                410 if session else 404,
                "notFound",
                "The upload session does not exist, or is over.",
            )
        return session

    def _put_chunk(self, request: Request) -> Response:
        session, (start, total) = self._session(request), _content_range(request)
        if session.done or start is None:
            return session.done or self._progress(request, session, total)
        if start > len(session.data):
            raise Refusal(
                503,
                "backendError",
                f"The chunk starts at {start}, but {len(session.data)} bytes arrived",
            )
        if start + len(request.body) != total and len(request.body) % QUANTUM:
            raise _invalid(
                f"A chunk of {len(request.body)} bytes: all but the last must be multiples of "
                "256 KiB"
            )
        session.total = session.total or total
        if total not in (None, session.total):
            raise _invalid(f"The upload was to have {session.total} bytes, not {total}")
        session.data += request.body[len(session.data) - start :]
        return self._progress(request, session, total)

    _query_upload = _put_chunk

    def _progress(self, request: Request, session: Session, total: int | None) -> Response:
        """Report how many bytes arrived. If all have, create the object.

        If the object is rejected, the session ends.
        """
        if total != len(session.data):
            return Response(
                308, {"Range": f"bytes=0-{len(session.data) - 1}"} if session.data else {}
            )
        del self.sessions[request.query["upload_id"]]
        session.done = self._store(
            session.start,
            session.metadata,
            bytes(session.data),
            request.headers.get("x-goog-hash", ""),
        )
        self.sessions[request.query["upload_id"]] = session
        return session.done

    def _cancel_upload(self, request: Request) -> Response:
        self._session(request).cancelled = True
        return Response(499)

    def body_interrupted(self, request: Request) -> None:
        """Keep the received bytes of a chunk, rounded down to a multiple of 256 KiB."""
        with self.lock:
            session = self.sessions.get(request.query.get("upload_id", ""))
            if (
                request.operation != "PutChunk"
                or session is None
                or session.done
                or session.cancelled
            ):
                return
            start, arrived = _content_range(request)[0] or 0, len(session.data)
            if start <= arrived:
                keep = (start + len(request.body)) // QUANTUM * QUANTUM
                session.data += request.body[arrived - start : max(keep - start, 0)]
