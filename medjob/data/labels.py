"""Which tokens of a row are trained: `sft` and everything that shows rows use the same labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from medjob.config.train import AssistantTurns

_IGNORED = -100
"""Label of a token that is not trained, as in PyTorch's cross entropy."""


def answers_in(row: dict[str, Any]) -> list[list[int]]:
    """Return where the answers of a row of TRAIN_SCHEMA are, each with its end token, as [first,
    last plus 1]. Between two answers there are always tokens of a question."""
    found, end = [], 0
    for is_answer, group in groupby(row["completion_mask"]):
        start, end = end, end + len(list(group))
        if is_answer:
            found.append([start, end])
    return found


def trained_turns(row: dict[str, Any], assistant_turns: AssistantTurns) -> list[list[int]]:
    """Return where the trained answers of a row of TRAIN_SCHEMA are, as [first, last plus 1]."""
    answers = answers_in(row)
    if assistant_turns == "all":
        return answers
    return answers[-1:] if row["is_last"] else []


def trained_tokens(row: dict[str, Any], assistant_turns: AssistantTurns = "all") -> int:
    """Return the number of trained tokens of a row of TRAIN_SCHEMA."""
    return sum(end - start for start, end in trained_turns(row, assistant_turns))


def is_trained(
    row: dict[str, Any],
    max_length: int,
    overlong: Literal["drop", "truncate"],
    assistant_turns: AssistantTurns = "all",
) -> bool:
    """Whether a row of TRAIN_SCHEMA has trained tokens within `max_length`."""
    turns = trained_turns(row, assistant_turns)
    if overlong == "drop":
        return bool(turns) and len(row["input_ids"]) <= max_length
    return any(start < max_length for start, _ in turns)


def with_labels(
    row: dict[str, Any], max_length: int, assistant_turns: AssistantTurns = "all"
) -> dict[str, list[int]]:
    """Return the token ids of a row, and their labels: only answers and their end tokens are
    trained. A row over `max_length` tokens ends with the last answer that fits, or is cut within
    the first one if none fits."""
    turns = trained_turns(row, assistant_turns)
    ids = row["input_ids"]
    if len(ids) > max_length:
        ids = ids[: max((end for _, end in turns if end <= max_length), default=max_length)]
    labels = [_IGNORED] * len(ids)
    for start, end in turns:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a row's text."""

    text: str
    trained: bool = False


def spans(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> tuple[Span, ...]:
    """Decode a row, and split its text where trained tokens begin or end."""
    found = []
    end, before = 0, ""
    for trained, group in groupby(label != _IGNORED for label in labels):
        end += len(list(group))
        # Some tokenizers drop a blank at the start of a text, so each part is decoded with all
        # that precedes it.
        text = tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)
        found.append(Span(text[len(before) :], trained))
        before = text.rstrip("\ufffd")  # a row can be cut within a character
    return tuple(found)
