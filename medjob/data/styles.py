"""Layouts of reasoning and response in an answer: write them, and parse them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from medjob.config.prepare import Style

_PATTERNS: dict[Style, re.Pattern[str]] = {
    "thinking": re.compile(
        r"^\s*## Thinking\s*\n(?P<reasoning>.*?)\n\s*## Final Response\s*\n(?P<response>.*)$",
        re.DOTALL,
    ),
    "tags": re.compile(
        r"^\s*<think>(?P<reasoning>.*?)</think>\s*<response>(?P<response>.*?)</response>\s*$",
        re.DOTALL,
    ),
    "plain": re.compile(r"^(?P<reasoning>)(?P<response>.*)$", re.DOTALL),
}
_RESPONSE_MARKS = ("## Final Response", "<response>", "</think>")


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of an answer."""

    reasoning: str
    response: str
    complies: bool
    """Whether the text has the layout: both parts, in order, neither empty. With `plain`, whether
    the text is not empty."""


def format_answer(style: Style, reasoning: str, response: str) -> str:
    """Write the text that a model is trained on. Without reasoning it is only the response."""
    if style == "plain" or not reasoning:
        return response
    if style == "tags":
        return f"<think>\n{reasoning}\n</think>\n<response>\n{response}\n</response>"
    return f"## Thinking\n\n{reasoning}\n\n## Final Response\n\n{response}"


def take_apart(style: Style, text: str) -> Answer:
    """Parse a generated text.

    If it does not have the layout, everything after the last marker of a response is the response.
    """
    match = _PATTERNS[style].match(text)
    if match:
        reasoning = match["reasoning"].strip()
        response = match["response"].strip()
        complies = bool(response) and (style == "plain" or bool(reasoning))
        return Answer(reasoning, response, complies)
    ends_of_marks = [text.rfind(mark) + len(mark) for mark in _RESPONSE_MARKS if mark in text]
    response = text[max(ends_of_marks, default=0) :].removesuffix("</response>").strip()
    return Answer("", response, complies=False)
