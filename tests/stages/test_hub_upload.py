"""Upload of an exported model, against a small server that answers as the hub does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from medjob.config.judge import ExportParams
from medjob.errors import ConfigError, InputError
from medjob.stages import export


class Hub(ThreadingHTTPServer):
    """The requests that it got, and whether its repository exists and is private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: bool | None = None
        self.refuses = False
        self.created: list[dict[str, Any]] = []
        self.committed: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.server.private is None:
            self._answer({"error": "Repository not found"}, 404, "RepoNotFound")
        else:
            self._answer({"id": "me/model", "private": self.server.private})

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.server.refuses:
            self._answer({"error": "no right"}, 403)
        elif self.path == "/api/repos/create" and self.server.private is not None:
            self._answer({"error": "You already created this model repo"}, 409)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(text))
            self._answer({"url": "https://huggingface.co/me/model"})
        elif "/preupload/" in self.path:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer(
                {"files": [{"path": f["path"], **mode} for f in json.loads(text)["files"]]}
            )
        elif "/commit/" in self.path:
            values = [json.loads(line) for line in text.splitlines()]
            self.server.committed += [v["value"]["path"] for v in values if v["key"] == "file"]
            self._answer(
                {"commitUrl": "https://huggingface.co/me/model/commit/1", "commitOid": "1"}
            )
        else:
            self._answer({})

    def _answer(self, body: dict[str, Any], status: int = 200, code: str = "") -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()


@pytest.mark.parametrize("private", [True, False])
def test_new_repository_is_private_unless_the_run_file_says_otherwise(
    hub: Hub, tmp_path: Path, private: bool
) -> None:
    params = ExportParams(hub_model_id="me/model", **({} if private else {"private": False}))
    (tmp_path / "config.json").write_text("{}")
    export._create_repository(params)
    export._push(tmp_path, "me/model")
    assert [each["visibility"] for each in hub.created] == ["private" if private else "public"]
    assert hub.committed == ["config.json"]


def test_public_repository_gets_no_model_by_accident(hub: Hub) -> None:
    hub.private = False
    with pytest.raises(ConfigError, match="the repository me/model is public"):
        export._create_repository(ExportParams(hub_model_id="me/model"))
    export._create_repository(ExportParams(hub_model_id="me/model", private=False))
    hub.private = True
    export._create_repository(ExportParams(hub_model_id="me/model"))


def test_refused_repository_is_reported_before_the_merge(hub: Hub) -> None:
    hub.refuses = True
    with pytest.raises(InputError, match=r"me/model: the hub refuses access \(403\)"):
        export._create_repository(ExportParams(hub_model_id="me/model"))
