"""judge: calibrate the judges, score the candidates, and build preference pairs."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medjob.data.criteria import from_json
from medjob.data.read import read
from medjob.data.sensitive import may_be_shown
from medjob.data.styles import take_apart
from medjob.errors import DataError, GateError
from medjob.generate.endpoint import spending
from medjob.judge.calibration import By, Calibration, calibrate
from medjob.judge.disagreement import JudgeDisagreement, disagreement
from medjob.judge.graded import GradedRow, parse_graded
from medjob.judge.load import model_judges
from medjob.judge.pairing import (
    Candidate,
    Pair,
    choose_pair,
    confirmed_in_both_orders,
    length_figures,
)
from medjob.judge.questions import Item
from medjob.judge.scoring import (
    Comparer,
    Judge,
    JudgePanel,
    ModelJudge,
    OverlapJudge,
    Score,
    combined,
)
from medjob.report.charts import bars, histogram, scatter
from medjob.report.page import write_page
from medjob.stage import Metrics, RowContext

_log = logging.getLogger(__name__)
_EXAMPLES = 6
_SCORES = pa.schema(
    [
        ("id", pa.string()),
        ("candidate", pa.int32()),
        ("score", pa.float64()),
        ("aspects", pa.string()),
    ]
)
_PAIRS = pa.schema(
    [(name, pa.string()) for name in ("id", "question", "prompt", "chosen", "rejected")]
    + [("prompt_ids", pa.list_(pa.int32()))]
    + [(name, pa.float64()) for name in ("chosen_score", "rejected_score")]
)


@dataclass(frozen=True, slots=True)
class _Judged:
    """The candidates with their scores, and the pairs made from them."""

    judge: Judge
    calibrations: list[Calibration]
    prompts: list[dict[str, Any]]
    items: list[Item]
    scores: dict[str, Score]
    pairs: list[Pair]
    dropped: Counter[str]
    disagreement: JudgeDisagreement | None
    own: dict[str, float] | None
    """Agreement with the preferences of the data set itself."""


def run(context: RowContext) -> Metrics:
    """Write pairs.parquet, scores.parquet, calibration.json and a report.

    Raises:
        GateError: a judge does not beat the trivial rules, or is swayed by answers that grade
            themselves, and the run allows no fallback; or it prefers the worse answers.
    """
    judged = compute(context)
    calibrations, pairs = judged.calibrations, judged.pairs
    summary = {
        "judge": judged.judge.name,
        "calibration": [calibration.as_dict() for calibration in calibrations],
        "prompts": len(judged.prompts),
        "pairs": len(pairs),
        "dropped": dict(sorted(judged.dropped.items())),
        "agreement_with_own_preferences": judged.own,
        "disagreement": asdict(judged.disagreement) if judged.disagreement else None,
        "criteria": _criteria_figures(judged.scores),
        **length_figures(pairs, judged.items, judged.scores),
    }
    _write(context, summary, judged)
    text = (
        "\n".join(f"judge: {calibration.sentence()}" for calibration in calibrations)
        + f"\njudge: {len(pairs)} pairs from {len(judged.prompts)} prompts, by {judged.judge.name}"
    )
    return summary | {"summary": text} | spending(context.extras)


def compute(context: RowContext) -> _Judged:
    """Calibrate the judges, and score the candidates. In a shard, those of its share."""
    prompts = pq.read_table(context.inputs["prepare"] / "preferences.parquet").to_pylist()
    judge, calibrations = _calibrated_judge(context, _asked_by(prompts))
    candidates = _candidates(context)
    items = _items(context, prompts, candidates)
    scores = judge.score(context.extras, f"scores-{judge.kind}", items)
    dropped: Counter[str] = Counter()
    pairs, ids = _pairs(context, prompts, candidates, scores, dropped)
    differences = disagreement(scores, ids)
    if context.run.judge.pairwise_check and isinstance(judge, ModelJudge | JudgePanel):
        style = context.run.prompt.style
        pairs = confirmed_in_both_orders(judge, context.extras, prompts, pairs, style, dropped)
    own = _own_preferences(context, judge, prompts)
    return _Judged(judge, calibrations, prompts, items, scores, pairs, dropped, differences, own)


def _asked_by(prompts: Sequence[Mapping[str, Any]]) -> list[By]:
    """What the judge is asked about in these rows."""
    have_criteria = {bool(prompt.get("rubric")) for prompt in prompts}
    asked: list[By] = []
    if have_criteria != {True}:
        asked.append("aspects")
    if True in have_criteria:
        asked.append("criteria")
    return asked


def _calibrated_judge(context: RowContext, asked: Sequence[By]) -> tuple[Judge, list[Calibration]]:
    """Return the judge to use: those of the run that are calibrated, or the overlap."""
    rows = _graded_rows(context)
    if context.run.judge.kind == "overlap":
        return OverlapJudge(), [_calibration(context, OverlapJudge(), rows, "aspects")]
    calibrations = []
    calibrated: list[Comparer] = []
    judges = model_judges(context, "judge")
    for judge in judges:
        own = [_calibration(context, judge, rows, by) for by in asked]
        calibrations += own
        if len(judges) > 1:
            judge.close()  # before the next model is loaded
        failed = next((each for each in own if not each.passed), None)
        if failed is None:
            calibrated.append(judge)
        else:
            _check_may_be_left_out(context, failed)
    if calibrated:
        return combined(calibrated), calibrations
    _log.warning("judge: the overlap with the reference makes the pairs")
    return OverlapJudge(), [*calibrations, _calibration(context, OverlapJudge(), rows, "aspects")]


def _graded_rows(context: RowContext) -> list[GradedRow]:
    source = context.run.judge.calibration
    graded = islice(read(source, context.location(source)), source.limit)
    return parse_graded([dict(row.fields) for row in graded])


def _calibration(
    context: RowContext, judge: Judge, rows: Sequence[GradedRow], by: By
) -> Calibration:
    result = calibrate(judge, rows, context.extras, by)
    _log.info("%s", result.sentence())
    return result


def _check_may_be_left_out(context: RowContext, calibration: Calibration) -> None:
    """Raise GateError if the run cannot continue without this judge."""
    if calibration.is_reversed:
        raise GateError(
            f"{calibration.sentence()}; it prefers the worse answers in most rows",
            "a grade or an instruction inside an answer may sway it: name a stronger "
            "run.judge.model; or the columns better and worse of run.judge.calibration are swapped",
        )
    if context.run.judge.on_uncalibrated == "stop":
        raise GateError(
            f"{calibration.sentence()}; its pairs would be noise",
            "name a stronger run.judge.model, or allow the overlap with the reference: "
            "--set run.judge.on_uncalibrated=overlap",
        )
    _log.warning(
        "judge: %s is not calibrated, and is left out because run.judge.on_uncalibrated is overlap",
        calibration.judge,
    )


def _candidates(context: RowContext) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(context.inputs["candidates"] / "candidates.parquet").to_pylist():
        rows.setdefault(row["id"], []).append(row)
    return rows


def _items(
    context: RowContext, prompts: list[dict[str, Any]], candidates: dict[str, list[dict[str, Any]]]
) -> list[Item]:
    """Return the responses of all candidates, without their reasoning."""
    style = context.run.prompt.style
    items = []
    for prompt in prompts:
        for row in candidates[prompt["id"]]:
            response = take_apart(style, row["text"]).response
            item_id = _item_id(prompt, row)
            criteria = from_json(prompt.get("rubric"))
            items.append(Item(item_id, prompt["question"], prompt["reference"], response, criteria))
    return items


def _item_id(prompt: dict[str, Any], candidate: dict[str, Any]) -> str:
    return f"{prompt['id']}/{candidate['candidate']}"


def _pairs(
    context: RowContext,
    prompts: list[dict[str, Any]],
    candidates: dict[str, list[dict[str, Any]]],
    scores: dict[str, Score],
    dropped: Counter[str],
) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Build at most one pair per prompt, and count in `dropped` why others have none. Also return
    the ids of the items in each pair."""
    params = context.run.judge
    style = context.run.prompt.style
    pairs, ids = [], []
    for prompt in prompts:
        rows = candidates[prompt["id"]]
        if not all(_item_id(prompt, row) in scores for row in rows):
            continue  # in another shard
        answers = [
            Candidate(
                text=row["text"],
                score=scores[_item_id(prompt, row)].value,
                usable=not row["truncated"],
                complies=take_apart(style, row["text"]).complies,
            )
            for row in rows
        ]
        indices = choose_pair(answers, params.min_margin, params.threshold, dropped)
        if indices is not None:
            chosen, rejected = (answers[index] for index in indices)
            pairs.append(_as_pair(prompt, chosen, rejected))
            ids.append((_item_id(prompt, rows[indices[0]]), _item_id(prompt, rows[indices[1]])))
    return pairs, ids


