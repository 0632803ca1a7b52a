"""The wire format of S3: operations, chunked bodies, checksums, XML, and the rules for parts."""

import base64
import hashlib
import io
import re
import uuid
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

from tests.fakes.server import Refusal, Request, Response, Stored, checksum

SMALLEST_PART = 5 << 20
ALGORITHMS = ("crc32", "crc32c", "sha1", "sha256")
ENTITIES = {'"': "&quot;", "\r": "&#13;"}
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
OPERATIONS = {  # method, whether there is a key, the parameter that names a sub-resource
    ("HEAD", False, ""): "HeadBucket",
    ("PUT", False, ""): "CreateBucket",
    ("GET", False, "list-type"): "ListObjectsV2",
    ("GET", False, "uploads"): "ListMultipartUploads",
    ("GET", True, ""): "GetObject",
    ("HEAD", True, ""): "HeadObject",
    ("PUT", True, ""): "PutObject",
    ("DELETE", True, ""): "DeleteObject",
    ("POST", True, "uploads"): "CreateMultipartUpload",
    ("PUT", True, "uploadId"): "UploadPart",
    ("GET", True, "uploadId"): "ListParts",
    ("POST", True, "uploadId"): "CompleteMultipartUpload",
    ("DELETE", True, "uploadId"): "AbortMultipartUpload",
}
LIST = {
    "list-type",
    "prefix",
    "continuation-token",
    "start-after",
    "max-keys",
    "encoding-type",
    "fetch-owner",
}
PARAMETERS = {  # and X-Amz-*; any other is rejected, because ignoring it would change the result
    "ListObjectsV2": LIST,
    "ListMultipartUploads": {
        "uploads",
        "prefix",
        "max-uploads",
        "key-marker",
        "upload-id-marker",
        "encoding-type",
    },
    "CreateMultipartUpload": {"uploads"},
    "UploadPart": {"uploadId", "partNumber"},
    "ListParts": {"uploadId", "max-parts", "part-number-marker"},
    "CompleteMultipartUpload": {"uploadId"},
    "AbortMultipartUpload": {"uploadId"},
}


@dataclass
class Upload:
    """An unfinished multipart upload. The checksums of a part are in its `resource`."""

    bucket: str
    key: str
    headers: dict[str, str]  # of the request that started it
    algorithm: str
    kind: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    parts: dict[int, Stored] = field(default_factory=dict)


def operation(request: Request) -> str:
    """Return the name of the operation, or "Unknown" if the fake does not support it."""
    subresource = next(
        (name for name in ("list-type", "uploads", "uploadId") if name in request.query), ""
    )
    name = OPERATIONS.get((request.method, bool(request.key), subresource), "Unknown")
    known = PARAMETERS.get(name, set()) | {"x-id"}
    unsupported = [
        key for key in request.query if key not in known and not key.lower().startswith("x-amz-")
    ]
    return "Unknown" if unsupported or "x-amz-copy-source" in request.headers else name


def bad_request(code: str, message: str) -> Refusal:
    return Refusal(400, code, message)


def header_or_query(request: Request, name: str) -> str:
    """Return a header. A presigned request may have it in the query instead."""
    return request.headers.get(name) or next(
        (value for key, value in request.query.items() if key.lower() == name), ""
    )


def xml(name: str, value: Any) -> str:
    if isinstance(value, list):
        return "".join(xml(name, item) for item in value)
    if isinstance(value, dict):
        return f"<{name}>{''.join(xml(*pair) for pair in value.items())}</{name}>"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"<{name}>{escape(text, ENTITIES)}</{name}>"


def xml_response(name: str, value: dict[str, Any]) -> Response:
    text = xml(name, value)
    if name != "Error":  # only errors have no namespace
        text = text.replace(f"<{name}>", f'<{name} xmlns="{NAMESPACE}">', 1)
    return Response(
        200,
        {"Content-Type": "application/xml"},
        f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode(),
    )


