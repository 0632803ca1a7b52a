"""What the rows of known medical data sets mean: any of them to one Record."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from medjob.config.prepare import Format

Fields = Mapping[str, Any]


_SURROGATE = re.compile(
    "[\ud800-\udfff]"
)  # what undecodable bytes and broken JSON escapes come in as


class Unusable(Exception):
    """A row cannot be used; the message says why."""


@dataclass(slots=True)
class Record:
    """One question with what is known about its answer. Empty text means: not given."""

    question: str
    id: str = ""
    """16 hex digits that follow from the question and its options alone; `clean` sets it."""
    response: str = ""
    reasoning: str = ""
    reference: str = ""
    """Short ground truth, such as a verifiable problem's answer."""
    options: dict[str, str] = field(default_factory=dict)
    answer_idx: str = ""
    chosen: str = ""
    rejected: str = ""
    label_type: str = ""
    system: str = ""
    kind: str = "open"
    """`open`, `multiple_choice`, `harmful` or `benign`."""

    @property
    def identity(self) -> str:
        """What makes it another question: its text, and its options (many share "All of these are true except")."""
        return "\n".join((self.question, *self.options.values()))


def _text(fields: Fields, *names: str, optional: bool = False) -> str:
    """The first of `names` that is there, in any letter case, spaces and underscores alike."""
    for name in names:
        if name in fields:
            value = fields[name]
            if value is None or (isinstance(value, str) and not value.strip()):
                if optional:
                    return ""
                raise Unusable(f"{name} is {'null' if value is None else 'empty'}")
            if not isinstance(value, str):
                raise Unusable(f"{name} is no text ({type(value).__name__})")
            if not value.isascii() and _SURROGATE.search(value):
                raise Unusable(f"{name} is not UTF-8")
            return value.strip()
    if optional:
        return ""
    raise Unusable(f"{names[0]} is missing")


def _medical_o1(fields: Fields) -> Record:
    return Record(
        _text(fields, "question"),
        response=_text(fields, "response"),
        reasoning=_text(fields, "complex_cot"),
    )


_TRUTH = (
    "ground_true_answer",
    "ground_truth_answer",
    "ground_truth",
    "standard_answer",
    "final_answer",
)


def _verifiable(fields: Fields) -> Record:
    truth = _text(fields, *_TRUTH)
    return Record(
        _text(fields, "open_ended_verifiable_question", "question"), response=truth, reference=truth
    )


def _instruction(fields: Fields) -> Record:
    question = _text(fields, "instruction", "question", "prompt", "query")
    context = _text(fields, "input", optional=True)
    response = _text(fields, "response", "output", "answer", "completion", "free_form_answer")
    reasoning = _text(fields, "reasoning", optional=True)
    return Record(
        f"{question}\n\n{context}" if context else question, response=response, reasoning=reasoning
    )


def _turns(value: Any, role_key: str, text_key: str) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise Unusable("the turns are no list of objects")
    return [(_text(turn, role_key), _text(turn, text_key)) for turn in value]


_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def _dialogue(turns: list[tuple[str, str]]) -> Record:
    """The first exchange; a longer dialogue's later turns would need answers that the model has not given."""
    roles = [(_ROLES.get(role, role), text) for role, text in turns]
    system = roles.pop(0)[1] if roles and roles[0][0] == "system" else ""
    if [role for role, _ in roles[:2]] != ["user", "assistant"]:
        raise Unusable("the turns do not begin with a question and its answer")
    return Record(roles[0][1], response=roles[1][1], system=system)


def _conversations(fields: Fields) -> Record:
    record = _dialogue(_turns(fields.get("conversations"), "from", "value"))
    record.reference = (
        _text(fields, "answer", optional=True) if isinstance(fields.get("answer"), str) else ""
    )
    return record


def _messages(fields: Fields) -> Record:
    return _dialogue(_turns(fields.get("messages"), "role", "content"))


def _last_turn(value: Any, name: str) -> str:
    """UltraMedical-Preference holds whole dialogues; other sets plain text."""
    if isinstance(value, list):
        turns = _turns(value, "role", "content")
        return turns[-1][1] if turns else ""
    return _text({name: value}, name)