def _as_pair(prompt: dict[str, Any], chosen: Candidate, rejected: Candidate) -> Pair:
    return {
        "id": prompt["id"],
        "question": prompt["question"],
        "prompt": prompt["prompt"],
        "prompt_ids": prompt["prompt_ids"],
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }


def _own_preferences(
    context: RowContext, judge: Judge, prompts: list[dict[str, Any]]
) -> dict[str, float] | None:
    """Return how often the judge agrees with the preferences of the data set itself.

    A chosen answer cannot be its own reference. Without another one, a model judges without a
    reference, and the overlap cannot judge the row.
    """
    rows = [_with_other_reference(row) for row in prompts if row["chosen"] and row["rejected"]]
    if judge.kind == "overlap":
        rows = [row for row in rows if row["reference"] or row.get("rubric")]
    rows = rows[: context.run.judge.agreement_rows]
    if not rows:
        return None
    items = [
        Item(
            f"{row['id']}/{side}",
            row["question"],
            row["reference"],
            row[side],
            from_json(row.get("rubric")),
        )
        for row in rows
        for side in ("chosen", "rejected")
    ]
    scores = judge.score(context.extras, f"own-{judge.kind}", items)
    agreement = 0.0
    for row in rows:
        if not all(f"{row['id']}/{side}" in scores for side in ("chosen", "rejected")):
            continue  # in another shard
        chosen = scores[f"{row['id']}/chosen"].value
        rejected = scores[f"{row['id']}/rejected"].value
        agreement += 0.5 if chosen == rejected else float(chosen > rejected)
    return {"rows": len(rows), "agreement": agreement / len(rows)}


