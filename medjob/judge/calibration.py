"""Calibration: a judge's agreement with graded answers, compared with trivial rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medjob.errors import DataError
from medjob.judge.rubric import Item
from medjob.judge.scoring import Judge, ModelJudge, token_f1

_Z = 1.96  # of a 95 % interval
_MIN_ROWS = 10


@dataclass(frozen=True, slots=True)
class GradedRow:
    """A question with a better and a worse answer."""

    id: str
    question: str
    reference: str
    better: str
    worse: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """A judge's results on the graded rows. Rates are shares of rows, and a tie is half right."""

    judge: str
    rows: int
    agreement: float
    agreement_low: float
    agreement_high: float
    tie_rate: float
    order_flip_rate: float | None
    length_correlation: float | None
    longer_is_better: float
    overlap_is_better: float

    @property
    def passed(self) -> bool:
        """Whether the lower end of the interval is above both trivial rules and chance."""
        return self.agreement_low > max(self.longer_is_better, self.overlap_is_better, 0.5)

    def sentence(self) -> str:
        """Summarise the result in one line."""
        verdict = "calibrated" if self.passed else "NOT calibrated"
        return (
            f"judge {self.judge}: agrees with {self.agreement:.0%} of {self.rows} graded rows (95% "
            f"interval {self.agreement_low:.0%}-{self.agreement_high:.0%}); choosing the longer "
            f"answer agrees with {self.longer_is_better:.0%}, choosing the answer with more words "
            f"of the reference with {self.overlap_is_better:.0%}: {verdict}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, and whether the judge passed."""
        return {**asdict(self), "passed": self.passed}


def graded_items(rows: Sequence[GradedRow]) -> list[Item]:
    """Return the better and the worse answer of each row, alternating."""
    items = []
    for row in rows:
        items.append(Item(f"{row.id}/better", row.question, row.reference, row.better))
        items.append(Item(f"{row.id}/worse", row.question, row.reference, row.worse))
    return items


def calibrate(judge: Judge, rows: Sequence[GradedRow], scores: Sequence[float]) -> Calibration:
    """Compare the grades with `scores`, which are in the order of `graded_items`."""
    better = np.array(scores[0::2])
    worse = np.array(scores[1::2])
    right = np.where(better == worse, 0.5, better > worse)
    agreement = float(right.mean())
    low, high = wilson(agreement, len(rows))
    lengths = [float(len(text)) for row in rows for text in (row.better, row.worse)]
    return Calibration(
        judge=judge.name,
        rows=len(rows),
        agreement=agreement,
        agreement_low=low,
        agreement_high=high,
        tie_rate=float((better == worse).mean()),
        order_flip_rate=order_flip_rate(judge, rows) if isinstance(judge, ModelJudge) else None,
        length_correlation=correlation(lengths, list(scores)),
        longer_is_better=float(np.mean([len(row.better) > len(row.worse) for row in rows])),
        overlap_is_better=float(np.mean([_overlap_is_better(row) for row in rows])),
    )


def _overlap_is_better(row: GradedRow) -> bool:
    return token_f1(row.better, row.reference) > token_f1(row.worse, row.reference)


def order_flip_rate(judge: ModelJudge, rows: Sequence[GradedRow]) -> float:
    """Return the share of rows whose winner changes when the two answers swap places."""
    better_first = judge.prefers_first(
        [(row.question, row.reference, row.better, row.worse) for row in rows]
    )
    worse_first = judge.prefers_first(
        [(row.question, row.reference, row.worse, row.better) for row in rows]
    )
    # If the answer in the same place wins both times, the order decided.
    flips = [(a > 0.5) == (b > 0.5) for a, b in zip(better_first, worse_first, strict=True)]
    return float(np.mean(flips))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of `n` rows.

    Unlike the normal approximation, it stays inside [0, 1].
    """
    if n == 0:
        return 0.0, 1.0
    scale = 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / scale
    half_width = _Z / scale * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Pearson's correlation, or None if one side is constant or there are under 3 values."""
    if len(x) < 3 or np.std(x) == 0 or np.std(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def parse_graded(rows: Sequence[dict[str, Any]]) -> list[GradedRow]:
    """Check graded rows and convert them.

    Raises:
        DataError: a field is missing or empty, or there are too few rows.
    """
    graded = []
    for number, row in enumerate(rows, 1):
        values = [row.get(name) for name in ("question", "reference", "better", "worse")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise DataError(
                f"run.judge.calibration: row {number} lacks question, reference, better or worse"
            )
        graded.append(GradedRow(str(row.get("id", number)), *map(str, values)))
    if len(graded) < _MIN_ROWS:
        raise DataError(
            f"run.judge.calibration: {len(graded)} graded rows are too few to calibrate a judge "
            f"(at least {_MIN_ROWS})"
        )
    return graded
