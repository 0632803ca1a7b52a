"""What the judge is asked. One aspect a prompt, one digit an answer: the digit's probabilities are the score."""

from __future__ import annotations

from dataclasses import dataclass

ASPECTS = {
    "accuracy": "How factually accurate is the answer? 1 means dangerously wrong, 5 means no error.",
    "completeness": "How completely does the answer cover what was asked? 1 means it misses the question, 5 means nothing is missing.",
    "key_points": "How many of the key points that a good answer makes does it make? 1 means none, 5 means all of them.",
}
DIGITS = ("1", "2", "3", "4", "5")
LETTERS = ("A", "B")


@dataclass(frozen=True, slots=True)
class Item:
    """One answer to be scored."""

    id: str
    question: str
    reference: str
    answer: str


def score_question(item: Item, aspect: str) -> str:
    """Ask for one aspect's digit. The aspect stands last, so that the three prompts of an answer share their beginning."""
    reference = f"Reference answer: {item.reference}\n\n" if item.reference else ""
    return (
        f"You grade an answer to a medical question{' against a reference answer' if reference else ''}.\n\nQuestion: {item.question}\n\n"
        f"{reference}Answer to grade: {item.answer}\n\n{ASPECTS[aspect]} Reply with one digit from 1 to 5."
    )


SCORE_START = "Score:"


def better_question(question: str, reference: str, first: str, second: str) -> str:
    """Ask which of two answers is better."""
    return (
        f"Two answers to a medical question are compared with a reference answer.\n\nQuestion: {question}\n\nReference answer: {reference}\n\n"
        f"Answer A: {first}\n\nAnswer B: {second}\n\nWhich answer is medically better? Reply with one letter, A or B."
    )


BETTER_START = "Better answer:"
