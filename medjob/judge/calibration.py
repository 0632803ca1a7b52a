"""Whether a judge may be trusted: its agreement with graded answers, and the trivial rules that it must beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medjob.errors import DataError
from medjob.judge.rubric import Item
from medjob.judge.scoring import Judge, ModelJudge, token_f1

_Z = 1.96


@dataclass(frozen=True, slots=True)
class Graded:
    """A question with two answers whose order is known."""

    id: str
    question: str
    reference: str
    better: str
    worse: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a judge did on the graded rows. Rates are shares of rows; ties count as half right."""

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
        """Whether the interval's lower end beats both trivial rules and chance."""
        return self.agreement_low > max(self.longer_is_better, self.overlap_is_better, 0.5)

    def sentence(self) -> str:
        """The verdict in one line."""
        return (
            f"judge {self.judge}: agrees with the graded order in {self.agreement:.0%} of {self.rows} rows "
            f"(95% interval {self.agreement_low:.0%}-{self.agreement_high:.0%}); the longer answer is right in {self.longer_is_better:.0%}, "
            f"the one nearer to the reference in {self.overlap_is_better:.0%}: {'calibrated' if self.passed else 'NOT calibrated'}"
        )

    def as_dict(self) -> dict[str, Any]:
        """All figures, and the verdict."""
        return {**asdict(self), "passed": self.passed}


def graded_items(rows: Sequence[Graded]) -> list[Item]:
    """The better and the worse answer of each row, in turn."""
    return [
        Item(f"{row.id}/{name}", row.question, row.reference, getattr(row, name))
        for row in rows
        for name in ("better", "worse")
    ]


def calibrate(judge: Judge, rows: Sequence[Graded], scores: Sequence[float]) -> Calibration:
    """Compare `scores`, in the order of `graded_items`, with the grades."""
    better, worse = np.array(scores[0::2]), np.array(scores[1::2])
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
        longer_is_better=_share(rows, len),
        overlap_is_better=float(
            np.mean(
                [
                    token_f1(row.better, row.reference) > token_f1(row.worse, row.reference)
                    for row in rows
                ]
            )
        ),
    )


def order_flip_rate(judge: ModelJudge, rows: Sequence[Graded]) -> float:
    """Share of pairs whose winner changes with the order in which the two answers are shown."""
    first = judge.prefers_first(
        [(row.question, row.reference, row.better, row.worse) for row in rows]
    )
    second = judge.prefers_first(
        [(row.question, row.reference, row.worse, row.better) for row in rows]
    )
    return float(np.mean([(a > 0.5) == (b > 0.5) for a, b in zip(first, second, strict=True)]))


def _share(rows: Sequence[Graded], measure: Any) -> float:
    return float(np.mean([measure(row.better) > measure(row.worse) for row in rows]))


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of `n` rows; unlike the normal one it stays inside [0, 1]."""
    if n == 0:
        return 0.0, 1.0
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation; None where one side does not vary."""
    if len(x) < 3 or np.std(x) == 0 or np.std(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def parse_graded(rows: Sequence[dict[str, Any]]) -> list[Graded]:
    """Graded rows out of plain ones.

    Raises:
        DataError: a field is missing, or there are too few rows to say anything.
    """
    graded = []
    for number, row in enumerate(rows, 1):
        values = [row.get(name) for name in ("question", "reference", "better", "worse")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise DataError(
                f"run.judge.calibration: row {number} lacks question, reference, better or worse"
            )
        graded.append(Graded(str(row.get("id", number)), *map(str, values)))
    if len(graded) < 10:
        raise DataError(
            f"run.judge.calibration: {len(graded)} graded rows are too few to calibrate a judge (at least 10)"
        )
    return graded
