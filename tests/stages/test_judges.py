"""Judges in the pipeline: several of them, and rows with criteria."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from medjob.config import RunFile
from medjob.data.criteria import from_json
from medjob.errors import GateError
from medjob.judge.calibration import By, graded_items
from medjob.judge.graded import GradedRow
from medjob.judge.load import model_judges
from medjob.pipeline.calibration import _context
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.stages.test_pipeline import with_pairs
from tests.support.rows import reasoning_rows, write_jsonl
from tests.support.small_run import fetched
from tests.support.tiny_model import make_tiny_model

WORDS = [
    "zinc",
    "rest",
    "fluids",
    "surgery",
    "insulin",
    "aspirin",
    "warmth",
    "sleep",
    "walking",
    "iodine",
]


def run_until(run_file: RunFile, last: str) -> Pipeline:
    pipeline = Pipeline.open(run_file)
    for name in ("fetch", "prepare", "sft", "candidates", "judge", "evaluate"):
        pipeline.run(get_stage(name))
        if name == last:
            break
    return pipeline


def rows_that_judges_agree_on(run_file: RunFile, grades: Path, by: Sequence[By]) -> None:
    """Write graded rows whose better answer is the one that every judge of the run prefers.

    The models are random, so any rows that show something else would be noise to them.
    """
    write_jsonl(grades, [{"question": "q", "answer": "a", "grade": 1}])  # part of a key
    context = _context(run_file, str(grades))
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=8)).ljust(80, ".") for _ in range(160)]
    rows = [
        GradedRow(str(n), f"What helps case {n}?", "cool the skin", *texts[2 * n : 2 * n + 2])
        for n in range(80)
    ]
    wins: dict[str, set[bool]] = {row.id: set() for row in rows}
    for judge in model_judges(context, "judge"):
        for form in by:
            items = graded_items(rows, form)
            scores = judge.score(context.extras, f"trial-{form}", items)
            for row in rows:
                first, second = (scores[f"{row.id}/{side}"].value for side in ("better", "worse"))
                wins[row.id].add(first > second)
    agreed = [(row, wins[row.id]) for row in rows if len(wins[row.id]) == 1]
    made = []
    for row, (first_wins,) in agreed:
        better, worse = (row.better, row.worse) if first_wins else (row.worse, row.better)
        made.append({"question": row.question, "reference": row.reference, "better": better, "worse": worse})  # fmt: skip
    assert len(made) >= 12
    write_jsonl(grades, made)


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_several_judges_score_together_and_their_disagreement_is_reported(
    make_run_file: Callable[..., RunFile], tmp_path: Path, tiny: Path
) -> None:
    other, grades = make_tiny_model(tmp_path / "other", hidden=64), tmp_path / "grades.jsonl"
    judge = {
        "kind": "model",
        "model": str(tiny),
        "extra_models": [str(other)],
        "calibration": {"path": str(grades)},
        "pairwise_check": True,
    }
    run_file = make_run_file({"run": {"judge": judge}})
    rows_that_judges_agree_on(run_file, grades, ["aspects"])
    pipeline = run_until(run_file, "judge")
    manifest = pipeline.artifact(get_stage("judge")).manifest()
    assert manifest is not None
    metrics = manifest.metrics
    assert metrics["judge"] == f"{tiny} + {other}"
    assert [(each["judge"], each["passed"]) for each in metrics["calibration"]] == [
        (str(tiny), True),
        (str(other), True),
    ]
    folder = fetched(pipeline, "judge")
    scores = pq.read_table(folder / "scores.parquet").to_pylist()
    assert metrics["disagreement"]["answers"] == len(scores)
    assert metrics["disagreement"]["mean_difference"] > 0
    for row in scores:
        values = json.loads(row["judges"])
        assert set(values) == {str(tiny), str(other)}
        assert row["score"] == pytest.approx(sum(values.values()) / 2)
    assert "Disagreement of the judges" in (folder / "report.html").read_text()


KQA_ROWS = [
    {
        "Question": row["Question"],
        "Free_form_answer": row["Response"],
        "Must_have": [f"Sign {n} matters", "See a doctor"],
        "Nice_to_have": ["It may pass"],
    }
    for n, row in enumerate(reasoning_rows(72)[48:])
]


def with_criteria(tmp_path: Path, **judge: Any) -> dict[str, Any]:
    bad = [{**KQA_ROWS[0], "Question": "And this?", "Must_have": [""]}]
    write_jsonl(tmp_path / "data/kqa.jsonl", [*KQA_ROWS, *bad])
    source = {"path": str(tmp_path / "data/kqa.jsonl")}
    prepare = {
        "preference_sources": [source],
        "preference_rows": 8,
        "evaluation_sources": [{**source, "limit": 6}],
        "max_rejected_fraction": 0.1,
    }
    return {"run": {"prepare": prepare, "judge": judge}}


def test_prepare_carries_criteria_and_rejects_rows_whose_criteria_are_unusable(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    folder = fetched(run_until(make_run_file(with_criteria(tmp_path)), "prepare"), "prepare")
    preferences = pq.read_table(folder / "preferences.parquet").to_pylist()
    assert len(preferences) == 8
    for row in preferences:
        criteria = from_json(row["rubric"])
        assert [each.critical for each in criteria] == [True, True, False]
        assert criteria[1].text == "States or implies: See a doctor"
    evaluation = pq.read_table(folder / "evaluation.parquet").to_pylist()
    assert sum(bool(row["rubric"]) for row in evaluation) == 6
    reasons = json.loads((folder / "statistics.json").read_text())["rejected_reasons"]
    assert reasons == {"a criterion in must_have has no text": 1}


def test_files_without_criteria_have_no_column_for_them(
    make_run_file: Callable[..., RunFile],
) -> None:
    folder = fetched(run_until(make_run_file(), "prepare"), "prepare")
    for name in ("preferences", "evaluation"):
        assert "rubric" not in pq.read_schema(folder / f"{name}.parquet").names


@pytest.mark.slow
def test_rows_with_criteria_are_judged_and_evaluated_by_them(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    grades = tmp_path / "grades.jsonl"
    judge = {"kind": "model", "calibration": {"path": str(grades)}}
    changes = with_criteria(tmp_path, **judge)
    changes["run"]["dpo"] = {"min_pairs": 1}
    run_file = make_run_file(changes)
    rows_that_judges_agree_on(run_file, grades, ["criteria"])
    pipeline = with_pairs(run_file)
    calibrations = json.loads((fetched(pipeline, "judge") / "calibration.json").read_text())
    assert [(each["by"], each["passed"]) for each in calibrations] == [("criteria", True)]
    for row in pq.read_table(fetched(pipeline, "judge") / "scores.parquet").to_pylist():
        criteria = json.loads(row["criteria"])
        assert len(criteria["met"]) == 3
        assert row["score"] == pytest.approx(criteria["expected"])
        assert json.loads(row["aspects"]) == {}
    for name in ("dpo", "evaluate"):
        pipeline.run(get_stage(name))
    comparison = json.loads((fetched(pipeline, "evaluate") / "comparison.json").read_text())
    names = {row["metric"] for row in comparison["metrics"]}
    assert {"rubric score", "critical criteria", "judge score"} <= names
    assert {"judge accuracy", "ROUGE-L"} <= names  # of the rows without criteria, and of all


@pytest.mark.usefixtures("trained")
@pytest.mark.slow
def test_judge_that_is_not_calibrated_is_left_out_or_stops_the_stage(
    make_run_file: Callable[..., RunFile], tmp_path: Path, tiny: Path
) -> None:
    """A random model cannot pass on the shipped rows; the other judge passes on its own rows."""
    grades = tmp_path / "grades.jsonl"
    judge: dict[str, Any] = {
        "kind": "model",
        "model": str(tiny),
        "calibration": {"path": str(grades)},
    }
    rows_that_judges_agree_on(make_run_file({"run": {"judge": judge}}), grades, ["aspects"])
    judge["extra_models"] = [str(make_tiny_model(tmp_path / "other", hidden=64))]
    with pytest.raises(GateError, match="its pairs would be noise"):
        run_until(make_run_file({"run": {"judge": judge}}), "judge")
    judge["on_uncalibrated"] = "overlap"
    pipeline = run_until(make_run_file({"run": {"judge": judge}}), "judge")
    manifest = pipeline.artifact(get_stage("judge")).manifest()
    assert manifest is not None
    assert manifest.metrics["judge"] == str(tiny)
    assert [each["passed"] for each in manifest.metrics["calibration"]] == [True, False]