def iso_time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def encode_key(request: Request, key: str) -> str:
    """Return the key as a listing encodes it."""
    return quote_plus(key, safe="/") if request.query.get("encoding-type") == "url" else key


def checksum_tags(checksums: dict[str, str]) -> dict[str, str]:
    return {f"Checksum{name.upper()}": value for name, value in checksums.items()}


def completed_parts(body: bytes) -> list[dict[str, str]]:
    """Read the part list of a CompleteMultipartUpload: tag to text, one dict per part."""
    try:
        root = ET.fromstring(body)
    except ET.ParseError:
        raise bad_request("MalformedXML", "The XML you provided was not well-formed") from None
    parts = [{child.tag.rpartition("}")[2]: child.text or "" for child in part} for part in root]
    if not parts or any("PartNumber" not in part or "ETag" not in part for part in parts):
        raise bad_request(
            "MalformedXML", "The XML you provided did not validate against our published schema"
        )
    return parts


def check_payload(request: Request) -> None:
    """Verify the body against its headers, and set `data` and `checksums` of the request."""
    headers, trailers = request.headers, dict[str, str]()
    claimed = headers.get(
        "x-amz-content-sha256", "" if "authorization" in headers else "UNSIGNED-PAYLOAD"
    )
    request.data = request.body
    if claimed.startswith("STREAMING-") or "aws-chunked" in headers.get("content-encoding", ""):
        request.data, trailers = _unchunk(request)
    elif not claimed:
        raise bad_request(
            "InvalidRequest", "Missing required header for this request: x-amz-content-sha256"
        )
    elif claimed not in ("UNSIGNED-PAYLOAD", hashlib.sha256(request.body).hexdigest()):
        raise bad_request(
            "XAmzContentSHA256Mismatch",
            "The provided 'x-amz-content-sha256' header does not match what was computed.",
        )
    md5 = checksum("md5", request.data)
    if headers.get("content-md5", md5) != md5:
        raise bad_request(
            "BadDigest", "The Content-MD5 you specified did not match what we received."
        )
    request.checksums = _claimed_checksums(request, trailers)
    if request.operation == "CompleteMultipartUpload":
        return  # the checksums of this request are those of the object
    for name, value in request.checksums.items():
        if value != checksum(name, request.data):
            raise bad_request(
                "BadDigest",
                f"The {name.upper()} you specified did not match the calculated checksum.",
            )


def _claimed_checksums(request: Request, trailers: dict[str, str]) -> dict[str, str]:
    names = {
        key.lower()
        for key in (*request.headers, *request.query, *trailers)
        if key.lower().startswith("x-amz-checksum-")
    }
    names = {name.removeprefix("x-amz-checksum-") for name in names} - {"algorithm", "mode", "type"}
    if names - set(ALGORITHMS):
        raise Refusal(501, "NotImplemented", f"The fake cannot compute {', '.join(sorted(names))}")
    if len(names) > 1:
        raise bad_request(
            "InvalidRequest",
            "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed.",
        )
    if header_or_query(request, "x-amz-sdk-checksum-algorithm").lower() not in {"", *names}:
        raise bad_request(
            "InvalidRequest",
            "x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* "
            "headers were found.",
        )
    return {
        name: header_or_query(request, f"x-amz-checksum-{name}")
        or trailers[f"x-amz-checksum-{name}"]
        for name in names
    }


def _unchunk(request: Request) -> tuple[bytes, dict[str, str]]:
    """Decode an aws-chunked body into the data and its trailing headers."""
    stream, data = io.BytesIO(request.body), bytearray()
    while size := re.fullmatch(rb"([0-9a-fA-F]+)(;chunk-signature=\w+)?\r\n", stream.readline()):
        data += stream.read(length := int(size[1], 16))
        if length and stream.read(2) != b"\r\n":
            break
        if not length:
            return _declared(request, bytes(data)), _trailers(request, stream.read())
    raise bad_request("IncompleteBody", "The request body terminated unexpectedly")


