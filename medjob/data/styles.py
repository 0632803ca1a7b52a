"""Layouts of reasoning and response in an answer: write them, and parse them.

Generated text can be anything, such as one character a thousand times. Texts are searched for
marks, each of which is one line or one tag, so that parsing takes linear time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from medjob.config.prepare import Style

_THINKING = re.compile(r"^[^\S\n]*+## Thinking[^\S\n]*+$", re.MULTILINE)
_FINAL_RESPONSE = re.compile(r"^[^\S\n]*+## Final Response[^\S\n]*+$", re.MULTILINE)
_HEADING = "## Final Response"
_NAMES = r"think(?:ing)?|thoughts?|reasoning"
_OPEN_THOUGHT = re.compile(rf"<(?:{_NAMES})>|\[THINK\]|<\|begin_of_thought\|>", re.IGNORECASE)
_END_THOUGHT = re.compile(rf"</(?:{_NAMES})>|\[/THINK\]|<\|end_of_thought\|>", re.IGNORECASE)
_EMPTY_THOUGHTS = re.compile(
    rf"(?:\s*+<({_NAMES})>\s*+</\1>|\s*+\[THINK\]\s*+\[/THINK\])++\s*+", re.IGNORECASE
)
_THINK = "<think>"
_RESPONSE = "<response>"
_END_RESPONSE = "</response>"


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of an answer."""

    reasoning: str
    response: str
    complies: bool
    """Whether the text has the layout: both parts, in order, neither empty. With `plain`, whether
    there is a response."""


def format_answer(style: Style, reasoning: str, response: str) -> str:
    """Write the text that a model is trained on. Without reasoning it is only the response."""
    if style == "plain" or not reasoning:
        return response
    if style == "tags":
        return f"<think>\n{reasoning}\n</think>\n<response>\n{response}\n</response>"
    return f"## Thinking\n\n{reasoning}\n\n## Final Response\n\n{response}"


def take_apart(style: Style, text: str) -> Answer:
    """Parse a generated text.

    Models that reason write their thoughts in tags before an answer of any style, and chat
    templates write an empty thought. Neither is part of the response. A thought without an end was
    cut off, so nothing after it is a response. If the text does not have the layout, everything
    after the last mark of a response is the response.
    """
    empty = _EMPTY_THOUGHTS.match(text)
    text = text[empty.end() :] if empty else text.lstrip()
    thought, rest, is_open = _split_thought(text)
    parts = None
    if style == "thinking":
        parts = _headings(rest)
    elif style == "tags" and text.startswith(_THINK):
        parts = _tags(thought, rest)
    if parts:
        return Answer(*parts, complies=all(parts) and not is_open)
    response = _after_marks(rest)
    complies = style == "plain" and bool(response) and not is_open
    return Answer(thought, response, complies)


def _split_thought(text: str) -> tuple[str, str, bool]:
    """Return the thought before the answer, the answer, and whether a thought has no end.

    A chat template may have written the opening tag, so the text can have only the other one.
    """
    last_end = max(_END_THOUGHT.finditer(text), key=lambda match: match.end(), default=None)
    start = last_end.end() if last_end else 0
    opening = _OPEN_THOUGHT.search(text, start)
    answer = text[start : opening.start()] if opening else text[start:]
    thought = text[: last_end.start()] if last_end else ""
    if opening and not last_end:
        thought = text[opening.end() :]
    first = _OPEN_THOUGHT.match(thought)
    thought = thought[first.end() :] if first else thought
    return thought.strip(), answer.strip(), opening is not None


def _tags(thought: str, rest: str) -> tuple[str, str] | None:
    """The thought, and the text in `<response>` tags, if there is nothing else."""
    if not rest.startswith(_RESPONSE) or not rest.endswith(_END_RESPONSE):
        return None
    response = rest.removeprefix(_RESPONSE).removesuffix(_END_RESPONSE)
    if _END_RESPONSE in response:
        return None
    return thought, response.strip()


def _headings(text: str) -> tuple[str, str] | None:
    """The texts below the two headings, if it begins with the first of them."""
    first = _THINKING.match(text)
    second = _FINAL_RESPONSE.search(text, first.end()) if first else None
    if first is None or second is None:
        return None
    return text[first.end() : second.start()].strip(), text[second.end() :].strip()


def _after_marks(text: str) -> str:
    ends = [text.rfind(mark) + len(mark) for mark in (_HEADING, _RESPONSE) if mark in text]
    return text[max(ends, default=0) :].removesuffix(_END_RESPONSE).strip()
