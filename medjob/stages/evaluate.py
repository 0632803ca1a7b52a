"""evaluate: compare base, sft, dpo and other models on the same rows."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from medjob.artifacts.finished_rows import Row
from medjob.data.criteria import from_json
from medjob.data.read import read
from medjob.data.sensitive import may_be_shown
from medjob.data.styles import take_apart
from medjob.errors import DataError
from medjob.evaluate.asked import Asked
from medjob.evaluate.compare import Answers, as_text, compare, without_infinities
from medjob.evaluate.graded import (
    compared_pairs,
    corrected_section,
    corrected_text,
    judge_scores,
)
from medjob.evaluate.human_grades import (
    SHEET,
    GradedLine,
    gradable,
    match_grades,
    read_grades,
    write_sheet,
)
from medjob.evaluate.metrics import EvaluatedAnswer
from medjob.evaluate.models import ComparedModel, ModelAnswers, label_of, model_names
from medjob.evaluate.pairwise import (
    Preference,
    answer_pairs,
    compare_pairs,
    pairwise_table,
    pairwise_text,
    win_rate,
)
from medjob.evaluate.report import write_answers, write_report
from medjob.evaluate.subjects import baseline_text, multiple_choice_section
from medjob.generate.endpoint import spending
from medjob.judge.load import calibrated_judge
from medjob.judge.questions import Item
from medjob.judge.scoring import Judge, JudgePanel, ModelJudge, OverlapJudge
from medjob.stage import Metrics, RowContext

_log = logging.getLogger(__name__)
_KINDS = ("open", "multiple_choice", "harmful", "benign")
_NO_KNOWLEDGE = "It is the word overlap with the reference and has no medical knowledge."
_BIASED = "The same judge made the pairs that dpo was trained on, so its scores of dpo are biased."


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """The answers of all models in this shard, with the judge's scores."""

    judge: Judge
    judge_note: str
    answers: Answers
    preferences: Mapping[tuple[str, str], Mapping[str, Preference]]
    """The judge's comparisons of two models' answers, by the models and then by row id."""
    grades: Sequence[GradedLine]


def run(context: RowContext) -> Metrics:
    """Write comparison.json, answers.jsonl, grading.csv and a report."""
    evaluated = compute(context)
    answers = evaluated.answers
    result = _result(context, evaluated)
    text = json.dumps(without_infinities(result), indent=1, ensure_ascii=False)
    (context.output / "comparison.json").write_text(text, encoding="utf-8")
    write_answers(context.output / "answers.jsonl", answers)
    write_sheet(context.output / SHEET, gradable(answers))
    shown, shows_rows = context.run.evaluate.side_by_side, may_be_shown(context.inputs["prepare"])
    write_report(context.output / "report.html", result, answers, shown, shows_rows)
    summary = _summary(result, list(answers))
    return {**without_infinities(result), "summary": summary, **spending(context.extras)}


def compute(context: RowContext) -> _Evaluated:
    """Let every model answer, and the judge score the answers. In a shard, those of its share."""
    params = context.run.evaluate
    rows = _rows(context)
    grades = _human_grades(context)
    judge, judge_note = _judge(context)
    asked = Asked.of(rows, params, context.run.seed)
    models = {name: ComparedModel.of(context, name, rows, asked) for name in model_names(context)}
    for each in models.values():
        # vLLM leaves no room for another engine on a GPU, so that one comes first.
        if each.scoring is not each.engine:
            each.likelihoods(context)
            each.scoring.close()
    answered = {name: each.answer(context) for name, each in models.items()}
    answers = {
        name: _judge_answers(context, name, rows, found, judge, asked)
        for name, found in answered.items()
    }
    preferences = _preferences(context, answers, judge)
    return _Evaluated(judge, judge_note, answers, preferences, grades)


def _result(context: RowContext, evaluated: _Evaluated) -> dict[str, Any]:
    """Compute all figures."""
    answers, samples = evaluated.answers, context.run.evaluate.bootstrap_samples
    first, rows = next(iter(answers.items()))
    corrected = None
    if evaluated.grades:
        grades = match_grades(evaluated.grades, gradable(answers))
        corrected = corrected_section(judge_scores(answers), grades)
    pairwise = [
        {
            "model": model,
            "against": against,
            **win_rate(answer_pairs(answers, model, against), found, samples, context.run.seed),
        }
        for (model, against), found in evaluated.preferences.items()
    ]
    table = compare(answers, samples, context.run.seed)
    shows_rows = may_be_shown(context.inputs["prepare"])
    return {
        "rows": {kind: sum(each.row["kind"] == kind for each in rows) for kind in _KINDS},
        "judge": evaluated.judge.name,
        "judge_note": evaluated.judge_note,
        "metrics": table + pairwise_table(pairwise, first),
        "multiple_choice": multiple_choice_section(answers, shows_rows),
        "corrected": corrected,
        "pairwise": pairwise,
    }


