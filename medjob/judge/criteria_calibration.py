"""Calibration of a judge that is asked whether answers meet criteria, with labels by humans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from medjob.data.criteria import is_met
from medjob.data.text import words
from medjob.judge.graded import LabelledAnswer
from medjob.judge.questions import Item
from medjob.judge.scoring import Judge
from medjob.judge.statistics import bootstrapped_kappa, effective_rows, kappa, wilson
from medjob.stage import RowExtras

_EXAMPLES = 6
_HALF = 0.5


@dataclass(frozen=True, slots=True)
class WrongLabel:
    """A labelled answer about which a judge and the humans differ."""

    question: str
    answer: str
    criterion: str
    met: bool
    """What the humans say."""
    probability: float
    """The judge's probability that the answer meets the criterion."""


@dataclass(frozen=True, slots=True)
class CriteriaCalibration:
    """A judge's results on the labelled answers. Intervals cover 95 %, and allow for labels of the
    same answer not being independent."""

    judge: str
    rows: int
    answers: int
    """Number of different answers."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    kappa: float | None
    """Cohen's kappa with the humans."""
    kappa_low: float
    kappa_high: float
    auc: float | None
    """Probability that a met criterion gets a higher probability than one that is not met. It does
    not depend on the limit of 0.5. None if all labels are the same."""
    met: float
    """Share of criteria that are met, according to the humans."""
    judged_met: float
    """The same, according to the judge."""
    commoner_label: float
    """Accuracy of always giving the commoner label."""
    words_in_answer: float
    """Accuracy of calling a criterion met if half of its words are in the answer."""
    human_kappa: float | None
    """Mean kappa between two of the annotators, if the rows name them."""
    examples: tuple[WrongLabel, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the lower end of the accuracy's interval is above both trivial rules."""
        return self.accuracy_low > max(self.commoner_label, self.words_in_answer)

    def sentence(self) -> str:
        """Summarise the result in one line."""
        agreement = "" if self.kappa is None else f", kappa {self.kappa:.2f}"
        humans = "" if self.human_kappa is None else f" (between annotators {self.human_kappa:.2f})"
        return (
            f"judge {self.judge}: right about {self.accuracy:.0%} of {self.rows} criteria (95% "
            f"interval {self.accuracy_low:.0%}-{self.accuracy_high:.0%}){agreement}{humans}; the "
            f"commoner label is right about {self.commoner_label:.0%}, half of the criterion's "
            f"words in the answer about {self.words_in_answer:.0%}: "
            f"{'calibrated' if self.passed else 'NOT calibrated'}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, and whether the judge passed. The examples are left out."""
        figures = {name: value for name, value in asdict(self).items() if name != "examples"}
        return {**figures, "passed": self.passed}


def labelled_items(rows: Sequence[LabelledAnswer]) -> list[Item]:
    """Return what the judge is asked about the rows."""
    return [Item(row.id, row.question, "", row.answer, (row.criterion,)) for row in rows]


def calibrate_criteria(
    judge: Judge, rows: Sequence[LabelledAnswer], extras: RowExtras
) -> CriteriaCalibration:
    """Compare a judge's replies with the labels. The overlap has none, and its scores
    are used."""
    found = judge.score(extras, "labelled", labelled_items(rows))
    probabilities = [(found[row.id].met or (found[row.id].value,))[0] for row in rows]
    labels = [row.met for row in rows]
    judged = [is_met(probability) for probability in probabilities]
    groups = [row.group for row in rows]
    right = [float(a == b) for a, b in zip(labels, judged, strict=True)]
    accuracy = float(np.mean(right))
    low, high = wilson(accuracy, effective_rows(right, groups))
    kappa_low, kappa_high = bootstrapped_kappa(labels, judged, groups)
    met = float(np.mean(labels))
    by_words = [_has_words(row) == row.met for row in rows]
    return CriteriaCalibration(
        judge=judge.name,
        rows=len(rows),
        answers=len(set(groups)),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        kappa=kappa(labels, judged),
        kappa_low=kappa_low,
        kappa_high=kappa_high,
        auc=_auc(labels, probabilities),
        met=met,
        judged_met=float(np.mean(judged)),
        commoner_label=max(met, 1 - met),
        words_in_answer=float(np.mean(by_words)),
        human_kappa=_between_annotators(rows),
        examples=_examples(rows, probabilities),
    )


def _has_words(row: LabelledAnswer) -> bool:
    wanted, said = set(words(row.criterion.text)), set(words(row.answer))
    return len(wanted & said) >= _HALF * len(wanted)


def _auc(labels: Sequence[bool], probabilities: Sequence[float]) -> float | None:
    met = np.array([p for label, p in zip(labels, probabilities, strict=True) if label])
    not_met = np.array([p for label, p in zip(labels, probabilities, strict=True) if not label])
    if not len(met) or not len(not_met):
        return None
    difference = met[:, None] - not_met[None, :]
    return float(np.where(difference == 0, 0.5, difference > 0).mean())


def _between_annotators(rows: Sequence[LabelledAnswer]) -> float | None:
    labels = [row.annotators for row in rows]
    if len(labels[0]) < 2 or any(len(each) != len(labels[0]) for each in labels):
        return None
    columns = [*zip(*labels, strict=True)]
    values = [kappa(first, second) for first, second in combinations(columns, 2)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _examples(
    rows: Sequence[LabelledAnswer], probabilities: Sequence[float]
) -> tuple[WrongLabel, ...]:
    wrong = [
        WrongLabel(row.question, row.answer, row.criterion.text, row.met, probability)
        for row, probability in zip(rows, probabilities, strict=True)
        if is_met(probability) != row.met
    ]
    wrong.sort(key=lambda each: -abs(each.probability - float(each.met)))
    return tuple(wrong[:_EXAMPLES])
