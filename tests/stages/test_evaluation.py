"""What `evaluate` adds on request: reordered options, abstention, human grades, and pairs of
answers in both orders."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medjob.artifacts.artifact import Attempt, Manifest
from medjob.artifacts.shard import Shard
from medjob.config.load import validate
from medjob.errors import ConfigError, DataError
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.stages.test_shapes import evaluate_models, preferences
from tests.support.rows import choice_rows, reasoning_rows, write_jsonl
from tests.support.small_run import fetched


@pytest.fixture
def other(tiny: Path, tmp_path: Path) -> str:
    """Another random model of the same family."""
    shutil.copytree(tiny, tmp_path / "other")
    file = tmp_path / "other/model.safetensors"
    torch.manual_seed(5)
    weights = {key: torch.randn_like(value) * 0.3 for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return str(tmp_path / "other")


@pytest.fixture
def comparison(tree: dict[str, Any], other: str, tmp_path: Path) -> dict[str, Any]:
    """A run that compares two models on multiple-choice rows and open questions."""
    evaluate_models(tree["run"], [])
    tree["run"]["evaluate"] |= {
        "extra_models": [other],
        "max_new_tokens": 4,
        "multiple_choice_max_new_tokens": 4,
    }
    questions = reasoning_rows(12)
    sources = [{"path": str(write_jsonl(tmp_path / "data/open.jsonl", questions))}]
    tree["run"]["prepare"]["evaluation_sources"] += sources
    return tree


def run_all(tree: dict[str, Any]) -> tuple[Manifest, Path]:
    pipeline = Pipeline.open(validate(tree))
    for name in ("fetch", "prepare", "evaluate"):
        manifest = pipeline.run(get_stage(name))
    return manifest, fetched(pipeline, "evaluate")


def test_multiple_choice_in_other_orders_and_with_abstention(
    comparison: dict[str, Any], other: str, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = choice_rows(6)
    for number, row in enumerate(rows):
        row["subject_name"] = "Surgery" if number % 3 else "Medicine"
    rows[0]["options"] = rows[0]["options"] | {"C": "Both A and B"}
    rows[1]["options"] = {"A": "yes", "B": "no"}
    write_jsonl(tmp_path / "data/choices.jsonl", rows)
    comparison["run"]["evaluate"] |= {"option_shuffles": 3, "abstain_option": True}
    manifest, folder = run_all(comparison)

    result = json.loads((folder / "comparison.json").read_text())
    table = {row["metric"]: row["models"] for row in result["metrics"]}
    assert {model: figures["n"] for model, figures in table["all orders"].items()} == {
        "base": 6,
        other: 6,
    }
    for name in ("same option", "letter, same option"):
        assert table[name]["base"]["n"] == 5  # one row keeps its order
        assert table[name]["base"]["p_value"] is None
        assert table[name][other]["p_value"] is not None
    assert table["abstained"]["base"]["n"] == 6
    assert -1 <= table["formula score"]["base"]["value"] <= 1
    # The random model has a favourite letter, and so chooses another option in each order.
    assert table["letter, same option"]["base"]["value"] < 0.5

    section = result["multiple_choice"]
    assert (section["reordered"], section["kept_in_order"], section["most_orders"]) == (5, 1, 4)
    assert section["chance"] == pytest.approx((5 * 0.25 + 0.5) / 6)
    assert [(each["subject"], each["rows"]) for each in section["subjects"]] == [
        ("Surgery", 4),
        ("Medicine", 2),
    ]
    assert "1 only in their own" in manifest.metrics["summary"]
    page = (folder / "report.html").read_text()
    assert "Multiple choice by subject" in page
    assert "Surgery" in page
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 18  # variants of a row are no rows


def graded(folder: Path, path: Path, count: int, scale: int = 4) -> list[dict[str, str]]:
    """Fill in the first lines of the evaluation's sheet: long answers are good ones."""
    with (folder / "grading.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for number, line in enumerate(lines[:count]):
        line["grade"] = str(1 + scale * (len(line["answer"]) + number) % (scale + 1))
    write_sheet(path, lines)
    return lines


def write_sheet(path: Path, lines: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def test_human_grades_correct_the_judge(
    comparison: dict[str, Any], other: str, tmp_path: Path
) -> None:
    _, folder = run_all(comparison)
    lines = graded(folder, tmp_path / "grades.csv", 16)
    assert len(lines) == 24
    assert [line["model"] for line in lines[:4]] == ["base", other] * 2
    assert len({line["id"] for line in lines[:16]}) == 8
    comparison["run"]["evaluate"]["human_grades"] = {"path": str(tmp_path / "grades.csv")}
    manifest, folder = run_all(comparison)

    result = json.loads((folder / "comparison.json").read_text())
    corrected = result["corrected"]
    assert set(corrected["models"]) == {"base", other}
    for model, figures in corrected["models"].items():
        given = [(float(x["grade"]) - 1) / 4 for x in lines[:16] if x["model"] == model]
        assert (figures["n"], figures["rows"]) == (8, 12)
        assert figures["graded"] == pytest.approx(sum(given) / 8)
        assert figures["low"] <= figures["value"] <= figures["high"]
    (difference,) = corrected["differences"]
    assert (difference["model"], difference["against"]) == (other, "base")
    assert corrected["left_out"] == {}
    assert "corrected mean" in manifest.metrics["summary"]
    assert f"{other} - base: " in manifest.metrics["summary"]
    assert "Scores corrected by human grades" in (folder / "report.html").read_text()


def test_grades_of_other_answers_and_questions_are_counted(
    comparison: dict[str, Any], tmp_path: Path
) -> None:
    _, folder = run_all(comparison)
    lines = graded(folder, tmp_path / "grades.csv", 10)
    lines[0]["answer_digest"] = "0" * 12
    lines[1]["id"] = lines[1]["question"] = "unknown"
    lines[2]["id"] = "1.23E+15"  # a spreadsheet did this; the question still names the row
    write_sheet(tmp_path / "grades.csv", lines)
    comparison["run"]["evaluate"]["human_grades"] = {"path": str(tmp_path / "grades.csv")}
    manifest, folder = run_all(comparison)
    corrected = manifest.metrics["corrected"]
    assert sum(figures["n"] for figures in corrected["models"].values()) == 8
    assert corrected["left_out"] == {
        "of answers that this evaluation did not generate": 1,
        "of questions that are not evaluated": 1,
    }
    assert "not used: 1 of questions that are not evaluated" in manifest.metrics["summary"]
    assert "Not used: 1 grade of answers" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grade": "6"}, r"grades\.csv:3: grade is 6, and run\.evaluate\.grade_scale is 1-5"),
        ({"grade": "0.5"}, r"grades\.csv:3: grade is 0\.5"),
        ({"grade": "good"}, r"grades\.csv:3: grade is not a number"),
        ({"model": "gpt"}, r"grades\.csv:3: the model is none of those compared \(base, "),
        ({"model": ""}, r"grades\.csv:3: model is "),
        ({"id": "", "question": ""}, r"grades\.csv:3: id is "),
    ],
)
def test_mistakes_in_grades_are_found_before_any_model_answers(
    change: dict[str, str], message: str, comparison: dict[str, Any], tmp_path: Path
) -> None:
    line = {"id": "x", "question": "Why?", "model": "base", "grade": "3"}
    write_sheet(tmp_path / "grades.csv", [line, line | change])
    comparison["run"]["evaluate"]["human_grades"] = {"path": str(tmp_path / "grades.csv")}
    pipeline = Pipeline.open(validate(comparison))
    for name in ("fetch", "prepare"):
        pipeline.run(get_stage(name))
    with pytest.raises(DataError, match=message):
        pipeline.run(get_stage("evaluate"))
    assert not list((tmp_path / "store").rglob("parts/*"))


