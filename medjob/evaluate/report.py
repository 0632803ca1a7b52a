"""What `evaluate` writes: every answer, and the report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medjob.evaluate.compare import Answers, format_estimate, without_infinities
from medjob.evaluate.graded import difference_sentence
from medjob.report.charts import intervals
from medjob.report.page import write_page


def write_answers(path: Path, answers: Answers) -> None:
    """Write one line per row, with the answers of all models."""
    with path.open("w", encoding="utf-8") as file:
        for row in _answer_table(answers):
            file.write(json.dumps(without_infinities(row), ensure_ascii=False) + "\n")


def _answer_table(answers: Answers) -> Iterator[dict[str, Any]]:
    """Yield each evaluation row with the answers of all models."""
    for row_answers in zip(*answers.values(), strict=True):
        row = row_answers[0].row
        texts = {
            name: {"text": answer.text, "truncated": answer.truncated, **answer.judged}
            for name, answer in zip(answers, row_answers, strict=True)
        }
        yield {
            "id": row["id"],
            "kind": row["kind"],
            "question": row["question"],
            "reference": row["reference"],
            "answers": texts,
        }


def write_report(
    path: Path, result: Mapping[str, Any], answers: Answers, shown: int, shows_rows: bool
) -> None:
    """Write the page.

    Args:
        shown: Number of questions whose answers are shown side by side.
        shows_rows: Whether the text of rows may be shown.
    """
    models = list(answers)
    table = [
        {**row, "cells": [format_estimate(row, model) for model in models]}
        for row in result["metrics"]
    ]
    corrected = result["corrected"] or {"differences": []}
    chart = intervals(_chart_points(result["metrics"]), "0 to 1, with 95 % intervals")
    write_page(
        path,
        "evaluate.html",
        {"intervals": chart},
        r=result,
        models=models,
        table=table,
        differences=[*map(difference_sentence, corrected["differences"])],
        answers=_side_by_side(answers, shown if shows_rows else 0),
        shows_rows=shows_rows,
    )


def _chart_points(
    table: Sequence[dict[str, Any]],
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return value, low and high of the metrics between 0 and 1, by metric and model.

    A value without an interval is drawn without one.
    """
    points = {}
    for row in table:
        if row["percent"] or row["metric"].startswith(("judge", "ROUGE", "BLEU")):
            points[row["metric"]] = {
                model: (
                    figures["value"],
                    *(
                        figures["value"] if figures[end] is None else figures[end]
                        for end in ("low", "high")
                    ),
                )
                for model, figures in row["models"].items()
                if math.isfinite(figures["value"])
            }
    return points


def _side_by_side(answers: Answers, wanted: int) -> list[dict[str, Any]]:
    """Select rows to show with all answers. Each kind gets up to half of them, open ones first."""
    rows = list(_answer_table(answers))
    selected: list[dict[str, Any]] = []
    for kind in ("open", "harmful", "benign"):
        of_kind = [row for row in rows if row["kind"] == kind]
        selected += of_kind[: max(1, wanted // 2)]
    return selected[:wanted]
