"""Bootstrap intervals over rows, and paired tests against the first model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` rows, with its 95 % bootstrap interval."""

    value: float
    """Infinite or not a number if a row's value is."""
    low: float | None
    """None for fewer than two rows, and for values that are not finite."""
    high: float | None
    n: int
    p_value: float | None = None
    """Of the paired test against the first model. None for the first model, for fewer than two
    rows, and for values that are not finite."""


def estimate(
    values: Sequence[float], against: Sequence[float] | None, samples: int, seed: int
) -> Estimate:
    """Estimate the mean of `values`, and test whether it differs from that of `against`.

    The interval is the percentile bootstrap over rows. The test is a paired permutation test, which
    flips the signs of the rows' differences at random. It is exact for a few rows, and suits both
    shares and scores.

    Args:
        values: One value per row.
        against: The first model's values on the same rows, or None.
    """
    array = np.asarray(values, dtype=np.float64)
    low, high = _interval(array, samples, seed)
    p_value = None
    if against is not None:
        p_value = paired_p_value(array, np.asarray(against, dtype=np.float64), samples, seed)
    mean = float(array.mean()) if len(array) else math.nan
    return Estimate(mean, low, high, len(array), p_value)


def _interval(values: Values, samples: int, seed: int) -> tuple[float | None, float | None]:
    if len(values) < 2 or not np.isfinite(values).all():
        return None, None
    if np.ptp(values) == 0:
        mean = float(values.mean())
        return mean, mean
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=samples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)


def paired_p_value(values: Values, against: Values, samples: int, seed: int) -> float | None:
    """Return the two-sided p-value of equal means on the same rows.

    None for fewer than two rows, and for values that are not finite.
    """
    if len(values) != len(against):
        raise ValueError(f"paired rows differ in number ({len(values)} and {len(against)})")
    if len(values) < 2 or not np.isfinite([values, against]).all():
        return None
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