def test_a_file_without_grades_is_refused(comparison: dict[str, Any], tmp_path: Path) -> None:
    write_sheet(tmp_path / "grades.csv", [{"id": "x", "model": "base", "grade": ""}])
    comparison["run"]["evaluate"]["human_grades"] = {"path": str(tmp_path / "grades.csv")}
    with pytest.raises(DataError, match="no line has a grade"):
        run_all(comparison)


def test_columns_of_grades_cannot_be_renamed(comparison: dict[str, Any]) -> None:
    source = {"path": "grades.csv", "columns": {"question": "Frage"}}
    comparison["run"]["evaluate"]["human_grades"] = source
    with pytest.raises(ConfigError, match="need the columns id or question, model and grade"):
        validate(comparison)


def with_judge(tree: dict[str, Any], folder: Path) -> Pipeline:
    """Publish a judge stage in which the model judge passed its calibration."""
    tree["run"]["prepare"] |= {"preference_sources": preferences(folder), "evaluation_rows": 0}
    tree["run"]["judge"] = {"kind": "model"}
    tree["run"]["stages"] = ["prepare", "candidates", "judge", "evaluate"]
    tree["run"]["evaluate"]["pairwise"] = True
    pipeline = Pipeline.open(validate(tree))
    for name in ("fetch", "prepare"):
        pipeline.run(get_stage(name))
    judge = {"judge": tree["run"]["base_model"], "kind": "model", "passed": True}
    calibration = json.dumps([judge])
    for name, file, text in (
        ("candidates", "candidates.txt", "none"),
        ("judge", "calibration.json", calibration),
    ):
        output = folder / f"made-{name}"
        output.mkdir()
        (output / file).write_text(text)
        Attempt.begin(pipeline.artifact(get_stage(name)), "test").publish(output, {}, {}, {}, {})
    return pipeline


