"""Graded answers: pairs of a better and a worse answer, and statements that an answer meets or not.

They come from the rows of `run.judge.calibration`, or from a user's own file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

from medjob.data.columns import Row, UnusableRow, is_number
from medjob.data.criteria import STATED, Criterion
from medjob.data.raw_row import RawRow
from medjob.errors import DataError

MIN_ROWS = 10
_PAIR = ("question", "reference", "better", "worse")
_SINGLE = ("question", "answer", "grade")
_LABELLED = ("question", "answer", "criterion", "met")
_STATEMENT = ("question", "answer", "claim", "majority_label")
_ANNOTATORS = ("label_0", "label_1", "label_2")
_LABELS = {
    **dict.fromkeys(("true", "yes", "1", "met", "entailment"), True),
    **dict.fromkeys(("false", "no", "0", "not met", "neutral", "contradiction"), False),
}
_HINT = (
    f"each row needs the columns {', '.join(_PAIR)}; or question, answer and grade (0 to 1, or 1 "
    "to 5), and reference if there is one; or question, answer, criterion and met (true or false)"
)
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class GradedRow:
    """A question with a better and a worse answer."""

    id: str
    question: str
    reference: str
    """Empty if the row has none."""
    better: str
    worse: str
    group: str = ""
    """Rows of one group share answers, so they are not independent. Default: each row is one."""


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """An answer, a criterion, and whether a human says that the answer meets it."""

    id: str
    question: str
    answer: str
    criterion: Criterion
    met: bool
    group: str
    """Rows about the same answer are not independent."""
    annotators: tuple[bool, ...] = ()
    """Labels of the single humans behind `met`, if the row has them."""


@dataclass(frozen=True, slots=True)
class Grades:
    """What a file of a user's own grades holds: pairs, or labelled answers."""

    pairs: tuple[GradedRow, ...] = ()
    labelled: tuple[LabelledAnswer, ...] = ()


def parse_graded(rows: Sequence[Mapping[str, Any]]) -> list[GradedRow]:
    """Check the rows of `run.judge.calibration` and convert them.

    Raises:
        DataError: a field is missing or empty, or there are too few rows.
    """
    graded = []
    for number, row in enumerate(rows, 1):
        try:
            graded.append(_pair(Row(row), str(number)))
        except UnusableRow as problem:
            raise DataError(
                f"run.judge.calibration: row {number}: {problem}",
                "each row needs the texts question, reference, better and worse",
            ) from None
    _check_enough("run.judge.calibration", "graded rows", graded)
    return graded


def parse_grades(name: str, rows: Iterable[RawRow]) -> Grades:
    """Check a user's own grades and convert them. All rows of a file have one layout.

    Args:
        name: The file, for messages.

    Raises:
        DataError: the columns are unknown, a cell is unusable, or there are too few rows.
    """
    read = [*rows]
    layout = _layout(name, read)
    converted = _converted(name, read)
    if layout == _PAIR:
        pairs = [*converted(_pair)]
    elif layout == _SINGLE:
        pairs = _pairs_of(name, [*converted(_single)])
    else:
        read_label = _claim if layout == _STATEMENT else _labelled
        labelled = [*converted(read_label)]
        _check_enough(name, "labelled answers", labelled)
        return Grades(labelled=tuple(labelled))
    _check_enough(name, "pairs of answers with different grades", pairs)
    return Grades(pairs=tuple(pairs))


def _layout(name: str, rows: Sequence[RawRow]) -> tuple[str, ...]:
    layouts = (_PAIR, _STATEMENT, _LABELLED, _SINGLE)
    for row in (Row(raw.fields) for raw in rows if not raw.problem):
        for layout in layouts:
            if all(row.mentions(column) for column in layout):
                return layout
        raise DataError(f"{name}: the columns are not those of graded answers", _HINT)
    raise DataError(f"{name}: no row can be read", _HINT)


