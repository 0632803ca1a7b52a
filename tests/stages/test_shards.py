"""Stages divided into shards: the same bytes for any number of them, and after kills."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.artifacts.artifact import Attempt
from medjob.artifacts.shard import Shard, shard_of
from medjob.config import RunFile
from medjob.errors import ConfigError, SupersededError
from medjob.pipeline.runner import Pipeline
from medjob.pipeline.shards import shard_of_process
from medjob.stage import get_stage

pytestmark = pytest.mark.usefixtures("trained")
CANDIDATES = get_stage("candidates")


def with_shards(count: int) -> dict[str, Any]:
    return {
        "resources": {name: {"shards": count} for name in ("candidates", "judge", "evaluate")},
    }


def digest_of(pipeline: Pipeline, stage: str) -> str:
    manifest = pipeline.artifact(get_stage(stage)).manifest()
    assert manifest is not None
    return manifest.digest


@pytest.fixture
def undivided(make_run_file: Callable[..., RunFile], tmp_path: Path) -> dict[str, str]:
    """Digests of the stages without shards, in a separate store."""
    pipeline = Pipeline.open(make_run_file())
    digests = {name: pipeline.run(get_stage(name)).digest for name in ("candidates", "judge")}
    for name in digests:
        (tmp_path / "store/t" / name).rename(tmp_path / f"undivided-{name}")
    return digests


def test_any_number_of_shards_gives_the_same_bytes(
    make_run_file: Callable[..., RunFile], undivided: dict[str, str]
) -> None:
    for count in (2, 5):
        pipeline = Pipeline.open(make_run_file(with_shards(count)))
        for name in ("candidates", "judge"):
            stage = get_stage(name)
            made = [pipeline.run_shard(stage, Shard(index, count)) for index in range(count)]
            assert made[:-1] == [None] * (count - 1)  # the last one joins them
            assert made[-1] is not None
            assert made[-1].digest == undivided[name]
        for name in ("candidates", "judge"):
            store = Path(pipeline.run_file.cluster.store.uri.removeprefix("file://"))
            (store / "t" / name).rename(store.parent / f"{name}-{count}")


def test_shard_that_is_finished_is_not_computed_again(
    make_run_file: Callable[..., RunFile],
) -> None:
    pipeline = Pipeline.open(make_run_file(with_shards(2)))
    assert pipeline.run_shard(CANDIDATES, Shard(1, 2)) is None
    assert pipeline.run_shard(CANDIDATES, Shard(1, 2)) is None
    assert shard_of(pipeline.artifact(CANDIDATES), Shard(1, 2)).epoch() == 1


def test_of_two_processes_with_one_shard_the_newer_one_counts(
    make_run_file: Callable[..., RunFile],
) -> None:
    pipeline = Pipeline.open(make_run_file(with_shards(2)))
    artifact = pipeline.artifact(CANDIDATES)
    older = Attempt.begin(shard_of(artifact, Shard(0, 2)), "other")
    pipeline.run_shard(CANDIDATES, Shard(0, 2))
    with pytest.raises(SupersededError):
        older.check()


def test_shards_that_were_not_joined_are_joined_by_the_next_process(
    make_run_file: Callable[..., RunFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.open(make_run_file(with_shards(2)))
    pipeline.run_shard(CANDIDATES, Shard(0, 2))

    def dies(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "_publish", dies)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run_shard(CANDIDATES, Shard(1, 2))
    assert pipeline.artifact(CANDIDATES).manifest() is None
    assert pipeline.run_shard(CANDIDATES, Shard(0, 2)) is not None


def test_marker_of_a_shard_is_not_the_stage_s(make_run_file: Callable[..., RunFile]) -> None:
    pipeline = Pipeline.open(make_run_file(with_shards(2)))
    pipeline.run_shard(CANDIDATES, Shard(0, 2))
    artifact = pipeline.artifact(CANDIDATES)
    part = shard_of(artifact, Shard(0, 2))
    blob = pipeline.store.get(part.path("_SUCCESS.json"))
    assert blob is not None
    for target in (artifact, shard_of(artifact, Shard(1, 2))):
        pipeline.store.create(target.path("_SUCCESS.json"), blob.data)
        with pytest.raises(Exception, match="belongs to another artifact"):
            target.manifest()


@pytest.mark.parametrize("text", ["2", "-1", "x", "", "٣", "99999999999999999999"])
def test_number_that_no_shard_has_is_refused(
    make_run_file: Callable[..., RunFile], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("MEDJOB_SHARD", text)
    with pytest.raises(ConfigError, match="MEDJOB_SHARD must be 0 to 1"):
        shard_of_process(make_run_file(with_shards(2)), CANDIDATES, None)
    with pytest.raises(ConfigError, match="--shard must be 0 to 1"):
        shard_of_process(make_run_file(with_shards(2)), CANDIDATES, text)


def medjob(tree: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    file = Path(tree["cluster"]["workDir"]).parent / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "medjob", *arguments, "-f", str(file)]
    environment = {key: value for key, value in os.environ.items() if key != "MEDJOB_SHARD"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_command_runs_all_shards_in_processes_and_joins_them(
    tree: dict[str, Any], make_run_file: Callable[..., RunFile], undivided: dict[str, str]
) -> None:
    tree["resources"]["candidates"]["shards"] = 2
    done = medjob(tree, "candidates")
    assert done.returncode == 0, done.stderr
    assert "2 shards, 1 at a time" in done.stderr
    pipeline = Pipeline.open(make_run_file(with_shards(2)))
    assert digest_of(pipeline, "candidates") == undivided["candidates"]


@pytest.mark.slow
def test_failing_shard_ends_the_command_with_its_code(tree: dict[str, Any]) -> None:
    tree["resources"]["candidates"] |= {"shards": 2, "engine": "vllm"}
    done = medjob(tree, "candidates")
    assert done.returncode == 64
    assert "vLLM is not installed" in done.stderr
    assert "candidates: shard 0 ended with exit code 64" in done.stderr
