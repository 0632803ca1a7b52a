"""Credentials that rotate, expire or arrive late, and regions that a policy hides."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medjob.config.store import StoreRef
from medjob.errors import ConfigError, MedjobError, RetryError
from medjob.store import Store, open_store, probe
from medjob.store.base import PART_SIZE
from medjob.store.transfer import find_damage, upload_folder
from tests.fakes.gcs import FakeGCS
from tests.fakes.s3 import FakeS3
from tests.fakes.server import Fault, Refusal, Request, Response


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medjob.store.retry._backoff", lambda _: 0.02)
    monkeypatch.setattr("medjob.store.retry._RENEWAL_INTERVAL_S", 0.0)


class Rotating(FakeS3):
    """Refuses all keys but the newest one."""

    code, status = "ExpiredToken", 400

    def _authenticate(self, request: Request) -> None:
        if f"Credential={self.access_key}/" not in request.headers.get("authorization", ""):
            raise Refusal(self.status, self.code, "The provided token has expired.")
        super()._authenticate(request)


@pytest.fixture
def write_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the file of credentials that the process was started with."""
    file = tmp_path / "credentials"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    text = "[default]\naws_access_key_id={0}\naws_secret_access_key=s\naws_session_token=t-{0}\n"

    def write(key: str) -> None:
        file.write_text(text.format(key))

    return write


def opened(server: Any, **options: Any) -> Store:
    defaults = {
        "uri": "s3://bucket/x",
        "endpoint": server.endpoint,
        "addressing_style": "path",
        "region": "us-east-1",
        "retry_seconds": 5,
    }
    return open_store(StoreRef(**(defaults | options)))


def operations(store: Any, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    (folder / "large").write_bytes(b"x" * (PART_SIZE + 1))
    return {
        "get": lambda: store.get("k"),
        "put": lambda: store.put("k", b"2"),
        "read": lambda: store.read("k", 0, memoryview(bytearray(1))),
        "list": lambda: list(store.list("")),
        "stat": lambda: store.stat("k"),
        "delete": lambda: store.delete("other"),
        "upload": lambda: find_damage(store, "d", upload_folder(store, folder, "d")),
    }


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (403, "InvalidAccessKeyId"),
        (403, "AccessDenied"),
        (401, "Unauthorized"),
    ],
)
def test_rotated_s3_keys_are_read_again(
    write_keys: Callable[[str], None], tmp_path: Path, status: int, code: str
) -> None:
    write_keys("key0")
    with Rotating(access_key="key0") as server:
        server.code, server.status = code, status
        store = opened(server)
        store.put("k", b"1")
        names = (
            operations(store, tmp_path)
            if status == 400
            else dict(list(operations(store, tmp_path).items())[:5])
        )
        for call in names.values():
            call()  # the store accepts this kind of request
        for number, (name, call) in enumerate(names.items(), 1):
            write_keys(f"key{number}")
            server.access_key = f"key{number}"
            assert not call() or name in {"get", "list", "stat"}


def test_keys_that_are_rewritten_during_a_retry_are_found(
    write_keys: Callable[[str], None], tmp_path: Path
) -> None:
    write_keys("old")
    with Rotating(access_key="old") as server:
        store = opened(server)
        store.put("k", b"1")
        server.access_key = "new"
        (tmp_path / "credentials").write_text("[default\naws_acc")  # half of a file
        timer = threading.Timer(0.4, write_keys, ["new"])
        timer.start()
        store.put("k", b"2")
        timer.join()
        found = store.get("k")
    assert found is not None
    assert found.data == b"2"


def test_keys_that_stay_expired_end_with_75(write_keys: Callable[[str], None]) -> None:
    write_keys("old")
    with Rotating(access_key="new") as server:
        with pytest.raises(RetryError, match="access denied"):
            opened(server).put("k", b"1")
        assert len(server.requests) == 3


def test_late_keys_are_awaited_in_a_pod(
    write_keys: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeS3() as server:
        with pytest.raises(RetryError, match="Unable to locate credentials"):
            opened(server).get("k")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        timer = threading.Timer(0.4, write_keys, ["test"])
        timer.start()
        probe(opened(server))
        timer.join()
        assert server.requests


def test_late_web_identity_token_is_awaited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/x")
    with (
        FakeS3() as server,
        pytest.raises(RetryError, match=r"access denied \(.*token: No such file"),
    ):
        opened(server, retry_seconds=0.2).get("k")


def test_mounted_secret_that_arrives_late_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("MEDJOB_SECRETS", str(tmp_path))
    text = "[default]\naws_access_key_id=test\naws_secret_access_key=s\n"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "")  # so that monkeypatch restores it
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE")
    timer = threading.Timer(0.4, (tmp_path / "aws-credentials").write_text, [text])
    with FakeS3() as server:
        timer.start()
        probe(opened(server))
        timer.join()