def _summary(result: Mapping[str, Any], models: Sequence[str]) -> str:
    """Format the result for a terminal."""
    parts = [as_text(result["metrics"], models)]
    if result["multiple_choice"]:
        parts.append(baseline_text(result["multiple_choice"]))
    if result["pairwise"]:
        parts.append(pairwise_text(result["pairwise"]))
    if result["corrected"]:
        parts.append(corrected_text(result["corrected"]))
    return "\n".join((*parts, f"judge: {result['judge']}. {result['judge_note']}"))


def _human_grades(context: RowContext) -> list[GradedLine]:
    """Read the human grades, before anything is generated."""
    params = context.run.evaluate
    source = params.human_grades
    if source is None:
        return []
    lines = read(source, context.location(source))
    return read_grades(lines, params.grade_scale, model_names(context))


def _preferences(
    context: RowContext, answers: Answers, judge: Judge
) -> dict[tuple[str, str], dict[str, Preference]]:
    """Compare pairs of models in both orders. Empty if the run does not ask for it, or if its judge
    fell back to the overlap."""
    if not context.run.evaluate.pairwise:
        return {}
    if not isinstance(judge, ModelJudge | JudgePanel):
        _log.warning("evaluate: no pairwise comparison, because the judge is %s", judge.name)
        return {}
    preferences = {}
    for model, against in compared_pairs(list(answers)):
        kind = f"pairwise-{label_of(context, model)}-{label_of(context, against)}"
        pairs = answer_pairs(answers, model, against)
        if pairs:
            preferences[model, against] = compare_pairs(judge, context.extras, kind, pairs)
    return preferences


def _rows(context: RowContext) -> list[Row]:
    rows: list[Row] = pq.read_table(context.inputs["prepare"] / "evaluation.parquet").to_pylist()
    if not rows:
        raise DataError(
            "there are no evaluation rows",
            "set run.prepare.evaluation_rows or run.prepare.evaluation_sources",
        )
    limit = context.run.evaluate.max_multiple_choice
    if limit is None:
        return rows
    choice_ids = sorted(row["id"] for row in rows if row["kind"] == "multiple_choice")
    kept = set(choice_ids[:limit])  # ids are hashes, so this is a random sample
    return [row for row in rows if row["kind"] != "multiple_choice" or row["id"] in kept]


def _judge(context: RowContext) -> tuple[Judge, str]:
    """Return the judge that made the pairs, or else the overlap, and a note on its limits."""
    if "judge" not in context.inputs:
        return OverlapJudge(), _NO_KNOWLEDGE
    calibrations = json.loads((context.inputs["judge"] / "calibration.json").read_text())
    judge = calibrated_judge(context, "evaluate", calibrations)
    return judge, f"{_NO_KNOWLEDGE} {_BIASED}" if judge.kind == "overlap" else _BIASED


def _judge_answers(
    context: RowContext,
    name: str,
    rows: Sequence[Row],
    found: ModelAnswers,
    judge: Judge,
    asked: Asked,
) -> list[EvaluatedAnswer]:
    """Score the answers to open questions, and combine all figures of each row."""
    style = context.run.prompt.style
    rows = [row for row in rows if row["id"] in found.answers]
    items = []
    for row in rows:
        if row["kind"] == "open":
            response = take_apart(style, found.answers[row["id"]].text).response
            criteria = from_json(row.get("rubric"))
            items.append(Item(row["id"], row["question"], row["reference"], response, criteria))
    judged = judge.score(context.extras, f"judged-{label_of(context, name)}", items)
    answers = []
    for row in rows:
        row_id = row["id"]
        score = judged.get(row_id)
        answers.append(
            EvaluatedAnswer.of(
                row,
                found.answers[row_id],
                style,
                nll_per_token=found.nll_per_token.get(row_id),
                letter=found.letters.get(row_id),
                judged=score.figures() if score else {},
                orders=asked.orders_of(row, found.answers, found.letters, style),
                with_abstention=asked.abstention_of(row, found.answers, style),
            )
        )
    return answers