def _declared(request: Request, data: bytes) -> bytes:
    declared = request.headers.get("x-amz-decoded-content-length")
    if declared is None:
        raise Refusal(
            411, "MissingContentLength", "You must provide the Content-Length HTTP header."
        )
    if int(declared) != len(data):
        raise bad_request(
            "IncompleteBody",
            "You did not provide the number of bytes specified by x-amz-decoded-content-length",
        )
    return data


def _trailers(request: Request, text: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in text.decode().splitlines())
    trailers = {name.strip().lower(): value.strip() for name, _, value in lines if name}
    if request.headers.get("x-amz-trailer", "").lower() not in {"", *trailers}:
        raise bad_request(
            "MalformedTrailerError", "The request contained trailing data that was not well-formed"
        )
    return trailers


def check_signed(request: Request, signed: list[str]) -> None:
    """Check that all signed headers were sent, and that S3's required headers were signed."""
    if not set(signed) <= request.headers.keys():
        raise Refusal(403, "SignatureDoesNotMatch", "A header that was signed was not sent")
    if any(
        name.startswith("x-amz-") and name not in (*signed, "x-amz-content-sha256")
        for name in request.headers
    ):
        raise Refusal(
            403, "AccessDenied", "There were headers present in the request which were not signed"
        )


def check_parts(upload: Upload, listed: list[dict[str, str]]) -> list[Stored]:
    """Check the parts that a completion lists, and return them in order."""
    if any(int(part["PartNumber"]) >= int(after["PartNumber"]) for part, after in pairwise(listed)):
        raise bad_request("InvalidPartOrder", "The list of parts was not in ascending order.")
    parts = [_listed_part(upload, claim) for claim in listed]
    if any(len(part.data) < SMALLEST_PART for part in parts[:-1]):
        raise bad_request(
            "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size"
        )
    return parts


def _listed_part(upload: Upload, claim: dict[str, str]) -> Stored:
    part = upload.parts.get(int(claim["PartNumber"]))
    tags = {} if part is None else checksum_tags(part.resource["checksums"])
    claimed = {tag: value for tag, value in claim.items() if tag.startswith("Checksum")}
    if (
        part is None
        or claim["ETag"].strip('"') != part.headers["ETag"].strip('"')
        or not claimed.items() <= tags.items()
    ):
        raise bad_request(
            "InvalidPart",
            "One or more of the specified parts could not be found, or its entity tag or "
            "checksum did not match.",
        )
    if upload.kind == "COMPOSITE" and claimed != tags:
        missing = f"It was missing for part {claim['PartNumber']} in the request."
        raise bad_request(
            "InvalidRequest",
            f"The complete request must include the {upload.algorithm} checksum for each part. "
            f"{missing}",
        )
    return part


def object_checksums(request: Request, upload: Upload, parts: list[Stored]) -> dict[str, str]:
    """Compute the checksum of the object, and compare it with the completion request."""
    sums = {}
    if upload.algorithm:
        full = upload.kind == "FULL_OBJECT"
        pieces = (
            part.data if full else base64.b64decode(part.resource["checksums"][upload.algorithm])
            for part in parts
        )
        sums[upload.algorithm] = checksum(upload.algorithm, b"".join(pieces)) + (
            "" if full else f"-{len(parts)}"
        )
    if (
        header_or_query(request, "x-amz-checksum-type").upper() not in ("", upload.kind)
        or not request.checksums.keys() <= sums.keys()
    ):
        raise bad_request(
            "InvalidRequest",
            f"The upload was created using the {upload.kind} checksum mode and "
            f"{upload.algorithm or 'no'} checksum.",
        )
    if not request.checksums.items() <= sums.items():
        raise bad_request(
            "BadDigest", "The checksum you specified did not match the calculated checksum."
        )
    size = str(sum(len(part.data) for part in parts))
    if header_or_query(request, "x-amz-mp-object-size") not in ("", size):
        raise bad_request(
            "InvalidRequest",
            f"The provided 'x-amz-mp-object-size' header does not match what was computed: {size}",
        )
    return sums
