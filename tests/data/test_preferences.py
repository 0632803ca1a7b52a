"""Preference data sets that list scored answers or name their sides in another way. test_layouts has
the layouts with `chosen` and `rejected`."""

import re
from typing import Any

import pytest

from medjob.data.columns import Row, UnusableRow
from medjob.data.formats import convert, detect

QUESTION, GOOD, BAD = "What helps a cough?", "Drink water and rest.", "Smoke more."
USER = {"role": "user", "content": QUESTION}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def record(fields: dict[str, Any]) -> Any:
    row = Row(fields)
    assert detect(row) == "preference"
    return convert(row, "preference", lambda *_: 0)


ULTRAFEEDBACK = {
    "source": "x",
    "incorrect_answers": ["None"],
    "instruction": QUESTION,
    "models": ["a", "b", "c"],
    "completions": [
        {"model": "a", "response": "Perhaps.", "overall_score": 5.0, "fine-grained_score": 3.5},
        {"model": "b", "response": GOOD, "overall_score": 8.5, "fine-grained_score": 4.5},
        {"model": "c", "response": BAD, "overall_score": 1.0, "fine-grained_score": 1.0},
    ],
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "UltraMedical-Preference": {
        "prompt_id": "x",
        "label_type": "hard",
        "prompt": QUESTION,
        "chosen": [USER, says(GOOD)],
        "rejected": [USER, says(BAD)],
        "metadata": {"chosen": {"model": "a", "rank": 1}, "rejected": {"model": "b", "rank": 9}},
    },
    "UltraFeedback": ULTRAFEEDBACK,
    "Argilla, binarized": {
        "instruction": QUESTION,
        "chosen_response": GOOD,
        "rejected_response": BAD,
        "chosen_avg_rating": 4.5,
    },
    "distilabel": {
        "instruction": QUESTION,
        "generations": ["Perhaps.", GOOD, BAD],
        "ratings": [3, 5, 1],
    },
    "distilabel, ratings as text": {
        "input": QUESTION,
        "generations": [BAD, GOOD],
        "rating": ["1.0", "4"],
    },
    "messages and scores": {
        "prompt": QUESTION,
        "chosen": [USER, says(GOOD)],
        "rejected": [USER, says(BAD)],
        "score_chosen": 9.0,
        "score_rejected": 2.0,
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_sides_of_every_layout_are_found(name: str) -> None:
    found = record(LAYOUTS[name])
    assert (found.question, found.chosen, found.rejected) == (QUESTION, GOOD, BAD)


def test_the_label_type_is_kept() -> None:
    assert record(LAYOUTS["UltraMedical-Preference"]).label_type == "hard"


def test_reasoning_stays_with_its_side() -> None:
    found = record(
        {
            "prompt": QUESTION,
            "chosen": f"<think>Coughs pass.</think>{GOOD}",
            "rejected": f"<think>No idea.</think>{BAD}",
        }
    )
    assert (found.chosen, found.chosen_reasoning) == (GOOD, "Coughs pass.")
    assert (found.rejected, found.rejected_reasoning) == (BAD, "No idea.")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {**ULTRAFEEDBACK, "completions": ULTRAFEEDBACK["completions"][:1]},
            "completions has 1 answer, and a pair needs two",
        ),
        (
            {"instruction": QUESTION, "generations": [GOOD, BAD], "ratings": [2, 2]},
            "all answers in generations have the same score",
        ),
        (
            {"instruction": QUESTION, "generations": [GOOD, BAD], "ratings": [2]},
            "ratings does not have one score for each answer in generations",
        ),
        (
            {"instruction": QUESTION, "generations": [GOOD, ""], "ratings": [2, 1]},
            "the best or the worst answer in generations is empty",
        ),
        (
            {
                **ULTRAFEEDBACK,
                "completions": [*ULTRAFEEDBACK["completions"], {"model": "d", "response": "Hm."}],
            },
            "an answer in completions has no score",
        ),
        (
            {"prompt": QUESTION, "chosen": GOOD, "chosen_response": BAD, "rejected": "No."},
            "chosen and chosen_response differ",
        ),
        (
            {"instruction": QUESTION, "generations": [GOOD, BAD], "ratings": [2, None]},
            "an answer in generations has no score",
        ),
    ],
)
def test_unusable_pairs_are_rejected_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRow, match=re.escape(reason)):
        record(fields)


def test_a_rating_of_the_only_answer_makes_no_pair() -> None:
    row = {"question": QUESTION, "answer": GOOD, "responses": [GOOD], "rating": 5}
    assert detect(Row(row)) == "instruction"


@pytest.mark.parametrize("verdict", [{"label": "False"}, {"is_correct": 0}, {"is_correct": "no"}])
def test_answers_that_are_marked_as_bad_are_not_trained(verdict: dict[str, Any]) -> None:
    row = Row({"prompt": QUESTION, "completion": BAD, **verdict})
    with pytest.raises(UnusableRow, match="is false, so the answer is a bad one"):
        convert(row, "instruction", lambda *_: 0)


def test_numbers_in_label_are_classes() -> None:
    row = Row({"prompt": QUESTION, "completion": GOOD, "label": 0})
    assert convert(row, "instruction", lambda *_: 0).response == GOOD


@pytest.mark.parametrize("label", [True, "true"])
def test_single_labels_are_refused_with_what_a_pair_needs(label: Any) -> None:
    row = Row({"prompt": QUESTION, "completion": GOOD, "label": label})
    with pytest.raises(
        UnusableRow, match="as in TRL's rows for KTO, and a pair needs a chosen and"
    ):
        convert(row, "preference", lambda *_: 0)
