"""The judge's prompts.

Each asks for one digit on one aspect. The score is computed from the probabilities of the digits.
"""

from __future__ import annotations

from dataclasses import dataclass

ASPECTS = {
    "accuracy": (
        "How factually accurate is the answer? 1 means dangerously wrong, 5 means no error."
    ),
    "completeness": (
        "How completely does the answer cover what was asked? 1 means it misses the question, "
        "5 means nothing is missing."
    ),
    "key_points": (
        "How many of the key points that a good answer makes does it make? 1 means none, "
        "5 means all of them."
    ),
}
DIGITS = ("1", "2", "3", "4", "5")
LETTERS = ("A", "B")


@dataclass(frozen=True, slots=True)
class Item:
    """An answer to score."""

    id: str
    question: str
    reference: str
    answer: str


def score_question(item: Item, aspect: str) -> str:
    """Ask for the digit of one aspect. The aspect comes last, so that the three prompts for an
    answer share a prefix."""
    task = "You grade an answer to a medical question"
    reference = ""
    if item.reference:
        task += " against a reference answer"
        reference = f"Reference answer: {item.reference}\n\n"
    return (
        f"{task}.\n\nQuestion: {item.question}\n\n{reference}Answer to grade: {item.answer}\n\n"
        f"{ASPECTS[aspect]} Reply with one digit from 1 to 5."
    )


SCORE_START = "Score:"


def better_question(question: str, reference: str, first: str, second: str) -> str:
    """Ask which of two answers is better."""
    return (
        "Two answers to a medical question are compared with a reference answer.\n\n"
        f"Question: {question}\n\nReference answer: {reference}\n\n"
        f"Answer A: {first}\n\nAnswer B: {second}\n\n"
        "Which answer is medically better? Reply with one letter, A or B."
    )


BETTER_START = "Better answer:"
