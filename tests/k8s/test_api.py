"""How `Api` handles the answers of an API server, including those that a network or proxy breaks.

The server is a thread on the loopback interface.
"""

import json
import types
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from medjob.config.cluster import Cluster, Orchestrator
from medjob.errors import ConfigError, RetryError
from medjob.k8s import api as module
from medjob.k8s.api import AlreadyExists, Api, QuotaExceeded
from medjob.k8s.preflight import check_queue, check_queues

KUEUE = "/apis/kueue.x-k8s.io"
Answers = dict[str, tuple[int, bytes, int]]
"""By path: status, body, and the number of announced bytes that are not sent."""


@contextmanager
def server(answers: Answers, tmp_path: Path, context: str = "c") -> Iterator[Api]:
    """Serve these answers, and 404 for every other path."""

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
def test_incomplete_or_foreign_answer_can_be_retried(
    answer: tuple[int, bytes, int], tmp_path: Path
) -> None:
    with (
        server({JOBS: answer}, tmp_path) as api,
        pytest.raises(RetryError, match="incomplete or invalid"),
    ):
        api.jobs("a=b")


def test_log_is_unchanged_and_a_broken_connection_is_an_error(tmp_path: Path) -> None:
    with server({LOG: (200, b"one\ntwo\n", 0)}, tmp_path) as api:
        assert b"".join(api.log("p")) == b"one\ntwo\n"
    with (
        server({LOG: (200, b"one\n", 100)}, tmp_path) as api,
        pytest.raises(RetryError, match="connection broke while reading the log of p"),
    ):
        list(api.log("p", follow=True))


def test_rejection_names_the_object_and_quotes_the_server(tmp_path: Path) -> None:
    forbidden = json.dumps({"message": 'User "x" cannot get resource "pods/log"'}).encode()
    with (
        server({LOG: (403, forbidden, 0)}, tmp_path) as api,
        pytest.raises(ConfigError) as rejected,
    ):
        list(api.log("p"))
    assert (
        rejected.value.message
        == 'the API server rejects GET pods/p/log: User "x" cannot get resource "pods/log"'
    )
    assert "auth can-i" in rejected.value.hint


def test_kubeconfig_needs_no_current_context_if_one_is_named(tmp_path: Path) -> None:
    with server({JOBS: (200, b'{"items": []}', 0)}, tmp_path, context="other") as api:
        assert api.jobs("a=b") == []


@pytest.mark.parametrize("text", ["a: [", "just words", "- a list"])
def test_invalid_kubeconfig_is_a_config_error(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kubeconfig").write_text(text)
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig")
    )
    with pytest.raises(ConfigError, match="cannot connect to a cluster"):
        Api.connect()


def test_missing_queue_or_missing_kueue_is_a_config_error(tmp_path: Path) -> None:
    group = json.dumps({"preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta2"}}).encode()
    queue = f"{KUEUE}/v1beta2/namespaces/research/localqueues/research"
    with server({}, tmp_path) as api:
        check_queue(api, None)
        with pytest.raises(ConfigError, match="Kueue is not installed in this cluster"):
            check_queue(api, "research")
    with server({KUEUE: (200, group, 0), queue: (200, b"{}", 0)}, tmp_path) as api:
        check_queue(api, "research")
        with pytest.raises(ConfigError, match="namespace research has no LocalQueue 'reserch'"):
            check_queue(api, "reserch")
        cluster = Cluster(orchestrator=Orchestrator(queue="reserch"))
        with pytest.raises(ConfigError, match=r"cluster.orchestrator.queue: namespace research"):
            check_queues(api, cluster)


@pytest.mark.parametrize(
    ("status", "message", "expected"),
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
def test_error_response_is_translated_by_its_status(
    status: int, message: str, expected: type[Exception]
) -> None:
    answer = types.SimpleNamespace(status=status, reason="", body=json.dumps({"message": message}))
    assert type(module._translate("POST", "/x/jobs", answer)) is expected
