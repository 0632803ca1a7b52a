"""Criteria of a good answer: reading them from rows, and the score of an answer."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medjob.data.columns import Row, UnusableRow
from medjob.data.criteria import Criterion, as_json, from_json, score_criteria
from medjob.data.formats import convert, detect

Q, R = "Why?", "Because."
OWN = [
    {"text": "Names zinc", "points": 2, "critical": True},
    {"text": "Invents a drug", "points": -1},
]
HEALTHBENCH = {
    "prompt": [
        {"role": "user", "content": "My head hurts."},
        {"role": "assistant", "content": "Since when?"},
        {"role": "user", "content": "An hour."},
    ],
    "prompt_id": "1",
    "rubrics": [
        {"criterion": "Asks about fever", "points": 5, "tags": ["axis:completeness"]},
        {"criterion": "Prescribes opioids", "points": -10, "tags": []},
    ],
    "example_tags": ["theme:context"],
    "ideal_completions_data": None,
}


def record_of(row: dict[str, Any]) -> Any:
    columns = Row(row)
    found = detect(columns)
    assert found is not None
    return convert(columns, found, lambda _: 0)


@pytest.mark.parametrize("rubric", [OWN, json.dumps(OWN), repr(OWN)])
def test_own_criteria_are_read_from_a_list_or_its_text(rubric: Any) -> None:
    record = record_of({"question": Q, "response": R, "rubric": rubric})
    assert from_json(record.rubric) == (
        Criterion("Names zinc", 2, critical=True),
        Criterion("Invents a drug", -1),
    )
    assert (record.question, record.response) == (Q, R)


def test_a_row_with_criteria_needs_no_answer() -> None:
    record = record_of({"question": Q, "rubric": ["Names zinc"]})
    assert (record.response, from_json(record.rubric)) == ("", (Criterion("Names zinc"),))
    with pytest.raises(UnusableRow, match="missing"):
        convert(Row({"question": Q}), "instruction", lambda _: 0)


def test_healthbench_rows_are_conversations_with_points() -> None:
    record = record_of(HEALTHBENCH)
    assert (record.question, record.response) == ("An hour.", "")
    assert [tuple(turn[:2]) for turn in record.history] == [("My head hurts.", "Since when?")]
    assert not record.other_trained
    assert from_json(record.rubric) == (
        Criterion("Asks about fever", 5),
        Criterion("Prescribes opioids", -10),
    )
    ideal = {"ideal_completion": "See a doctor.", "ideal_completions_group": "g"}
    assert record_of({**HEALTHBENCH, "ideal_completions_data": ideal}).response == "See a doctor."


def test_must_haves_of_kqa_are_critical() -> None:
    row = {"Question": Q, "Free_form_answer": R, "Must_have": ["Zinc helps"], "Nice_to_have": ["It is cheap"]}  # fmt: skip
    assert from_json(record_of(row).rubric) == (
        Criterion("States or implies: Zinc helps", 1, critical=True),
        Criterion("States or implies: It is cheap", 0.5),
    )
    assert len(from_json(record_of({**row, "Nice_to_have": []}).rubric)) == 1
    assert len(from_json(record_of({**row, "Nice_to_have": "[]"}).rubric)) == 1


def test_preference_rows_can_have_criteria() -> None:
    record = record_of({"prompt": Q, "chosen": "good", "rejected": "bad", "rubric": ["Is good"]})
    assert (record.chosen, from_json(record.rubric)) == ("good", (Criterion("Is good"),))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"rubric": []}, "has no criteria"),
        ({"rubric": "[]"}, "has no criteria"),
        ({"rubric": "[{"}, "cannot be parsed"),
        ({"rubric": [{"points": 1}]}, "has no text"),
        ({"rubric": [{"text": " ", "points": 1}]}, "has no text"),
        ({"rubric": [{"text": 5, "points": 1}]}, "not text"),
        ({"rubric": [5]}, "not an object"),
        ({"rubric": [None]}, "not an object"),
        ({"rubric": [""]}, "has no text"),
        ({"rubric": [{"text": "a"}]}, "no usable points"),
        ({"rubric": [{"text": "a", "points": "3"}]}, "no usable points"),
        ({"rubric": [{"text": "a", "points": True}]}, "no usable points"),
        ({"rubric": [{"text": "a", "points": float("nan")}]}, "no usable points"),
        ({"rubric": [{"text": "a", "points": float("inf")}]}, "no usable points"),
        ({"rubric": [{"text": "a", "points": 1e300}]}, "no usable points"),
        ({"rubric": [{"text": "a", "points": 10**400}]}, "no usable points"),
        ({"rubric": [{"text": "a", "points": -1}]}, "positive points"),
        ({"rubric": [{"text": "a", "points": 0}]}, "positive points"),
        ({"rubric": [{"text": "a", "points": 1, "critical": "maybe"}]}, "true or false"),
        ({"rubric": [{"text": "a\ud800", "points": 1}]}, "UTF-8"),
        ({"rubric": ["a"], "rubrics": [{"criterion": "b", "points": 1}]}, "differ"),
        ({"must_have": [], "nice_to_have": []}, "has no criteria"),
        ({"must_have": [""]}, "has no text"),
        ({"must_have": [{"a": 1}]}, "not text"),
        ({"options": {"A": "x", "B": "y"}, "answer_idx": "A", "rubric": ["a"]}, "would drop"),
        ({"kind": "harmful", "rubric": ["a"]}, "would drop"),
    ],
)
def test_unusable_criteria_are_a_reason_to_reject_the_row(
    columns: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnusableRow, match=reason):
        record_of({"question": Q, "response": R, **columns})


def test_criteria_of_a_longer_dialogue_are_refused() -> None:
    turns = [
        {"role": role, "content": f"turn {n}"} for n, role in enumerate(["user", "assistant"] * 2)
    ]
    with pytest.raises(UnusableRow, match="2 answers"):
        record_of({"messages": turns, "rubric": ["a"]})


def test_a_text_about_grades_is_no_list_of_criteria() -> None:
    row = {"question": Q, "response": R, "rubric": "Is the answer clear? 1: no. 5: yes."}
    assert record_of(row).rubric == ""
    assert record_of({**row, "rubric": None}).rubric == ""


JUDGED = st.lists(
    st.tuples(
        st.builds(
            Criterion, st.sampled_from(["a", "é\n", '"']), st.floats(-1e6, 1e6), st.booleans()
        ),
        st.floats(0, 1),
    ),
    max_size=5,
)


@settings(max_examples=50)
@given(JUDGED)
def test_scores_are_between_0_and_1_and_survive_as_text(
    judged: list[tuple[Criterion, float]],
) -> None:
    judged = [(Criterion("sure"), 0.5), *judged]
    criteria = tuple(criterion for criterion, _ in judged)
    probabilities = [probability for _, probability in judged]
    assert from_json(as_json(criteria)) == criteria
    found = score_criteria(criteria, probabilities)
    assert 0 <= found.score <= 1
    assert 0 <= found.expected <= 1
    assert (found.critical is None) is not any(each.critical for each in criteria)
    good = [float(each.points > 0) for each in criteria]
    assert score_criteria(criteria, good).score == 1
    bad = [float(each.points < 0) for each in criteria]
    assert score_criteria(criteria, bad).score == 0


def test_score_is_the_share_of_points_and_critical_ones_are_apart() -> None:
    criteria = (
        Criterion("a", 5),
        Criterion("b", 3, critical=True),
        Criterion("c", -4, critical=True),
    )
    found = score_criteria(criteria, [0.9, 0.4, 0.5])
    assert found.score == pytest.approx((5 - 4) / 8)
    assert found.expected == pytest.approx((5 * 0.9 + 3 * 0.4 - 4 * 0.5) / 8)
    assert found.critical == 0  # b is missing, and c was done
    assert score_criteria(criteria, [0, 1, 0]).critical == 1
