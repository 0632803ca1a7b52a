"""Pins of hub ids: chosen once per run, and part of the keys. The hub is a fake."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medjob.config import RunFile
from medjob.errors import ConfigError, InputError, RetryError
from medjob.pipeline.runner import Pipeline
from medjob.sources.copies import copies_in, place_copy
from medjob.sources.locations import locate
from medjob.stage import get_stage
from tests.fakes.s3 import FakeS3

CHANGES = {
    "run": {"base_model": "org/model", "prepare": {"sources": [{"path": "org/rows", "name": "en"}]}}
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Fake hub: the commit or error of each id, and the number of requests as `asked`."""
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
    monkeypatch.setattr("medjob.stages.fetch.check_later_models", lambda run, locate: None)
    return answers


def test_commits_are_in_the_keys_and_stay_for_the_run(
    make_run_file: Callable[..., RunFile], hub: dict[str, Any]
) -> None:
    pipeline = Pipeline.open(make_run_file(CHANGES))
    pipeline.run(get_stage("fetch"))
    key = pipeline.artifact(get_stage("prepare")).key
    hub["org/model"] = "moved"
    pipeline.run(get_stage("fetch"))
    assert hub["asked"] == 2  # one request per id

    # One more model makes a new fetch, in which the other references keep their commits.
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


def test_fields_without_references_do_not_change_the_key_of_fetch(
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


def test_unreachable_hub_can_be_retried(
    make_run_file: Callable[..., RunFile], hub: dict[str, Any]
) -> None:
    hub["org/model"] = ConnectionError("no route")
    with pytest.raises(RetryError, match="cannot be reached"):
        Pipeline.open(make_run_file(CHANGES)).run(get_stage("fetch"))


def test_unknown_id_is_an_input_error(
    make_run_file: Callable[..., RunFile], hub: dict[str, Any]
) -> None:
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
    """Target directory of each download. Every id gets the tiny model."""
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


def test_later_stages_read_hub_models_from_copies_in_the_bucket(
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
    hub.clear()  # any further request fails
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepared = pipeline.run(get_stage("prepare"))
    assert prepared.digest == plain.run(get_stage("prepare")).digest
    snapshot = pipeline.snapshot()
    model = pipeline.run_file.run.base_model
    cache = Path(pipeline.run_file.cluster.work_dir) / "models"
    copy = place_copy(*snapshot.copy_of(model, pipeline.known_pins()), cache)
    assert (copy / "model.safetensors").is_file()
    # Only the copy that has just been verified is used, never one that is on the disk already.
    found = locate(model, pipeline.known_pins(), cache)
    assert (found.on_hub, found.revision) == (True, "c0ffee")


def test_hub_models_are_copied_once_per_run_and_data_sets_never(
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
    assert len(copies_in(made)) == 1
    artifact, _, _ = more.snapshot().copy_of(more.run_file.run.base_model, more.known_pins())
    assert artifact.key == pipeline.artifact(get_stage("fetch")).key


def test_fetch_with_copies_has_another_key_than_one_without(
    make_run_file: Callable[..., RunFile],
    hub: dict[str, Any],
    downloads: list[Path | None],
    fake_s3: FakeS3,
) -> None:
    here = Pipeline.open(make_run_file(CHANGES))
    there = Pipeline.open(make_run_file(CHANGES | {"cluster": in_bucket(fake_s3)}))
    assert here.artifact(get_stage("fetch")).key != there.artifact(get_stage("fetch")).key
    here.run(get_stage("fetch"))
    assert downloads == [None]  # to the hub's own cache
    there.run(get_stage("fetch"))
    assert downloads[1] is not None
    assert here.artifact(get_stage("prepare")).key == there.artifact(get_stage("prepare")).key


def test_hub_model_without_safetensors_is_refused(
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
    with pytest.raises(InputError, match=r"org/model: no \.safetensors weights"):
        Pipeline.open(make_run_file(CHANGES | {"cluster": in_bucket(fake_s3)})).run(
            get_stage("fetch")
        )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"evaluate": {"models": ["base"], "extra_models": ["{model}"]}}, "extra_models.0"),
        ({"judge": {"kind": "model", "model": "{model}"}}, "judge.model"),
    ],
)
def test_models_used_after_the_training_are_checked_first(
    make_run_file: Callable[..., RunFile],
    tiny: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    key: str,
) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    changes = json.loads(json.dumps(changes).replace("{model}", str(broken)))
    with pytest.raises(ConfigError, match=rf"run\..*{key} \(broken\): the chat template fails"):
        Pipeline.open(make_run_file({"run": changes})).run(get_stage("fetch"))
