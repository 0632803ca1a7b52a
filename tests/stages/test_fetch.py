"""Pins of hub ids: taken once, kept for the run, and part of the keys. The hub itself is a stand-in: no test asks a real one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medjob.config import RunFile
from medjob.errors import InputError, RetryError
from medjob.pipeline.runner import Pipeline
from medjob.sources.copies import place
from medjob.sources.locations import locate
from medjob.stage import get_stage
from tests.fakes.s3 import FakeS3

CHANGES = {
    "run": {"base_model": "org/model", "prepare": {"sources": [{"path": "org/rows", "name": "en"}]}}
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Commits by id; counts the questions."""
    import huggingface_hub

    answers: dict[str, Any] = {"org/model": "c0ffee", "org/rows": "f00d", "asked": 0}

    def repo_info(self: Any, name: str, **kwargs: Any) -> Any:
        answers["asked"] += 1
        if isinstance(answers[name], Exception):
            raise answers[name]
        return SimpleNamespace(sha=answers[name])

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: None)
    return answers


def test_commits_enter_the_keys_and_stay_for_the_run(
    make_run_file: Callable[..., RunFile], hub: dict[str, Any]
) -> None:
    pipeline = Pipeline.open(make_run_file(CHANGES))
    pipeline.run(get_stage("fetch"))
    key = pipeline.artifact(get_stage("prepare")).key
    hub["org/model"] = "moved"
    pipeline.run(get_stage("fetch"))
    assert hub["asked"] == 2  # once each

    # A flag that names one more model makes another fetch, and the others keep their commits.
    more = Pipeline.open(
        make_run_file(
            {**CHANGES, "run": {**CHANGES["run"], "evaluate": {"extra_models": ["org/other"]}}}
        )
    )
    hub["org/other"] = "beef"
    more.run(get_stage("fetch"))
    assert hub["asked"] == 3
    assert more.artifact(get_stage("prepare")).key == key

    other = Pipeline.open(make_run_file({**CHANGES, "run": {**CHANGES["run"], "name": "another"}}))
    other.run(get_stage("fetch"))
    assert other.artifact(get_stage("prepare")).key != key


def test_other_values_of_the_fields_do_not_fetch_again(
    make_run_file: Callable[..., RunFile], hub: dict[str, Any]
) -> None:
    pipeline = Pipeline.open(make_run_file(CHANGES))
    pipeline.run(get_stage("fetch"))
    changed = Pipeline.open(
        make_run_file(
            {
                "run": {
                    **CHANGES["run"],
                    "judge": {"min_margin": 0.5},
                    "evaluate": {"bootstrap_samples": 200},
                }
            }
        )
    )
    assert changed.artifact(get_stage("fetch")).key == pipeline.artifact(get_stage("fetch")).key


def test_a_hub_out_of_reach_is_no_missing_model(
    make_run_file: Callable[..., RunFile], hub: dict[str, Any]
) -> None:
    hub["org/model"] = ConnectionError("no route")
    with pytest.raises(RetryError, match="cannot be reached"):
        Pipeline.open(make_run_file(CHANGES)).run(get_stage("fetch"))


def test_an_unknown_id_is_told(make_run_file: Callable[..., RunFile], hub: dict[str, Any]) -> None:
    import httpx2
    from huggingface_hub.errors import RepositoryNotFoundError

    response = httpx2.Response(404, request=httpx2.Request("GET", "http://localhost"))
    hub["org/model"] = RepositoryNotFoundError("404 Client Error", response=response)
    with pytest.raises(InputError, match="the hub has no such model"):
        Pipeline.open(make_run_file(CHANGES)).run(get_stage("fetch"))


