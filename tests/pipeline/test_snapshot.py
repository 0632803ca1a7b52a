"""Keys on a machine that lacks a package, and the requests that computing them takes."""

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medjob.config import RunFile
from medjob.errors import InputError
from medjob.pipeline.runner import Pipeline
from medjob.pipeline.snapshot import Snapshot
from medjob.stage import STAGES, get_stage
from tests.fakes.s3 import FakeS3
from tests.support.rows import reasoning_rows, write_jsonl
from tests.support.store_fixtures import credentials, fake_s3

__all__ = ["credentials", "fake_s3"]
CHANGES: dict[str, Any] = {
    "run": {"prepare": {"sources": [{"path": "package:rowspackage/rows.jsonl"}]}}
}


class Package:
    """A package of rows that can be installed and removed."""

    def __init__(self, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._site = site
        self._monkeypatch = monkeypatch
        self.install(48)

    def install(self, rows: int) -> None:
        write_jsonl(self._site / "rowspackage/rows.jsonl", reasoning_rows(rows))
        (self._site / "rowspackage/__init__.py").touch()
        self._monkeypatch.setattr(sys, "path", [str(self._site), *sys.path])
        importlib.invalidate_caches()

    def remove(self) -> None:
        self._monkeypatch.setattr(
            sys, "path", [entry for entry in sys.path if entry != str(self._site)]
        )
        sys.modules.pop("rowspackage", None)
        importlib.invalidate_caches()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    return Package(tmp_path / "site", monkeypatch)


def keys(pipeline: Pipeline) -> dict[str, str]:
    return {name: pipeline.artifact(get_stage(name)).key for name in ("fetch", "prepare", "sft")}


def test_keys_are_known_without_the_package_after_fetch(
    make_run_file: Callable[..., RunFile], package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.open(make_run_file(CHANGES))
    package.remove()
    for name in ("fetch", "prepare"):
        with pytest.raises(
            InputError, match=r"t/fetch is not published yet, .* rowspackage is not installed"
        ) as caught:
            pipeline.artifact(get_stage(name))
        assert (
            "run `medjob fetch` on a machine that has the package, or pip install rowspackage"
            in caught.value.hint
        )
    package.install(48)
    pipeline.run(get_stage("fetch"))
    pipeline.run(get_stage("prepare"))
    known = keys(pipeline)
    package.remove()
    assert keys(pipeline) == known
    assert keys(Pipeline.open(make_run_file(CHANGES))) == known
    pipeline.run(get_stage("fetch"))  # skipped

    package.install(47)  # as with another version of the image
    later = datetime.now(UTC) + timedelta(minutes=5)
    monkeypatch.setattr("medjob.pipeline.runner.datetime", SimpleNamespace(now=lambda _: later))
    newer = Pipeline.open(make_run_file(CHANGES))
    made = newer.run(get_stage("fetch"))
    assert made.key != known["fetch"]
    other = newer.artifact(get_stage("prepare")).key
    assert other != known["prepare"]
    package.remove()
    assert pipeline.artifact(get_stage("fetch")).key == made.key
    assert pipeline.artifact(get_stage("prepare")).key == other


def test_fetch_without_all_references_is_not_a_fallback(
    make_run_file: Callable[..., RunFile], package: Package, tmp_path: Path
) -> None:
    Pipeline.open(make_run_file(CHANGES)).run(get_stage("fetch"))
    write_jsonl(tmp_path / "more.jsonl", reasoning_rows(3))
    more = {
        "run": {
            "prepare": CHANGES["run"]["prepare"]
            | {"preference_sources": [{"path": str(tmp_path / "more.jsonl")}]}
        }
    }
    package.remove()
    with pytest.raises(InputError, match="is not published yet"):
        Pipeline.open(make_run_file(more)).artifact(get_stage("prepare"))
    package.install(48)
    Pipeline.open(make_run_file(more)).run(get_stage("fetch"))
    package.remove()
    Pipeline.open(make_run_file(more)).artifact(get_stage("prepare"))
    write_jsonl(tmp_path / "more.jsonl", reasoning_rows(4))
    with pytest.raises(InputError, match="is not published yet"):
        Pipeline.open(make_run_file(more)).artifact(get_stage("prepare"))


def test_fetch_of_another_package_version_is_not_a_fallback(
    make_run_file: Callable[..., RunFile], package: Package, tmp_path: Path
) -> None:
    both = {
        "run": CHANGES["run"] | {"judge": {"calibration": {"path": "package:otherpackage/x.jsonl"}}}
    }
    write_jsonl(tmp_path / "site/otherpackage/x.jsonl", [{"a": 1}])
    (tmp_path / "site/otherpackage/__init__.py").touch()
    Pipeline.open(make_run_file(CHANGES | both)).run(get_stage("fetch"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "site/otherpackage").rename(tmp_path / "elsewhere/otherpackage")
    package.remove()
    sys.modules.pop("otherpackage", None)
    sys.path.insert(0, str(tmp_path / "elsewhere"))
    Pipeline.open(make_run_file(both)).artifact(get_stage("fetch"))
    write_jsonl(tmp_path / "elsewhere/otherpackage/x.jsonl", [{"a": 2}])
    with pytest.raises(InputError, match="is not published yet"):
        Pipeline.open(make_run_file(both)).artifact(get_stage("fetch"))


def test_computing_keys_again_reads_only_markers(
    make_run_file: Callable[..., RunFile], package: Package, fake_s3: FakeS3
) -> None:
    store = {"uri": "s3://bucket/medjob", "endpoint": fake_s3.endpoint, "addressingStyle": "path"}
    run_file = make_run_file(CHANGES | {"cluster": {"store": store}})
    pipeline = Pipeline.open(run_file)
    for name in ("fetch", "prepare"):
        pipeline.run(get_stage(name))
    package.remove()  # takes the most requests, because the newest fetch is searched for
    watching = Pipeline.open(run_file)

    def requests(ask: Callable[[str], object]) -> Counter[str]:
        fake_s3.requests.clear()
        for stage in STAGES[:3]:
            ask(stage.name)
        return Counter(
            f"{r.operation} {r.key.rpartition('/')[2]}".strip() for r in list(fake_s3.requests)
        )

    assert requests(lambda name: watching.artifact(get_stage(name)))["GetObject pins.json"] == 1
    assert requests(lambda name: watching.artifact(get_stage(name))) == {
        "ListObjectsV2": 3,
        "GetObject _SUCCESS.json": 4,
    }
    snapshot = watching.snapshot()
    assert requests(lambda name: snapshot.artifact(get_stage(name))) == {
        "ListObjectsV2": 1,
        "GetObject _SUCCESS.json": 2,
    }
    assert isinstance(snapshot, Snapshot)
