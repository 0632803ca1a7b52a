"""Corrected judge scores: a few human grades turn a judge's mean into one of the human grades.

Prediction-powered inference: the judge scores every row, people grade a random sample of them, and
the judge's error on the sample corrects its mean over all rows. The result is right on average
however wrong the judge is; a better judge only narrows the interval. See Angelopoulos, Duchi and
Zrnic, "PPI++: Efficient Prediction-Powered Inference" (arXiv 2311.01453). For judges, arXiv
2601.05420 compares it with corrections by sensitivity and specificity (arXiv 2511.21140). Those
need yes-or-no scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Values = npt.NDArray[np.float64]

_LEVEL = 0.975  # quantile of a two-sided 95 % interval
_MIN_TUNED = 5  # grades. With fewer, the slope is too uncertain, and the judge is not used


@dataclass(frozen=True, slots=True)
class Corrected:
    """The corrected estimate of a mean grade, or of a mean difference of two models' grades."""

    judge: float
    """The judge's own mean over all rows."""
    graded: float
    """The mean of the grades alone."""
    value: float
    """The corrected estimate."""
    low: float | None
    high: float | None
    """Ends of the 95 % interval. None for fewer than two grades, and if all grades are equal: their
    spread is then unknown."""
    n: int
    """Graded rows."""
    rows: int
    """All rows."""
    weight: float
    """How far the estimate follows the judge. 0: `value` is the mean of the grades."""
    correlation: float | None
    """Of scores and grades, on the graded rows. None for fewer than 3 rows and for constants."""
    more_grades: int | None = None
    """How many more graded rows would make the interval exclude zero, if the estimate stays as it
    is. None if grading all rows would not. For differences only."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does not contain zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def corrected_mean(
    scores: Sequence[float], grades: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)
) -> Corrected | None:
    """Estimate the mean grade of all rows. Return None if no row is graded.

    The estimate is `mean(y) + w (mean(f) - mean(f of graded rows))` for grades y, scores f and the
    slope w of the line through scores and grades. That is PPI++ with its best weight for a mean
    (Example 6.1: lambda = w / (1 + n/N), over the N ungraded rows), and the regression estimator of
    survey sampling. The weight is not limited to 1, because small judges use a narrow range of
    scores. It is not below 0: a judge that contradicts people is not used upside down.

    The variance is `s^2 (1/n + d^2 / Sxx) + w^2 Var(f) / rows`, with the residual variance s^2, the
    difference d of the two means of f, and the sum of squares Sxx of f on the graded rows (Cochran,
    Sampling Techniques, section 7.7, and the variance over further samples of rows). With n - 2
    degrees of freedom, intervals cover in 94-97 % from five grades on, where the normal interval of
    PPI++ covers in less. Value and interval are limited to `bounds`, in which every mean lies.

    Args:
        scores: The judge's score of each row.
        grades: The human grade of each row, NaN for rows without one. The graded rows must be a
            random sample.
    """
    fit = _fit(np.asarray(scores, dtype=np.float64), np.asarray(grades, dtype=np.float64))
    return None if fit is None else _corrected(fit, bounds)


def corrected_difference(scores: Sequence[float], grades: Sequence[float]) -> Corrected | None:
    """Estimate the mean of paired differences, as `corrected_mean`, and how many more grades would
    settle their sign.

    Args:
        scores: Difference of the judge's scores of two models' answers, per row.
        grades: Difference of the grades, NaN for rows in which not both answers are graded.
    """
    fit = _fit(np.asarray(scores, dtype=np.float64), np.asarray(grades, dtype=np.float64))
    if fit is None:
        return None
    made = _corrected(fit, (-1.0, 1.0))
    return made if made.low is None else replace(made, more_grades=_more_grades(made, fit))


@dataclass(frozen=True, slots=True)
class _Fit:
    """The line through scores and grades."""

    f: Values
    """Scores of all rows."""
    graded_f: Values
    y: Values
    """Grades."""
    weight: float

    @property
    def fitted(self) -> int:
        """Number of fitted parameters."""
        return 2 if self.weight else 1

    @property
    def shift(self) -> float:
        """How far the graded rows' mean score is below that of all rows."""
        return float(self.f.mean() - self.graded_f.mean())

    @property
    def residual_variance(self) -> float:
        errors = self.y - self.y.mean() - self.weight * (self.graded_f - self.graded_f.mean())
        return float(errors @ errors) / (len(self.y) - self.fitted)

    @property
    def judge_variance(self) -> float:
        """The part of the estimate's variance that more grades do not reduce."""
        return self.weight**2 * float(self.f.var(ddof=1)) / len(self.f) if self.weight else 0.0


def _fit(f: Values, y: Values) -> _Fit | None:
    graded = np.isfinite(y)
    if not graded.any():
        return None
    graded_f, y = f[graded], y[graded]
    usable = len(y) >= _MIN_TUNED and len(y) < len(f) and np.isfinite(f).all()
    weight = 0.0
    if usable and np.ptp(graded_f) > 0:
        centred = graded_f - graded_f.mean()
        weight = max(0.0, float(centred @ y / (centred @ centred)))
    return _Fit(f, graded_f, y, weight)


def _corrected(fit: _Fit, bounds: tuple[float, float]) -> Corrected:
    # Without a weight, scores that are not finite must not make the shift count.
    value = float(fit.y.mean()) + (fit.weight * fit.shift if fit.weight else 0.0)
    half_width = _half_width(fit)
    low, high = (None, None) if half_width is None else (value - half_width, value + half_width)
    return Corrected(
        judge=float(fit.f.mean()),
        graded=float(fit.y.mean()),
        value=_within(value, bounds),
        low=None if low is None else _within(low, bounds),
        high=None if high is None else _within(high, bounds),
        n=len(fit.y),
        rows=len(fit.f),
        weight=fit.weight,
        correlation=_correlation(fit.graded_f, fit.y),
    )


def _half_width(fit: _Fit) -> float | None:
    """Return half the width of the 95 % interval, or None if the grades do not show their
    spread."""
    n = len(fit.y)
    if n < 2 or np.ptp(fit.y) == 0:
        return None
    variance = fit.residual_variance / n + fit.judge_variance
    if fit.weight:
        squares = n * float(fit.graded_f.var())
        variance += fit.residual_variance * fit.shift**2 / squares
    return float(stdtrit(n - fit.fitted, _LEVEL)) * math.sqrt(variance)


def _more_grades(made: Corrected, fit: _Fit) -> int | None:
    """Return how many more grades would make the interval exclude zero, for the present line and
    spread around it."""
    if made.excludes_zero:
        return 0
    n = np.arange(made.n + 1, made.rows + 1)
    variance = fit.residual_variance / n + fit.judge_variance
    enough = stdtrit(n - fit.fitted, _LEVEL) * np.sqrt(variance) < abs(made.value)
    return int(n[enough.argmax()]) - made.n if enough.any() else None


def _correlation(x: Values, y: Values) -> float | None:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0 or not np.isfinite(x).all():
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _within(value: float, bounds: tuple[float, float]) -> float:
    return float(min(max(value, bounds[0]), bounds[1]))
