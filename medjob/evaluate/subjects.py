"""What multiple-choice accuracy means: chance, the majority answer, and the figures per subject."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medjob.evaluate.metrics import EvaluatedAnswer, is_in_several_orders
from medjob.judge.statistics import wilson

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Majority:
    """The best constant answer."""

    kind: str
    """`letter` or `text`: whether it is always the same letter, or the same option, wherever it
    is."""
    answer: str
    accuracy: float


def chance(rows: Sequence[Row]) -> float:
    """Return the expected accuracy of guessing."""
    return sum(1 / len(json.loads(row["options"])) for row in rows) / len(rows)


def majority(rows: Sequence[Row], shows_rows: bool = True) -> Majority:
    """Return the constant answer that is right in most rows.

    In PubMedQA that is the text "yes". A text counts before an equally good letter.

    Args:
        shows_rows: Whether text of the rows may be shown. Otherwise, only letters are considered.
    """
    texts: Counter[str] = Counter()
    letters: Counter[str] = Counter()
    for row in rows:
        texts[" ".join(json.loads(row["options"])[row["answer_idx"]].casefold().split())] += 1
        letters[row["answer_idx"]] += 1
    text, text_rows = max(texts.items(), key=lambda item: (item[1], item[0]))
    letter, letter_rows = min(letters.items(), key=lambda item: (-item[1], item[0]))
    if shows_rows and text_rows >= letter_rows:
        return Majority("text", text, text_rows / len(rows))
    return Majority("letter", letter, letter_rows / len(rows))


def multiple_choice_section(
    answers: Mapping[str, Sequence[EvaluatedAnswer]], shows_rows: bool = True
) -> dict[str, Any] | None:
    """Return chance level and majority answer, rows by whether their options were reordered, and
    the same figures and each model's accuracy per subject. None without multiple-choice rows.

    A row without a subject counts for its source, and so do all if text of the rows may not be
    shown. Intervals are Wilson's, because subjects can have
    few rows.
    """
    choices = {
        model: [answer for answer in given if answer.row["kind"] == "multiple_choice"]
        for model, given in answers.items()
    }
    first = next(iter(choices.values()))
    if not first:
        return None
    rows = [answer.row for answer in first]
    subjects: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        subject = row.get("subject") if shows_rows else None
        subjects.setdefault(subject or row["source"], []).append(number)
    ordered = sorted(subjects.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        **_baselines(rows, shows_rows),
        "models": {model: _accuracy(given) for model, given in choices.items()},
        "reordered": sum(map(is_in_several_orders, first)),
        "kept_in_order": sum(len(answer.orders) == 1 for answer in first),
        "most_orders": max(len(answer.orders) for answer in first),
        "subjects": [
            {
                "subject": name,
                **_baselines([rows[number] for number in numbers], shows_rows),
                "models": {
                    model: _accuracy([given[number] for number in numbers])
                    for model, given in choices.items()
                },
            }
            for name, numbers in ordered
        ],
    }


def _baselines(rows: Sequence[Row], shows_rows: bool) -> dict[str, Any]:
    best = majority(rows, shows_rows)
    return {"rows": len(rows), "chance": chance(rows), "majority": asdict(best)}


def _accuracy(answers: Sequence[EvaluatedAnswer]) -> dict[str, float]:
    share = sum(answer.choice == answer.row["answer_idx"] for answer in answers) / len(answers)
    low, high = wilson(share, len(answers))
    return {"value": share, "low": low, "high": high}


def baseline_text(section: Mapping[str, Any]) -> str:
    """Summarise the baselines, and how many rows were reordered, in one line."""
    best = section["majority"]
    kind = "letter" if best["kind"] == "letter" else "option"
    text = (
        f"multiple choice: {section['rows']} rows; guessing gets {section['chance']:.0%}, always "
        f'the {kind} "{best["answer"]}" {best["accuracy"]:.0%}'
    )
    if section["most_orders"]:
        text += f"; {section['reordered']} rows in up to {section['most_orders']} orders"
    if section["kept_in_order"]:
        text += (
            f", {section['kept_in_order']} only in their own, because their options refer to "
            "letters or places"
        )
    return text
