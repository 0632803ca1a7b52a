"""Which tokens of a row are trained: `sft` and everything that shows rows use the same labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

_IGNORED = -100
"""Label of a token that is not trained, as in PyTorch's cross entropy."""


def is_trained(row: dict[str, Any], max_length: int, overlong: Literal["drop", "truncate"]) -> bool:
    """Whether a row of TRAIN_SCHEMA has trained tokens within `max_length`."""
    if overlong == "drop":
        return len(row["input_ids"]) <= max_length
    return bool(row["prompt_tokens"] < max_length)


def with_labels(row: dict[str, Any], max_length: int) -> dict[str, list[int]]:
    """Return the token ids of a row, and their labels: only the answer is trained."""
    ids = row["input_ids"]
    prompt_tokens = row["prompt_tokens"]
    labels = [_IGNORED] * prompt_tokens + ids[prompt_tokens:]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


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
