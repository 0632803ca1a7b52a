"""How sure a figure is: bootstrap intervals over rows, and paired tests against the first model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` rows with its 95 % bootstrap interval. `p_value`: paired against the first model, None for that one."""

    value: float
    low: float
    high: float
    n: int
    p_value: float | None = None


def estimate(
    values: Sequence[float], against: Sequence[float] | None, samples: int, seed: int
) -> Estimate:
    """Mean of `values` (one a row), and whether it differs from `against` on the same rows.

    The interval is the percentile bootstrap over rows; the test flips the signs of the rows' differences at random
    (a paired permutation test: exact for a handful of rows, and the same one for shares and for scores).
    """
    array = np.asarray(values, dtype=np.float64)
    low, high = _interval(array, samples, seed)
    p_value = (
        paired_p_value(array, np.asarray(against, dtype=np.float64), samples, seed)
        if against is not None
        else None
    )
    return Estimate(float(array.mean()), low, high, len(array), p_value)


def _interval(values: Values, samples: int, seed: int) -> tuple[float, float]:
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=samples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_p_value(values: Values, against: Values, samples: int, seed: int) -> float:
    """Two-sided p-value of mean(values) = mean(against) on the same rows."""
    if len(values) != len(against):
        raise ValueError(f"paired rows differ in number ({len(values)} and {len(against)})")
    differences = values - against
    if not differences.any():
        return 1.0
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=max(samples, 999),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
