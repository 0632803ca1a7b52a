"""A user's own grades: the layouts that are read, and how a judge's replies compare with them."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from medjob.config.prepare import DataSource
from medjob.data.read import read
from medjob.errors import DataError
from medjob.judge.criteria_calibration import calibrate_criteria
from medjob.judge.graded import Grades, LabelledAnswer, parse_grades
from medjob.judge.questions import Item
from medjob.judge.scoring import OverlapJudge, Score, rubric_of
from medjob.sources.locations import Location
from medjob.stage import RowExtras
from tests.support.rows import write_jsonl

EXTRAS = RowExtras(finished=None, progress=None)  # type: ignore[arg-type]  # no model is asked


def grades_in(path: Path, rows: Sequence[dict[str, Any]]) -> Grades:
    """Write rows to a file of the path's type, and read them as a user's grades."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_jsonl(path, list(rows))
    return parse_grades("my grades", read(DataSource(path=str(path)), Location("x", str(path))))


PAIR = {"question": "q", "reference": "r", "better": "b", "worse": "w"}


@pytest.mark.parametrize("name", ["grades.jsonl", "grades.csv"])
def test_pairs_single_grades_and_criteria_are_read(tmp_path: Path, name: str) -> None:
    pairs = grades_in(tmp_path / name, [PAIR] * 10).pairs
    assert [(row.question, row.better, row.worse) for row in pairs] == [("q", "b", "w")] * 10

    singles = [
        {"question": f"q{n // 3}", "reference": "r", "answer": f"a{n}", "grade": (5, 1, 3)[n % 3]}
        for n in range(12)
    ]
    found = grades_in(tmp_path / name, singles).pairs
    assert len(found) == 12  # three of each of the four questions
    assert {(row.better, row.worse) for row in found[:3]} == {
        ("a0", "a1"),
        ("a0", "a2"),
        ("a2", "a1"),
    }
    assert len({row.group for row in found}) == 4

    labels = [
        {"question": "q", "answer": "a", "criterion": "c", "met": met}
        for met in (True, False, "yes", "No", 1, 0, "TRUE", "false", "not met", "met")
    ]
    labelled = grades_in(tmp_path / name, labels).labelled
    assert [row.met for row in labelled] == [True, False] * 4 + [False, True]


