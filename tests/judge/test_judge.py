"""Scores, the calibration of a judge, and pairs."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from medjob.config.judge_prompts import JudgePrompts
from medjob.errors import DataError
from medjob.judge.calibration import calibrate
from medjob.judge.graded import GradedRow, parse_graded
from medjob.judge.pairing import Candidate, choose_pair, confirmed_in_both_orders
from medjob.judge.questions import Comparison, Item, Prompts
from medjob.judge.scoring import OverlapJudge, Score, expected_digit, token_f1
from medjob.judge.statistics import correlation, effective_rows, kappa, wilson
from medjob.stage import RowExtras

EXTRAS = RowExtras(finished=None, progress=None)  # type: ignore[arg-type]  # no model is asked


class Oracle:
    """A judge that is right in all but the first `wrong` rows."""

    kind = name = "oracle"

    def __init__(self, wrong: int) -> None:
        self.wrong = wrong

    def score(self, extras: RowExtras, kind: str, items: Sequence[Item]) -> dict[str, Score]:
        return {
            i.id: Score(float(i.id.endswith("better") == (int(i.id.split("/")[0]) >= self.wrong)))
            for i in items
        }


def graded(count: int) -> list[GradedRow]:
    """Rows on which the longer answer and the overlap are each right in one half."""
    rows = []
    for n in range(count):
        better, worse = ("red blue", "red") if n % 2 else ("grey", "grey blue")
        rows.append(GradedRow(str(n), "q", "red blue" if n % 2 else "grey blue", better, worse))
    return rows


@pytest.mark.parametrize(("wrong", "passes"), [(0, True), (4, True), (15, False), (40, False)])
def test_judge_passes_only_if_it_beats_the_trivial_rules(wrong: int, passes: bool) -> None:
    rows, judge = graded(40), Oracle(wrong)
    result = calibrate(judge, rows, EXTRAS)
    assert result.agreement == pytest.approx((40 - wrong) / 40)
    assert (result.longer_is_better, result.overlap_is_better) == (0.5, 0.5)
    assert result.passed is passes
    assert ("NOT calibrated" in result.sentence()) is not passes


def test_tie_is_half_right_and_counted() -> None:
    rows = [GradedRow(str(n), "q", "grey", "red", "blue") for n in range(20)]
    result = calibrate(OverlapJudge(), rows, EXTRAS)
    assert (result.agreement, result.tie_rate, result.length_correlation) == (0.5, 1.0, None)
    assert [(each.better_score, each.worse_score) for each in result.examples] == [(0, 0)] * 6


def test_agreement_is_shown_by_length() -> None:
    """The oracle is wrong in the first rows; odd rows have the longer answer as the better one."""
    result = calibrate(Oracle(10), graded(40), EXTRAS)
    assert (result.agreement_if_longer, result.agreement_if_shorter) == (0.75, 0.75)
    assert {row.better for row in result.examples} == {"red blue", "grey"}


def test_wilson_interval_equals_a_published_value() -> None:
    low, high = wilson(0.5, 10)
    assert (round(low, 3), round(high, 3)) == (0.237, 0.763)
    assert wilson(1.0, 48)[0] > 0.92


def test_trivial_rules_do_not_solve_the_shipped_graded_rows() -> None:
    from medjob.config.judge import JudgeParams
    from medjob.data.read import read
    from medjob.sources.locations import locate

    calibration = JudgeParams().calibration
    rows = parse_graded(
        [dict(row.fields) for row in read(calibration, locate(calibration, {}, Path()))]
    )
    result = calibrate(OverlapJudge(), rows, EXTRAS)
    assert len(rows) >= 40
    assert 0.4 <= result.longer_is_better <= 0.6
    assert 0.4 <= result.overlap_is_better <= 0.6
    assert not result.passed


def test_too_few_graded_rows_are_an_error() -> None:
    row = {"question": "q", "reference": "r", "better": "b", "worse": "w"}
    with pytest.raises(DataError, match="too few"):
        parse_graded([row] * 3)


def test_expected_digit_is_between_0_and_1() -> None:
    assert expected_digit([0, 0, 0, 0, 1]) == 1.0
    assert expected_digit([1, 0, 0, 0, 0]) == 0.0
    assert expected_digit([0.5, 0, 0, 0, 0.5]) == 0.5


def test_aspect_prompts_share_a_prefix() -> None:
    """An engine's prefix cache then computes it once for the three aspects."""
    item = Item("1", "Why?", "Because.", "So.")
    prompts = Prompts.of(JudgePrompts())
    texts = [prompts.score(item, aspect) for aspect in prompts.aspects]
    assert len(texts) == 3
    common = next(
        i for i in range(min(map(len, texts))) if any(a[i] != b[i] for a, b in pairwise(texts))
    )
    assert "So." in texts[0][:common]


