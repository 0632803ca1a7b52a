"""Criteria of a good answer, and the score of an answer that meets some of them.

The same object serves the judge, the evaluation and a reward. It is plain data without models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medjob.data.columns import (
    Row,
    UnusableRow,
    checked,
    is_empty,
    normal_name,
    to_text,
    unpacked,
)

OWN = "rubric"
HEALTHBENCH = "rubrics"
MUST_HAVE, NICE_TO_HAVE = "must_have", "nice_to_have"
COLUMNS = (OWN, HEALTHBENCH, MUST_HAVE, NICE_TO_HAVE)
_NICE_POINTS = 0.5
_MOST_POINTS = 1e6
_MET = 0.5
_TEXT_KEYS = ("text", "criterion")
STATED = "States or implies: "
"""What precedes a statement of K-QA, which is about medicine and not about an answer."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """Something that an answer does or does not do."""

    text: str
    points: float = 1.0
    """Negative points are for what an answer must not do, as in HealthBench."""
    critical: bool = False
    """Whether it is also reported apart, because points for other criteria cannot make up for
    it."""


@dataclass(frozen=True, slots=True)
class RubricScore:
    """How far an answer meets its criteria. All figures are in [0, 1]."""

    score: float
    """Points of the criteria that are met / all positive points, as in HealthBench."""
    expected: float
    """The same with each criterion's points times the probability that it is met. It rarely ties,
    so it orders two answers better (decision 17)."""
    critical: float | None
    """Share of the critical criteria that the answer satisfies: it meets one with positive points,
    or does not do what has negative points. None if there are none."""


def score_criteria(criteria: Sequence[Criterion], probabilities: Sequence[float]) -> RubricScore:
    """Score an answer.

    Args:
        criteria: At least one with positive points.
        probabilities: For each criterion, the probability that the answer meets it. It is met from
            0.5 on.
    """
    met = [float(is_met(probability)) for probability in probabilities]
    satisfied = [
        bool(m) == (each.points >= 0)
        for each, m in zip(criteria, met, strict=True)
        if each.critical
    ]
    return RubricScore(
        score=_share_of_points(criteria, met),
        expected=_share_of_points(criteria, probabilities),
        critical=sum(satisfied) / len(satisfied) if satisfied else None,
    )


def is_met(probability: float) -> bool:
    """Whether a criterion counts as met."""
    return probability >= _MET


def _share_of_points(criteria: Sequence[Criterion], met: Sequence[float]) -> float:
    positive = sum(each.points for each in criteria if each.points > 0)
    points = sum(each.points * share for each, share in zip(criteria, met, strict=True))
    return min(1.0, max(0.0, points / positive))


def as_json(criteria: Sequence[Criterion]) -> str:
    """Write criteria as text, for a column of a table. No criteria are an empty text."""
    if not criteria:
        return ""
    return json.dumps([asdict(each) for each in criteria], ensure_ascii=False)


def from_json(text: str | None) -> tuple[Criterion, ...]:
    """Read what `as_json` wrote."""
    return tuple(Criterion(**each) for each in json.loads(text)) if text else ()


def has_criteria(row: Row) -> bool:
    """Whether a raw row has a column with a list of criteria.

    A text in such a column is something else: Prometheus, for example, describes grades in
    `rubric`.
    """
    return any(_is_list(row.get(name)) for name in COLUMNS)


def read_criteria(row: Row) -> tuple[Criterion, ...]:
    """Read the criteria of a raw row: medjob's own, HealthBench's or K-QA's.

    Raises:
        UnusableRow: a criterion has no text or no finite points, no criterion has positive points,
            a list is empty, or two columns hold different criteria.
    """
    found = [*_of_objects(row), *_of_statements(row)]
    if not found:
        return ()
    if any(criteria != found[0] for criteria in found[1:]):
        raise UnusableRow("the row has several columns with criteria, which differ")
    if not any(each.points > 0 for each in found[0]):
        raise UnusableRow("no criterion has positive points")
    return found[0]


def _of_objects(row: Row) -> Iterator[tuple[Criterion, ...]]:
    """Read medjob's own column and HealthBench's."""
    for name in (OWN, HEALTHBENCH):
        items = _items(row, name)
        if items is not None:
            yield tuple(_criterion(item, name, n) for n, item in enumerate(_filled(items, name), 1))


def _of_statements(row: Row) -> Iterator[tuple[Criterion, ...]]:
    """Read K-QA's two columns. Either list may be empty."""
    must, nice = (_items(row, name) for name in (MUST_HAVE, NICE_TO_HAVE))
    if must is None and nice is None:
        return
    _filled([*(must or ()), *(nice or ())], MUST_HAVE)
    yield tuple(
        Criterion(STATED + _text(item, name, number), points, is_critical)
        for name, items, points, is_critical in (
            (MUST_HAVE, must, 1.0, True),
            (NICE_TO_HAVE, nice, _NICE_POINTS, False),
        )
        for number, item in enumerate(items or (), 1)
    )


def _is_list(value: Any) -> bool:
    """Whether a cell holds a list. A CSV file holds it as text."""
    if isinstance(value, str):
        return value.lstrip().startswith("[")
    return isinstance(value, list | tuple)


def _items(row: Row, name: str) -> Sequence[Any] | None:
    """Return the list in a column, which can be empty. None if the column holds no list."""
    value = row.get(name)
    if value is None:
        value = row.empty.get(normal_name(name))
    if not _is_list(value):
        return None
    value = unpacked(value)
    if isinstance(value, str):
        raise UnusableRow(f"{name} cannot be parsed")
    items: Sequence[Any] = value
    return items


def _filled(items: Sequence[Any], name: str) -> Sequence[Any]:
    if not items:
        raise UnusableRow(f"{name} has no criteria")
    return items


def _criterion(item: Any, column: str, number: int) -> Criterion:
    """Convert an item of a list: a text of one point, or an object."""
    if isinstance(item, str):
        return Criterion(_text(item, column, number))
    if not isinstance(item, Mapping):
        raise UnusableRow(f"{column} has an item that is not an object ({type(item).__name__})")
    text = next((item[key] for key in _TEXT_KEYS if not is_empty(item.get(key))), None)
    critical = item.get("critical")
    if critical not in (None, True, False):
        raise UnusableRow(f"critical is not true or false in {column} (criterion {number})")
    return Criterion(_text(text, column, number), _points(item, column, number), bool(critical))


def _points(item: Mapping[str, Any], column: str, number: int) -> float:
    points: Any = item.get("points")
    is_number = isinstance(points, int | float) and not isinstance(points, bool)
    if not is_number or not abs(points) <= _MOST_POINTS:  # NaN is not less than anything
        raise UnusableRow(f"a criterion in {column} has no usable points (criterion {number})")
    return float(points)


def _text(value: Any, column: str, number: int) -> str:
    if is_empty(value):
        raise UnusableRow(f"a criterion in {column} has no text (criterion {number})")
    return checked(to_text(value, f"a criterion in {column}"), column)
