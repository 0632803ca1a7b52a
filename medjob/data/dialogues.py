"""Dialogues: a system message, and questions and answers in turn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

from medjob.data.columns import (
    UnusableRow,
    checked,
    is_empty,
    normal_name,
    parse_literal,
    strip,
    to_text,
)
from medjob.data.reasoning import join_reasoning, split_reasoning

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "question", "patient", "prompter", "instruction"), "user"),
    **dict.fromkeys(("问", "患者"), "user"),
    **dict.fromkeys(("答", "医生"), "assistant"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "doctor", "ai", "answer", "response"),
        "assistant",
    ),
}
_ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
_TEXT_KEYS = ("content", "value", "text", "message", "utterance")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
_TOOL_ROLES = (
    *("tool", "tools", "function", "functions", "observation", "ipython", "environment"),
    *("toolcall", "toolcalls", "toolresponse", "toolresult", "tooloutput"),
    *("functioncall", "functionresponse", "functionoutput"),
)
_OTHER_MEDIA = (
    *("tool_calls", "tool_call", "function_call", "tool_call_id", "tool_results", "tools"),
    *("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos"),
)
_MEDIA_PARTS = (
    *("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video"),
    *("video_url", "file", "document", "tool_use", "tool_result", "tool_call"),
)
_WEIGHTS = ("weight", "loss", "train")
_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \t]*")
_PREFIXED = re.compile(r"\s*(\w+)\s*[:：]\s*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a dialogue."""

    role: str
    """`system`, `user` or `assistant`."""
    text: str
    reasoning: str = ""
    is_trained: bool = True
    """False if the data set marks the turn as one that is not to be trained on."""


