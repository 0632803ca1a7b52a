"""How an answer is laid out, and how a layout is taken apart again."""

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
    """An answer's parts. `complies`: both parts are there, in order, and neither is empty (`plain`: the text is not empty)."""

    reasoning: str
    response: str
    complies: bool


def lay_out(style: Style, reasoning: str, response: str) -> str:
    """The text that a model is trained to write. Without reasoning it is the response alone, in any style."""
    if style == "plain" or not reasoning:
        return response
    if style == "tags":
        return f"<think>\n{reasoning}\n</think>\n<response>\n{response}\n</response>"
    return f"## Thinking\n\n{reasoning}\n\n## Final Response\n\n{response}"


def take_apart(style: Style, text: str) -> Answer:
    """The parts of a generated text. What does not comply is a response as a whole, from the last mark of one on."""
    match = _PATTERNS[style].match(text)
    if match:
        reasoning, response = match["reasoning"].strip(), match["response"].strip()
        return Answer(reasoning, response, bool(response) and (style == "plain" or bool(reasoning)))
    start = max(
        (text.rfind(mark) + len(mark) for mark in _RESPONSE_MARKS if mark in text), default=0
    )
    return Answer("", text[start:].removesuffix("</response>").strip(), False)
