"""judge: calibrate the judge, score the candidates, and build preference pairs."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medjob.data.read import read
from medjob.data.sensitive import may_be_shown
from medjob.data.styles import take_apart
from medjob.errors import DataError, GateError
from medjob.generate.endpoint import spending
from medjob.judge.calibration import Calibration, parse_graded, score_graded
from medjob.judge.load import load_judge
from medjob.judge.pairing import (
    Candidate,
    Pair,
    choose_pair,
    confirmed_in_both_orders,
    length_figures,
)
from medjob.judge.rubric import Item
from medjob.judge.scoring import Judge, ModelJudge, OverlapJudge, Score
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
    own: dict[str, float] | None
    """Agreement with the preferences of the data set itself."""


def run(context: RowContext) -> Metrics:
    """Write pairs.parquet, scores.parquet, calibration.json and a report.

    Raises:
        GateError: the judge does not beat the trivial rules, or is swayed by answers that grade
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
        **length_figures(pairs, judged.items, judged.scores),
    }
    _write(context, summary, judged.items, judged.scores, pairs)
    text = (
        f"judge: {calibrations[0].sentence()}\n"
        f"judge: {len(pairs)} pairs from {len(judged.prompts)} prompts, by {judged.judge.name}"
    )
    return summary | {"summary": text} | spending(context.extras)


def compute(context: RowContext) -> _Judged:
    """Calibrate the judge, and score the candidates. In a shard, those of its share."""
    judge, calibrations = _calibrated_judge(context)
    prompts = pq.read_table(context.inputs["prepare"] / "preferences.parquet").to_pylist()
    candidates = _candidates(context)
    items = _items(context, prompts, candidates)
    scores = judge.score(context.extras, f"scores-{judge.kind}", items)
    dropped: Counter[str] = Counter()
    pairs = _pairs(context, prompts, candidates, scores, dropped)
    if context.run.judge.pairwise_check and isinstance(judge, ModelJudge):
        style = context.run.prompt.style
        pairs = confirmed_in_both_orders(judge, context.extras, prompts, pairs, style, dropped)
    own = _own_preferences(context, judge, prompts)
    return _Judged(judge, calibrations, prompts, items, scores, pairs, dropped, own)


def _calibrated_judge(context: RowContext) -> tuple[Judge, list[Calibration]]:
    """Return the judge to use. If the one of the run is not calibrated, that is the overlap."""
    judge: Judge = load_judge(context, "judge")
    calibration = _calibration(context, judge)
    if calibration.passed or judge.kind == "overlap":
        return judge, [calibration]
    if calibration.is_reversed:
        raise GateError(
            f"{calibration.sentence()}; it prefers the worse answers in most rows",
            "a grade or an instruction inside an answer may sway it: name a stronger "
            "run.judge.model; or the columns better and worse of run.judge.calibration are swapped",
        )
    fallback = _fall_back(context, calibration)
    return fallback, [calibration, _calibration(context, fallback)]


def _calibration(context: RowContext, judge: Judge) -> Calibration:
    source = context.run.judge.calibration
    graded = islice(read(source, context.location(source)), source.limit)
    rows = parse_graded([dict(row.fields) for row in graded])
    result = score_graded(judge, rows, context.extras)
    _log.info("%s", result.sentence())
    return result


def _fall_back(context: RowContext, calibration: Calibration) -> Judge:
    if context.run.judge.on_uncalibrated == "stop":
        raise GateError(
            f"{calibration.sentence()}; its pairs would be noise",
            "name a stronger run.judge.model, or allow the overlap with the reference: "
            "--set run.judge.on_uncalibrated=overlap",
        )
    _log.warning(
        "judge: not calibrated; the overlap with the reference makes the pairs, "
        "because run.judge.on_uncalibrated is overlap"
    )
    return OverlapJudge()


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
            items.append(Item(item_id, prompt["question"], prompt["reference"], response))
    return items


def _item_id(prompt: dict[str, Any], candidate: dict[str, Any]) -> str:
    return f"{prompt['id']}/{candidate['candidate']}"


def _pairs(
    context: RowContext,
    prompts: list[dict[str, Any]],
    candidates: dict[str, list[dict[str, Any]]],
    scores: dict[str, Score],
    dropped: Counter[str],
) -> list[Pair]:
    """Build at most one pair per prompt, and count in `dropped` why others have none."""
    params = context.run.judge
    style = context.run.prompt.style
    pairs = []
    for prompt in prompts:
        if not all(_item_id(prompt, row) in scores for row in candidates[prompt["id"]]):
            continue  # in another shard
        answers = [
            Candidate(
                text=row["text"],
                score=scores[_item_id(prompt, row)].value,
                usable=not row["truncated"],
                complies=take_apart(style, row["text"]).complies,
            )
            for row in candidates[prompt["id"]]
        ]
        indices = choose_pair(answers, params.min_margin, params.threshold, dropped)
        if indices is not None:
            chosen, rejected = (answers[index] for index in indices)
            pairs.append(_as_pair(prompt, chosen, rejected))
    return pairs


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
        rows = [row for row in rows if row["reference"]]
    rows = rows[: context.run.judge.agreement_rows]
    if not rows:
        return None
    items = [
        Item(f"{row['id']}/{side}", row["question"], row["reference"], row[side])
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


def _write(
    context: RowContext,
    summary: dict[str, Any],
    items: Sequence[Item],
    scores: dict[str, Score],
    pairs: list[dict[str, Any]],
) -> None:
    output = context.output
    (output / "calibration.json").write_text(json.dumps(summary["calibration"], indent=1))
    rows = [_score_row(item, scores[item.id]) for item in items]
    _write_table(rows, _SCORES, output / "scores.parquet")
    _write_table(pairs, _PAIRS, output / "pairs.parquet")
    if not rows:
        raise DataError("there are no candidates to score")
    values = [row["score"] for row in rows]
    lengths = [len(item.answer) for item in items]
    charts = {
        "scores": histogram(values, "score"),
        "length": scatter(lengths, values, "characters", "score"),
        "dropped": bars(summary["dropped"] | {"pairs": len(pairs)}, "prompts"),
    }
    shows_rows = may_be_shown(context.inputs["prepare"])
    shown = pairs[:_EXAMPLES] if shows_rows else []
    write_page(
        output / "report.html", "judge.html", charts, s=summary, pairs=shown, shows_rows=shows_rows
    )


def _score_row(item: Item, score: Score) -> dict[str, Any]:
    row_id, candidate = item.id.rsplit("/", 1)
    return {
        "id": row_id,
        "candidate": int(candidate),
        "score": score.value,
        "aspects": json.dumps(score.aspects),
    }


def _write_table(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")
