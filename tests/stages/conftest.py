"""Runs whose models, data or artifacts are in strict fakes of S3 and GCS."""

import json
from pathlib import Path
from typing import Any

import pytest

from medjob.config.store import StoreRef
from medjob.store import open_store
from medjob.store.transfer import upload_folder
from tests.fakes.server import FakeServer
from tests.support.rows import choice_rows, write_jsonl
from tests.support.store_fixtures import credentials, fake_gcs, fake_s3

__all__ = ["credentials", "fake_gcs", "fake_s3"]
Bucket = tuple[FakeServer, dict[str, Any]]


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    """A strict fake server, and the run file's section for a store on it."""
    options: dict[str, Any] = (
        {"addressingStyle": "path"} if request.param == "s3" else {"anonymous": True}
    )
    server = request.getfixturevalue("fake_s3" if request.param == "s3" else "fake_gcs")
    return server, {
        "uri": f"{request.param}://bucket/medjob",
        "endpoint": server.endpoint,
        "retrySeconds": 2,
        **options,
    }


def put(bucket: Bucket, key: str, source: Path) -> str:
    """Upload a file or directory, and return its address."""
    scheme = bucket[1]["uri"].partition("://")[0]
    store = open_store(StoreRef.model_validate(bucket[1] | {"uri": f"{scheme}://bucket"}))
    if source.is_dir():
        upload_folder(store, source, key)
    else:
        store.put(key, source.read_bytes())
    return f"{scheme}://bucket/{key}"


@pytest.fixture
def remote(bucket: Bucket, tree: dict[str, Any], tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """The run of `tree` with its model, data and artifacts in the bucket."""
    choices = tmp_path / "choices"
    # These names sort differently as keys and as paths.
    for number, name in enumerate(("a/x.jsonl", "a-b/x.jsonl", "z.jsonl")):
        rows = [row | {"question": f"{number}: {row['question']}"} for row in choice_rows(4)]
        write_jsonl(choices / name, rows)
    (choices / "README.md").write_text("not data")
    tree["run"]["prepare"]["evaluation_sources"] = [{"path": str(choices)}]
    changed = json.loads(json.dumps(tree))
    changed["run"]["base_model"] = put(bucket, "models/tiny", tiny)
    changed["run"]["prepare"]["sources"] = [
        {"path": put(bucket, "rows/rows.jsonl", tmp_path / "data/rows.jsonl")}
    ]
    changed["run"]["prepare"]["evaluation_sources"] = [
        {"path": put(bucket, "choices", choices) + "/"}
    ]
    changed["cluster"] = {"store": bucket[1], "workDir": str(tmp_path / "work-remote")}
    bucket[0].requests.clear()
    return changed
