"""Rows of data for tests, in the formats that medjob reads."""

import json
from pathlib import Path
from typing import Any

TOPICS = (
    "chest pain",
    "a rash",
    "fever",
    "a cough",
    "back pain",
    "dizziness",
    "thirst",
    "a swollen knee",
    "blurred vision",
    "a sore throat",
)
SIGNS = (
    "for two days",
    "since childhood",
    "after a long flight",
    "with weight loss",
    "at night only",
    "after a new medicine",
)


def reasoning_rows(count: int) -> list[dict[str, str]]:
    """Different rows in the medical-o1 format."""
    return [
        {
            "Question": f"Case {n}: someone has {TOPICS[n % 10]} {SIGNS[n // 10 % 6]}, and the value is {n * 37}. What is likely?",
            "Complex_CoT": f"The sign is {TOPICS[n % 10]}. It lasts {SIGNS[n // 10 % 6]}.",
            "Response": f"Likely cause number {n}; see a doctor.",
        }
        for n in range(count)
    ]


def choice_rows(count: int) -> list[dict[str, Any]]:
    """Multiple-choice rows."""
    options = {"A": "insulin", "B": "aspirin", "C": "oxygen", "D": "rest"}
    return [
        {
            "question": f"Which treatment fits item {n} of the list?",
            "options": options,
            "answer_idx": "ABCD"[n % 4],
        }
        for n in range(count)
    ]


def safety_rows(count: int) -> list[dict[str, str]]:
    """Half harmful, half benign."""
    return [
        {
            "prompt": f"Request {n} about {TOPICS[n % 10]}",
            "response": "I cannot help with that." if n % 2 else "Drink water.",
            "kind": "harmful" if n % 2 else "benign",
        }
        for n in range(count)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One JSON value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def preference_rows(count: int) -> list[dict[str, str]]:
    """Rows with a chosen and a rejected answer, two for each question."""
    return [
        {
            "prompt": f"Visit {n // 2}: {TOPICS[n // 2 % 10]} {SIGNS[n // 20 % 6]}, number {n // 2 * 41}. What helps?",
            "chosen": f"Rest, and see a doctor about value {n}.",
            "rejected": f"Nothing helps in case {n}.",
            "label_type": "easy" if n % 3 else "hard",
        }
        for n in range(count)
    ]
