"""Scores, the calibration of a judge, and pairs."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from medjob.errors import DataError
from medjob.judge.calibration import (
    GradedRow,
    calibrate,
    correlation,
    parse_graded,
    score_graded,
    wilson,
)
from medjob.judge.pairing import Candidate, choose_pair, confirmed_in_both_orders
from medjob.judge.rubric import ASPECTS, Comparison, Item, score_question
from medjob.judge.scoring import OverlapJudge, Score, expected_digit, token_f1
from medjob.stage import RowExtras
from tests.support.row_work import row_extras


class Oracle:
    """A judge that is right in all but the first `wrong` rows."""

    kind = name = "oracle"

    def __init__(self, wrong: int) -> None:
        self.wrong = wrong

    def score(self, extras: RowExtras, kind: str, items: Sequence[Item]) -> dict[str, Score]:
        return {
            i.id: Score(
                float(i.id.endswith("better") == (int(i.id.split("/")[0]) >= self.wrong)), {}
            )
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
def test_judge_passes_only_if_it_beats_the_trivial_rules(
    tmp_path: Path, wrong: int, passes: bool
) -> None:
    result = score_graded(Oracle(wrong), graded(40), row_extras(tmp_path))
    assert result.agreement == pytest.approx((40 - wrong) / 40)
    assert (result.longer_is_better, result.overlap_is_better) == (0.5, 0.5)
    assert result.passed is passes
    assert ("NOT calibrated" in result.sentence()) is not passes


def test_tie_is_half_right_and_counted() -> None:
    result = calibrate(OverlapJudge(), graded(20), [0.5] * 40)
    assert (result.agreement, result.tie_rate, result.length_correlation) == (0.5, 1.0, None)


def test_wilson_interval_equals_a_published_value() -> None:
    low, high = wilson(0.5, 10)
    assert (round(low, 3), round(high, 3)) == (0.237, 0.763)
    assert wilson(1.0, 48)[0] > 0.92


def test_trivial_rules_do_not_solve_the_shipped_graded_rows(tmp_path: Path) -> None:
    from medjob.config.judge import JudgeParams
    from medjob.data.read import read
    from medjob.sources.locations import locate

    calibration = JudgeParams().calibration
    rows = parse_graded(
        [dict(row.fields) for row in read(calibration, locate(calibration, {}, Path()))]
    )
    result = score_graded(OverlapJudge(), rows, row_extras(tmp_path))
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
    texts = [score_question(item, aspect) for aspect in ASPECTS]
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
        self, extras: RowExtras, kind: str, comparisons: Sequence[Comparison]
    ) -> dict[str, float]:
        return {
            each.id: 0.9 if each.first == "good" or each.second != "good" else 0.1
            for each in comparisons
        }


def test_pairs_whose_winner_depends_on_the_order_are_dropped(tmp_path: Path) -> None:
    prompts = [{"id": "1", "reference": "r"}, {"id": "2", "reference": "r"}]
    pairs = [
        {"id": "1", "question": "q", "chosen": "good", "rejected": "bad"},
        {"id": "2", "question": "q", "chosen": "a", "rejected": "b"},
    ]
    dropped: Counter[str] = Counter()
    judge: Any = PositionBiasedJudge()
    extras = row_extras(tmp_path)
    kept = confirmed_in_both_orders(judge, extras, prompts, pairs, "plain", dropped)
    assert [p["id"] for p in kept] == ["1"]
    assert dropped == {"orders disagree": 1}


def test_correlation_with_a_constant_is_none() -> None:
    assert correlation([1, 2, 3], [1, 1, 1]) is None
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
