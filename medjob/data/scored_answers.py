"""Preference data sets that list scored answers, or name their two sides in another way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from medjob.data.columns import Row, UnusableRow, is_empty, is_number, normal_name, unpacked

SIDES = ("chosen", "rejected")
_OTHER_NAMES = {
    "chosen": ("chosen_response", "response_chosen", "chosen_answer"),
    "rejected": ("rejected_response", "response_rejected", "rejected_answer"),
}
_ANSWERS = ("completions", "generations", "responses", "candidates")
_SCORES = ("ratings", "rating", "scores", "generation_scores", "overall_scores")
_TEXT_KEYS = ("response", "text", "content", "completion", "generation")
# UltraFeedback gives each answer an overall score of a critic, and the mean of its four aspects.
_SCORE_KEYS = ("overall_score", "score", "rating", "fine-grained_score")


def has_sides(row: Row) -> bool:
    """Whether a row has two answers of which one is better, or a list of scored answers."""
    if any(row.has(name, *_OTHER_NAMES[name]) for name in SIDES):
        return all(row.mentions(name, *_OTHER_NAMES[name]) for name in SIDES)
    return next(_lists(row), None) is not None


def with_sides(row: Row) -> Row:
    """Return a row with the columns `chosen` and `rejected`: of a list of scored answers, the best
    and the worst.

    Raises:
        UnusableRow: a list has fewer than two scored answers, or all have the same score; or two
            columns differ about a side.
    """
    values = dict(row.values)
    for side, names in _OTHER_NAMES.items():
        for name, value in row.present(names):
            if values.setdefault(side, value) != value:
                raise UnusableRow(f"{side} and {name} differ")
            values.pop(normal_name(name), None)
    if not any(side in values for side in SIDES):
        for name in _lists(row):
            values |= _best_and_worst(row, name)
            for used in (name, *_SCORES):
                values.pop(normal_name(used), None)
            break
    return _row(values, row)


def _row(values: Mapping[str, Any], original: Row) -> Row:
    found = Row(values)
    found.empty = original.empty
    return found


def _lists(row: Row) -> Iterator[str]:
    """Yield the columns that list scored answers."""
    for name, value in row.present(_ANSWERS):
        answers = unpacked(value)
        if isinstance(answers, list) and answers:
            has_own = any(
                isinstance(each, Mapping) and _score(each) is not None for each in answers
            )
            if has_own or any(isinstance(unpacked(s), list) for _, s in row.present(_SCORES)):
                yield name


def _best_and_worst(row: Row, name: str) -> dict[str, Any]:
    answers = unpacked(row.get(name))
    scores = _scores(row, name, answers)
    if len(answers) < 2:
        raise UnusableRow(f"{name} has {len(answers)} answer, and a pair needs two")
    best, worst = (scores.index(pick(scores)) for pick in (max, min))
    if scores[best] == scores[worst]:
        raise UnusableRow(f"all answers in {name} have the same score")
    sides = {"chosen": _text(answers[best]), "rejected": _text(answers[worst])}
    if any(is_empty(side) for side in sides.values()):
        raise UnusableRow(f"the best or the worst answer in {name} is empty")
    return sides


def _scores(row: Row, name: str, answers: list[Any]) -> list[float]:
    lists = ((column, unpacked(value)) for column, value in row.present(_SCORES))
    column, scores = next((each for each in lists if isinstance(each[1], list)), (name, None))
    if scores is None:
        scores = [_score(each) if isinstance(each, Mapping) else None for each in answers]
    if len(scores) != len(answers):
        raise UnusableRow(f"{column} does not have one score for each answer in {name}")
    numbers = [_number(each) for each in scores]
    if any(number is None for number in numbers):
        raise UnusableRow(f"an answer in {name} has no score")
    return [number for number in numbers if number is not None]


def _score(answer: Mapping[str, Any]) -> float | None:
    for key in _SCORE_KEYS:
        number = _number(answer.get(key))
        if number is not None:
            return number
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if is_number(value) else None


def _text(answer: Any) -> Any:
    if not isinstance(answer, Mapping):
        return answer
    return next((answer[key] for key in _TEXT_KEYS if answer.get(key)), None)


def has_single_label(row: Row) -> bool:
    """Whether a row is one answer and a verdict on it, as in TRL's rows for KTO."""
    label = row.get("label")
    is_verdict = isinstance(label, bool) or (
        isinstance(label, str) and label.strip().casefold() in ("true", "false")
    )
    return is_verdict and row.has("completion", "response", "answer")