def test_answers_with_equal_grades_make_no_pair(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": str(n), "grade": n // 2 / 4} for n in range(10)]
    found = grades_in(tmp_path / "grades.jsonl", rows).pairs
    assert len(found) == 45 - 5
    assert all(int(row.better) // 2 > int(row.worse) // 2 for row in found)
    assert {row.reference for row in found} == {""}


def kqa_row(n: int, labels: Sequence[str]) -> dict[str, Any]:
    majority = max(labels, key=labels.count)
    return {
        "": n,
        "Question": "Is rest good?",
        "llm_x": "model",
        "answer": f"Answer {n // 2} says to rest.",
        "claim": "Rest is good",
        "category_x": "Must_have",
        "majority_label": majority,
        **{f"label_{annotator}": label for annotator, label in enumerate(labels)},
    }


def test_labels_of_kqa_are_read_with_their_annotators(tmp_path: Path) -> None:
    yes, no, contrary = "Entailment", "Neutral", "Contradiction"
    rows = [kqa_row(n, [yes, yes, no] if n % 2 else [no, contrary, no]) for n in range(10)]
    labelled = grades_in(tmp_path / "kqa.csv", rows).labelled
    assert [row.met for row in labelled] == [False, True] * 5
    assert labelled[0].criterion.text == "States or implies: Rest is good"
    assert labelled[1].annotators == (True, True, False)
    assert len({row.group for row in labelled}) == 5
    result = calibrate_criteria(OverlapJudge(), labelled, EXTRAS)
    assert result.human_kappa == pytest.approx(1 / 3)
    assert (result.rows, result.answers, result.met) == (10, 5, 0.5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR] * 9, "9 graded rows|9 pairs"),
        ([{**PAIR, "better": ""}] * 10, "better is empty"),
        ([{**PAIR, "worse": 5}] * 10, "worse is not text"),
        ([{"question": "q", "answer": "a", "grade": "good"}] * 10, "grade is not a number"),
        ([{"question": "q", "answer": "a", "grade": None}] * 10, "grade is not a number"),
        ([{"question": "q", "answer": "a", "grade": True}] * 10, "grade is not a number"),
        ([{"question": "q", "answer": "a", "grade": n} for n in range(10)], "lowest 0, highest 9"),
        ([{"question": "q", "answer": "a", "grade": 5}] * 10, "0 pairs of answers with different"),
        ([{"question": "q", "answer": "a", "criterion": "c", "met": "maybe"}] * 10, "met is not true or false"),
        ([{"question": "q", "answer": "a"}] * 10, "the columns are not those of graded answers"),
        ([{"text": "x"}], "the columns are not those of graded answers"),
    ],
)  # fmt: skip
def test_unusable_grades_are_an_error_that_names_the_row(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        grades_in(tmp_path / "grades.jsonl", rows)
    assert "my grades: " in caught.value.message
    assert caught.value.hint


class Guesser:
    """Judges by a table: the probability that each answer meets its criterion."""

    kind = "model"
    name = "guesser"

    def __init__(self, probabilities: dict[str, float]) -> None:
        self.probabilities = probabilities

    def score(self, extras: RowExtras, kind: str, items: Sequence[Item]) -> dict[str, Score]:
        return {i.id: rubric_of(i.criteria, (self.probabilities[i.id],)) for i in items}


def labelled_rows(tmp_path: Path, count: int) -> tuple[LabelledAnswer, ...]:
    rows = [
        {
            "question": f"q{n}",
            "answer": "zinc helps" if n % 4 < 2 else "rest helps",
            "criterion": "zinc helps a lot",
            "met": n % 2 == 0,
        }
        for n in range(count)
    ]
    return grades_in(tmp_path / "labels.jsonl", rows).labelled


def test_judge_of_criteria_passes_only_above_the_trivial_rules(tmp_path: Path) -> None:
    rows = labelled_rows(tmp_path, 60)
    right = {row.id: 0.9 if row.met else 0.2 for row in rows}
    good = calibrate_criteria(Guesser(right), rows, EXTRAS)
    assert (good.accuracy, good.kappa, good.auc, good.passed) == (1, 1, 1, True)
    assert (good.commoner_label, good.words_in_answer) == (0.5, 0.5)
    assert good.examples == ()
    always = calibrate_criteria(Guesser(dict.fromkeys(right, 0.7)), rows, EXTRAS)
    assert (always.accuracy, always.kappa, always.auc, always.passed) == (0.5, 0, 0.5, False)
    assert (always.judged_met, always.met) == (1, 0.5)
    assert {each.met for each in always.examples} == {False}
    assert "NOT calibrated" in always.sentence()
    # The order is right, but all probabilities are above the limit of 0.5.
    high = {name: 0.5 + value / 2 for name, value in right.items()}
    assert calibrate_criteria(Guesser(high), rows, EXTRAS).auc == 1


def test_labels_of_one_answer_count_less(tmp_path: Path) -> None:
    apart = labelled_rows(tmp_path, 60)
    wrong = {row.id: float(row.met) if n >= 15 else 1.0 - row.met for n, row in enumerate(apart)}
    together = tuple(
        LabelledAnswer(r.id, r.question, r.answer, r.criterion, r.met, str(n // 15))
        for n, r in enumerate(apart)
    )
    alone, grouped = (
        calibrate_criteria(Guesser(wrong), rows, EXTRAS) for rows in (apart, together)
    )
    assert alone.accuracy == grouped.accuracy == 0.75
    assert grouped.accuracy_low < alone.accuracy_low
    assert grouped.kappa_low < alone.kappa_low
