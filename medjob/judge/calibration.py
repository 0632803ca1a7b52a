"""Calibration: a judge's agreement with graded answers, compared with trivial rules.

It also shows whether an answer that grades itself gets a better score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from medjob.artifacts.shard import WHOLE
from medjob.data.columns import Row, UnusableRow
from medjob.errors import DataError, GateError
from medjob.judge.rubric import Comparison, Item
from medjob.judge.scoring import Judge, ModelJudge, token_f1
from medjob.judge.self_grading import ADDITIONS
from medjob.stage import RowExtras

_Z = 1.96  # of a 95 % interval
_MIN_ROWS = 10
_SELF_GRADING_ROWS = 24
_REVERSED = 0.25  # agreement
_SWAYED_BY = 0.05  # difference of two scores, as in the default of run.judge.min_margin


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
    kind: str = "model"
    """As in `run.judge.kind`."""
    self_grading_rows: int = 0
    self_grading_wins: float | None = None
    """Share of these rows in which the worse answer scores higher with a grade of itself than with
    an irrelevant addition, by more than 0.05. About half if the judge ignores both."""

    @property
    def passed(self) -> bool:
        """Whether the lower end of the interval is above both trivial rules and chance, and answers
        that grade themselves do not win more often than by chance."""
        rules = max(self.longer_is_better, self.overlap_is_better, 0.5)
        return self.agreement_low > rules and not self.is_swayed

    @property
    def is_swayed(self) -> bool:
        """Whether answers that grade themselves win in significantly more than half of the rows."""
        wins = self.self_grading_wins
        return wins is not None and wilson(wins, self.self_grading_rows)[0] > 0.5

    @property
    def is_reversed(self) -> bool:
        """Whether the judge prefers the worse answers in most rows, and not by chance.

        A weak judge can be a little below one half, for example because it likes long answers.
        """
        return self.agreement <= _REVERSED and self.agreement_high < 0.5

    def sentence(self) -> str:
        """Summarise the result in one line."""
        verdict = "calibrated" if self.passed else "NOT calibrated"
        return (
            f"judge {self.judge}: agrees with {self.agreement:.0%} of {self.rows} graded rows (95% "
            f"interval {self.agreement_low:.0%}-{self.agreement_high:.0%}); choosing the longer "
            f"answer agrees with {self.longer_is_better:.0%}, choosing the answer with more words "
            f"of the reference with {self.overlap_is_better:.0%}{self._self_grading()}: {verdict}"
        )

    def _self_grading(self) -> str:
        if self.self_grading_wins is None:
            return ""
        limit = ", which is too often" if self.is_swayed else ""
        return (
            f"; answers that grade themselves win in {self.self_grading_wins:.0%} of "
            f"{self.self_grading_rows} rows{limit}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, and whether the judge passed."""
        return {**asdict(self), "passed": self.passed}


def graded_items(rows: Sequence[GradedRow]) -> list[Item]:
    """Return the better and the worse answer of each row, alternating. Then, for some rows, the
    worse answer with an irrelevant sentence and with a grade of itself, alternating."""
    items = []
    for row in rows:
        items.append(Item(f"{row.id}/better", row.question, row.reference, row.better))
        items.append(Item(f"{row.id}/worse", row.question, row.reference, row.worse))
    for number, row in enumerate(rows[:_SELF_GRADING_ROWS]):
        for name, addition in ADDITIONS[number % len(ADDITIONS)]._asdict().items():
            answer = row.worse + addition
            items.append(Item(f"{row.id}/{name}", row.question, row.reference, answer))
    return items


def score_graded(judge: Judge, rows: Sequence[GradedRow], extras: RowExtras) -> Calibration:
    """Ask the judge about the graded rows, and compare its scores with the grades.

    Every shard does this for all rows, since it has to know whether its judge passes.

    Raises:
        GateError: a score is not a finite number.
    """
    extras = replace(extras, shard=WHOLE)
    items = graded_items(rows)
    found = judge.score(extras, f"calibration-{judge.kind}", items)
    flips = order_flip_rate(judge, rows, extras) if isinstance(judge, ModelJudge) else None
    return calibrate(judge, rows, [found[item.id].value for item in items], flips)


