"""Compare the answers of models: estimates, intervals, and tests against the first model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from medjob.evaluate.metrics import METRICS, EvaluatedAnswer, Metric, metric_values
from medjob.evaluate.option_orders import ABSTENTION
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
    return [
        *table,
        *_accuracy_if_answered(answers, samples, seed),
        *_win_rates(answers, first, samples, seed),
    ]


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
            if figures[name] is not None:
                figures[name] = _exp(figures[name])
    about = "of the data's own answers; interval and test are those of the mean -log p per row"
    return row | {"metric": "perplexity", "about": about}


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _accuracy_if_answered(answers: Answers, samples: int, seed: int) -> list[dict[str, Any]]:
    """Return the accuracy on the rows in which a model did not abstain. These differ between
    models, so there is no paired test."""
    estimates = {}
    for model, rows in answers.items():
        choices = [(a.with_abstention, a.row["answer_idx"]) for a in rows if a.with_abstention]
        values = [float(c.stated == right) for c, right in choices if c.stated != ABSTENTION]
        if values:
            estimates[model] = asdict(estimate(values, None, samples, seed))
    if not estimates:
        return []
    return [
        {
            "metric": "accuracy if answered",
            "about": "correct answers among those that do not abstain; the rows differ by model",
            "better": "higher",
            "percent": True,
            "models": estimates,
        }
    ]


def _win_rates(answers: Answers, first: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """Return how often the judge scores a model's answer above the first model's. A tie is half a
    win, so 50 % is no difference."""
    scores = {model: _judge_scores(rows) for model, rows in answers.items()}
    first_scores = scores.pop(first)
    if not first_scores:
        return []
    estimates = {}
    for model, model_scores in scores.items():
        if model_scores:
            wins = _wins(model_scores, first_scores)
            estimates[model] = asdict(estimate(wins, [0.5] * len(wins), samples, seed))
    if not estimates:
        return []
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
    return [_win(score, first) for score, first in zip(scores, first_scores, strict=True)]


def _win(score: float, first: float) -> float:
    if math.isnan(score) or math.isnan(first):
        return math.nan
    return 0.5 if score == first else float(score > first)


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
    if numbers[0] is None or math.isnan(numbers[0]):
        return "-"
    known = [number for number in numbers if number is not None]
    digits = 3 if max(known) < 10 else 1
    value, *interval = (_number(number, row["percent"], digits) for number in known)
    if row["percent"]:
        value += "%"
    if interval:
        value += f" [{', '.join(interval)}]"
    differs = figures["p_value"] is not None and figures["p_value"] < 0.05
    return f"{value}{'*' if differs else ' '}"


def _number(number: float, percent: bool, digits: int) -> str:
    if percent:
        return f"{100 * number:.0f}"
    if number >= 1e6:
        return f"{number:.3g}"
    return f"{number:.{digits}f}"


def without_infinities(value: Any) -> Any:
    """Return a copy of plain data with null for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_infinities(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
