"""Runs of every shape: each from its data to its result, on the tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest

from medjob.cli.main import main
from medjob.config.load import validate
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage, stages_of
from tests.support.rows import preference_rows, write_jsonl
from tests.support.small_run import fetched

ALL = ["prepare", "sft", "candidates", "judge", "dpo", "evaluate", "export"]


def preferences(folder: Path, count: int = 24) -> list[dict[str, str]]:
    write_jsonl(folder / "data/preferences.jsonl", preference_rows(count))
    return [{"path": str(folder / "data/preferences.jsonl")}]


def fine_tune(run: dict[str, Any], _: list[dict[str, str]]) -> None:
    del run["candidates"], run["dpo"], run["prepare"]["preference_rows"]


def dpo_on_data(run: dict[str, Any], pairs: list[dict[str, str]]) -> None:
    for key in ("sft", "candidates", "judge"):
        del run[key]
    for key in ("sources", "preference_rows", "safety"):
        del run["prepare"][key]
    run["prepare"]["preference_sources"] = pairs
    run["dpo"]["pairs"] = "data"


def fine_tune_and_dpo_on_data(run: dict[str, Any], pairs: list[dict[str, str]]) -> None:
    del run["candidates"], run["judge"], run["prepare"]["preference_rows"]
    run["prepare"]["preference_sources"] = pairs
    run["dpo"]["pairs"] = "data"


def evaluate_models(run: dict[str, Any], _: list[dict[str, str]]) -> None:
    for key in ("sft", "candidates", "judge", "dpo"):
        del run[key]
    run["prepare"] = {"evaluation_sources": run["prepare"]["evaluation_sources"]}
    run["evaluate"]["extra_models"] = [f"{run['base_model']}/"]


def make_preferences(run: dict[str, Any], pairs: list[dict[str, str]]) -> None:
    for key in ("sft", "dpo", "evaluate"):
        del run[key]
    run["stages"] = ["judge", "candidates", "prepare"]
    run["prepare"] = {"preference_sources": pairs, "evaluation_rows": 0}


CHANGES = {
    "fine-tune": fine_tune,
    "DPO on data": dpo_on_data,
    "fine-tune, DPO on data": fine_tune_and_dpo_on_data,
    "evaluate models": evaluate_models,
    "make preferences": make_preferences,
}


def shape(tree: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Change the small run to one of the shapes."""
    CHANGES[name](tree["run"], preferences(folder))
    return tree


SHAPES = {
    "fine-tune": ["prepare", "sft", "evaluate", "export"],
    "DPO on data": ["prepare", "dpo", "evaluate", "export"],
    "fine-tune, DPO on data": ["prepare", "sft", "dpo", "evaluate", "export"],
    "evaluate models": ["prepare", "evaluate"],
    "make preferences": ["prepare", "candidates", "judge"],
}


def cli(tree: dict[str, Any], folder: Path, *arguments: str) -> None:
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree))
    with pytest.raises(SystemExit) as ended:
        main([arguments[0], "-f", str(path), *arguments[1:]])
    assert not ended.value.code


def test_a_run_with_preference_prompts_has_every_stage(tree: dict[str, Any]) -> None:
    """test_pipeline runs this shape, with candidates from which the judge can make pairs."""
    assert validate(tree).run.stages == ALL


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_runs_from_its_data_to_its_result(
    name: str, tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = shape(tree, name, tmp_path)
    assert validate(tree).run.stages == SHAPES[name]
    cli(tree, tmp_path, "run")
    capsys.readouterr()
    cli(tree, tmp_path, "run", "--dry-run")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:]] == ["fetch", *SHAPES[name]]
    assert all("published" in line for line in lines[1:])
    cli(tree, tmp_path, "plan")
    assert " -> ".join(["fetch", *SHAPES[name]]) in capsys.readouterr().out


def published(tree: dict[str, Any], until: str) -> Pipeline:
    pipeline = Pipeline.open(validate(tree))
    for stage in stages_of(pipeline.run_file.run, until):
        pipeline.run(stage)
    return pipeline


