"""What `Api` makes of an API server's answers, from a server on loopback that speaks as badly as networks and proxies make it."""

import json
import types
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from medjob.errors import ConfigError, RetryError
from medjob.k8s import api as module
from medjob.k8s.api import AlreadyExists, Api, QuotaExceeded
from medjob.k8s.preflight import check_queue

KUEUE = "/apis/kueue.x-k8s.io"
Answers = dict[str, tuple[int, bytes, int]]
"""Path: status, body, and by how many bytes less than announced it ends."""


@contextmanager
def server(answers: Answers, tmp_path: Path, context: str = "c") -> Iterator[Api]:
    """An API that gives these answers, 404 to all else."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            missing = json.dumps({"message": f"{self.path} not found"}).encode()
            status, body, short = answers.get(self.path.partition("?")[0], (404, missing, 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + short))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=listening.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{listening.server_address[1]}"
    config = {
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "contexts": [
            {"name": context, "context": {"cluster": "c", "user": "u", "namespace": "research"}}
        ],
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION",
            str(tmp_path / "kubeconfig"),
        )
        try:
            yield Api.connect(context, None)
        finally:
            listening.shutdown()


JOBS = "/apis/batch/v1/namespaces/research/jobs"
LOG = "/api/v1/namespaces/research/pods/p/log"


@pytest.mark.parametrize(
    "answer", [(200, b'{"items": [', 40), (200, b"<html>sign in</html>", 0), (200, b"[1]", 0)]
)
def test_an_answer_that_breaks_off_or_is_not_the_apis_may_succeed_later(
    answer: tuple[int, bytes, int], tmp_path: Path
) -> None:
    with server({JOBS: answer}, tmp_path) as api, pytest.raises(RetryError, match="broke off"):
        api.jobs("a=b")


def test_a_log_comes_as_it_is_and_says_when_it_broke_off(tmp_path: Path) -> None:
    with server({LOG: (200, b"one\ntwo\n", 0)}, tmp_path) as api:
        assert b"".join(api.log("p")) == b"one\ntwo\n"
    with (
        server({LOG: (200, b"one\n", 100)}, tmp_path) as api,
        pytest.raises(RetryError, match="p: its log broke off"),
    ):
        list(api.log("p", follow=True))


def test_a_refusal_is_told_in_the_server_s_words_with_the_object(tmp_path: Path) -> None:
    forbidden = json.dumps({"message": 'User "x" cannot get resource "pods/log"'}).encode()
    with server({LOG: (403, forbidden, 0)}, tmp_path) as api, pytest.raises(ConfigError) as refused:
        list(api.log("p"))
    assert (
        refused.value.message
        == 'the API server refuses GET pods/p/log: User "x" cannot get resource "pods/log"'
    )
    assert "auth can-i" in refused.value.hint


def test_a_named_context_is_enough(tmp_path: Path) -> None:
    """A kubeconfig need not have a current one."""
    with server({JOBS: (200, b'{"items": []}', 0)}, tmp_path, context="other") as api:
        assert api.jobs("a=b") == []


@pytest.mark.parametrize("text", ["a: [", "just words", "- a list"])
def test_a_kubeconfig_that_is_none_is_the_users_to_mend(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kubeconfig").write_text(text)
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig")
    )
    with pytest.raises(ConfigError, match="no way to a cluster"):
        Api.connect()


def test_a_queue_has_to_be_there(tmp_path: Path) -> None:
    group = json.dumps({"preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta2"}}).encode()
    queue = f"{KUEUE}/v1beta2/namespaces/research/localqueues/research"
    with server({}, tmp_path) as api:
        check_queue(api, None)
        with pytest.raises(ConfigError, match="Kueue is not in this cluster"):
            check_queue(api, "research")
    with server({KUEUE: (200, group, 0), queue: (200, b"{}", 0)}, tmp_path) as api:
        check_queue(api, "research")
        with pytest.raises(ConfigError, match="namespace research has no LocalQueue 'reserch'"):
            check_queue(api, "reserch")


@pytest.mark.parametrize(
    ("status", "message", "meaning"),
    [
        (401, "Unauthorized", RetryError),
        (403, "pods is forbidden: exceeded quota: gpus", QuotaExceeded),
        (403, "pods is forbidden: User cannot create", ConfigError),
        (404, "not found", ConfigError),
        (409, "already exists", AlreadyExists),
        (422, "invalid", ConfigError),
        (429, "too many requests", RetryError),
        (500, "etcd", RetryError),
        (503, "unavailable", RetryError),
    ],
)
def test_what_an_answer_of_the_api_means(
    status: int, message: str, meaning: type[Exception]
) -> None:
    answer = types.SimpleNamespace(status=status, reason="", body=json.dumps({"message": message}))
    assert type(module._translate("POST", "/x/jobs", answer)) is meaning
