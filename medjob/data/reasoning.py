"""Reasoning inside an answer, in the layouts that reasoning models write."""

from __future__ import annotations

import re

from medjob.data.columns import UnusableRow, strip

_NAMES = "think|thinking|thought|thoughts|reasoning|scratchpad|seed:think"
_OPEN = re.compile(
    rf"<(?:{_NAMES})>|<\|begin_of_thought\|>|<\|start_thinking\|>|\[think\]|◁think▷", re.IGNORECASE
)
_CLOSE = re.compile(
    rf"</(?:{_NAMES})>|<\|end_of_thought\|>|<\|end_thinking\|>|\[/think\]|◁/think▷", re.IGNORECASE
)
_WRAPPERS = (
    *((f"<{name}>", f"</{name}>") for name in ("response", "answer", "final_answer", "solution")),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|start_response|>", "<|end_response|>"),
)
# OpenAI's harmony format, as gpt-oss writes it.
_CHANNELS = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>(.*?)<\|end\|>"
    r"<\|start\|>assistant<\|channel\|>final<\|message\|>(.*?)(?:<\|return\|>|<\|end\|>)?",
    re.DOTALL,
)
_CHANNEL = "<|channel|>"
_GAP = "[ \\t]{0,9}"  # of limited width, so that the time to match is linear
_HEADING = re.compile(
    rf"(?:#{{1,6}}|\*\*){_GAP}(?:(thinking)|reasoning|thoughts?|thought process|chain of thought)"
    rf"{_GAP}:?(?:\*\*)?:?{_GAP}\n",
    re.IGNORECASE,
)
_ANSWER_HEADING = re.compile(
    rf"^(?:#{{1,6}}|\*\*){_GAP}(?:final )?(?:response|answer){_GAP}:?(?:\*\*)?:?{_GAP}$",
    re.IGNORECASE | re.MULTILINE,
)


def split_reasoning(text: str, name: str) -> tuple[str, str]:
    """Split a text into its reasoning and its answer, without tags and headings.

    Args:
        name: What to call the text in a reason, such as `response`.

    Raises:
        UnusableRow: the reasoning has no end, the answer is empty, or tags are out of place.
    """
    reasoning, answer = _split(text, name)
    answer = _unwrap(answer, name)
    if _OPEN.search(answer) or _CLOSE.search(answer):
        raise UnusableRow(f"{name} has a reasoning tag inside the answer")
    if not answer:
        raise UnusableRow(f"{name} has reasoning, but no answer")
    return reasoning, answer


def _split(text: str, name: str) -> tuple[str, str]:
    if channels := _CHANNELS.fullmatch(text):
        return strip(channels[1]), strip(channels[2])
    if _CHANNEL in text:
        raise UnusableRow(f"{name} has channels other than analysis and final")
    if heading := _HEADING.match(text):
        parts = _ANSWER_HEADING.split(text[heading.end() :])
        if len(parts) == 2:
            return strip(parts[0]), strip(parts[1])
        # "Reasoning" can also be the first heading of an ordinary answer.
        if heading[1] or len(parts) > 2:
            raise UnusableRow(f"{name} has {len(parts) - 1} answer headings after its reasoning")
    opening = _OPEN.match(text)
    closing = _CLOSE.search(text)
    if closing is None:
        if opening:
            raise UnusableRow(f"{name} has reasoning without an end")
        return "", text
    # Some templates put the opening tag into the prompt, so an answer may have only the other one.
    start = opening.end() if opening else 0
    reasoning = text[start : closing.start()]
    if _OPEN.search(reasoning):
        raise UnusableRow(f"{name} has a reasoning tag inside the answer")
    return strip(reasoning), strip(text[closing.end() :])


def _unwrap(answer: str, name: str) -> str:
    lowered = answer.lower()
    for start, end in _WRAPPERS:
        if lowered.startswith(start):
            if not lowered.endswith(end):
                raise UnusableRow(f"{name} has {start} without its end")
            return strip(answer[len(start) : -len(end)])
    return answer


def join_reasoning(*texts: str) -> str:
    """Join reasoning from several places. A text that another one contains is left out."""
    kept: list[str] = []
    for text in filter(None, texts):
        if not any(text in other for other in kept):
            kept = [other for other in kept if other not in text]
            kept.append(text)
    return "\n\n".join(kept)


def bare_reasoning(text: str, name: str) -> str:
    """Return reasoning from a column without the tags around it.

    Raises:
        UnusableRow: tags are out of place.
    """
    opening = _OPEN.match(text)
    closings = list(_CLOSE.finditer(text))
    if closings and closings[-1].end() == len(text):
        text = text[: closings[-1].start()]
    text = text[opening.end() :] if opening else text
    if _OPEN.search(text) or _CLOSE.search(text):
        raise UnusableRow(f"{name} has a reasoning tag inside the text")
    return strip(text)