def _preference(fields: Fields) -> Record:
    return Record(
        _text(fields, "prompt", "question"),
        chosen=_last_turn(fields.get("chosen"), "chosen"),
        rejected=_last_turn(fields.get("rejected"), "rejected"),
        label_type=_text(fields, "label_type", optional=True),
        reference=_text(fields, "reference", optional=True),
    )


def _multiple_choice(fields: Fields) -> Record:
    options = _options(fields)
    question = _text(fields, "question")
    context = _context(fields.get("context", fields.get("contexts")))
    answer = _answer_letter(fields, options)
    return Record(
        f"{context}\n\n{question}" if context else question,
        response=f"The answer is {answer}. {options[answer]}",
        reasoning=_text(fields, "exp", "long_answer", "explanation", optional=True),
        reference=options[answer],
        options=options,
        answer_idx=answer,
        kind="multiple_choice",
    )


def _options(fields: Fields) -> dict[str, str]:
    value: Any = fields.get("options")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)  # a CSV cell; literals only, nothing is run
        except (ValueError, SyntaxError):
            raise Unusable("options can not be read") from None
    if value is None and "opa" in fields:  # MedMCQA
        value = {letter.upper(): fields[f"op{letter}"] for letter in "abcd"}
    if value is None and "final_decision" in fields:  # PubMedQA
        value = {"A": "yes", "B": "no", "C": "maybe"}
    if isinstance(value, list):
        value = (
            {o["key"]: o["value"] for o in value}
            if value and isinstance(value[0], dict)
            else dict(zip("ABCDEFGHIJ", value, strict=False))
        )
    if not isinstance(value, dict) or len(value) < 2:
        raise Unusable("options are missing")
    return {
        str(letter): _text({"option": option}, "option")
        for letter, option in value.items()
        if option is not None
    }


def _answer_letter(fields: Fields, options: dict[str, str]) -> str:
    """The right option's letter, from a letter, an index (MedMCQA's cop) or the option's text."""
    letters = list(options)
    for name in ("answer_idx", "cop", "final_decision", "answer", "label"):
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
            return letters[value]
        if isinstance(value, str) and value.strip():
            value = value.strip()
            if value in options:
                return value
            matching = [
                letter for letter, text in options.items() if text.casefold() == value.casefold()
            ]
            if matching:
                return matching[0]
    raise Unusable("no answer that is one of the options")


def _context(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("contexts")
    if isinstance(value, list):
        value = "\n".join(str(part) for part in value)
    return value.strip() if isinstance(value, str) else ""


def _safety(fields: Fields) -> Record:
    kind = _text(fields, "kind", optional=True) or "harmful"
    if kind not in ("harmful", "benign"):
        raise Unusable(f"kind must be harmful or benign (got {kind!r})")
    return Record(
        _text(fields, "prompt", "question"),
        response=_text(fields, "response", "safe_response"),
        kind=kind,
    )


CONVERTERS: dict[Format, Callable[[Fields], Record]] = {
    "medical_o1": _medical_o1,
    "verifiable": _verifiable,
    "instruction": _instruction,
    "conversations": _conversations,
    "preference": _preference,
    "multiple_choice": _multiple_choice,
    "messages": _messages,
    "safety": _safety,
}
assert set(CONVERTERS) == set(get_args(Format))


def normalise_columns(fields: Fields) -> dict[str, Any]:
    """Column names in lower case with underscores: `Open-ended Verifiable Question` and `Complex_CoT` alike."""
    return {
        re.sub(r"[^a-z0-9]+", "_", str(name).strip().lower()).strip("_"): value
        for name, value in fields.items()
    }


def detect(columns: set[str]) -> Format | None:
    """The format of rows with these (normalised) columns; None when it is none of those known."""
    if "complex_cot" in columns:
        return "medical_o1"
    if {"chosen", "rejected"} <= columns:
        return "preference"
    if "options" in columns or "opa" in columns or "final_decision" in columns:
        return "multiple_choice"
    if "conversations" in columns:
        return "conversations"
    if "messages" in columns:
        return "messages"
    if columns & set(_TRUTH):
        return "verifiable"
    if "safe_response" in columns or {"prompt", "response", "kind"} <= columns:
        return "safety"
    if columns & {"instruction", "question", "prompt", "query"} and columns & {
        "response",
        "output",
        "answer",
        "completion",
        "free_form_answer",
    }:
        return "instruction"
    return None
