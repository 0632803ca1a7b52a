"""Read the replies of an OpenAI-compatible endpoint. Servers differ, so every field is checked.

Source of the fields: the API reference of OpenAI's chat completions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Malformed(ValueError):
    """The body is not a chat completion. The message says why, without quoting the body."""


@dataclass(frozen=True, slots=True)
class Position:
    """One token of an answer, and log-probabilities of the tokens that could be in its place."""

    token: str
    alternatives: Mapping[str, float]
    """Each listed token with its log p, including `token`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of a reply."""

    text: str
    finish_reason: str
    """`stop`, `length` (the token limit), `content_filter`, or what else the server says."""
    positions: tuple[Position, ...]
    """Empty if the endpoint gives no log-probabilities."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply, and what it has cost. Token counts are None if the endpoint does not give them."""

    answers: tuple[Answer, ...]
    input_tokens: int | None = None
    output_tokens: int | None = None
    refusal: str = ""
    """Why the endpoint refused this prompt, such as `content_filter`. There are no answers then."""


def parse(body: str) -> Reply:
    """Parse the body of a successful response.

    Raises:
        Malformed: it is not JSON, or has no answer.
    """
    try:
        data = json.loads(body)
    except ValueError:
        raise Malformed("the body is not JSON") from None
    if not isinstance(data, dict):
        raise Malformed("the body is not a JSON object")
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Malformed("the list of choices is missing or empty")
    usage = data.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        tuple(_answer(choice) for choice in choices),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def _answer(choice: Any) -> Answer:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Malformed("a choice has no message")
    text = message.get("content")
    if text is not None and not isinstance(text, str):
        raise Malformed("the content of a message is not text")
    reason = choice.get("finish_reason")
    return Answer(text or "", str(reason or ""), _positions(choice.get("logprobs")))


def _positions(logprobs: Any) -> tuple[Position, ...]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list):
        return ()
    found = []
    for entry in content:
        listed = entry.get("top_logprobs") if isinstance(entry, dict) else None
        if not isinstance(listed, list) or not listed:
            return ()
        alternatives = dict(filter(None, map(_log_p, [*listed, entry])))
        found.append(Position(str(entry.get("token", "")), alternatives))
    return tuple(found)


def _log_p(entry: Any) -> tuple[str, float] | None:
    """The token and log p of an entry. None if it has none, or one that is not a number."""
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        return None
    value = entry.get("logprob")
    if not isinstance(value, int | float) or math.isnan(value):
        return None
    return entry["token"], float(value)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def probabilities(answer: Answer, choices: Sequence[str]) -> list[float] | None:
    """The probabilities of `choices` as the first word of an answer. They sum to 1.

    A choice that is not among the listed tokens gets 0: it is less likely than all of them, and
    endpoints list 5 or 20. Tokens that differ in blanks, such as `5` and ` 5`, count together.

    Returns:
        None if no position of the answer lists a choice.
    """
    with_choice = [each for each in answer.positions if each.token.strip() in choices]
    for position in with_choice or [each for each in answer.positions if each.token.strip()][:1]:
        weights = dict.fromkeys(choices, 0.0)
        for token, log_p in position.alternatives.items():
            if token.strip() in weights:
                weights[token.strip()] += math.exp(log_p)
        total = sum(weights.values())
        if total > 0:
            return [weights[choice] / total for choice in choices]
    return None


def chosen(answer: Answer, choices: Sequence[str]) -> list[float] | None:
    """1 for the choice of an answer in the format of `choice_format`, and 0 for the others. Also
    reads a plain answer. None if it is none of the choices."""
    text = answer.text.strip()
    try:
        data = json.loads(text)
    except ValueError:
        data = text
    value = str(data.get("choice", "") if isinstance(data, dict) else data).strip()
    return [float(choice == value) for choice in choices] if value in choices else None


def choice_format(choices: Sequence[str]) -> dict[str, Any]:
    """`response_format` of an answer that is one of `choices`: strict structured output."""
    schema = {
        "type": "object",
        "properties": {"choice": {"type": "string", "enum": list(choices)}},
        "required": ["choice"],
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "choice", "strict": True, "schema": schema},
    }