def _converted(
    name: str, rows: Sequence[RawRow]
) -> Callable[[Callable[[Row, str], _Found]], Iterator[_Found]]:
    """Return a function that converts all rows, and names the place of one that is unusable."""

    def convert(convert_row: Callable[[Row, str], _Found]) -> Iterator[_Found]:
        for number, raw in enumerate(rows, 1):
            try:
                if raw.problem:
                    raise UnusableRow(raw.problem)
                yield convert_row(Row(raw.fields), str(number))
            except UnusableRow as problem:
                raise DataError(f"{name}: {raw.place}: {problem}", _HINT) from None

    return convert


def _check_enough(name: str, what: str, rows: Sequence[object]) -> None:
    if len(rows) < MIN_ROWS:
        raise DataError(
            f"{name}: {len(rows)} {what} are too few to calibrate a judge (at least {MIN_ROWS})",
            "add rows; about 50 show whether a judge is better than the trivial rules",
        )


def _text(row: Row, name: str) -> str:
    if not row.has(name):
        raise row.missing((name,))
    return row.text(name)


def _pair(row: Row, number: str) -> GradedRow:
    # Ids of the rows themselves may be repeated, and replies are kept by id.
    return GradedRow(number, *(_text(row, name) for name in _PAIR))


# ---- single answers with grades


@dataclass(frozen=True, slots=True)
class _Single:
    number: str
    question: str
    reference: str
    answer: str
    grade: float


def _single(row: Row, number: str) -> _Single:
    question, answer = _text(row, "question"), _text(row, "answer")
    return _Single(number, question, row.text("reference"), answer, _grade(row))


def _grade(row: Row) -> float:
    value = row.get("grade")
    grade: Any
    try:
        grade = float(value) if isinstance(value, str) else value
    except ValueError:
        grade = None
    if not is_number(grade):
        raise UnusableRow("grade is not a number")
    return float(grade)


def _pairs_of(name: str, answers: Sequence[_Single]) -> list[GradedRow]:
    """Return every two answers to the same question that have different grades."""
    grades = [each.grade for each in answers]
    if not (all(0 <= grade <= 1 for grade in grades) or all(1 <= grade <= 5 for grade in grades)):
        raise DataError(
            f"{name}: the grades are neither all between 0 and 1 nor all between 1 and 5 (lowest "
            f"{min(grades):g}, highest {max(grades):g})",
            "use one of the two scales in the whole file",
        )
    groups: dict[tuple[str, str], list[_Single]] = defaultdict(list)
    for each in answers:
        groups[each.question, each.reference].append(each)
    return [
        _as_pair(first, second, group=members[0].number)
        for members in groups.values()
        for first, second in combinations(members, 2)
        if first.grade != second.grade
    ]


def _as_pair(first: _Single, second: _Single, group: str) -> GradedRow:
    better, worse = (first, second) if first.grade > second.grade else (second, first)
    number = f"{first.number}-{second.number}"
    return GradedRow(number, first.question, first.reference, better.answer, worse.answer, group)


# ---- criteria


def _labelled(row: Row, number: str) -> LabelledAnswer:
    question, answer = _text(row, "question"), _text(row, "answer")
    criterion = Criterion(_text(row, "criterion"))
    met = _label(row.get("met"), "met")
    return LabelledAnswer(number, question, answer, criterion, met, f"{question}\n{answer}")


def _claim(row: Row, number: str) -> LabelledAnswer:
    """Convert a row of K-QA: an answer, a statement that it has to make, and the labels of three
    physicians. An answer meets it if it entails the statement."""
    question, answer = _text(row, "question"), _text(row, "answer")
    criterion = Criterion(STATED + _text(row, "claim"))
    met = _label(row.get("majority_label"), "majority_label")
    single = tuple(_label(value, name) for name, value in row.present(_ANNOTATORS))
    return LabelledAnswer(number, question, answer, criterion, met, f"{question}\n{answer}", single)


def _label(value: Any, name: str) -> bool:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    met = _LABELS.get(str(value).strip().casefold())
    if met is None:
        raise UnusableRow(f"{name} is not true or false")
    return met
