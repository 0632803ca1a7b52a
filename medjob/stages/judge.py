"""judge: check the judge, score the candidates, make preference pairs."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medjob.data.read import read
from medjob.data.styles import take_apart
from medjob.errors import DataError, GateError
from medjob.judge.calibration import Calibration, calibrate, graded_items, parse_graded
from medjob.judge.finish import score_all
from medjob.judge.load import load_judge
from medjob.judge.pairing import Candidate, confirmed_in_both_orders, length_figures, pair
from medjob.judge.rubric import Item
from medjob.judge.scoring import Judge, ModelJudge, OverlapJudge, Score
from medjob.report.charts import bars, histogram, scatter
from medjob.report.page import write_page
from medjob.stage import Metrics, RowContext

_log = logging.getLogger(__name__)
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
    + [(name, pa.float64()) for name in ("chosen_score", "rejected_score")]
)


def run(context: RowContext) -> Metrics:
    """Write pairs.parquet, scores.parquet, calibration.json and a report.

    Raises:
        GateError: the judge does not beat the trivial rules and no fall-back is allowed.
    """
    judge: Judge = load_judge(context)
    calibrations = [_calibration(context, judge)]
    if not calibrations[0].passed and judge.kind != "overlap":
        judge = _fall_back(context, calibrations[0])
        calibrations.append(_calibration(context, judge))
    prompts = pq.read_table(context.inputs["prepare"] / "preferences.parquet").to_pylist()
    candidates = _candidates(context)
    style = context.run.prompt.style
    items = [
        Item(
            f"{p['id']}/{c['candidate']}",
            p["question"],
            p["reference"],
            take_apart(style, c["text"]).response,
        )
        for p in prompts
        for c in candidates[p["id"]]
    ]
    scores = _score(context, judge, items, f"scores-{judge.kind}")
    dropped: Counter[str] = Counter()
    pairs = [
        made
        for p in prompts
        if (made := _pair(context, p, candidates[p["id"]], scores, dropped)) is not None
    ]
    if context.run.judge.pairwise_check and isinstance(judge, ModelJudge):
        pairs = confirmed_in_both_orders(judge, prompts, pairs, style, dropped)
    summary = {
        "judge": judge.name,
        "calibration": [calibration.as_dict() for calibration in calibrations],
        "prompts": len(prompts),
        "pairs": len(pairs),
        "dropped": dict(sorted(dropped.items())),
        "agreement_with_own_preferences": _own_preferences(context, judge, prompts),
        **length_figures(pairs, items, scores),
    }
    _write(context, summary, items, scores, pairs)
    return summary | {
        "summary": f"judge: {calibrations[0].sentence()}\njudge: {len(pairs)} pairs of {len(prompts)} prompts by {judge.name}"
    }


def _calibration(context: RowContext, judge: Judge) -> Calibration:
    params = context.run.judge
    graded = read(params.calibration, context.location(params.calibration))
    rows = parse_graded([dict(row.fields) for row in islice(graded, params.calibration.limit)])
    items = graded_items(rows)
    scores = _score(context, judge, items, f"calibration-{judge.kind}")
    result = calibrate(judge, rows, [scores[item.id].value for item in items])
    _log.info("%s", result.sentence())
    return result


def _fall_back(context: RowContext, calibration: Calibration) -> Judge:
    if context.run.judge.on_uncalibrated == "stop":
        raise GateError(
            f"{calibration.sentence()}; pairs made by it would be noise",
            "name a stronger run.judge.model, or allow the reference overlap with --set run.judge.on_uncalibrated=overlap",
        )
    _log.warning(
        "the judge is not calibrated; the reference overlap makes the pairs, as the run file allows"
    )
    return OverlapJudge()


def _candidates(context: RowContext) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(context.inputs["candidates"] / "candidates.parquet").to_pylist():
        rows.setdefault(row["id"], []).append(row)
    return rows


def _score(context: RowContext, judge: Judge, items: Sequence[Item], kind: str) -> dict[str, Score]:
    return score_all(
        judge,
        items,
        context.extras.finished,
        context.extras.progress,
        kind,
        batch=2 * context.resources.batch_size,
    )


def _pair(
    context: RowContext,
    prompt: dict[str, Any],
    rows: list[dict[str, Any]],
    scores: dict[str, Score],
    dropped: Counter[str],
) -> dict[str, Any] | None:
    params, style = context.run.judge, context.run.prompt.style
    candidates = [
        Candidate(
            row["text"],
            scores[f"{prompt['id']}/{row['candidate']}"].value,
            not row["truncated"],
            take_apart(style, row["text"]).complies,
        )
        for row in rows
    ]
    made = pair(candidates, params.min_margin, params.threshold, dropped)
    if made is None:
        return None
    chosen, rejected = candidates[made[0]], candidates[made[1]]
    texts = {
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }
    return {name: prompt[name] for name in ("id", "question", "prompt")} | texts


def _own_preferences(
    context: RowContext, judge: Judge, prompts: list[dict[str, Any]]
) -> dict[str, float] | None:
    """How often the judge orders a data set's own chosen and rejected answers as it does.

    A chosen answer is no reference to itself: without another one the model judges without, and the overlap cannot.
    """
    rows = [
        {**p, "reference": p["reference"] if p["reference"] != p["chosen"] else ""}
        for p in prompts
        if p["chosen"] and p["rejected"]
    ]
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
    scores = _score(context, judge, items, f"own-{judge.kind}")
    margins = [
        scores[f"{row['id']}/chosen"].value - scores[f"{row['id']}/rejected"].value for row in rows
    ]
    return {
        "rows": len(rows),
        "agreement": sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins),
    }


def _write(
    context: RowContext,
    summary: dict[str, Any],
    items: Sequence[Item],
    scores: dict[str, Score],
    pairs: list[dict[str, Any]],
) -> None:
    output = context.output
    (output / "calibration.json").write_text(json.dumps(summary["calibration"], indent=1))
    rows: list[dict[str, Any]] = []
    for item in items:
        row_id, candidate = item.id.rsplit("/", 1)
        score = scores[item.id]
        rows.append(
            {
                "id": row_id,
                "candidate": int(candidate),
                "score": score.value,
                "aspects": json.dumps(score.aspects),
            }
        )
    pq.write_table(
        pa.Table.from_pylist(rows, _SCORES), output / "scores.parquet", compression="zstd"
    )
    pq.write_table(
        pa.Table.from_pylist(pairs, _PAIRS), output / "pairs.parquet", compression="zstd"
    )
    if not rows:
        raise DataError("there are no candidates to score")
    charts = {
        "scores": histogram([row["score"] for row in rows], "score"),
        "length": scatter(
            [len(item.answer) for item in items],
            [scores[item.id].value for item in items],
            "characters",
            "score",
        ),
        "dropped": bars(summary["dropped"] | {"pairs": len(pairs)}, "prompts"),
    }
    write_page(output / "report.html", "judge.html", charts, s=summary, pairs=pairs[:6])
