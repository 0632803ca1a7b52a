"""How S3 requests and answers look (operations, chunked bodies, checksums, XML), and what it asks of parts."""

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
OPERATIONS = {  # method, is there a key, the parameter that names a sub-resource
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
PARAMETERS = {  # besides X-Amz-*; any other is refused, for to ignore it would answer another question
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
    """A multipart upload under way; the checksums of a part are under its `resource`."""

    bucket: str
    key: str
    headers: dict[str, str]  # of the request that started it
    algorithm: str
    kind: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    parts: dict[int, Stored] = field(default_factory=dict)


def operation(request: Request) -> str:
    """Name the operation, "Unknown" for what the fake does not know."""
    mark = next(
        (name for name in ("list-type", "uploads", "uploadId") if name in request.query), ""
    )
    name = OPERATIONS.get((request.method, bool(request.key), mark), "Unknown")
    known = PARAMETERS.get(name, set()) | {"x-id"}
    strange = [
        key for key in request.query if key not in known and not key.lower().startswith("x-amz-")
    ]
    return "Unknown" if strange or "x-amz-copy-source" in request.headers else name


def bad(code: str, message: str) -> Refusal:
    return Refusal(400, code, message)


def given(request: Request, name: str) -> str:
    """Return a header; a presigned request may carry it in its query."""
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


def document(name: str, value: dict[str, Any]) -> Response:
    text = xml(name, value)
    if name != "Error":  # errors alone have no namespace
        text = text.replace(f"<{name}>", f'<{name} xmlns="{NAMESPACE}">', 1)
    return Response(
        200,
        {"Content-Type": "application/xml"},
        f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode(),
    )


def iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def encoded(request: Request, key: str) -> str:
    """Return the key as a listing shows it."""
    return quote_plus(key, safe="/") if request.query.get("encoding-type") == "url" else key


def checksum_tags(checksums: dict[str, str]) -> dict[str, str]:
    return {f"Checksum{name.upper()}": value for name, value in checksums.items()}


def completed_parts(body: bytes) -> list[dict[str, str]]:
    """Read the part list of a CompleteMultipartUpload: tag to text, one dict a part."""
    try:
        root = ET.fromstring(body)
    except ET.ParseError:
        raise bad("MalformedXML", "The XML you provided was not well-formed") from None
    parts = [{child.tag.rpartition("}")[2]: child.text or "" for child in part} for part in root]
    if not parts or any("PartNumber" not in part or "ETag" not in part for part in parts):
        raise bad(
            "MalformedXML", "The XML you provided did not validate against our published schema"
        )
    return parts


def check_payload(request: Request) -> None:
    """Set `data` and `checksums` of the request, once all that came with the body is found right."""
    headers, trailers = request.headers, dict[str, str]()
    claimed = headers.get(
        "x-amz-content-sha256", "" if "authorization" in headers else "UNSIGNED-PAYLOAD"
    )
    request.data = request.body
    if claimed.startswith("STREAMING-") or "aws-chunked" in headers.get("content-encoding", ""):
        request.data, trailers = _unchunk(request)
    elif not claimed:
        raise bad(
            "InvalidRequest", "Missing required header for this request: x-amz-content-sha256"
        )
    elif claimed not in ("UNSIGNED-PAYLOAD", hashlib.sha256(request.body).hexdigest()):
        raise bad(
            "XAmzContentSHA256Mismatch",
            "The provided 'x-amz-content-sha256' header does not match what was computed.",
        )
    md5 = checksum("md5", request.data)
    if headers.get("content-md5", md5) != md5:
        raise bad("BadDigest", "The Content-MD5 you specified did not match what we received.")
    request.checksums = _claimed_checksums(request, trailers)
    if request.operation == "CompleteMultipartUpload":
        return  # its checksums are those of the object
    for name, value in request.checksums.items():
        if value != checksum(name, request.data):
            raise bad(
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
        raise bad(
            "InvalidRequest",
            "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed.",
        )
    if given(request, "x-amz-sdk-checksum-algorithm").lower() not in {"", *names}:
        raise bad(
            "InvalidRequest",
            "x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* headers were found.",
        )
    return {
        name: given(request, f"x-amz-checksum-{name}") or trailers[f"x-amz-checksum-{name}"]
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
    raise bad("IncompleteBody", "The request body terminated unexpectedly")


def _declared(request: Request, data: bytes) -> bytes:
    declared = request.headers.get("x-amz-decoded-content-length")
    if declared is None:
        raise Refusal(
            411, "MissingContentLength", "You must provide the Content-Length HTTP header."
        )
    if int(declared) != len(data):
        raise bad(
            "IncompleteBody",
            "You did not provide the number of bytes specified by x-amz-decoded-content-length",
        )
    return data


def _trailers(request: Request, text: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in text.decode().splitlines())
    trailers = {name.strip().lower(): value.strip() for name, _, value in lines if name}
    if request.headers.get("x-amz-trailer", "").lower() not in {"", *trailers}:
        raise bad(
            "MalformedTrailerError", "The request contained trailing data that was not well-formed"
        )
    return trailers


def check_signed(request: Request, signed: list[str]) -> None:
    """Check that what was signed is there, and that what S3 wants signed was."""
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
    """Return the parts that a completion lists, in order, all as they were uploaded."""
    if any(int(one["PartNumber"]) >= int(other["PartNumber"]) for one, other in pairwise(listed)):
        raise bad("InvalidPartOrder", "The list of parts was not in ascending order.")
    parts = [_listed_part(upload, claim) for claim in listed]
    if any(len(part.data) < SMALLEST_PART for part in parts[:-1]):
        raise bad("EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size")
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
        raise bad(
            "InvalidPart",
            "One or more of the specified parts could not be found, or its entity tag or checksum did not match.",
        )
    if upload.kind == "COMPOSITE" and claimed != tags:
        missing = f"It was missing for part {claim['PartNumber']} in the request."
        raise bad(
            "InvalidRequest",
            f"The complete request must include the {upload.algorithm} checksum for each part. {missing}",
        )
    return part


def object_checksums(request: Request, upload: Upload, parts: list[Stored]) -> dict[str, str]:
    """Compute the checksum of the object, and check what the completion says about the object."""
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
        given(request, "x-amz-checksum-type").upper() not in ("", upload.kind)
        or not request.checksums.keys() <= sums.keys()
    ):
        raise bad(
            "InvalidRequest",
            f"The upload was created using the {upload.kind} checksum mode and {upload.algorithm or 'no'} checksum.",
        )
    if not request.checksums.items() <= sums.items():
        raise bad("BadDigest", "The checksum you specified did not match the calculated checksum.")
    size = str(sum(len(part.data) for part in parts))
    if given(request, "x-amz-mp-object-size") not in ("", size):
        raise bad(
            "InvalidRequest",
            f"The provided 'x-amz-mp-object-size' header does not match what was computed: {size}",
        )
    return sums
