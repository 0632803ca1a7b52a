"""How much several judges differ."""

import pytest

from medjob.judge.disagreement import disagreement
from medjob.judge.scoring import Score


def score(*values: float) -> Score:
    return Score(0.5, judges={str(n): value for n, value in enumerate(values)})


def test_differences_and_orders_of_every_two_judges_are_counted() -> None:
    scores = {
        "a": score(0.9, 0.8, 0.1),
        "b": score(0.1, 0.2, 0.5),
        "c": score(0.5, 0.5, 0.5),
    }
    found = disagreement(scores, [("a", "b"), ("c", "b")])
    assert found is not None
    assert (found.judges, found.answers, found.pairs) == (3, 3, 2)
    assert found.mean_difference == pytest.approx((0.1 + 0.8 + 0.7 + 0.1 + 0.4 + 0.3) / 9)
    # a > b for two judges and not for the third; c > b for two, and a tie for the third.
    assert found.other_order == pytest.approx((0 + 1 + 1 + 0 + 0.5 + 0.5) / 6)


def test_one_judge_cannot_disagree() -> None:
    assert disagreement({"a": Score(0.5)}, []) is None
    found = disagreement({"a": score(0.5, 0.4)}, [])
    assert found is not None
    assert found.other_order is None
