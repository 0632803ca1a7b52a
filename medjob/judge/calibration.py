"""Calibration: a judge's agreement with graded answers, compared with trivial rules.

It also shows whether an answer that grades itself gets a better score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medjob.artifacts.shard import WHOLE
from medjob.data.criteria import STATED, Criterion
from medjob.errors import GateError
from medjob.judge.graded import GradedRow
from medjob.judge.questions import Comparison, Item
from medjob.judge.scoring import Judge, JudgePanel, ModelJudge, token_f1
from medjob.judge.self_grading import ADDITIONS, CRITERION_ADDITIONS
from medjob.judge.statistics import correlation, effective_rows, wilson
from medjob.stage import RowExtras

_SELF_GRADING_ROWS = 24
_REVERSED = 0.25  # agreement
_SWAYED_BY = 0.05  # difference of two scores, as in the default of run.judge.min_margin
_EXAMPLES = 6
_PURPOSE = "calibration"

By = Literal["aspects", "criteria"]
"""What a judge is asked about an answer: aspects, or whether it meets criteria."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A graded row that a judge orders in the other way, or not at all."""

    question: str
    better: str
    worse: str
    better_score: float
    worse_score: float


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
    by: By = "aspects"
    agreement_if_longer: float | None = None
    """Agreement where the better answer is the longer one. A judge that likes length has a much
    higher one here than in the other rows."""
    agreement_if_shorter: float | None = None
    """Agreement where the better answer is not the longer one."""
    examples: tuple[Disagreement, ...] = ()
    """The rows that the judge orders most clearly in the other way."""

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
        asked = ", asked about criteria," if self.by == "criteria" else ":"
        return (
            f"judge {self.judge}{asked} agrees with {self.agreement:.0%} of {self.rows} graded "
            f"rows (95% interval {self.agreement_low:.0%}-{self.agreement_high:.0%}); choosing the "
            f"longer answer agrees with {self.longer_is_better:.0%}, choosing the answer with more "
            f"words of the reference with {self.overlap_is_better:.0%}{self._self_grading()}: "
            f"{verdict}"
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
        """Return all figures, and whether the judge passed. The examples are left out."""
        figures = {name: value for name, value in asdict(self).items() if name != "examples"}
        return {**figures, "passed": self.passed}


def graded_items(rows: Sequence[GradedRow], by: By = "aspects") -> list[Item]:
    """Return the better and the worse answer of each row, alternating. Then, for some rows, the
    worse answer with an irrelevant sentence and with a grade of itself, alternating.

    To ask about criteria, the reference becomes one: the answer has to say the same.
    """
    additions = ADDITIONS if by == "aspects" else CRITERION_ADDITIONS
    items = []
    for row in rows:
        items.append(_item(row, "better", row.better, by))
        items.append(_item(row, "worse", row.worse, by))
    for number, row in enumerate(rows[:_SELF_GRADING_ROWS]):
        for name, addition in additions[number % len(additions)]._asdict().items():
            items.append(_item(row, name, row.worse + addition, by))
    return items


def _item(row: GradedRow, name: str, answer: str, by: By) -> Item:
    criteria = (Criterion(STATED + row.reference),) if by == "criteria" else ()
    return Item(f"{row.id}/{name}", row.question, row.reference, answer, criteria)


def calibrate(
    judge: Judge, rows: Sequence[GradedRow], extras: RowExtras, by: By = "aspects"
) -> Calibration:
    """Score the graded rows, and compare the scores with the grades.

    Every shard does this for all rows, since it has to know whether its judge passes.

    Raises:
        GateError: a score is not a finite number.
    """
    items = graded_items(rows, by)
    extras = replace(extras, shard=WHOLE)
    found = judge.score(extras, f"{_PURPOSE}-{by}", items)
    scores = np.array([found[item.id].value for item in items])
    unknown = int((~np.isfinite(scores)).sum())
    if unknown:
        raise GateError(
            f"judge {judge.name}: {unknown} of {len(scores)} scores are not finite numbers",
            "set run.dtype to bfloat16 or float32, or name another run.judge.model",
        )
    self_grading = scores[2 * len(rows) :]
    better, worse = scores[0 : 2 * len(rows) : 2], scores[1 : 2 * len(rows) : 2]
    right = _right(better - worse, 0)
    low, high = wilson(
        float(right.mean()), effective_rows([*right], [r.group or r.id for r in rows])
    )
    longer = np.array([len(row.better) > len(row.worse) for row in rows])
    lengths = [float(len(text)) for row in rows for text in (row.better, row.worse)]
    return Calibration(
        judge=judge.name,
        rows=len(rows),
        agreement=float(right.mean()),
        agreement_low=low,
        agreement_high=high,
        tie_rate=float((better == worse).mean()),
        order_flip_rate=_order_flip_rate(judge, rows, extras) if by == "aspects" else None,
        length_correlation=correlation(lengths, [*scores[: 2 * len(rows)]]),
        longer_is_better=float(longer.mean()),
        overlap_is_better=float(np.mean([overlap_is_better(row) for row in rows])),
        kind=judge.kind,
        self_grading_rows=len(self_grading) // 2,
        self_grading_wins=_self_grading_wins(self_grading),
        by=by,
        agreement_if_longer=_mean(right[longer]),
        agreement_if_shorter=_mean(right[~longer]),
        examples=_examples(rows, better, worse),
    )


def _right(differences: npt.NDArray[np.float64], tie: float) -> npt.NDArray[np.float64]:
    """Return 1 for a positive difference and 0 for a negative one. One of at most `tie` in size is
    half right."""
    return np.where(np.abs(differences) <= tie, 0.5, differences > 0).astype(float)


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _self_grading_wins(scores: npt.NDArray[np.float64]) -> float | None:
    return _mean(_right(scores[1::2] - scores[0::2], _SWAYED_BY))


def overlap_is_better(row: GradedRow) -> bool:
    """Whether the better answer has more overlap with the reference, which is the trivial rule."""
    return token_f1(row.better, row.reference) > token_f1(row.worse, row.reference)


def _examples(
    rows: Sequence[GradedRow], better: npt.NDArray[np.float64], worse: npt.NDArray[np.float64]
) -> tuple[Disagreement, ...]:
    order = np.argsort(better - worse, kind="stable")
    return tuple(
        Disagreement(
            rows[n].question, rows[n].better, rows[n].worse, float(better[n]), float(worse[n])
        )
        for n in order[:_EXAMPLES].tolist()
        if better[n] <= worse[n]
    )


def comparisons(rows: Sequence[GradedRow]) -> list[Comparison]:
    """Return each row's better answer before its worse one, and the same in the other order."""
    pairs = [Comparison(r.id, r.question, r.reference, r.better, r.worse) for r in rows]
    return [*pairs, *(pair.swapped() for pair in pairs)]


def _order_flip_rate(judge: Judge, rows: Sequence[GradedRow], extras: RowExtras) -> float | None:
    """Return the share of rows whose winner changes when the two answers swap places. None for a
    judge that does not see two answers."""
    if not isinstance(judge, ModelJudge | JudgePanel):
        return None
    pairs = comparisons(rows)
    first = judge.prefers_first(extras, _PURPOSE, pairs)
    # If the answer in the same place wins both times, the order decided.
    flips = [(first[p.id] > 0.5) == (first[p.swapped().id] > 0.5) for p in pairs[: len(rows)]]
    return float(np.mean(flips))
