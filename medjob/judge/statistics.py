"""Shares with intervals, and measures of agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_Z = 1.96  # of a 95 % interval


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of `n` rows.

    Unlike the normal approximation, it stays inside [0, 1].
    """
    if n == 0:
        return 0.0, 1.0
    scale = 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / scale
    half_width = _Z / scale * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def effective_rows(right: Sequence[float], groups: Sequence[str]) -> float:
    """Return the number of independent rows that say as much as these, which come in groups.

    It is share x (1 - share) / the variance of the share between groups (Korn and Graubard 1998),
    between the number of groups and the number of rows. Independent rows count in full.
    """
    values = np.asarray(right, dtype=float)
    if len(set(groups)) == len(values):
        return float(len(values))
    share = float(values.mean())
    sums: dict[str, float] = {}
    for group, value in zip(groups, values, strict=True):
        sums[group] = sums.get(group, 0.0) + float(value) - share
    variance = sum(each**2 for each in sums.values()) / len(values) ** 2
    if variance == 0:
        return float(len(sums))
    return min(float(len(values)), max(float(len(sums)), share * (1 - share) / variance))


def kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Return Cohen's kappa: agreement beyond chance. None if both sides are constant."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    observed = float((a == b).mean())
    by_chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def bootstrapped_kappa(
    first: Sequence[bool], second: Sequence[bool], groups: Sequence[str], samples: int = 1000
) -> tuple[float, float]:
    """Return the 95 % percentile interval of kappa, with groups drawn as a whole. The seed is
    fixed, so that the same rows give the same interval."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    members: dict[str, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    positions = [np.array(each) for each in members.values()]
    random = np.random.default_rng(0)
    found = []
    for _ in range(samples):
        drawn = random.integers(len(positions), size=len(positions))
        rows = np.concatenate([positions[number] for number in drawn])
        value = kappa(a[rows], b[rows])
        found.append(0.0 if value is None else value)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Pearson's correlation. None if one side is constant, a value is not finite, or there
    are fewer than 3 values."""
    if len(x) < 3 or not np.isfinite([*x, *y]).all() or np.std(x) == 0 or np.std(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
