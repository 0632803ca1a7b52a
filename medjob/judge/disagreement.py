"""How much several judges differ about the same answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from medjob.judge.scoring import Score


@dataclass(frozen=True, slots=True)
class JudgeDisagreement:
    """How much several judges differ. Figures are means over every two of them."""

    judges: int
    answers: int
    mean_difference: float
    """Mean absolute difference of two judges' scores of an answer."""
    pairs: int
    other_order: float | None
    """Share of the pairs that two judges order differently. A tie of one of them counts as half.
    None without pairs."""


def disagreement(
    scores: Mapping[str, Score], pairs: Iterable[tuple[str, str]]
) -> JudgeDisagreement | None:
    """Compare the judges. None if there is only one.

    Args:
        scores: By answer.
        pairs: Ids of the chosen and the rejected answer of each pair.
    """
    values = {id_: [*score.judges.values()] for id_, score in scores.items() if score.judges}
    if not values:
        return None
    differences = [abs(a - b) for each in values.values() for a, b in combinations(each, 2)]
    margins = [
        [a - b for a, b in zip(values[first], values[second], strict=True)]
        for first, second in pairs
    ]
    orders = [_differ(a, b) for each in margins for a, b in combinations(each, 2)]
    return JudgeDisagreement(
        judges=len(next(iter(values.values()))),
        answers=len(values),
        mean_difference=_mean(differences),
        pairs=len(margins),
        other_order=_mean(orders) if orders else None,
    )


def _differ(first: float, second: float) -> float:
    """Return how much two margins differ in their sign: 0, 0.5 or 1."""
    return abs(_sign(first) - _sign(second)) / 2


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