def _with_other_reference(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "reference": ""} if row["reference"] == row["chosen"] else row


def _criteria_figures(scores: Mapping[str, Score]) -> dict[str, float | None] | None:
    """Return how far the answers meet their criteria. None if no row has any."""
    rubrics = [score.rubric for score in scores.values() if score.rubric]
    if not rubrics:
        return None
    critical = [each.critical for each in rubrics if each.critical is not None]
    return {
        "answers": len(rubrics),
        "score": sum(each.score for each in rubrics) / len(rubrics),
        "critical": sum(critical) / len(critical) if critical else None,
    }


def _write(context: RowContext, summary: dict[str, Any], judged: _Judged) -> None:
    output, items, scores = context.output, judged.items, judged.scores
    pairs = judged.pairs
    (output / "calibration.json").write_text(json.dumps(summary["calibration"], indent=1))
    if not items:
        raise DataError("there are no candidates to score")
    _write_scores(items, scores, output / "scores.parquet")
    _write_table(pairs, _PAIRS, output / "pairs.parquet")
    values = [scores[item.id].value for item in items]
    lengths = [len(item.answer) for item in items]
    charts = {
        "scores": histogram(values, "score"),
        "length": scatter(lengths, values, "characters", "score"),
        "dropped": bars(summary["dropped"] | {"pairs": len(pairs)}, "prompts"),
    }
    shows_rows = may_be_shown(context.inputs["prepare"])
    write_page(
        output / "report.html",
        "judge.html",
        charts,
        s=summary,
        pairs=pairs[:_EXAMPLES] if shows_rows else [],
        calibrations=judged.calibrations,
        shows_rows=shows_rows,
    )


def _write_scores(items: Sequence[Item], scores: Mapping[str, Score], path: Path) -> None:
    """Write one row per answer. Columns that no row needs are left out, so that the file of a run
    with one judge and without criteria keeps its bytes."""
    schema = _SCORES
    if any(scores[item.id].judges for item in items):
        schema = schema.append(pa.field("judges", pa.string()))
    if any(item.criteria for item in items):
        schema = schema.append(pa.field("criteria", pa.string()))
    _write_table([_score_row(item, scores[item.id]) for item in items], schema, path)


def _score_row(item: Item, score: Score) -> dict[str, Any]:
    row_id, candidate = item.id.rsplit("/", 1)
    criteria = {"met": score.met, **asdict(score.rubric)} if score.rubric else None
    return {
        "id": row_id,
        "candidate": int(candidate),
        "score": score.value,
        "aspects": json.dumps(score.aspects),
        "judges": json.dumps(score.judges),
        "criteria": json.dumps(criteria) if criteria else "",
    }


def _write_table(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")
