"""Corrected judge scores: coverage, agreement with other implementations, and small samples."""

import math
import warnings

import numpy as np
import pytest

from medjob.evaluate.corrected import Corrected, corrected_difference, corrected_mean

NAN = math.nan


def graded_rows(rows: int = 120, every: int = 3) -> tuple[list[float], list[float], list[float]]:
    """Scores of a judge, all grades, and the grades of every third row."""
    i = np.arange(rows)
    digits = np.clip(np.round(3 + 1.6 * np.sin(1.7 * i) + 0.9 * np.sin(0.37 * i * i)), 1, 5)
    truth = (digits - 1) / 4
    scores = 0.62 + 0.09 * np.sin(1.7 * i) + 0.03 * np.cos(2.9 * i * i)
    return scores.tolist(), truth.tolist(), np.where(i % every == 0, truth, NAN).tolist()


def test_the_estimate_agrees_with_other_implementations() -> None:
    """The figures were computed with ppi-python 0.2.3 (`ppi_mean_pointestimate`, `ppi_mean_ci`) and
    with cje-eval 0.9.3 (`calibrated_mean_ci`, correction weights one and tuned) on the same rows.
    They are written down because these packages bring pandas, statsmodels, numba and
    scikit-learn."""
    scores, truth, grades = graded_rows()
    made = corrected_mean(scores, grades)
    assert made is not None
    assert made.low is not None
    assert made.high is not None
    # ppi-python, with scores times 6, so that it does not limit its weight: it divides by the
    # variance of all scores and not of the graded ones, and its interval is normal.
    assert made.value == pytest.approx(0.52173, abs=1e-3)
    assert (made.low, made.high) == pytest.approx((0.44442, 0.59904), abs=6e-3)
    # cje-eval: an isotonic curve through scores and grades instead of a line.
    for estimate, low, high in ((0.52361, 0.43154, 0.61567), (0.52099, 0.42982, 0.61215)):
        assert made.value == pytest.approx(estimate, abs=2e-3)
        assert (made.low, made.high) == pytest.approx((low, high), abs=0.013)
    assert made.low < np.mean(truth) < made.high
    assert made.judge == pytest.approx(np.mean(scores))
    assert made.judge > made.high  # what the correction is for


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
@pytest.mark.parametrize(("rows", "graded"), [(60, 10), (150, 15), (300, 60)])
def test_95_percent_intervals_cover_the_true_mean(
    rows: int, graded: int, correlation: float
) -> None:
    """Grades from 1 to 5, and a judge that uses a tenth of its range and is biased."""
    draw = np.random.default_rng(7)
    hits, widths, plain_widths = 0, 0.0, 0.0
    for _ in range(400):
        quality = draw.normal(size=rows)
        noise = math.sqrt(1 - correlation**2) * draw.normal(size=rows)
        grades = (np.clip(np.round(3 + correlation * quality + noise), 1, 5) - 1) / 4
        grades[draw.permutation(rows)[graded:]] = NAN
        made = corrected_mean((0.8 + 0.03 * quality).tolist(), grades.tolist())
        assert made is not None
        assert made.low is not None
        assert made.high is not None
        hits += made.low <= 0.5 <= made.high
        widths += made.high - made.low
        plain_widths += 4 * float(np.nanstd(grades, ddof=1)) / math.sqrt(graded)
    assert 0.925 <= hits / 400 <= 0.975
    if correlation == 0.9 and graded >= 15:
        assert widths < 0.75 * plain_widths  # a good judge saves grades


@pytest.mark.parametrize(
    ("grades", "value", "has_interval"),
    [
        ([1.0, NAN, NAN, NAN], 1.0, False),
        ([1.0, 1.0, NAN, NAN], 1.0, False),
        ([1.0, 0.0, NAN, NAN], 0.5, True),
        ([1.0, 1.0, 1.0, 1.0], 1.0, False),
        ([1.0, 0.5, 0.25, 0.25], 0.5, True),
    ],
)
def test_small_samples(grades: list[float], value: float, has_interval: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = corrected_mean([0.4, 0.5, 0.6, 0.7], grades)
    assert made is not None
    assert made.value == pytest.approx(value)
    assert (made.low is not None) is has_interval
    assert made.weight == 0.0
    assert made.n == sum(not math.isnan(grade) for grade in grades)
    if made.low is not None and made.high is not None:
        assert 0.0 <= made.low <= made.value <= made.high <= 1.0


def test_no_grades_are_no_estimate() -> None:
    assert corrected_mean([0.1, 0.2], [NAN, NAN]) is None
    assert corrected_difference([0.1, 0.2], [NAN, NAN]) is None


def test_a_judge_that_says_nothing_is_not_used() -> None:
    grades = [0.0, 1.0, 0.25, 0.75, 0.5, 1.0, NAN, NAN, NAN]
    constant = corrected_mean([0.6] * 9, grades)
    assert constant is not None
    assert (constant.weight, constant.correlation) == (0.0, None)
    assert constant.value == pytest.approx(np.nanmean(grades))
    upside_down = corrected_mean([0.9, 0.1, 0.7, 0.3, 0.5, 0.1, 0.2, 0.2, 0.2], grades)
    assert upside_down is not None
    assert upside_down.weight == 0.0
    assert upside_down.correlation is not None
    assert upside_down.correlation < -0.9


def test_the_stated_number_of_grades_settles_a_difference() -> None:
    """Rows repeat in blocks of ten, so that further grades do not change the estimate."""
    differences = np.tile([0.25, 0.25, 0.25, 0.0, 0.0, -0.25, 0.25, -0.25, 0.0, 0.0], 40)
    scores = 0.1 * differences + np.tile([0.04, -0.04], 200)

    def with_grades(count: int) -> Corrected:
        grades = np.where(np.arange(400) < count, differences, NAN)
        made = corrected_difference(scores.tolist(), grades.tolist())
        assert made is not None
        return made

    first = with_grades(10)
    assert not first.excludes_zero
    assert first.more_grades is not None
    needed = 10 + first.more_grades
    assert 30 < needed < 200
    assert not with_grades(needed // 10 * 10 - 10).excludes_zero
    assert with_grades(needed // 10 * 10 + 10).excludes_zero
    assert with_grades(400).more_grades == 0


def test_no_number_of_grades_settles_equal_models() -> None:
    scores = [0.01 * (-1) ** n for n in range(60)]
    grades = [0.25 * (-1) ** n if n < 20 else NAN for n in range(60)]
    made = corrected_difference(scores, grades)
    assert made is not None
    assert made.value == pytest.approx(0.0)
    assert made.more_grades is None
    same = corrected_difference([0.0] * 60, [0.0] * 20 + [NAN] * 40)
    assert same is not None
    assert (same.low, same.more_grades) == (None, None)
