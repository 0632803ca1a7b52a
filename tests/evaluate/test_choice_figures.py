"""Figures of multiple choice: orders, abstention, constant answers and subjects."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from medjob.data.columns import Row
from medjob.data.formats import convert
from medjob.evaluate.compare import as_text, compare
from medjob.evaluate.graded import difference_sentence
from medjob.evaluate.metrics import Choice, EvaluatedAnswer
from medjob.evaluate.option_orders import ABSTENTION
from medjob.evaluate.pairwise import AnswerPair, Preference, win_rate
from medjob.evaluate.subjects import baseline_text, majority, multiple_choice_section
from medjob.generate.protocol import Generated

OPTIONS = {"A": "yes", "B": "no", "C": "maybe", "D": "never"}
LIKELIEST = "A"


def answered(
    right: str,
    stated: str | None,
    orders: Sequence[str | None] = (),
    abstaining: str | None = "",
    subject: str = "",
    options: dict[str, str] | None = None,
) -> EvaluatedAnswer:
    row = {
        "kind": "multiple_choice",
        "options": json.dumps(options or OPTIONS),
        "answer_idx": right,
        "subject": subject,
        "source": "pubmedqa",
    }
    return EvaluatedAnswer.of(
        row,
        Generated(f"The answer is {stated}." if stated else "Hm", 3, False),
        "plain",
        nll_per_token=None,
        letter=LIKELIEST,
        judged={},
        orders=[Choice(letter, LIKELIEST) for letter in orders],
        with_abstention=None if abstaining == "" else Choice(abstaining, None),
    )


def table_of(*models: list[EvaluatedAnswer]) -> dict[str, Any]:
    names = ("base", "sft")
    table = compare(dict(zip(names, models, strict=False)), 100, 0)
    assert "base" in as_text(table, names)
    return {row["metric"]: row["models"] for row in table}


def test_accuracy_and_consistency_over_orders() -> None:
    rows = [
        answered("A", "A", ["A", "A", "A", "A"]),  # right everywhere
        answered("A", "B", ["B", "B", "B", "B"]),  # the same wrong option
        answered("A", "A", ["A", "B", "C", "D"]),  # a favourite letter
        answered("A", "A", ["A", None, "A", "A"]),  # once no option
        answered("A", "A", ["A"]),  # cannot be reordered
    ]
    table = table_of(rows)
    assert table["all orders"]["base"]["value"] == pytest.approx((1 + 0 + 0.25 + 0.75 + 1) / 5)
    assert table["same option"]["base"]["value"] == pytest.approx(2 / 4)
    assert table["same option"]["base"]["n"] == 4
    assert table["letter, same option"]["base"]["value"] == 1.0
    assert table["multiple choice"]["base"]["value"] == pytest.approx(4 / 5)


def test_abstentions_cost_nothing_and_guesses_gain_nothing() -> None:
    base = [answered("A", "A", abstaining=letter) for letter in "ABCD"]
    sft = [answered("A", "A", abstaining=each) for each in ("A", ABSTENTION, ABSTENTION, None)]
    table = table_of(base, sft)
    assert table["formula score"]["base"]["value"] == pytest.approx(0.0)
    assert table["formula score"]["sft"]["value"] == pytest.approx((1 - 1 / 3) / 4)
    assert table["abstained"]["sft"]["value"] == 0.5
    assert table["accuracy if answered"]["base"]["value"] == 0.25
    assert table["accuracy if answered"]["sft"]["value"] == 0.5
    assert table["accuracy if answered"]["sft"]["n"] == 2


def test_figures_that_were_not_asked_for_are_absent() -> None:
    table = table_of([answered("A", "A"), answered("B", "A")])
    assert set(table) == {"multiple choice", "unparsed", "likeliest letter"}


def test_the_constant_answer_is_a_text_or_a_letter() -> None:
    """PubMedQA asks everything with yes, no and maybe; shuffled data sets have them anywhere."""
    moved = {"A": "no", "B": "Yes", "C": "maybe", "D": "never"}
    rows = [answered("A", "A").row] * 2 + [answered("B", "A", options=moved).row] * 3
    best = majority(rows)
    assert (best.kind, best.answer, best.accuracy) == ("text", "yes", 1.0)
    different = [answered("C", "A", options=OPTIONS | {"C": f"drug {n}"}).row for n in range(4)]
    best = majority([*different, answered("A", "A").row])
    assert (best.kind, best.answer, best.accuracy) == ("letter", "C", 0.8)


def test_figures_per_subject() -> None:
    subjects = ["Surgery"] * 3 + ["Anatomy"]
    base = [answered("A", "A", subject=subject) for subject in subjects]
    sft = [answered("A", "B", subject=subject) for subject in subjects]
    section = multiple_choice_section({"base": base, "sft": sft})
    assert section is not None
    assert [each["subject"] for each in section["subjects"]] == ["Surgery", "Anatomy"]
    surgery = section["subjects"][0]
    assert surgery["chance"] == 0.25
    assert surgery["models"]["base"]["value"] == 1.0
    assert surgery["models"]["base"]["low"] < 0.5  # three rows prove little
    assert surgery["models"]["sft"]["value"] == 0.0
    assert 'guessing gets 25%, always the option "yes" 100%' in baseline_text(section)
    unnamed = multiple_choice_section({"base": [answered("A", "A")]})
    assert unnamed is not None
    assert unnamed["subjects"][0]["subject"] == "pubmedqa"
    assert multiple_choice_section({"base": []}) is None


def test_figures_of_sensitive_rows_show_no_text_of_them() -> None:
    rows = [answered("A", "A", subject="Ward 7") for _ in range(3)]
    section = multiple_choice_section({"base": rows}, shows_rows=False)
    assert section is not None
    text = json.dumps(section) + baseline_text(section)
    assert "Ward 7" not in text
    assert "yes" not in text
    assert section["majority"] == {"kind": "letter", "answer": "A", "accuracy": 1.0}
    assert section["subjects"][0]["subject"] == "pubmedqa"


@pytest.mark.parametrize(
    ("columns", "subject"),
    [
        ({"subject_name": "Surgery", "topic_name": "Hernia"}, "Surgery"),
        ({"subject": "clinical_knowledge"}, "clinical_knowledge"),
        ({"meta_info": "step1"}, "step1"),
        ({"category": "health"}, "health"),
        ({"subject": ["a", "b"]}, ""),
        ({"subject": "x" * 200}, ""),
        ({}, ""),
    ],
)
def test_subjects_of_known_data_sets(columns: dict[str, Any], subject: str) -> None:
    fields = {"question": "Why?", "options": OPTIONS, "answer_idx": "B", **columns}
    assert convert(Row(fields), "multiple_choice", lambda _: 0).subject == subject


def test_a_win_needs_both_orders() -> None:
    pairs = [AnswerPair(str(n), "q", "r", "x", "y") for n in range(5)]
    pairs.append(AnswerPair("5", "q", "r", "same", "same"))
    asked = {
        "0": Preference(0.9, 0.8),
        "1": Preference(0.2, 0.4),
        "2": Preference(0.9, 0.1),  # the first place wins
        "3": Preference(0.1, 0.9),
        "4": Preference(0.9, 0.6),
    }
    made = win_rate(pairs, asked, 100, 0)
    counts = {name: made[name] for name in ("rows", "wins", "ties", "losses", "equal_answers")}
    assert counts == {"rows": 6, "wins": 2, "ties": 3, "losses": 1, "equal_answers": 1}
    assert made["order_disagreement"] == pytest.approx(2 / 5)
    assert made["win_rate"]["value"] == pytest.approx(3.5 / 6)
    assert made["win_rate"]["p_value"] > 0.05


def test_equal_answers_are_ties_and_unknown_preferences_are_no_result() -> None:
    same = [AnswerPair(str(n), "q", "r", "same", "same") for n in range(3)]
    made = win_rate(same, {}, 100, 0)
    assert (made["ties"], made["order_disagreement"], made["win_rate"]["value"]) == (3, None, 0.5)
    unknown = win_rate(same[:2], {"0": Preference(math.nan, 0.5)}, 100, 0)
    assert math.isnan(unknown["win_rate"]["value"])


@pytest.mark.parametrize(
    ("low", "high", "more", "says"),
    [
        (0.1, 0.3, 0, "settled: dpo is better (20 rows graded for both)"),
        (-0.3, -0.1, 0, "settled: sft is better"),
        (-0.1, 0.3, 35, "about 35 more rows, graded for both, would settle a difference"),
        (-0.1, 0.3, None, "out of reach: at this difference, grading all 200 rows would not"),
        (None, None, None, "too few grades, or all alike, for an interval"),
    ],
)
def test_a_difference_says_what_would_settle_it(
    low: float | None, high: float | None, more: int | None, says: str
) -> None:
    figures = {"model": "dpo", "against": "sft", "value": 0.1, "n": 20, "rows": 200}
    figures |= {"low": low, "high": high, "more_grades": more}
    assert says in difference_sentence(figures)
    assert difference_sentence(figures).startswith("dpo - sft: 0.100")