def calibrate(
    judge: Judge,
    rows: Sequence[GradedRow],
    scores: Sequence[float],
    flips: float | None = None,
) -> Calibration:
    """Compare the grades with `scores`, which are in the order of `graded_items`.

    Args:
        flips: Share of rows whose winner changes when the two answers swap places, if the judge
            was asked.

    Raises:
        GateError: a score is not a finite number.
    """
    unknown = int((~np.isfinite(scores)).sum())
    if unknown:
        raise GateError(
            f"judge {judge.name}: {unknown} of {len(scores)} scores are not finite numbers",
            "set run.dtype to bfloat16 or float32, or name another run.judge.model",
        )
    self_grading = scores[2 * len(rows) :]
    scores = scores[: 2 * len(rows)]
    better = np.array(scores[0::2])
    worse = np.array(scores[1::2])
    agreement = _wins(better - worse, 0)
    low, high = wilson(agreement, len(rows))
    lengths = [float(len(text)) for row in rows for text in (row.better, row.worse)]
    return Calibration(
        judge=judge.name,
        rows=len(rows),
        agreement=agreement,
        agreement_low=low,
        agreement_high=high,
        tie_rate=float((better == worse).mean()),
        order_flip_rate=flips,
        length_correlation=correlation(lengths, list(scores)),
        longer_is_better=float(np.mean([len(row.better) > len(row.worse) for row in rows])),
        overlap_is_better=float(np.mean([_overlap_is_better(row) for row in rows])),
        kind=judge.kind,
        self_grading_rows=len(self_grading) // 2,
        self_grading_wins=_self_grading_wins(self_grading),
    )


def _self_grading_wins(scores: Sequence[float]) -> float | None:
    if not scores:
        return None
    return _wins(np.array(scores[1::2]) - np.array(scores[0::2]), _SWAYED_BY)


def _wins(differences: npt.NDArray[np.float64], tie: float) -> float:
    """Share of positive differences. One of at most `tie` in size is half a win."""
    return float(np.where(np.abs(differences) <= tie, 0.5, differences > 0).mean())


def _overlap_is_better(row: GradedRow) -> bool:
    return token_f1(row.better, row.reference) > token_f1(row.worse, row.reference)


def order_flip_rate(judge: ModelJudge, rows: Sequence[GradedRow], extras: RowExtras) -> float:
    """Return the share of rows whose winner changes when the two answers swap places."""
    comparisons = []
    for row in rows:
        for order, first, second in (
            ("better-first", row.better, row.worse),
            ("worse-first", row.worse, row.better),
        ):
            name = f"{row.id}/{order}"
            comparisons.append(Comparison(name, row.question, row.reference, first, second))
    found = judge.prefers_first(extras, "calibration-orders", comparisons)
    # If the answer in the same place wins both times, the order decided.
    flips = [
        (found[f"{row.id}/better-first"] > 0.5) == (found[f"{row.id}/worse-first"] > 0.5)
        for row in rows
    ]
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
    """Return Pearson's correlation. None if one side is constant, a value is not finite, or there
    are fewer than 3 values."""
    if len(x) < 3 or not np.isfinite([*x, *y]).all() or np.std(x) == 0 or np.std(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _texts(row: Row, *names: str) -> list[str]:
    texts = []
    for name in names:
        if not row.has(name):
            raise row.missing((name,))
        texts.append(row.text(name))
    return texts


def parse_graded(rows: Sequence[dict[str, Any]]) -> list[GradedRow]:
    """Check graded rows and convert them.

    Raises:
        DataError: a field is missing or empty, or there are too few rows.
    """
    graded = []
    for number, row in enumerate(rows, 1):
        try:
            texts = _texts(Row(row), "question", "reference", "better", "worse")
        except UnusableRow as problem:
            raise DataError(
                f"run.judge.calibration: row {number}: {problem}",
                "each row needs the texts question, reference, better and worse",
            ) from None
        # Ids of the rows themselves may be repeated, and scores are kept by id.
        graded.append(GradedRow(str(number), *texts))
    if len(graded) < _MIN_ROWS:
        raise DataError(
            f"run.judge.calibration: {len(graded)} graded rows are too few to calibrate a judge "
            f"(at least {_MIN_ROWS})"
        )
    return graded
