"""The fakes, tested with the real clients: accepted and rejected requests, and each fault."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import google.api_core.exceptions as google_errors
import pytest
import requests
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, HTTPClientError
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from tests.fakes.gcs import FakeGCS
from tests.fakes.s3 import FakeS3
from tests.fakes.server import Fault, checksum

MIB = 1 << 20
BODY = bytes(range(256)) * 4096  # 1 MiB
WRONG = checksum("crc32c", b"another body")


@pytest.fixture
def s3() -> Iterator[FakeS3]:
    with FakeS3(page_size=3) as fake:
        yield fake


@pytest.fixture
def gcs() -> Iterator[FakeGCS]:
    with FakeGCS(page_size=3) as fake:
        yield fake


def aws(fake: FakeS3, key: str = "test") -> Any:
    session = boto3.Session(
        aws_access_key_id=key, aws_secret_access_key="secret", region_name="us-east-1"
    )
    options: Any = {
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 30,
        "signature_version": "s3v4",
    }  # by default, presigned URLs use SigV2
    return session.client(
        "s3", endpoint_url=fake.endpoint, config=Config(s3={"addressing_style": "path"}, **options)
    )


def bucket(fake: FakeGCS, user_project: str | None = None) -> Any:
    client = storage.Client(
        "project", AnonymousCredentials(), client_options={"api_endpoint": fake.endpoint}
    )
    return client.bucket("bucket", user_project)


def refusal(call: Any, *args: Any, **kwargs: Any) -> tuple[int, str]:
    """Call a client method that must fail, and return status and code of the error."""
    with pytest.raises(ClientError) as caught:
        call(*args, **kwargs)
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def count_winners(write: Any) -> int:
    """Run 20 concurrent writes, and return how many succeed."""

    def won(number: int) -> bool:
        try:
            write(b"%d" % number)
        except (ClientError, google_errors.PreconditionFailed):
            return False
        return True

    with ThreadPoolExecutor(20) as pool:
        return sum(pool.map(won, range(20)))


def upload(client: Any, parts: list[bytes], **options: Any) -> dict[str, Any]:
    """Start an upload with full-object CRC32C, and send its parts."""
    kind = {"ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
    at = {
        "Bucket": "bucket",
        "Key": "big",
        "UploadId": client.create_multipart_upload(Bucket="bucket", Key="big", **kind)["UploadId"],
    }
    sent = []
    for number, part in enumerate(parts, 1):
        answer = client.upload_part(
            **at, PartNumber=number, Body=part, ChecksumCRC32C=checksum("crc32c", part)
        )
        sent.append(
            {
                "PartNumber": number,
                "ETag": answer["ETag"],
                "ChecksumCRC32C": answer["ChecksumCRC32C"],
            }
        )
    return {**at, "MultipartUpload": {"Parts": sent}, **options}


def test_s3_uploads_and_downloads_files(s3: FakeS3, tmp_path: Path) -> None:
    client, data = aws(s3), BODY * 12
    (tmp_path / "up").write_bytes(data)
    client.upload_file(
        str(tmp_path / "up"),
        "bucket",
        "a b/ü+",
        ExtraArgs={"ServerSideEncryption": "AES256", "Metadata": {"k": "v"}},
    )
    client.download_file("bucket", "a b/ü+", str(tmp_path / "down"))
    assert (tmp_path / "down").read_bytes() == data == s3.objects["a b/ü+"]
    assert s3.operations.count("UploadPart") == 2
    assert s3.encryption["a b/ü+"] == {"x-amz-server-side-encryption": "AES256"}
    head = client.head_object(Bucket="bucket", Key="a b/ü+", ChecksumMode="ENABLED")
    assert (head["ChecksumType"], head["ChecksumCRC32"][-2:], head["Metadata"]) == (
        "COMPOSITE",
        "-2",
        {"k": "v"},
    )
    assert client.head_bucket(Bucket="bucket")["BucketRegion"] == "us-east-1"
    assert (
        client.get_object(Bucket="bucket", Key="a b/ü+", Range="bytes=1-3")["Body"].read()
        == data[1:4]
    )
    assert refusal(
        client.get_object, Bucket="bucket", Key="a b/ü+", Range=f"bytes={12 * MIB}-"
    ) == (416, "InvalidRange")
    assert [refusal(client.get_object, Bucket=at, Key="none")[1] for at in ("bucket", "none")] == [
        "NoSuchKey",
        "NoSuchBucket",
    ]


def test_s3_rejects_wrong_checksums(s3: FakeS3) -> None:
    client, at = aws(s3), {"Bucket": "bucket", "Key": "k"}
    assert client.put_object(**at, Body=BODY, ChecksumCRC32C=checksum("crc32c", BODY))[
        "ChecksumCRC32C"
    ] == checksum("crc32c", BODY)
    for wrong in (
        {"ChecksumCRC32C": WRONG},
        {"ChecksumSHA256": checksum("sha256", b"")},
        {"ContentMD5": checksum("md5", b"")},
    ):
        assert refusal(client.put_object, Bucket="bucket", Key="wrong", Body=BODY, **wrong) == (
            400,
            "BadDigest",
        )
    client.create_multipart_upload(**at, ChecksumAlgorithm="CRC32C")
    part = {**at, "UploadId": next(iter(s3.uploads)), "PartNumber": 1, "Body": BODY}
    assert refusal(client.upload_part, **part, ChecksumCRC32C=WRONG) == (400, "BadDigest")
    assert refusal(client.upload_part, **part, ChecksumCRC32=checksum("crc32", BODY)) == (
        400,
        "InvalidRequest",
    )
    link = client.generate_presigned_url(
        "put_object", {"Bucket": "bucket", "Key": "p", "ChecksumCRC32C": WRONG}
    )
    assert (
        "BadDigest"
        in requests.put(link, BODY, headers={"x-amz-checksum-crc32c": WRONG}, timeout=5).text
    )
    assert (list(s3.objects), next(iter(s3.uploads.values())).parts) == (["k"], {})


def test_s3_decodes_chunked_bodies(s3: FakeS3) -> None:
    link = aws(s3).generate_presigned_url("put_object", {"Bucket": "bucket", "Key": "k"})
    signed = link.replace(
        "SignedHeaders=host", "SignedHeaders=host%3Bx-amz-trailer%3Bx-amz-decoded-content-length"
    )
    headers = {
        "content-encoding": "aws-chunked",
        "x-amz-trailer": "x-amz-checksum-crc32c",
        "x-amz-decoded-content-length": "5",
    }
    for crc, status in ((WRONG, 400), (checksum("crc32c", b"hello"), 200)):
        chunks = "3;chunk-signature=ab\r\nhel\r\n2\r\nlo\r\n0\r\n"
        body = f"{chunks}x-amz-checksum-crc32c:{crc}\r\n\r\n".encode()
        assert requests.put(signed, body, headers=headers, timeout=5).status_code == status
    assert s3.objects == {"k": b"hello"}
    assert (
        requests.put(signed, iter([body]), headers=headers, timeout=5).status_code == 200
    )  # additionally in HTTP chunks
    assert requests.put(signed, body[:12], headers=headers, timeout=5).status_code == 400


def test_s3_checks_the_completion_of_an_upload(s3: FakeS3) -> None:
    client, parts = aws(s3), [BODY * 5, BODY]
    complete, done = client.complete_multipart_upload, upload(client, parts)
    full = {"ChecksumType": "FULL_OBJECT", "ChecksumCRC32C": checksum("crc32c", BODY * 6)}
    listed = done["MultipartUpload"]["Parts"]
    for wrong, code in (
        (listed[::-1], "InvalidPartOrder"),
        ([{**listed[0], "ETag": "x"}], "InvalidPart"),
    ):
        assert refusal(complete, **{**done, "MultipartUpload": {"Parts": wrong}}) == (400, code)
    assert refusal(complete, **done, **{**full, "ChecksumCRC32C": WRONG}) == (400, "BadDigest")
    assert complete(**done, **full)["ChecksumCRC32C"] == full["ChecksumCRC32C"]
    assert refusal(complete, **done, **full) == (404, "NoSuchUpload")
    assert refusal(complete, **upload(client, parts), IfNoneMatch="*") == (
        412,
        "PreconditionFailed",
    )
    assert refusal(complete, **upload(client, parts[::-1])) == (400, "EntityTooSmall")
    for one in client.list_multipart_uploads(Bucket="bucket", Prefix="bi")["Uploads"]:
        client.abort_multipart_upload(Bucket="bucket", Key=one["Key"], UploadId=one["UploadId"])
    assert s3.uploads == {}


def test_s3_conditional_writes(s3: FakeS3) -> None:
    client, at = aws(s3), {"Bucket": "bucket", "Key": "k"}
    assert count_winners(lambda body: client.put_object(**at, Body=body, IfNoneMatch="*")) == 1
    etag = client.put_object(**at, Body=b"new")["ETag"]
    assert refusal(client.put_object, **at, Body=b"x", IfMatch='"other"') == (
        412,
        "PreconditionFailed",
    )
    assert refusal(client.put_object, Bucket="bucket", Key="none", Body=b"x", IfMatch=etag) == (
        404,
        "NoSuchKey",
    )
    client.put_object(**at, Body=b"newer", IfMatch=etag)
    s3.ignore_conditions = True
    client.put_object(**at, Body=b"x", IfNoneMatch="*")


def test_listings_are_paginated(s3: FakeS3, gcs: FakeGCS) -> None:
    names = [f"p/<&> {n}\r" for n in range(7)]
    client, there = aws(s3), bucket(gcs)
    for name in [*names, "q"]:
        client.put_object(Bucket="bucket", Key=name, Body=b"x")
        there.blob(name).upload_from_string(b"x", retry=None)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix="p/")
    assert (
        [one["Key"] for page in pages for one in page["Contents"]]
        == names
        == [one.name for one in there.list_blobs(prefix="p/")]
    )
    assert (s3.operations.count("ListObjectsV2"), gcs.operations.count("ListObjects")) == (3, 3)
    sent = upload(client, [b"x"] * 5)
    pages = client.get_paginator("list_parts").paginate(
        Bucket="bucket", Key="big", UploadId=sent["UploadId"]
    )
    found = [
        (one["PartNumber"], one["ETag"], one["ChecksumCRC32C"])
        for page in pages
        for one in page["Parts"]
    ]
    assert found == [
        (one["PartNumber"], one["ETag"], one["ChecksumCRC32C"])
        for one in sent["MultipartUpload"]["Parts"]
    ]


def test_s3_access_control() -> None:
    with FakeS3(public=True, region="eu-west-1") as fake:
        nobody = boto3.client(
            "s3",
            endpoint_url=fake.endpoint,
            region_name="eu-west-1",
            config=Config(signature_version=UNSIGNED),
        )
        assert "Contents" not in nobody.list_objects_v2(Bucket="bucket")
        assert refusal(nobody.put_object, Bucket="bucket", Key="k", Body=b"") == (
            403,
            "AccessDenied",
        )
        assert refusal(aws(fake, key="other").list_objects_v2, Bucket="bucket") == (
            403,
            "InvalidAccessKeyId",
        )
        link = aws(fake).generate_presigned_url("head_bucket", {"Bucket": "bucket"})
        assert (
            "<Region>eu-west-1</Region>"
            in requests.get(link.replace("?", "?list-type=2&"), timeout=5).text
        )
        answer = requests.head(link, allow_redirects=False, timeout=5)
        assert (answer.status_code, answer.headers["x-amz-bucket-region"]) == (301, "eu-west-1")
    with FakeS3(requester_pays=True) as fake:
        assert refusal(aws(fake).put_object, Bucket="bucket", Key="k", Body=b"") == (
            403,
            "AccessDenied",
        )
        aws(fake).put_object(Bucket="bucket", Key="k", Body=b"", RequestPayer="requester")
        fake.clock_skew = True
        assert refusal(aws(fake).list_objects_v2, Bucket="bucket") == (403, "RequestTimeTooSkewed")


def test_gcs_objects_generations_and_checksums(gcs: FakeGCS) -> None:
    blob, wrong = (
        bucket(gcs).blob("a b/ü+", kms_key_name="projects/p/key"),
        bucket(gcs).blob("wrong"),
    )
    blob.upload_from_string(BODY, retry=None, if_generation_match=0, checksum="crc32c")
    assert (blob.crc32c, gcs.objects, gcs.encryption) == (
        checksum("crc32c", BODY),
        {"a b/ü+": BODY},
        {"a b/ü+": "projects/p/key"},
    )
    assert blob.download_as_bytes(retry=None) == BODY
    assert blob.download_as_bytes(start=1, end=3, retry=None) == BODY[1:4]
    with pytest.raises(google_errors.RequestRangeNotSatisfiable):
        blob.download_as_bytes(start=MIB, retry=None)
    first = blob.generation
    blob.upload_from_string(b"new", retry=None, if_generation_match=first)
    assert blob.generation > first
    with pytest.raises(google_errors.PreconditionFailed):
        blob.delete(retry=None, if_generation_match=first)
    blob.delete(retry=None, if_generation_match=blob.generation)
    with pytest.raises(google_errors.NotFound):
        bucket(gcs).blob("a b/ü+").reload(retry=None)
    wrong.crc32c = WRONG
    with pytest.raises(google_errors.BadRequest):
        wrong.upload_from_string(b"x", retry=None, checksum=None)
    assert gcs.objects == {}


def test_gcs_resumable_uploads(gcs: FakeGCS) -> None:
    blob = bucket(gcs).blob("big", chunk_size=MIB)
    blob.upload_from_string(BODY * 9 + b"end", retry=None, checksum="crc32c")
    assert (gcs.objects["big"], gcs.operations.count("PutChunk")) == (BODY * 9 + b"end", 10)
    session = (
        bucket(gcs)
        .blob("k")
        .create_resumable_upload_session(size=MIB + 1, retry=None, if_generation_match=0)
    )

    def put(data: bytes, span: str, **headers: str) -> requests.Response:
        return requests.put(
            session, data, headers={"content-range": f"bytes {span}", **headers}, timeout=5
        )

    assert "Range" not in put(b"", "*/*").headers
    assert put(b"x" * 1000, f"0-999/{MIB + 1}").status_code == 400
    assert put(BODY[: MIB // 4], f"{MIB // 4}-{MIB // 2 - 1}/{MIB + 1}").status_code == 503
    gcs.faults = [Fault("break", "PutChunk", key="k")]
    with pytest.raises(requests.ConnectionError):
        put(BODY, f"0-{MIB - 1}/{MIB + 1}")
    assert (put(b"", f"*/{MIB + 1}").headers["Range"], gcs.faults[0].hits) == (
        f"bytes=0-{MIB // 2 - 1}",
        1,
    )
    assert put(BODY, f"0-{MIB - 1}/{MIB + 1}").status_code == 308
    assert put(b"!", f"{MIB}-{MIB}/{MIB + 1}").json()["crc32c"] == checksum("crc32c", BODY + b"!")
    assert (put(b"", "*/*").status_code, gcs.objects["k"] == BODY + b"!") == (200, True)
    session = bucket(gcs).blob("k").create_resumable_upload_session(retry=None)
    assert put(b"!", "0-0/1", **{"x-goog-hash": f"crc32c={WRONG}"}).status_code == 400
    assert put(b"", "*/1").status_code == 404
    session = bucket(gcs).blob("k").create_resumable_upload_session(size=1, retry=None)
    assert (requests.delete(session, timeout=5).status_code, put(b"", "*/1").status_code) == (
        499,
        410,
    )


def test_gcs_conditional_writes_and_requester_pays(gcs: FakeGCS) -> None:
    assert (
        count_winners(
            lambda body: (
                bucket(gcs).blob("k").upload_from_string(body, retry=None, if_generation_match=0)
            )
        )
        == 1
    )
    gcs.requester_pays = True
    with pytest.raises(google_errors.BadRequest, match="user project"):
        bucket(gcs).blob("k").reload(retry=None)
    bucket(gcs, user_project="me").blob("k").reload(retry=None)


def test_faults_with_a_response(s3: FakeS3) -> None:
    client, at = aws(s3), {"Bucket": "bucket", "Key": "k"}
    busy = Fault("status", "PutObject", status=503, retry_after=7, times=2, after=1)
    slow = Fault("slow", key="k", seconds=0.2)
    s3.faults = [slow, busy]
    started = time.monotonic()
    client.put_object(**at, Body=BODY)
    elapsed = time.monotonic() - started
    assert [refusal(client.put_object, **at, Body=b"x") for _ in range(2)] == [
        (503, "SlowDown")
    ] * 2
    client.put_object(**at, Body=BODY)
    assert (busy.hits, busy.seen, slow.hits, elapsed >= 0.2) == (2, 4, 1, True)
    s3.faults = [Fault("flip", "GetObject"), Fault("duplicate", "PutObject")]
    assert client.get_object(**at, Range="bytes=1-3")["Body"].read() == bytes([1, 2 ^ 1, 3])
    assert refusal(client.put_object, Bucket="bucket", Key="new", Body=b"x", IfNoneMatch="*") == (
        412,
        "PreconditionFailed",
    )
    assert ([fault.hits for fault in s3.faults], s3.objects["new"]) == ([1, 1], b"x")
    s3.corrupt("k", 3)
    with pytest.raises(FlexibleChecksumError):
        client.get_object(**at)["Body"].read()


def test_faults_that_close_the_connection(s3: FakeS3) -> None:
    client, at = aws(s3), {"Bucket": "bucket", "Key": "k"}
    s3.faults = [
        Fault("cut", "GetObject"),
        Fault("lost", "PutObject"),
        Fault("break", "UploadPart"),
    ]
    with pytest.raises(HTTPClientError):
        client.put_object(**at, Body=BODY)
    assert (s3.objects["k"], s3.requests[-1].status) == (BODY, None)
    with pytest.raises(BotoCoreError):
        client.get_object(**at)["Body"].read()
    with pytest.raises(HTTPClientError):
        upload(client, [BODY * 5])
    assert ([fault.hits for fault in s3.faults], next(iter(s3.uploads.values())).parts) == (
        [1, 1, 1],
        {},
    )
    s3.faults = [Fault("kill_store", "DeleteObject")]
    client.get_object(**at)["Body"].read()
    for call in (client.delete_object, client.head_object):
        with pytest.raises(HTTPClientError):
            call(**at)
    assert s3.faults.pop().hits == 2
    s3.stop()
    with pytest.raises(BotoCoreError):
        client.head_object(**at)
    s3.start()
    assert client.head_object(**at)["ContentLength"] == MIB