@pytest.fixture
def downloads(
    hub: dict[str, Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Path | None]:
    """Where models were downloaded to: the tiny one, whatever the id."""
    import huggingface_hub

    found: list[Path | None] = []

    def snapshot_download(
        name: str, revision: str, local_dir: Path | None, ignore_patterns: list[str]
    ) -> None:
        found.append(local_dir)
        if local_dir is not None:
            shutil.copytree(tiny, local_dir)
            (local_dir / ".cache").mkdir()
            (local_dir / ".cache/when").write_text("now")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return found


def in_bucket(server: FakeS3) -> dict[str, Any]:
    return {
        "store": {
            "uri": "s3://bucket/medjob",
            "endpoint": server.endpoint,
            "addressingStyle": "path",
        }
    }


def test_a_bucket_holds_the_hub_s_models_and_later_stages_ask_no_hub(
    make_run_file: Callable[..., RunFile],
    hub: dict[str, Any],
    downloads: list[Path | None],
    fake_s3: FakeS3,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = Pipeline.open(make_run_file())
    plain.run(get_stage("prepare"))
    pipeline = Pipeline.open(
        make_run_file({"run": {"base_model": "org/model"}, "cluster": in_bucket(fake_s3)})
    )
    made = pipeline.run(get_stage("fetch"))
    copied = [file.path for file in made.files if file.path.startswith("mirror/")]
    assert any(path.endswith("/model.safetensors") for path in copied)
    assert not any(".cache" in path for path in copied)
    hub.clear()  # whoever asks it now fails
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepared = pipeline.run(get_stage("prepare"))
    assert prepared.digest == plain.run(get_stage("prepare")).digest
    snapshot, model, cache = (
        pipeline.snapshot(),
        pipeline.run_file.run.base_model,
        Path(pipeline.run_file.cluster.work_dir) / "models",
    )
    without_weights = locate(model, pipeline.known_pins(), cache)
    assert (without_weights.on_hub, without_weights.revision) == (True, "c0ffee")
    place(*snapshot.copy_of(model, pipeline.known_pins()), cache)
    copy = locate(model, pipeline.known_pins(), cache)
    assert (Path(copy.path) / "model.safetensors").is_file()
    assert (copy.on_hub, copy.revision) == (False, None)


def test_a_hub_s_models_are_copied_once_for_a_run_and_its_data_sets_never(
    make_run_file: Callable[..., RunFile],
    hub: dict[str, Any],
    downloads: list[Path | None],
    fake_s3: FakeS3,
) -> None:
    changes = CHANGES | {"cluster": in_bucket(fake_s3)}
    pipeline = Pipeline.open(make_run_file(changes))
    pipeline.run(get_stage("fetch"))
    assert len(downloads) == 1
    more = Pipeline.open(
        make_run_file(
            {**changes, "run": {**CHANGES["run"], "evaluate": {"extra_models": ["org/other"]}}}
        )
    )
    hub["org/other"] = "beef"
    made = more.run(get_stage("fetch"))
    assert len(downloads) == 2
    assert (
        len(
            {path.split("/")[1] for file in made.files if (path := file.path).startswith("mirror/")}
        )
        == 1
    )
    assert (
        more.snapshot().copy_of(more.run_file.run.base_model, more.known_pins())[0].key
        == pipeline.artifact(get_stage("fetch")).key
    )


def test_a_fetch_without_copies_is_not_taken_for_one_with_them(
    make_run_file: Callable[..., RunFile],
    hub: dict[str, Any],
    downloads: list[Path | None],
    fake_s3: FakeS3,
) -> None:
    here, there = (
        Pipeline.open(make_run_file(CHANGES)),
        Pipeline.open(make_run_file(CHANGES | {"cluster": in_bucket(fake_s3)})),
    )
    assert here.artifact(get_stage("fetch")).key != there.artifact(get_stage("fetch")).key
    here.run(get_stage("fetch"))
    assert downloads == [None]  # to the hub's own cache
    there.run(get_stage("fetch"))
    assert downloads[1] is not None
    assert here.artifact(get_stage("prepare")).key == there.artifact(get_stage("prepare")).key


def test_a_model_without_safetensors_is_refused(
    make_run_file: Callable[..., RunFile],
    hub: dict[str, Any],
    fake_s3: FakeS3,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, local_dir, **kwargs: local_dir.mkdir(parents=True),
    )
    with pytest.raises(InputError, match=r"org/model: has no \.safetensors weights"):
        Pipeline.open(make_run_file(CHANGES | {"cluster": in_bucket(fake_s3)})).run(
            get_stage("fetch")
        )
