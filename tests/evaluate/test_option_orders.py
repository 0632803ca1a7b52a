"""Options in other orders, and the option to abstain."""

import json
from typing import Any

import pytest

from medjob.config.judge import EvaluateParams
from medjob.data.formats import Record
from medjob.data.prompts import question_text
from medjob.evaluate.asked import Asked
from medjob.evaluate.option_orders import movable_letters, reordered, with_abstention
from medjob.generate.protocol import Generated

FOUR = ("insulin", "aspirin", "oxygen", "rest at home")


def row(*texts: str, question: str = "What helps?", answer: str = "B", name: str = "r1") -> Any:
    options = dict(zip("ABCDEFGH", texts, strict=False))
    record = Record(question, options=options, answer_idx=answer, kind="multiple_choice")
    return {
        "id": name,
        "kind": "multiple_choice",
        "message": question_text(record),
        "options": json.dumps(options),
        "answer_idx": answer,
        "source": "s",
    }


def test_orders_differ_and_keep_every_option() -> None:
    orders = reordered(row(*FOUR), 5, seed=1)
    assert [each.id for each in orders] == [f"r1/order-{n}" for n in range(1, 6)]
    assert len({tuple(each.options.values()) for each in orders} | {FOUR}) == 6
    for each in orders:
        assert list(each.options) == ["A", "B", "C", "D"]
        assert sorted(each.options.values()) == sorted(FOUR)
        for letter, text in each.options.items():
            assert FOUR["ABCD".index(each.original[letter])] == text
            assert f"\n{letter}. {text}\n" in each.message
        assert each.message.startswith("What helps?\n\nA. ")
        assert each.message.endswith("The answer is X.")


def test_orders_depend_on_the_seed_and_the_row_only() -> None:
    first = [each.options for each in reordered(row(*FOUR), 5, seed=1)]
    assert [each.options for each in reordered(row(*FOUR), 3, seed=1)] == first[:3]
    assert [each.options for each in reordered(row(*FOUR), 5, seed=2)] != first
    assert [each.options for each in reordered(row(*FOUR, name="r2"), 5, seed=1)] != first


def test_there_are_no_more_orders_than_permutations() -> None:
    assert len(reordered(row("yes", "no"), 5, seed=0)) == 1
    assert len(reordered(row("yes", "no", "maybe"), 23, seed=0)) == 5
    assert len({tuple(v.options.values()) for v in reordered(row(*FOUR), 23, seed=0)}) == 23


@pytest.mark.parametrize(
    ("texts", "movable"),
    [
        (FOUR, "ABCD"),
        (("yes", "no", "maybe"), "ABC"),
        (("insulin", "aspirin", "oxygen", "All of the above"), "ABC"),
        (("insulin", "aspirin", "oxygen", "None of these."), "ABC"),
        (("insulin", "aspirin", "all of the above", "none of the above"), "AB"),
        (("insulin", "aspirin", "Both of the above", "Neither of the above"), "AB"),
        (("insulin", "aspirin", "oxygen", "Both of the above"), ""),
        (("insulin", "All of the above", "oxygen", "rest"), ""),
        (("insulin", "aspirin", "Both A and B", "None"), ""),
        (("insulin", "aspirin", "a and b", "oxygen"), ""),
        (("insulin", "aspirin", "oxygen", "A, B & C"), ""),
        (("insulin", "aspirin", "A only", "oxygen"), ""),
        (("insulin", "aspirin", "Either option A or option B", "oxygen"), ""),
        (("insulin", "aspirin", "oxygen", "ABC"), ""),
        (("insulin", "aspirin", "oxygen", "The previous two options"), ""),
        (("Both A and R are true", "A is true but R is false", "x", "y"), ""),
        (("A", "B", "AB", "O"), ""),
        (("vitamin A", "vitamin B", "vitamin C", "hepatitis B and C"), "ABCD"),
        (("1 and 2", "2 and 3", "1, 2 and 3", "3 only"), "ABCD"),
        (("above-knee amputation", "a fever and a cough", "I and II", "none"), "ABC"),
        (("两者", "胰岛素", "阿司匹林", "以上都是"), "ABC"),
        (("one", "All of the above"), "A"),
    ],
)
def test_options_about_other_options_keep_their_meaning(
    texts: tuple[str, ...], movable: str
) -> None:
    options = dict(zip("ABCD", texts, strict=False))
    assert "".join(movable_letters("What helps?", options)) == movable


@pytest.mark.parametrize(
    ("question", "can_move"),
    [
        ("If option B is excluded, what helps?", False),
        ("Which answer (C) is shown?", False),
        ("What is the answer a patient expects?", True),
        ("Which of these options A patient should take?", False),
        ("Is hepatitis B likely?", True),
    ],
)
def test_questions_that_name_an_option_keep_the_order(question: str, can_move: bool) -> None:
    options = dict(zip("ABCD", FOUR, strict=True))
    assert bool(movable_letters(question, options)) is can_move


def test_a_group_option_stays_last_in_every_order() -> None:
    texts = ("insulin", "aspirin", "oxygen", "None of the above")
    orders = reordered(row(*texts), 5, seed=0)
    assert len(orders) == 5
    assert {each.options["D"] for each in orders} == {"None of the above"}


def test_the_option_to_abstain_comes_last() -> None:
    variant = with_abstention(row(*FOUR))
    assert variant is not None
    assert variant.id == "r1/abstain"
    assert variant.options["E"] == "I don't know"
    assert "\nE. I don't know\n" in variant.message
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    full = row(*FOUR) | {"options": json.dumps(dict.fromkeys(letters, "x"))}
    assert with_abstention(full) is None


def answers(texts: dict[str, str]) -> dict[str, Generated]:
    return {name: Generated(text, 1, False) for name, text in texts.items()}


def test_choices_are_mapped_back_to_the_options_of_the_row() -> None:
    made = row(*FOUR)
    asked = Asked.of([made], EvaluateParams(option_shuffles=3, abstain_option=True), seed=0)
    variants = asked.orders["r1"]
    knows = {"r1": "The answer is B."}
    knows |= {
        each.id: f"The answer is {next(k for k, v in each.options.items() if v == 'aspirin')}."
        for each in variants
    }
    letters = {"r1": "A"} | {each.id: "A" for each in variants}
    choices = asked.orders_of(made, answers(knows), letters, "plain")
    assert [choice.stated for choice in choices] == ["B"] * 4
    assert [choice.likeliest for choice in choices] == ["A", *(v.original["A"] for v in variants)]
    assert len({choice.likeliest for choice in choices}) > 1
    for text, stated in (
        ("The answer is E.", "I don't know"),
        ("I don't know", "I don't know"),
        ("I don’t know.", "I don't know"),
        ("The answer is C.", "C"),
        ("Hm", None),
    ):
        choice = asked.abstention_of(made, answers({"r1/abstain": text}), "plain")
        assert choice is not None
        assert choice.stated == stated


def test_without_the_options_nothing_is_asked_in_addition() -> None:
    asked = Asked.of([row(*FOUR)], EvaluateParams(), seed=0)
    assert asked.reordered_rows([row(*FOUR)]) == []
    assert asked.abstaining_rows([row(*FOUR)]) == []
    assert asked.orders_of(row(*FOUR), answers({"r1": "The answer is B."}), {}, "plain") == []
