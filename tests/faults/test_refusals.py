"""Errors of refused requests, options that must reach the store, and secrecy of credentials."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.config.store import StoreRef
from medjob.errors import ConfigError, InputError, MedjobError, RetryError
from medjob.runtime.files import File, fingerprint
from medjob.store import Store, open_store, probe
from medjob.store.base import PART_SIZE
from medjob.store.transfer import download_files, upload_folder
from tests.fakes.gcs import FakeGCS
from tests.fakes.s3 import FakeS3
from tests.fakes.server import Fault


@pytest.mark.parametrize(
    ("options", "uri", "code", "text"),
    [
        ({}, "s3://other/x", 64, "there is no such bucket"),
        (
            {"access_key": "someone else's"},
            "s3://bucket/x",
            75,
            "access denied (403 InvalidAccessKeyId",
        ),
        ({"clock_skew": True}, "s3://bucket/x", 75, "clock is wrong"),
        ({"requester_pays": True}, "s3://bucket/x", 75, "access denied"),
        ({"ignore_conditions": True}, "s3://bucket/x", 64, "ignores conditional writes"),
    ],
)
def test_refusals_of_s3_have_an_error_and_a_hint(
    options: dict[str, Any], uri: str, code: int, text: str
) -> None:
    with FakeS3(**options) as server, pytest.raises(MedjobError) as caught:
        probe(
            open_store(
                StoreRef(
                    uri=uri,
                    endpoint=server.endpoint,
                    region="us-east-1",
                    addressing_style="path",
                    retry_seconds=0,
                )
            )
        )
    assert (caught.value.exit_code, text in caught.value.message, bool(caught.value.hint)) == (
        code,
        True,
        True,
    ), str(caught.value)


def test_wrong_region_has_an_error_and_a_hint() -> None:
    with FakeS3(region="eu-west-1") as server:
        options = {"uri": "s3://bucket/x", "endpoint": server.endpoint, "addressing_style": "path"}
        open_store(StoreRef(region="eu-west-1", **options)).put("k", b"x")
        open_store(StoreRef(region="eu-west-1", **options)).read(
            "k", 0, memoryview(piece := bytearray(1))
        )
        assert piece == b"x"
        with pytest.raises(ConfigError, match="is in another region") as caught:
            open_store(StoreRef(region="us-east-1", **options)).read(
                "k", 0, memoryview(bytearray(1))
            )
        assert caught.value.hint == "set cluster.store.region to eu-west-1"


def test_refusals_of_gcs_have_an_error_and_a_hint(
    fake_gcs: FakeGCS, open_gcs: Callable[..., Store]
) -> None:
    with pytest.raises(ConfigError, match="there is no such bucket"):
        probe(open_gcs(uri="gs://other/x"))
    fake_gcs.faults[:] = [Fault("status", status=403, times=None)]
    with pytest.raises(RetryError, match="access denied"):
        probe(open_gcs())
    fake_gcs.faults.clear()
    fake_gcs.ignore_conditions = True
    with pytest.raises(ConfigError, match="ignores conditional writes") as caught:
        probe(open_gcs())
    assert "singleWriter" in caught.value.hint


def test_missing_credentials_are_reported(
    open_s3: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(RetryError, match="Unable to locate credentials"):
        open_s3().get("k")


def test_single_writer_is_refused_on_a_cluster(
    open_s3: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ConfigError, match="is not allowed on a cluster"):
        open_s3(single_writer=True)


def source_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    (folder / "large").write_bytes(b"x" * (PART_SIZE + 1))
    (folder / "small").write_bytes(b"small")
    return folder


def test_options_reach_the_store(
    fake_s3: FakeS3, fake_gcs: FakeGCS, open_s3: Any, open_gcs: Any, tmp_path: Path
) -> None:
    for store in (open_s3(kms_key="arn:key"), open_gcs(kms_key="projects/key")):
        upload_folder(store, source_folder(tmp_path), "d")
    for name in ("small", "large"):
        assert "arn:key" in fake_s3.encryption[f"some/prefix/d/{name}"].values()
        assert fake_gcs.encryption[f"some/prefix/d/{name}"] == "projects/key"
    with (
        FakeS3(requester_pays=True) as payer,
        FakeGCS(requester_pays=True) as project,
        FakeS3(public=True) as public,
    ):
        for store in (
            open_s3(endpoint=payer.endpoint, requester_pays=True),
            open_gcs(endpoint=project.endpoint, user_project="p"),
        ):
            files = upload_folder(store, source_folder(tmp_path), "d")
            download_files(store, "d", files, tmp_path / store.uri[:2])
        public.buckets["bucket"] = payer.buckets["bucket"]
        reader = open_s3(endpoint=public.endpoint, anonymous=True)
        download_files(reader, "d", files, tmp_path / "public")
        assert [entry.key for entry in reader.list("d/")] == ["d/large", "d/small"]
        assert not any(
            "authorization" in request.headers or "X-Amz-Signature" in request.query
            for request in public.requests
        )


def test_credentials_appear_in_no_message_and_no_object(
    fake_s3: FakeS3, open_s3: Callable[..., Store], tmp_path: Path
) -> None:
    store = open_s3(retry_seconds=0)
    attempt = Attempt.begin(Artifact(store, "run", "sft", fingerprint(1)), "me")
    attempt.publish(source_folder(tmp_path), {}, {}, {}, {})
    fake_s3.faults[:] = [Fault("status", "GetObject", status=503, times=None)]
    with pytest.raises(RetryError) as caught:
        store.read("run/x", 0, memoryview(bytearray(1)))
    fake_s3.stop()
    with pytest.raises(RetryError) as unreachable:
        store.read("run/x", 0, memoryview(bytearray(1)))
    texts = [
        str(caught.value),
        str(unreachable.value),
        *(data.decode(errors="replace") for data in fake_s3.objects.values()),
    ]
    assert not any("testsecret" in text or "X-Amz-Signature" in text for text in texts)


def test_manifest_path_outside_the_folder_is_rejected(
    open_s3: Callable[..., Store], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="points outside"):
        download_files(
            open_s3(), "d", [File(path="../x", size=1, sha256="0", crc32c="0")], tmp_path / "down"
        )