class _TokenService(http.server.BaseHTTPRequestHandler):
    """Exchanges the token of a file for an access token."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = {
            "access_token": "t",
            "expires_in": 3600,
            "token_type": "Bearer",
            "issued_token_type": "x",
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def write_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Writes the files of a workload identity, which are missing at first."""
    file, token = tmp_path / "gcs.json", tmp_path / "token"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _TokenService) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        identity = {
            "type": "external_account",
            "audience": "//iam.googleapis.com/x",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": f"http://127.0.0.1:{server.server_port}/token",
            "credential_source": {"file": str(token)},
        }

        def write() -> None:
            file.write_text(json.dumps(identity))
            time.sleep(0.1)  # the token is later still
            token.write_text("token")

        yield write
        server.shutdown()


def test_late_google_identity_is_awaited_in_a_pod(
    write_identity: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeGCS() as server:
        ref = StoreRef(uri="gs://bucket/x", endpoint=server.endpoint, retry_seconds=5)
        with pytest.raises(RetryError, match=r"access denied \(.*gcs.json was not found") as caught:
            open_store(ref)
        assert "gcloud auth" in caught.value.hint
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        timer = threading.Timer(0.2, write_identity)
        timer.start()
        probe(open_store(ref))
        timer.join()


def test_refused_google_token_is_renewed(fake_gcs: FakeGCS, open_gcs: Callable[..., Store]) -> None:
    store: Any = open_gcs()
    store.put("k", b"1")
    before = store._client
    fake_gcs.faults[:] = [Fault("status", "PutObject", status=401, times=1)]
    store.put("k", b"2")
    assert store._client is not before
    assert store.get("k").data == b"2"


class Restricted(FakeS3):
    """Allows only what is below medjob/."""

    head_status, head_headers, lists = 403, {"x-amz-bucket-region": "eu-west-1"}, True

    def _head_bucket(self, request: Request) -> Response:
        raise Refusal(self.head_status, "", "", dict(self.head_headers))

    def _list_objects_v2(self, request: Request) -> Response:
        if not self.lists or not request.query.get("prefix", "").startswith("medjob/"):
            raise Refusal(403, "AccessDenied", "not authorized to perform: s3:ListBucket")
        return super()._list_objects_v2(request)


@pytest.mark.parametrize(
    ("status", "headers", "region"),
    [
        (403, {"x-amz-bucket-region": "eu-west-1"}, "eu-west-1"),
        (301, {"x-amz-bucket-region": "eu-west-1"}, "eu-west-1"),
        (400, {"x-amz-bucket-region": "eu-west-1"}, "eu-west-1"),
        (403, {}, None),
        (405, {}, None),
        (501, {}, None),
    ],
)
def test_region_is_found_without_the_right_to_head_the_bucket(
    monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str], region: str | None
) -> None:
    with Restricted(region=region) as server:
        server.head_status, server.head_headers = status, headers
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        store = open_store(
            StoreRef(uri="s3://bucket/medjob", addressing_style="path", retry_seconds=0)
        )
        probe(store)
        store.put("k", b"1234")
        store.read("k", 1, memoryview(part := bytearray(2)))
        assert part == b"23"


@pytest.mark.parametrize(("status", "code"), [(403, 75), (404, 64)])
def test_bucket_without_any_rights_or_without_a_bucket(
    monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    with Restricted() as server:
        server.head_status, server.head_headers, server.lists = status, {}, False
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        with pytest.raises(MedjobError) as caught:
            open_store(StoreRef(uri="s3://bucket/medjob", addressing_style="path", retry_seconds=0))
        assert caught.value.exit_code == code


def test_passwords_in_the_environment_are_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://user:correct-horse@127.0.0.1:1", "http://user:correct/horse@127.0.0.1:1"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises((RetryError, ConfigError)) as caught:
            open_store(
                StoreRef(
                    uri="s3://bucket/x",
                    addressing_style="path",
                    region="us-east-1",
                    retry_seconds=0,
                )
            ).get("k")
        assert "horse" not in str(caught.value)


_SCOPES = (
    '{"type": "authorized_user", "client_id": "a", "client_secret": "b", "refresh_token": "c", '
    '"scopes": 5}'
)


@pytest.mark.parametrize("content", ['["x"]', "null", "[" * 100_000, '{"type": ["x"]}', _SCOPES])
def test_malformed_google_credentials_end_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "gcs.json").write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "gcs.json"))
    with pytest.raises(RetryError, match=r"access denied \(.*type"):
        open_store(StoreRef(uri="gs://bucket/x", endpoint="http://127.0.0.1:9", retry_seconds=0))


def test_refused_google_credentials_are_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = {"type": "service_account", "client_email": "a@b", "token_uri": "https://127.0.0.1:9"}
    (tmp_path / "gcs.json").write_text(json.dumps(account | {"private_key": ["SECRET"]}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "gcs.json"))
    with pytest.raises(RetryError, match="access denied") as caught:
        open_store(StoreRef(uri="gs://bucket/x", endpoint="http://127.0.0.1:9", retry_seconds=0))
    assert "SECRET" not in str(caught.value)
