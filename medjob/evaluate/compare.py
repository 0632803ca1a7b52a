"""Answers of several models to one table: estimates, intervals and paired tests against the first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from medjob.evaluate.metrics import METRICS, Answered, Metric, values_of
from medjob.evaluate.statistics import estimate
from medjob.runtime.tables import text_table

Answers = Mapping[str, Sequence[Answered]]


def compare(answers: Answers, samples: int, seed: int) -> list[dict[str, Any]]:
    """One dict a metric: name, about, better, percent, and by model value, low, high, n and p_value."""
    first = next(iter(answers))
    table = []
    for metric in METRICS:
        values = {model: values_of(metric, rows) for model, rows in answers.items()}
        if all(v is None for v in values.values()):
            continue
        against = values[first]
        models = {
            model: asdict(estimate(v, against if model != first else None, samples, seed))
            for model, v in values.items()
            if v is not None
        }
        table.append(_line(metric, models))
    return table + _win_rates(answers, first, samples, seed)


def _line(metric: Metric, models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    line = {
        "metric": metric.name,
        "about": metric.about,
        "better": metric.better,
        "percent": metric.percent,
        "models": models,
    }
    if metric.name != "nll":
        return line
    for figures in (
        models.values()
    ):  # the exponential is monotonous: it maps the interval, and the test stays that of the nll
        figures |= {name: math.exp(figures[name]) for name in ("value", "low", "high")}
    return line | {
        "metric": "perplexity",
        "about": "of held-out answers; its interval and test are those of the mean -log p per row",
    }


def _win_rates(answers: Answers, first: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """How often the judge scores a model's answer above the first model's; ties are half a win, and 50 % is no difference."""
    scores = {
        model: [a.judged.get("score") for a in rows if a.row["kind"] == "open"]
        for model, rows in answers.items()
    }
    if not scores[first] or any(score is None for values in scores.values() for score in values):
        return []
    models = {}
    for model, values in scores.items():
        if model != first:
            pairs = list(zip(values, scores[first], strict=True))
            wins = [0.5 if a == b else float(a > b) for a, b in pairs]  # type: ignore[operator]  # no None is left
            models[model] = asdict(estimate(wins, [0.5] * len(wins), samples, seed))
    if not models:
        return []
    about = f"the judge scores it above {first}'s answer; ties are half a win"
    return [
        {
            "metric": f"win rate over {first}",
            "about": about,
            "better": "higher",
            "percent": True,
            "models": models,
        }
    ]


def as_text(table: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    """The table for a terminal; an asterisk marks p < 0.05 against the first model."""
    rows = [("", *models)]
    rows += [(line["metric"], *(cell(line, model) for model in models)) for line in table]
    return "\n".join(
        [
            text_table(rows, numbers=True),
            f"95% bootstrap intervals over rows; * differs from {models[0]}, paired test, p < 0.05",
        ]
    )


def cell(line: Mapping[str, Any], model: str) -> str:
    """One estimate with its interval."""
    figures = line["models"].get(model)
    if figures is None:
        return "-"
    scale, digits = (100, 0) if line["percent"] else (1, 3 if figures["high"] < 10 else 1)
    value, low, high = (f"{scale * figures[name]:.{digits}f}" for name in ("value", "low", "high"))
    star = "*" if figures["p_value"] is not None and figures["p_value"] < 0.05 else " "
    return f"{value}{'%' if line['percent'] else ''} [{low}, {high}]{star}"
