"""Human grades of the answers that an evaluation compares: `run.evaluate.human_grades`.

`evaluate` writes `grading.csv` with one line per answer. People fill in its column `grade`, from
the top, and the file is read back here.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medjob.config.judge import GradeScale
from medjob.data.columns import Row, UnusableRow, to_text
from medjob.data.raw_row import RawRow
from medjob.errors import DataError
from medjob.evaluate.metrics import EvaluatedAnswer

_RANGES: dict[GradeScale, tuple[float, float]] = {"1-5": (1.0, 5.0), "0-1": (0.0, 1.0)}
_KEY = "run.evaluate.human_grades"
SHEET = "grading.csv"
_COLUMNS = ("id", "model", "question", "reference", "answer", "answer_digest", "grade")
_DIGEST_LENGTH = 12  # hexadecimal digits
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True)
class GradableAnswer:
    """An answer to an open question, as one line of the sheet."""

    row_id: str
    model: str
    question: str
    reference: str
    answer: str

    @property
    def digest(self) -> str:
        """Digest of the answer, by which a grade of another answer is recognised."""
        return hashlib.sha256(self.answer.encode(errors="replace")).hexdigest()[:_DIGEST_LENGTH]


@dataclass(frozen=True, slots=True)
class HumanGrades:
    """Grades, converted to [0, 1]."""

    by_model: Mapping[str, Mapping[str, float]]
    """The grade of each row, by model and row id. Several grades of one answer are averaged."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many grades were not used, by reason."""


def gradable(answers: Mapping[str, Sequence[EvaluatedAnswer]]) -> list[GradableAnswer]:
    """Return the answers to open questions, without their reasoning, as the judge sees them."""
    return [
        GradableAnswer(
            row_id=answer.row["id"],
            model=model,
            question=answer.row["question"],
            reference=answer.row["reference"],
            answer=answer.parts.response,
        )
        for model, given in answers.items()
        for answer in given
        if answer.row["kind"] == "open"
    ]


def write_sheet(path: Path, answers: Iterable[GradableAnswer]) -> None:
    """Write the sheet, in the order of row ids. Ids are hashes, so any number of rows from the top
    is a random sample, in which each row has the answers of all models."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for each in sorted(answers, key=lambda answer: answer.row_id):
            texts = map(_without_formula, (each.model, each.question, each.reference, each.answer))
            writer.writerow([each.row_id, *texts, each.digest, ""])


def _without_formula(text: str) -> str:
    """Return a text that no spreadsheet runs as a formula. Answers are not trusted."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


@dataclass(frozen=True, slots=True)
class GradedLine:
    """One line of the file that has a grade."""

    place: str
    """File and line, for messages."""
    row_id: str
    question: str
    model: str
    digest: str
    """Digest of the graded answer, or nothing if the file does not say."""
    grade: float
    """In [0, 1]."""


def read_grades(
    rows: Iterable[RawRow], scale: GradeScale, models: Sequence[str]
) -> list[GradedLine]:
    """Read the lines that have a grade. Call it before any answer is generated: it finds mistakes
    in the file.

    Raises:
        DataError: a line cannot be read, names another model or has a grade outside of the scale,
            or no line has a grade.
    """
    lines = []
    for raw in rows:
        try:
            line = _graded_line(raw, scale, models)
        except UnusableRow as problem:
            raise DataError(f"{_KEY}: {raw.place}: {problem}", _hint(scale)) from None
        if line is not None:
            lines.append(line)
    if not lines:
        raise DataError(f"{_KEY}: no line has a grade", _hint(scale))
    return lines


def _graded_line(raw: RawRow, scale: GradeScale, models: Sequence[str]) -> GradedLine | None:
    if raw.problem:
        raise UnusableRow(raw.problem)
    row = Row(raw.fields)
    if not row.has("grade"):
        if row.mentions("grade"):
            return None
        raise row.missing(("grade",))
    grade = _grade(row.get("grade"), scale)
    if not row.has("id", "question"):
        raise row.missing(("id",))
    if not row.has("model"):
        raise row.missing(("model",))
    model = row.text("model")
    if model not in models:
        raise UnusableRow(f"the model is none of those compared ({', '.join(models)})")
    return GradedLine(
        place=raw.place,
        row_id=row.text("id", numbers=True),
        question=_squeezed(row.text("question")),
        model=model,
        digest=row.text("answer_digest", numbers=True),
        grade=grade,
    )


def _grade(value: Any, scale: GradeScale) -> float:
    """Convert a grade to [0, 1].

    Raises:
        UnusableRow: it is not a number on the scale.
    """
    low, high = _RANGES[scale]
    text = to_text(value, "grade", numbers=True)
    try:
        number = float(text)
    except ValueError:
        raise UnusableRow("grade is not a number") from None
    if not low <= number <= high:
        raise UnusableRow(
            f"grade is {number:g}, and run.evaluate.grade_scale is {scale}; all grades of a file "
            "have one scale"
        )
    return (number - low) / (high - low)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def match_grades(lines: Sequence[GradedLine], answers: Sequence[GradableAnswer]) -> HumanGrades:
    """Match grades with the answers of this evaluation.

    Grades of questions that are not evaluated, and of other answers, are left out and counted.

    Raises:
        DataError: several rows have a line's question, or no grade is of an evaluated answer.
    """
    by_id = {(answer.model, answer.row_id): answer for answer in answers}
    by_question: dict[tuple[str, str], list[GradableAnswer]] = defaultdict(list)
    for each in answers:
        by_question[each.model, _squeezed(each.question)].append(each)
    grades: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    left_out: Counter[str] = Counter()
    for line in lines:
        answer = by_id.get((line.model, line.row_id))
        if answer is None:  # spreadsheets turn ids that look like numbers into numbers
            answer = _only(line, by_question.get((line.model, line.question), []))
        if answer is None:
            left_out["of questions that are not evaluated"] += 1
        elif line.digest not in ("", answer.digest):
            left_out["of answers that this evaluation did not generate"] += 1
        else:
            grades[line.model][answer.row_id].append(line.grade)
    if not grades:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DataError(
            f"{_KEY}: no grade can be used ({reasons})",
            f"grade the {SHEET} of an evaluation of the same models and rows",
        )
    means = {
        model: {row_id: sum(given) / len(given) for row_id, given in by_row.items()}
        for model, by_row in grades.items()
    }
    return HumanGrades(means, dict(left_out))


def _only(line: GradedLine, found: Sequence[GradableAnswer]) -> GradableAnswer | None:
    if len(found) > 1:
        raise DataError(
            f"{_KEY}: {line.place}: {len(found)} evaluation rows have this question",
            f"name the row by its id, as in {SHEET}",
        )
    return found[0] if found else None


def _hint(scale: GradeScale) -> str:
    return (
        f"each line needs id or question, model, and a grade from {scale.replace('-', ' to ')}, as "
        f"in the evaluation's {SHEET}; another scale is set with run.evaluate.grade_scale"
    )