class Exchange(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str
    reasoning: str = ""
    is_trained: bool = True
    """Whether the answer can be trained. If not, it is only context."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue that begins with a question."""

    system: str = ""
    exchanges: list[Exchange] = field(default_factory=list)
    question: str = ""
    """The last question, if it has no answer."""


def is_dialogue(value: Any) -> bool:
    """Whether a cell holds turns rather than plain text."""
    if isinstance(value, str):
        # Turns are objects or texts in a list. A text that begins with a bracket is not a list.
        return bool(re.match(r"\s*\[\s*[\[{]", value)) or _is_hh(value)
    return isinstance(value, list | tuple | Mapping)


def _is_hh(text: str) -> bool:
    return strip(text).startswith("Human:") and "\n\nAssistant:" in text


def read_dialogue(value: Any, name: str) -> Dialogue:
    """Convert turns in any of the usual layouts.

    Args:
        name: The column, for reasons.

    Raises:
        UnusableRow: the turns cannot be used, such as those with images or tool calls.
    """
    return arrange(read_turns(value, name), name)


def read_turns(value: Any, name: str) -> list[Turn]:
    """Convert turns, and merge consecutive ones of the same role."""
    return [
        _merge(role, list(turns))
        for role, turns in groupby(_turns(value, name), key=lambda turn: turn.role)
    ]


def _merge(role: str, turns: list[Turn]) -> Turn:
    text = "\n\n".join(turn.text for turn in turns)
    reasoning = join_reasoning(*(turn.reasoning for turn in turns))
    return Turn(role, text, reasoning, all(turn.is_trained for turn in turns))


def arrange(turns: list[Turn], name: str) -> Dialogue:
    """Pair questions with their answers."""
    turns = list(turns)
    system = turns.pop(0).text if turns and turns[0].role == "system" else ""
    roles = [turn.role for turn in turns]
    if "system" in roles:
        raise UnusableRow(f"{name} has a system turn after the first turn")
    if roles[:1] == ["assistant"]:
        raise UnusableRow(f"{name} does not begin with a question")
    exchanges = [
        Exchange(question.text, answer.text, answer.reasoning, answer.is_trained)
        for question, answer in zip(turns[::2], turns[1::2], strict=False)
    ]
    return Dialogue(system, exchanges, turns[-1].text if len(turns) % 2 else "")


def _turns(value: Any, name: str) -> Iterator[Turn]:
    if isinstance(value, str) and _is_hh(value):
        yield from _hh_turns(strip(checked(value, name)), name)
        return
    value = parse_literal(value, name) if isinstance(value, str) and is_dialogue(value) else value
    if isinstance(value, Mapping):
        value = _rows_of_columns(value) or [value]
    if not isinstance(value, list | tuple):
        raise UnusableRow(f"{name} is not a list of turns ({type(value).__name__})")
    for number, turn in enumerate(value, 1):
        yield from _turn(turn, f"turn {number} of {name}")


def _rows_of_columns(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Convert an object of lists, as datasets stores a sequence of objects, to a list of objects.
    Return an empty list if it is another object."""
    columns = list(value.values())
    if not columns or not all(isinstance(column, list) for column in columns):
        return []
    if len({len(column) for column in columns}) != 1:
        return []
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _hh_turns(text: str, name: str) -> Iterator[Turn]:
    """Split the text layout of Anthropic's HH-RLHF. The last answer may be left open."""
    _, *parts = _HH_TURN.split(text)
    if parts[-2] == "Assistant" and not strip(parts[-1]):
        del parts[-2:]
    for role, words in zip(parts[::2], parts[1::2], strict=True):
        yield _made(_ROLES[role.lower()], words, "", name)


def _turn(value: Any, place: str) -> Iterator[Turn]:
    if isinstance(value, str):
        yield _prefixed_turn(value, place)
    elif isinstance(value, list | tuple):
        yield from _exchange(value, place)
    elif not isinstance(value, Mapping):
        raise UnusableRow(f"{place} is not an object ({type(value).__name__})")
    else:
        yield from _object_turn(value, place)


def _exchange(pair: list[Any] | tuple[Any, ...], place: str) -> Iterator[Turn]:
    """Convert a question and its answer in a list of two texts."""
    if len(pair) != 2:
        raise UnusableRow(f"{place} has {len(pair)} texts instead of 2")
    for role, text in zip(("user", "assistant"), pair, strict=True):
        yield _made(role, to_text(text, place), "", place)


def _prefixed_turn(text: str, place: str) -> Turn:
    match = _PREFIXED.match(text)
    role = _ROLES.get(match[1].lower()) if match else None
    if match is None or role is None:
        raise UnusableRow(f"{place} does not say whose it is")
    return _made(role, to_text(match[2], place), "", place)


def _object_turn(value: Mapping[str, Any], place: str) -> Iterator[Turn]:
    cells = {normal_name(str(key)): cell for key, cell in value.items() if not is_empty(cell)}
    for name in _OTHER_MEDIA:
        if cells.get(normal_name(name)):
            raise UnusableRow(f"{place} has {name}, which medjob cannot use")
    role = next((cells[key] for key in _ROLE_KEYS if key in cells), None)
    if role is None:
        yield from _turns_by_role(cells, place)
        return
    text = next((cells[key] for key in _TEXT_KEYS if key in cells), None)
    if text is None and _role(role, place) == "system":
        return  # many data sets have an empty system message in every row
    reasoning = join_reasoning(
        *(to_text(cells[key], place) for key in map(normal_name, _REASONING_KEYS) if key in cells)
    )
    text, thought = _content(text, place)
    turn = _made(_role(role, place), text, join_reasoning(reasoning, thought), place)
    yield replace(turn, is_trained=not any(_is_zero(cells.get(name)) for name in _WEIGHTS))


def _is_zero(weight: Any) -> bool:
    """Whether a weight or a flag says that a turn is not trained. Some files hold it as text."""
    if isinstance(weight, str):
        return weight.strip().casefold() in ("0", "0.0", "false", "no")
    return bool(weight == 0)


def _turns_by_role(cells: Mapping[str, Any], place: str) -> Iterator[Turn]:
    """Convert an exchange with the roles as keys, such as {"human": ..., "assistant": ...}."""
    roles = {**_ROLES, "input": "user", "output": "assistant"}
    known = {roles[key]: cell for key, cell in cells.items() if key in roles}
    if not {"user", "assistant"} & set(known) or len(known) < sum(key in roles for key in cells):
        raise UnusableRow(f"{place} does not say whose it is")
    for role in ("system", "user", "assistant"):
        if role in known:
            yield _made(role, to_text(known[role], place), "", place)


def _role(value: Any, place: str) -> str:
    name = normal_name(value) if isinstance(value, str) else ""
    if name in _TOOL_ROLES:
        raise UnusableRow(f"{place} is from a tool, which medjob cannot use")
    if name not in _ROLES:
        raise UnusableRow(f"{place} has an unknown role")
    return _ROLES[name]


def _content(value: Any, place: str) -> tuple[str, str]:
    """Return the text and the reasoning of a turn, whose content may be a list of parts."""
    if not isinstance(value, list | tuple):
        return to_text(value, place), ""
    texts, thoughts = [], []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind in ("text", "input_text", "output_text"):
            text = part.get("text") if isinstance(part, Mapping) else part
            texts.append(to_text(text, place))
        elif kind in ("thinking", "reasoning"):
            thoughts.append(to_text(part.get(kind, part.get("text")), place))
        elif kind in _MEDIA_PARTS:
            raise UnusableRow(f"{place} has a part of type {kind}, which medjob cannot use")
        else:
            raise UnusableRow(f"{place} has a part that is not text, which medjob cannot use")
    return to_text("\n".join(texts), place), "\n\n".join(thoughts)


def _made(role: str, text: str, reasoning: str, place: str) -> Turn:
    if role != "assistant":
        return Turn(role, to_text(text, place))
    thought, answer = split_reasoning(to_text(text, place), place)
    return Turn(role, answer, join_reasoning(reasoning, thought))
