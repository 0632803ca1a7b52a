"""Requests that a store refuses: which are sent again, and which end the run with what advice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.checkpoints import Checkpoints
from medjob.errors import ConfigError, MedjobError, RetryError
from medjob.runtime.files import fingerprint
from medjob.store import Store
from medjob.store.base import PART_SIZE
from medjob.store.errors import StoreRefusal
from medjob.store.transfer import find_damage, upload_folder
from tests.fakes.gcs import FakeGCS
from tests.fakes.s3 import FakeS3
from tests.fakes.server import FakeServer, Fault

ServerAndOpen = tuple[FakeServer, Callable[..., Store]]


@pytest.fixture(params=["s3", "gcs"])
def opened(request: pytest.FixtureRequest) -> ServerAndOpen:
    """A strict fake server, and a function that opens a store in it."""
    return request.getfixturevalue(f"fake_{request.param}"), request.getfixturevalue(
        f"open_{request.param}"
    )


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medjob.store.retry._backoff", lambda _: 0.02)


def large_file(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    (folder / "large").write_bytes(b"x" * (PART_SIZE + 3))
    return folder


PART_REFUSALS = [
    (400, "IncompleteBody"),
    (400, "BadDigest"),
    (400, "RequestTimeout"),
    (409, "OperationAborted"),
    (425, "TooEarly"),
    (499, "ClientClosedRequest"),
    (400, "SomethingNew"),
    (417, "Expectation"),
]


def test_s3_part_is_sent_again_after_any_refusal(
    fake_s3: FakeS3, open_s3: Callable[..., Store], tmp_path: Path
) -> None:
    store = open_s3()
    faults = [
        Fault("status", "UploadPart", status=status, code=code) for status, code in PART_REFUSALS
    ]
    faults += [Fault("status", "CreateMultipartUpload", status=400, code="SomethingNew")]
    fake_s3.faults[:] = faults
    files = upload_folder(store, large_file(tmp_path), "d")
    assert [fault.hits for fault in faults] == [1] * len(faults)
    assert find_damage(store, "d", files) == []


@pytest.mark.parametrize(
    ("code", "uploads"), [("InvalidPart", 2), ("BadDigest", 2), ("SomethingNew", 1)]
)
def test_s3_upload_that_cannot_be_completed_starts_again(
    fake_s3: FakeS3, open_s3: Callable[..., Store], tmp_path: Path, code: str, uploads: int
) -> None:
    store = open_s3()
    fake_s3.faults[:] = [Fault("status", "CompleteMultipartUpload", status=400, code=code)]
    files = upload_folder(store, large_file(tmp_path), "d")
    assert fake_s3.operations.count("CreateMultipartUpload") == uploads
    assert find_damage(store, "d", files) == []


def test_gcs_upload_survives_refusals(
    fake_gcs: FakeGCS, open_gcs: Callable[..., Store], tmp_path: Path
) -> None:
    store = open_gcs()
    store.put("small", b"1")
    faults = [Fault("status", "PutObject", status=status) for status in (400, 403, 409, 425, 499)]
    faults += [Fault("status", "PutChunk", status=status, after=1) for status in (400, 409, 499)]
    faults += [Fault("status", "StartUpload", status=400)]
    fake_gcs.faults[:] = faults
    store.put("small", b"2")
    files = upload_folder(store, large_file(tmp_path), "d")
    assert [fault.hits for fault in faults] == [1] * len(faults)
    assert find_damage(store, "d", files) == []


def test_gcs_session_that_stays_broken_is_replaced(
    fake_gcs: FakeGCS, open_gcs: Callable[..., Store], tmp_path: Path
) -> None:
    fake_gcs.faults[:] = [
        Fault("status", "PutChunk", status=400),
        Fault("status", "QueryUpload", status=400, times=2),
    ]
    files = upload_folder(open_gcs(), large_file(tmp_path), "d")
    assert fake_gcs.operations.count("StartUpload") == 2
    assert find_damage(open_gcs(), "d", files) == []


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "SomethingNew"), (403, "AccessDenied"), (405, "MethodNotAllowed"), (400, None)],
)
def test_refusal_is_not_final_after_an_accepted_request(
    opened: ServerAndOpen, status: int, code: str | None
) -> None:
    server, opener = opened
    store = opener(retry_seconds=0.3)
    store.put("k", b"1")
    assert store.get("k") is not None
    list(store.list(""))
    names = {"PutObject": lambda: store.put("k", b"2"), "GetObject": lambda: store.get("k")}
    names["ListObjectsV2" if isinstance(server, FakeS3) else "ListObjects"] = lambda: list(
        store.list("")
    )
    for operation, call in names.items():
        server.faults[:] = [
            fault := Fault("status", operation, status=status, code=code, times=None)
        ]
        with pytest.raises(RetryError, match=str(status)):
            call()
        assert fault.hits > 3, operation
        server.faults[:] = [fault := Fault("status", operation, status=status, code=code, times=2)]
        call()
        assert fault.hits == 2


def test_first_conditional_write_is_another_kind_of_request(
    fake_s3: FakeS3, open_s3: Callable[..., Store]
) -> None:
    store = open_s3()
    store.put("k", b"1")
    fake_s3.faults[:] = [
        Fault("status", "PutObject", status=400, code="InvalidArgument", times=None)
    ]
    with pytest.raises(MedjobError, match="rejected the request") as caught:
        store.create("new", b"1")
    assert (caught.value.exit_code, fake_s3.faults[0].hits) == (64, 3)


PERMANENT: list[tuple[int, str, str, int, str]] = [
    (403, "InvalidObjectState", "not valid for the object's storage class", 66, "archived"),
    (
        403,
        "AccessDenied",
        "Access Denied because object protected by object lock.",
        66,
        "retention",
    ),
    (400, "ObjectLocked", "Object is WORM protected and cannot be overwritten", 66, "retention"),
    (400, "KMS.DisabledException", "arn:aws:kms:key is disabled", 66, "encryption key"),
    (400, "KMS.NotFoundException", "no key", 66, "encryption key"),
    (403, "QuotaExceeded", "", 66, "quota"),
    (400, "XMinioAdminBucketQuotaExceeded", "Bucket quota exceeded", 66, "quota"),
    (403, "AllAccessDisabled", "All access to this object has been disabled", 66, "billing"),
    (403, "AccountProblem", "", 66, "billing"),
    (404, "NoSuchBucket", "", 64, "there is no such bucket"),
    (400, "InvalidBucketName", "", 64, "bucket cannot be used"),
    (400, "AuthorizationHeaderMalformed", "expecting 'eu-west-1'", 64, "another region"),
    (413, "EntityTooLarge", "", 64, "request of this size"),
    (400, "KeyTooLongError", "Your key is too long", 64, "too long"),
]
PERMANENT_GCS: list[tuple[int, str, str, int, str]] = [
    (
        403,
        "retentionPolicyNotMet",
        "Object 'a' is subject to bucket's retention policy",
        66,
        "retention",
    ),
    (403, "objectUnderActiveHold", "Object 'a' is under active Temporary hold", 66, "retention"),
    (
        403,
        "forbidden",
        "Object is under active Event-Based hold and cannot be deleted",
        66,
        "retention",
    ),
    (400, "cloudKmsDisabledKey", "The key is disabled", 66, "encryption key"),
    (403, "quotaExceeded", "Your project exceeded its quota", 66, "quota"),
    (
        403,
        "accountDisabled",
        "The billing account for the owning project is disabled",
        66,
        "billing",
    ),
    (403, "billingDisabled", "", 66, "billing"),
    (
        400,
        "required",
        "Bucket is a requester pays bucket but no user project provided.",
        64,
        "userProject",
    ),
    (
        412,
        "orgPolicyConstraintFailed",
        "Request violates constraint 'constraints/x'",
        66,
        "organization",
    ),
    (404, "notFound", "The specified bucket does not exist.", 64, "there is no such bucket"),
]


@pytest.mark.parametrize(
    ("kind", "status", "code", "message", "exit_code", "text"),
    [("s3", *row) for row in PERMANENT] + [("gcs", *row) for row in PERMANENT_GCS],
)
def test_permanent_refusals_end_at_once_with_advice(
    request: pytest.FixtureRequest,
    kind: str,
    status: int,
    code: str,
    message: str,
    exit_code: int,
    text: str,
) -> None:
    server, store = (
        request.getfixturevalue(f"fake_{kind}"),
        request.getfixturevalue(f"open_{kind}")(),
    )
    store.put("k", b"1")
    server.faults[:] = [
        Fault("status", "PutObject", status=status, code=code or None, message=message, times=None)
    ]
    with pytest.raises(MedjobError) as caught:
        store.put("k", b"2")
    assert (caught.value.exit_code, server.faults[0].hits) == (exit_code, 1), str(caught.value)
    assert text in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("gcs", 403, "rateLimitExceeded"),
        ("gcs", 429, "rateLimitExceeded"),
        ("s3", 400, "KMS.ThrottlingException"),
    ],
)
def test_rate_limits_are_no_quotas(
    request: pytest.FixtureRequest, kind: str, status: int, code: str
) -> None:
    server, store = (
        request.getfixturevalue(f"fake_{kind}"),
        request.getfixturevalue(f"open_{kind}")(),
    )
    server.faults[:] = [
        Fault(
            "status",
            "PutObject",
            status=status,
            code=code,
            message="Quota exceeded for requests per minute",
            times=2,
        )
    ]
    store.put("k", b"1")
    assert server.faults[0].hits == 2


def test_names_in_a_message_are_no_reasons(fake_s3: FakeS3, open_s3: Callable[..., Store]) -> None:
    message = "User: arn:user/legal-hold-archived is not authorized: arn:aws:s3:::archived/billing-account"
    fake_s3.faults[:] = [
        Fault("status", "PutObject", status=403, code="AccessDenied", message=message, times=None)
    ]
    with pytest.raises(RetryError, match="access denied"):
        open_s3().put("k", b"1")


@pytest.mark.parametrize("key", ["missing", "there"])
def test_page_of_a_proxy_says_nothing_about_an_object(opened: ServerAndOpen, key: str) -> None:
    server, opener = opened
    store: Any = opener(retry_seconds=0.2)
    store.put("there", b"1234")
    store.get("there")
    server.faults[:] = [
        Fault("status", "GetObject", status=404, message="default backend", page=True, times=None)
    ]
    with pytest.raises(RetryError, match="404"):
        store.get(key)
    with pytest.raises(MedjobError, match="404"):
        store.read(key, 0, memoryview(bytearray(2)))
    server.faults.clear()
    assert (store.get(key) is None) == (key == "missing")


def test_proxy_that_limits_bodies_is_named(opened: ServerAndOpen) -> None:
    server, opener = opened
    store = opener()
    server.faults[:] = [Fault("status", "PutObject", status=413, page=True, times=None)]
    with pytest.raises(ConfigError, match="request of this size") as caught:
        store.put("k", b"1")
    assert "client_max_body_size" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("s3", "InvalidObjectState"),
        ("s3", "KMS.DisabledException"),
        ("gcs", "cloudKmsDisabledKey"),
        ("gcs", "accountDisabled"),
    ],
)
def test_refused_checkpoint_never_means_step_0(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, code: str
) -> None:
    server, store = (
        request.getfixturevalue(f"fake_{kind}"),
        request.getfixturevalue(f"open_{kind}")(),
    )
    attempt = Attempt.begin(Artifact(store, "run", "sft", fingerprint(1)), "me")
    checkpoints = Checkpoints(attempt, 2, tmp_path / "snapshots")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("1")
    checkpoints.save(10, tmp_path / "out")
    checkpoints.wait()
    server.faults[:] = [Fault("status", "GetObject", "part-0/a", status=403, code=code, times=None)]
    with pytest.raises(StoreRefusal) as caught:
        checkpoints.restore(tmp_path / "restored")
    assert (caught.value.exit_code, bool(caught.value.hint)) == (66, True)
    server.faults.clear()
    assert checkpoints.restore(tmp_path / "restored") == 10  # it was not quarantined