def test_the_comparison_has_the_models_that_the_run_trains(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = published(shape(tree, "DPO on data", tmp_path), "export")
    folder = fetched(pipeline, "evaluate")
    comparison = json.loads((folder / "comparison.json").read_text())
    assert list(comparison["metrics"][0]["models"]) == ["base", "dpo"]
    # 4 of the questions were held out: their chosen answers are the references.
    assert comparison["rows"]["open"] == 4
    assert (fetched(pipeline, "export") / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_dpo_from_a_base_starts_at_the_loss_of_two_equal_models(
    method: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = shape(tree, "DPO on data", tmp_path)
    tree["run"]["method"] = method
    pipeline = published(tree, "dpo")
    manifest = pipeline.artifact(get_stage("dpo")).manifest()
    assert manifest is not None
    assert manifest.metrics["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert manifest.metrics["last_loss"] < 0.6931


def test_pairs_of_data_are_trained_on_with_those_of_the_judge(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = shape(tree, "fine-tune, DPO on data", tmp_path)
    tree["run"]["dpo"] |= {"pairs": "both", "loss_type": "apo_zero", "rpo_alpha": 0.5}
    tree["run"]["judge"] = {"kind": "overlap", "min_margin": 0.0}
    assert validate(tree).run.stages == ALL
    pipeline = published(tree, "dpo")
    counts = {}
    for name in ("judge", "dpo"):
        manifest = pipeline.artifact(get_stage(name)).manifest()
        assert manifest is not None
        counts[name] = manifest.metrics
    names = ("pairs", "validation_pairs", "overlong_pairs_left_out")
    assert counts["judge"]["pairs"] > 0
    assert sum(counts["dpo"][name] for name in names) == 24 + counts["judge"]["pairs"]


def test_report_of_a_run_without_training_rows_has_no_empty_tables(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = published(shape(tree, "DPO on data", tmp_path), "prepare")
    page = (fetched(pipeline, "prepare") / "report.html").read_text()
    assert "16 preference pairs" in page
    assert "Length of training rows" not in page
    assert "Training rows as the model sees them" not in page


def test_pairs_are_compared_as_they_are_rendered(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = shape(tree, "DPO on data", tmp_path)
    tree["run"]["prepare"] |= {"evaluation_rows": 0, "max_rejected_fraction": 0.5}
    rows = [
        {"prompt": "Why?", "chosen": f"<think>{n}</think>Rest.", "rejected": "<think>b</think>No."}
        for n in range(3)
    ]
    same = {
        "prompt": "How?",
        "chosen": "<think>a</think>Rest.",
        "rejected": "<think>b</think>Rest.",
    }
    without = {"prompt": "Who?", "response": "You."}
    write_jsonl(tmp_path / "data/preferences.jsonl", [*rows, same, without])
    counts = {}
    for style in ("plain", "tags"):
        tree["run"]["prompt"]["style"] = style
        manifest = published(tree, "prepare").artifact(get_stage("prepare")).manifest()
        assert manifest is not None
        names = ("pairs", "repeated_pairs", "identical_pairs", "rejected")
        counts[style] = [manifest.metrics[name] for name in names]
    assert counts == {"plain": [1, 2, 1, 1], "tags": [4, 0, 0, 1]}


def test_overlong_pairs_are_counted_and_listed(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = shape(tree, "DPO on data", tmp_path)
    rows = preference_rows(24)
    rows[5]["rejected"] = "a long answer " * 300
    write_jsonl(tmp_path / "data/preferences.jsonl", rows)
    tree["run"]["prepare"]["evaluation_rows"] = 0
    tree["run"]["stages"] = ["prepare", "dpo"]
    pipeline = published(tree, "dpo")
    manifest = pipeline.artifact(get_stage("dpo")).manifest()
    assert manifest is not None
    assert manifest.metrics["overlong_pairs_left_out"] == 1
    listed = (fetched(pipeline, "dpo") / "overlong_pairs.jsonl").read_text().splitlines()
    assert len(listed) == 1
    assert json.loads(listed[0])["tokens"] > 512
