"""Runs that start from a finished model: an adapter's directory, or what another run published."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from medjob.config import load_run_file
from medjob.config.load import validate
from medjob.errors import ConfigError, InputError
from medjob.pipeline.planning import plan_lines
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage, stages_of
from tests.stages.test_shapes import dpo_on_data, preferences
from tests.support.small_run import fetched

pytestmark = pytest.mark.usefixtures("trained")


def publish(tree: dict[str, Any], until: str) -> Pipeline:
    pipeline = Pipeline.open(validate(tree))
    for stage in stages_of(pipeline.run_file.run, until):
        pipeline.run(stage)
    return pipeline


def metrics(pipeline: Pipeline, stage: str) -> dict[str, Any]:
    manifest = pipeline.artifact(get_stage(stage)).manifest()
    assert manifest is not None
    return manifest.metrics


def continuing(tree: dict[str, Any], reference: str = "run:t/sft") -> dict[str, Any]:
    """A second run, which starts from the adapter of the first."""
    tree["run"] |= {"name": "second", "adapter": reference, "lora": {"r": 16}}
    return tree


def test_fine_tuning_continues_the_adapter_of_another_run(tree: dict[str, Any]) -> None:
    first = metrics(Pipeline.open(validate(tree)), "sft")
    pipeline = publish(continuing(tree), "sft")
    assert metrics(pipeline, "sft")["last_loss"] < first["last_loss"]
    config = json.loads((fetched(pipeline, "sft") / "adapter_config.json").read_text())
    assert config["r"] == 4  # the adapter's, not the 16 of the run file


def test_dpo_starts_from_the_adapter_of_another_run(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = continuing(tree)
    dpo_on_data(tree["run"], preferences(tmp_path))
    tree["run"]["prompt"] = {"style": "plain"}
    pipeline = publish(tree, "evaluate")
    # The reference is the base with the adapter, so policy and reference are equal at first.
    assert metrics(pipeline, "dpo")["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    adapter = load_file(fetched(pipeline, "dpo") / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in adapter.items() if "lora_A" in name} == {4}
    # What is compared as `base` is the model that the run started from.
    table = {row["metric"]: row["models"] for row in metrics(pipeline, "evaluate")["metrics"]}
    assert set(table["perplexity"]) == {"base", "dpo"}


def test_a_directory_of_an_adapter_stands_for_its_base_and_itself(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(fetched(Pipeline.open(validate(tree)), "sft"), adapter)
    base = tree["run"]["base_model"]
    tree["run"] |= {"name": "second", "base_model": str(adapter)}
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    run_file = load_run_file([tmp_path / "run.yaml"])
    assert run_file.run.base_model.id == base
    assert run_file.run.adapter is not None
    assert run_file.run.adapter.id == str(adapter)
    pipeline = Pipeline.open(run_file)
    for name in ("fetch", "prepare", "sft"):
        pipeline.run(get_stage(name))


def test_another_adapter_in_the_same_directory_is_another_run(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(fetched(Pipeline.open(validate(tree)), "sft"), adapter)
    tree = continuing(tree, str(adapter))
    before = publish(tree, "prepare").artifact(get_stage("sft")).key
    (adapter / "README.md").write_text("changed")
    assert publish(tree, "prepare").artifact(get_stage("sft")).key != before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"adapter": "run:nobody/sft"},
            InputError,
            "run.adapter: run:nobody/sft: .*/nobody/sft is not published",
        ),
        (
            {"adapter": "run:t/sft/ffff"},
            InputError,
            "run.adapter: run:t/sft/ffff: .*/t/sft/ffff is not published",
        ),
        ({"base_model": "run:t/sft"}, ConfigError, "run.base_model: run:t/sft is a LoRA adapter"),
        (
            {"evaluate": {"extra_models": ["run:t/sft"]}},
            ConfigError,
            "run.evaluate.extra_models.0: run:t/sft is a LoRA adapter",
        ),
        (
            {"adapter": "{base}"},
            ConfigError,
            "run.adapter: .* is a model, not a LoRA adapter",
        ),
    ],
)
def test_models_that_cannot_be_started_from_are_named_before_anything_is_trained(
    tree: dict[str, Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    if changes.get("adapter") == "{base}":
        changes = {"adapter": tree["run"]["base_model"]}
    tree["run"] |= {"name": "second", **changes}
    with pytest.raises(error, match=message) as caught:
        Pipeline.open(validate(tree)).run(get_stage("fetch"))
    assert caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("adapter_config.json", '{"peft_type": "IA3"}', "not a complete LoRA adapter"),
        ("adapter_config.json", "{bad", "cannot read adapter_config.json"),
        ("adapter_config.json", "[1]", "is not an object"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors"),
    ],
)
def test_a_damaged_adapter_is_refused_by_fetch(
    tree: dict[str, Any], tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(fetched(Pipeline.open(validate(tree)), "sft"), adapter)
    if text is None:
        (adapter / name).unlink()
    else:
        (adapter / name).write_text(text)
    with pytest.raises(InputError, match=f"run.adapter: .*{message}"):
        Pipeline.open(validate(continuing(tree, str(adapter)))).run(get_stage("fetch"))


def test_one_reference_in_two_fields_is_checked_in_both(tree: dict[str, Any]) -> None:
    tree = continuing(tree)
    tree["run"]["evaluate"]["extra_models"] = ["run:t/sft"]
    with pytest.raises(ConfigError, match=r"run\.evaluate\.extra_models\.0: run:t/sft is a LoRA"):
        Pipeline.open(validate(tree)).run(get_stage("fetch"))


def test_a_missing_adapter_names_its_key(tree: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"run\.adapter: /nope/x"):
        Pipeline.open(validate(continuing(tree, "/nope/x"))).run(get_stage("fetch"))


def test_plan_counts_the_rank_of_the_adapter(tree: dict[str, Any], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(fetched(Pipeline.open(validate(tree)), "sft"), adapter)
    plain = "\n".join(plan_lines(validate(tree), None))
    lines = "\n".join(plan_lines(validate(continuing(tree, str(adapter))), None))
    assert "run.lora has no effect" in lines
    assert plain.splitlines()[0] == lines.splitlines()[0]  # rank 4, not the 16 of the run file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "run:t"}, "run.adapter: must be run:NAME/STAGE"),
        ({"adapter": "run:t/prepare"}, "run.adapter: must be run:NAME/STAGE"),
        ({"adapter": "run:t/sft", "method": "full"}, "run.adapter: is continued as an adapter"),
    ],
)
def test_references_that_no_run_can_have(
    tree: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    tree["run"] |= changes
    with pytest.raises(ConfigError, match=message):
        validate(tree)