def test_token_f1_counts_repeated_words() -> None:
    assert token_f1("the red fox", "the red fox") == 1.0
    assert token_f1("a", "b") == 0.0
    assert token_f1("红色", "红 色") == 1.0
    assert token_f1("red red", "red") == pytest.approx(2 / 3)


def candidate(
    score: float, text: str = "", usable: bool = True, complies: bool = True
) -> Candidate:
    return Candidate(text or str(score), score, usable, complies)


@pytest.mark.parametrize(
    ("candidates", "threshold", "expected"),
    [
        ([candidate(0.2), candidate(0.9)], None, (1, 0)),
        ([candidate(0.2), candidate(0.9), candidate(0.1)], None, (1, 2)),
        ([candidate(0.5), candidate(0.52)], None, "tie"),
        ([candidate(0.5, "a"), candidate(0.5, "b")], None, "tie"),
        ([candidate(0.9, "same"), candidate(0.1, "same")], None, "same text"),
        ([candidate(0.2), candidate(0.9, usable=False)], None, "truncated"),
        ([candidate(0.2, complies=False), candidate(0.9, complies=False)], None, "wrong layout"),
        ([candidate(0.9, complies=False), candidate(0.5), candidate(0.1)], None, (1, 2)),
        (
            [candidate(0.9, complies=False), candidate(0.5)],
            None,
            "tie",  # the better one does not comply, so it cannot be chosen
        ),
        ([candidate(0.4), candidate(0.2)], 0.5, "same side of the threshold"),
        ([candidate(0.6), candidate(0.2)], 0.5, (0, 1)),
    ],
)
def test_chosen_pair_or_the_reason_for_none(
    candidates: list[Candidate], threshold: float | None, expected: Any
) -> None:
    dropped: Counter[str] = Counter()
    made = choose_pair(candidates, 0.05, threshold, dropped)
    if isinstance(expected, str):
        assert made is None
        assert dropped == {expected: 1}
    else:
        assert made == expected
        assert not dropped


class PositionBiasedJudge:
    """Prefers the first answer, except over the answer `good`."""

    def prefers_first(
        self, extras: RowExtras, kind: str, pairs: Sequence[Comparison]
    ) -> dict[str, float]:
        return {
            pair.id: 0.9 if pair.first == "good" or pair.second != "good" else 0.1 for pair in pairs
        }


def test_pairs_whose_winner_depends_on_the_order_are_dropped() -> None:
    prompts = [{"id": "1", "reference": "r"}, {"id": "2", "reference": "r"}]
    pairs = [
        {"id": "1", "question": "q", "chosen": "good", "rejected": "bad"},
        {"id": "2", "question": "q", "chosen": "a", "rejected": "b"},
    ]
    dropped: Counter[str] = Counter()
    kept = confirmed_in_both_orders(PositionBiasedJudge(), EXTRAS, prompts, pairs, "plain", dropped)  # type: ignore[arg-type]
    assert [p["id"] for p in kept] == ["1"]
    assert dropped == {"orders disagree": 1}


def test_correlation_with_a_constant_is_none() -> None:
    assert correlation([1, 2, 3], [1, 1, 1]) is None
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)


def test_rows_that_share_answers_count_less() -> None:
    right = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert effective_rows(right, list("abcdef")) == 6
    assert effective_rows(right, list("aaabbb")) == 2
    assert effective_rows(right, list("aabbcc")) == 4.5
    assert effective_rows([1.0] * 6, list("aaabbb")) == 2


def test_kappa_is_agreement_beyond_chance() -> None:
    assert kappa([True, True, False, False], [True, True, False, False]) == 1
    assert kappa([True, True, False, False], [True, False, True, False]) == 0
    assert kappa([True, True], [True, True]) is None
