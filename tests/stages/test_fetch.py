"""Pins of hub ids: taken once, kept for the run, and part of the keys. The hub itself is a stand-in: no test asks a real one."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from medjob.config import Job
from medjob.errors import InputError, RetryError
from medjob.runner import Line
from medjob.stage import get_stage

CHANGES = {"run": {"base_model": "org/model", "prepare": {"sources": [{"path": "org/rows", "name": "en"}]}}}


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


def test_commits_enter_the_keys_and_stay_for_the_run(make_job: Callable[..., Job], hub: dict[str, Any]) -> None:
    line = Line.open(make_job(CHANGES))
    line.run(get_stage("fetch"))
    key = line.artifact(get_stage("prepare")).key
    hub["org/model"] = "moved"
    line.run(get_stage("fetch"))
    assert hub["asked"] == 2  # once each

    # A flag that names one more model makes another fetch, and the others keep their commits.
    more = Line.open(make_job({**CHANGES, "run": {**CHANGES["run"], "evaluate": {"extra_models": ["org/other"]}}}))
    hub["org/other"] = "beef"
    more.run(get_stage("fetch"))
    assert hub["asked"] == 3
    assert more.artifact(get_stage("prepare")).key == key

    other = Line.open(make_job({**CHANGES, "run": {**CHANGES["run"], "name": "another"}}))
    other.run(get_stage("fetch"))
    assert other.artifact(get_stage("prepare")).key != key


def test_other_values_of_the_fields_do_not_fetch_again(make_job: Callable[..., Job], hub: dict[str, Any]) -> None:
    line = Line.open(make_job(CHANGES))
    line.run(get_stage("fetch"))
    changed = Line.open(make_job({"run": {**CHANGES["run"], "judge": {"min_margin": 0.5}, "evaluate": {"bootstrap_samples": 200}}}))
    assert changed.artifact(get_stage("fetch")).key == line.artifact(get_stage("fetch")).key


def test_a_hub_out_of_reach_is_no_missing_model(make_job: Callable[..., Job], hub: dict[str, Any]) -> None:
    hub["org/model"] = ConnectionError("no route")
    with pytest.raises(RetryError, match="cannot be reached"):
        Line.open(make_job(CHANGES)).run(get_stage("fetch"))


def test_an_unknown_id_is_told(make_job: Callable[..., Job], hub: dict[str, Any]) -> None:
    import httpx2
    from huggingface_hub.errors import RepositoryNotFoundError

    response = httpx2.Response(404, request=httpx2.Request("GET", "http://localhost"))
    hub["org/model"] = RepositoryNotFoundError("404 Client Error", response=response)
    with pytest.raises(InputError, match="the hub has no such model"):
        Line.open(make_job(CHANGES)).run(get_stage("fetch"))
