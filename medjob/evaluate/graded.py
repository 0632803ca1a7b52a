"""Corrected judge scores of every model, and of the differences between models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from medjob.evaluate.corrected import Corrected, corrected_difference, corrected_mean
from medjob.evaluate.human_grades import HumanGrades
from medjob.evaluate.metrics import EvaluatedAnswer
from medjob.runtime.tables import text_table

Scores = Mapping[str, Mapping[str, float]]
"""A number by model and row id."""


def compared_pairs(models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (model, other model) for the differences to report: each model against the first, and
    dpo against sft."""
    first, *others = models
    yield from ((model, first) for model in others)
    if first != "sft" and {"sft", "dpo"} <= {*models}:
        yield "dpo", "sft"


def judge_scores(answers: Mapping[str, Sequence[EvaluatedAnswer]]) -> dict[str, dict[str, float]]:
    """Return the judge's score of each open question's answer, by model and row id."""
    return {
        model: {
            answer.row["id"]: answer.judged["score"]
            for answer in given
            if answer.row["kind"] == "open" and "score" in answer.judged
        }
        for model, given in answers.items()
    }


def corrected_section(scores: Scores, grades: HumanGrades) -> dict[str, Any]:
    """Return the corrected estimate of each graded model and of each compared pair of models.

    `models` holds a `Corrected` per model, and `differences` one per pair, with `model` and
    `against`.
    """
    models = {}
    for model, by_row in scores.items():
        given = grades.by_model.get(model, {})
        made = corrected_mean([*by_row.values()], [given.get(row, math.nan) for row in by_row])
        if made is not None:
            models[model] = asdict(made)
    differences = []
    for model, against in compared_pairs([*scores]):
        difference = _difference(scores, grades, model, against)
        if difference is not None:
            differences.append({"model": model, "against": against, **asdict(difference)})
    return {"models": models, "differences": differences, "left_out": dict(grades.left_out)}


def _difference(scores: Scores, grades: HumanGrades, model: str, against: str) -> Corrected | None:
    rows = [row for row in scores[model] if row in scores[against]]
    ours, others = (grades.by_model.get(name, {}) for name in (model, against))
    return corrected_difference(
        [scores[model][row] - scores[against][row] for row in rows],
        [ours.get(row, math.nan) - others.get(row, math.nan) for row in rows],
    )


def corrected_text(section: Mapping[str, Any]) -> str:
    """Format the section for a terminal."""
    models = section["models"]
    rows = [
        ("human grades", *(str(figures["n"]) for figures in models.values())),
        ("judge's own mean", *(f"{figures['judge']:.3f}" for figures in models.values())),
        ("mean of the grades", *(f"{figures['graded']:.3f}" for figures in models.values())),
        ("corrected mean", *(interval(figures) for figures in models.values())),
        ("correlation", *(_correlation(figures) for figures in models.values())),
    ]
    table = text_table([("corrected scores", *models), *rows], numbers=True)
    left_out = (f"not used: {count} {reason}" for reason, count in section["left_out"].items())
    return "\n".join((table, *map(difference_sentence, section["differences"]), *left_out))


def interval(figures: Mapping[str, Any]) -> str:
    """Format an estimate, such as `0.412 [0.331, 0.493]`."""
    if figures["low"] is None:
        return f"{figures['value']:.3f}"
    return f"{figures['value']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"


def _correlation(figures: Mapping[str, Any]) -> str:
    return "-" if figures["correlation"] is None else f"{figures['correlation']:.2f}"


def difference_sentence(figures: Mapping[str, Any]) -> str:
    """State a difference, and what would settle it."""
    text = f"{figures['model']} - {figures['against']}: {interval(figures)}"
    if figures["low"] is None:
        return f"{text}; too few grades, or all alike, for an interval"
    low, high, more = figures["low"], figures["high"], figures["more_grades"]
    if low > 0 or high < 0:
        better = figures["model"] if low > 0 else figures["against"]
        return f"{text}; settled: {better} is better ({figures['n']} rows graded for both)"
    if more is None:
        return (
            f"{text}; not settled, and out of reach: at this difference, grading all "
            f"{figures['rows']} rows would not settle it"
        )
    return (
        f"{text}; not settled: about {more} more rows, graded for both, would settle a difference "
        "of this size"
    )
