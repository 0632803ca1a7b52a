"""Comparisons of too few rows, of constant values, and of values that are not finite."""

import json
import math
import warnings
from typing import Any

import pytest

from medjob.evaluate.compare import as_text, compare, format_estimate, without_infinities
from medjob.evaluate.metrics import EvaluatedAnswer
from medjob.evaluate.statistics import estimate
from medjob.generate.protocol import Generated


def answered(nll: float | None, score: float | None = None, text: str = "red") -> EvaluatedAnswer:
    row = {"kind": "open", "reference": "red blue", "options": "{}", "answer_idx": ""}
    return EvaluatedAnswer.of(
        row,
        Generated(text, 1, False),
        "plain",
        nll_per_token=nll,
        letter=None,
        judged={} if score is None else {"score": score},
    )


@pytest.mark.parametrize(
    ("values", "against", "interval", "p_value"),
    [
        ([0.5], [0.25], (None, None), None),
        ([0.5], [0.5], (None, None), None),
        ([], [], (None, None), None),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], (1.0, 1.0), 1.0),
        ([math.nan, 1.0], [1.0, 1.0], (None, None), None),
        ([math.inf, 1.0], [math.inf, 1.0], (None, None), None),
        ([1.0, 2.0], [math.nan, math.nan], (1.0, 2.0), None),
        ([1.0, 2.0], None, (1.0, 2.0), None),
    ],
)
def test_estimate_of_a_degenerate_sample(
    values: list[float], against: list[float] | None, interval: Any, p_value: float | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = estimate(values, against, 100, 0)
    assert (made.low, made.high) == interval
    assert made.p_value == p_value
    assert made.n == len(values)


def test_two_rows_have_an_interval_and_a_p_value() -> None:
    made = estimate([1.0, 2.0], [0.0, 0.0], 100, 0)
    assert made.p_value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("base", "other"),
    [
        ([answered(1.0, 0.5)], [answered(2.0, 0.6)]),
        ([answered(1000.0)] * 3, [answered(2.0)] * 3),
        ([answered(math.nan)] * 2, [answered(math.inf)] * 2),
        ([answered(None)] * 2, [answered(2.0, 0.5)] * 2),
        ([answered(1.0, 0.5)] * 2, [answered(None)] * 2),
        ([answered(1.0, math.nan)] * 2, [answered(1.0, 0.5)] * 2),
        ([answered(1.0, text="")] * 2, [answered(1.0, text="")] * 2),
    ],
)
def test_comparison_of_degenerate_samples_is_valid_json(base: Any, other: Any) -> None:
    table = compare({"base": base, "other": other}, 100, 0)
    assert "base" in as_text(table, ["base", "other"])
    text = json.dumps(without_infinities(table), allow_nan=False)
    for row in json.loads(text):
        for model in row["models"]:
            format_estimate(row, model)


def test_perplexity_that_overflows_is_infinite() -> None:
    table = compare({"base": [answered(1000.0)] * 2}, 100, 0)
    perplexity = next(row for row in table if row["metric"] == "perplexity")
    assert format_estimate(perplexity, "base").startswith("inf")
    assert without_infinities(perplexity)["models"]["base"]["value"] is None


def test_model_without_scores_leaves_the_others_their_win_rates() -> None:
    answers = {
        "base": [answered(1.0, 0.5)] * 3,
        "unjudged": [answered(1.0)] * 3,
        "other": [answered(1.0, 0.9)] * 3,
    }
    table = {row["metric"]: row for row in compare(answers, 100, 0)}
    assert set(table["win rate over base"]["models"]) == {"other"}
    assert table["win rate over base"]["models"]["other"]["value"] == 1.0
