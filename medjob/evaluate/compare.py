"""Compare the answers of models: estimates, intervals, and tests against the first model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from medjob.evaluate.metrics import METRICS, EvaluatedAnswer, Metric, metric_values
from medjob.evaluate.statistics import estimate
from medjob.runtime.tables import text_table

Answers = Mapping[str, Sequence[EvaluatedAnswer]]


def compare(answers: Answers, samples: int, seed: int) -> list[dict[str, Any]]:
    """Return one dict per metric: `metric`, `about`, `better`, `percent`, and for each of `models`
    its value, low, high, n and p_value."""
    first = next(iter(answers))
    table = []
    for metric in METRICS:
        values = {model: metric_values(metric, rows) for model, rows in answers.items()}
        estimates = {}
        for model, model_values in values.items():
            if model_values is not None:
                against = None if model == first else values[first]
                estimates[model] = asdict(estimate(model_values, against, samples, seed))
        if estimates:
            table.append(_table_row(metric, estimates))
    return table + _win_rates(answers, first, samples, seed)


def _table_row(metric: Metric, estimates: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row = {
        "metric": metric.name,
        "about": metric.about,
        "better": metric.better,
        "percent": metric.percent,
        "models": estimates,
    }
    return _as_perplexity(row) if metric.name == "nll" else row


def _as_perplexity(row: dict[str, Any]) -> dict[str, Any]:
    """Convert the mean -log p to perplexity. The exponential is monotonic, so it maps the interval
    too, and the test stays valid."""
    for figures in row["models"].values():
        for name in ("value", "low", "high"):
            figures[name] = math.exp(figures[name])
    about = "of the data's own answers; interval and test are those of the mean -log p per row"
    return row | {"metric": "perplexity", "about": about}


def _win_rates(answers: Answers, first: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """Return how often the judge scores a model's answer above the first model's. A tie is half a
    win, so 50 % is no difference."""
    scores = {model: _judge_scores(rows) for model, rows in answers.items()}
    first_scores = scores.pop(first)
    if not first_scores or not scores or None in (first_scores, *scores.values()):
        return []
    estimates = {}
    for model, model_scores in scores.items():
        wins = _wins(model_scores or [], first_scores)
        estimates[model] = asdict(estimate(wins, [0.5] * len(wins), samples, seed))
    return [
        {
            "metric": f"win rate over {first}",
            "about": f"answers that the judge scores above {first}'s; a tie is half a win",
            "better": "higher",
            "percent": True,
            "models": estimates,
        }
    ]


def _judge_scores(answers: Sequence[EvaluatedAnswer]) -> list[float] | None:
    """Return the scores of the answers to open questions, or None if one was not judged."""
    scores = []
    for answer in answers:
        if answer.row["kind"] == "open":
            if "score" not in answer.judged:
                return None
            scores.append(answer.judged["score"])
    return scores


def _wins(scores: Sequence[float], first_scores: Sequence[float]) -> list[float]:
    pairs = zip(scores, first_scores, strict=True)
    return [0.5 if score == first else float(score > first) for score, first in pairs]


def as_text(table: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    """Format the table for a terminal."""
    header = ("", *models)
    rows = [(row["metric"], *(format_estimate(row, model) for model in models)) for row in table]
    note = (
        "95% bootstrap intervals over rows; "
        f"* differs from {models[0]} (paired permutation test, p < 0.05)"
    )
    return f"{text_table([header, *rows], numbers=True)}\n{note}"


def format_estimate(row: Mapping[str, Any], model: str) -> str:
    """Format one estimate with its interval, such as `0.41 [0.38, 0.44]*`."""
    figures = row["models"].get(model)
    if figures is None:
        return "-"
    numbers = [figures["value"], figures["low"], figures["high"]]
    if row["percent"]:
        value, low, high = (f"{100 * number:.0f}" for number in numbers)
        value += "%"
    else:
        digits = 3 if figures["high"] < 10 else 1
        value, low, high = (f"{number:.{digits}f}" for number in numbers)
    differs = figures["p_value"] is not None and figures["p_value"] < 0.05
    return f"{value} [{low}, {high}]{'*' if differs else ' '}"