def test_pairs_of_answers_are_compared_in_both_orders(
    comparison: dict[str, Any], other: str, tmp_path: Path
) -> None:
    pipeline = with_judge(comparison, tmp_path)
    manifest = pipeline.run(get_stage("evaluate"))
    (pair,) = manifest.metrics["pairwise"]
    assert (pair["model"], pair["against"], pair["rows"]) == (other, "base", 12)
    assert pair["wins"] + pair["ties"] + pair["losses"] == 12
    assert pair["win_rate"]["value"] == pytest.approx((pair["wins"] + pair["ties"] / 2) / 12)
    assert 0 <= pair["order_disagreement"] <= 1
    table = {row["metric"]: row for row in manifest.metrics["metrics"]}
    assert table["pairwise win rate over base"]["models"][other]["n"] == 12
    assert "win rate over base" in table
    assert f"pairwise, {other} against base: " in manifest.metrics["summary"]
    page = (fetched(pipeline, "evaluate") / "report.html").read_text()
    assert "Pairwise comparison by the judge" in page


@pytest.mark.parametrize(
    ("judge", "stages", "message"),
    [
        ({}, ["prepare", "evaluate"], "this run has no judge"),
        (
            {"kind": "overlap"},
            ["prepare", "candidates", "judge", "evaluate"],
            "run.judge.kind is overlap",
        ),
    ],
)
def test_pairs_need_a_model_judge(
    judge: dict[str, Any],
    stages: list[str],
    message: str,
    comparison: dict[str, Any],
    tmp_path: Path,
) -> None:
    comparison["run"] |= {"judge": judge, "stages": stages}
    comparison["run"]["prepare"]["preference_sources"] = preferences(tmp_path)
    comparison["run"]["evaluate"]["pairwise"] = True
    with pytest.raises(ConfigError, match=rf"evaluate\.pairwise: .*{message}"):
        validate(comparison)


@pytest.mark.slow
def test_shards_give_the_figures_of_one_process(comparison: dict[str, Any], tmp_path: Path) -> None:
    comparison["run"]["evaluate"] |= {"option_shuffles": 2, "abstain_option": True}
    whole = with_judge(comparison, tmp_path).run(get_stage("evaluate"))
    shutil.rmtree(tmp_path / "store/t/evaluate")
    comparison["resources"]["evaluate"]["shards"] = 2
    pipeline = Pipeline.open(validate(comparison))
    stage = get_stage("evaluate")
    assert pipeline.run_shard(stage, Shard(1, 2)) is None
    joined = pipeline.run_shard(stage, Shard(0, 2))
    assert joined is not None
    assert joined.metrics["multiple_choice"] == whole.metrics["multiple_choice"]
    assert joined.metrics["pairwise"] == whole.metrics["pairwise"]
    assert joined.metrics["summary"] == whole.metrics["summary"]
    assert joined.digest == whole.digest
