"""Converters from the row formats of known medical data sets to `Record`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from medjob.config.prepare import Format

Fields = Mapping[str, Any]
# Python decodes invalid bytes and broken JSON escapes to surrogates.
_SURROGATE = re.compile("[\ud800-\udfff]")


class UnusableRow(Exception):
    """A row is rejected, for the reason in the message."""


@dataclass(slots=True)
class Record:
    """One question and the data about its answer. An empty string is a missing value."""

    question: str
    id: str = ""
    """16 hex digits derived from the question and its options. `clean` sets it."""
    response: str = ""
    reasoning: str = ""
    reference: str = ""
    """Short ground truth, such as the answer of a verifiable problem."""
    options: dict[str, str] = field(default_factory=dict)
    answer_idx: str = ""
    chosen: str = ""
    rejected: str = ""
    label_type: str = ""
    system: str = ""
    context: str = ""
    """Passage that the question is about. It precedes the question in the prompt."""
    history: list[tuple[str, str]] = field(default_factory=list)
    """Earlier exchanges of the dialogue, each a question and its answer."""
    later_exchanges: int = 0
    """Number of exchanges after this one, which are not used."""
    kind: str = "open"
    """`open`, `multiple_choice`, `harmful` or `benign`."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The texts that identify a question. They include the options, because many questions
        share a text such as "All of these are true except"."""
        turns = (turn for exchange in self.history for turn in exchange)
        return (self.system, *turns, self.context, self.question, *self.options.values())

    @property
    def identity(self) -> str:
        """The non-empty parts as one text."""
        return "\n".join(part for part in self.parts if part)


def _text(fields: Fields, *names: str, optional: bool = False) -> str:
    """Return the text of the first column of `names` that the row has."""
    for name in names:
        if name in fields:
            return _checked_text(name, fields[name], optional)
    if optional:
        return ""
    raise UnusableRow(f"{names[0]} is missing")


def _checked_text(name: str, value: Any, optional: bool) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        if optional:
            return ""
        raise UnusableRow(f"{name} is {'null' if value is None else 'empty'}")
    if not isinstance(value, str):
        raise UnusableRow(f"{name} is not text ({type(value).__name__})")
    if not value.isascii() and _SURROGATE.search(value):
        raise UnusableRow(f"{name} is not UTF-8")
    return value.strip()


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
        raise UnusableRow("the turns are not a list of objects")
    return [(_text(turn, role_key), _text(turn, text_key)) for turn in value]


_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def _dialogue(turns: list[tuple[str, str]]) -> Record:
    """Take the first question and answer. Later turns refer to answers that the trained model would
    not have given."""
    roles = [(_ROLES.get(role, role), text) for role, text in turns]
    system = roles.pop(0)[1] if roles and roles[0][0] == "system" else ""
    if [role for role, _ in roles[:2]] != ["user", "assistant"]:
        raise UnusableRow("the turns do not begin with a question and its answer")
    return Record(roles[0][1], response=roles[1][1], system=system)


def _conversations(fields: Fields) -> Record:
    record = _dialogue(_turns(fields.get("conversations"), "from", "value"))
    if isinstance(fields.get("answer"), str):
        record.reference = _text(fields, "answer", optional=True)
    return record


def _messages(fields: Fields) -> Record:
    return _dialogue(_turns(fields.get("messages"), "role", "content"))


def _last_turn(value: Any, name: str) -> str:
    """Return an answer's text. UltraMedical-Preference has dialogues, and other sets plain text."""
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
        question,
        context=context,
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
        value = _parse_options(value)
    if value is None and "opa" in fields:  # MedMCQA
        value = {letter.upper(): fields[f"op{letter}"] for letter in "abcd"}
    if value is None and "final_decision" in fields:  # PubMedQA
        value = {"A": "yes", "B": "no", "C": "maybe"}
    if isinstance(value, list):
        value = _label_options(value)
    if not isinstance(value, dict) or len(value) < 2:
        raise UnusableRow("options are missing")
    return {
        str(letter): _text({"option": option}, "option")
        for letter, option in value.items()
        if option is not None
    }


def _parse_options(cell: str) -> Any:
    """Parse the options in a CSV cell. Only literals are accepted, so no code can run."""
    try:
        return ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        raise UnusableRow("options cannot be parsed") from None


def _label_options(options: list[Any]) -> dict[str, Any]:
    """Convert a list of texts, or of objects with `key` and `value`."""
    if options and isinstance(options[0], dict):
        return {option["key"]: option["value"] for option in options}
    return dict(zip("ABCDEFGHIJ", options, strict=False))


def _answer_letter(fields: Fields, options: dict[str, str]) -> str:
    """Return the letter of the correct option. The row holds a letter, an index such as MedMCQA's
    `cop`, or the text of the option."""
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
    raise UnusableRow("the answer is not one of the options")


def _context(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("contexts")
    if isinstance(value, list):
        value = "\n".join(str(part) for part in value)
    return value.strip() if isinstance(value, str) else ""


def _safety(fields: Fields) -> Record:
    kind = _text(fields, "kind", optional=True) or "harmful"
    if kind not in ("harmful", "benign"):
        raise UnusableRow(f"kind must be harmful or benign (got {kind!r})")
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
    """Convert column names to lower case with underscores, such as `Open-ended Verifiable Question`
    to `open_ended_verifiable_question`."""
    return {
        re.sub(r"[^a-z0-9]+", "_", str(name).strip().lower()).strip("_"): value
        for name, value in fields.items()
    }


_INSTRUCTION_QUESTIONS = {"instruction", "question", "prompt", "query"}
_INSTRUCTION_ANSWERS = {"response", "output", "answer", "completion", "free_form_answer"}


def detect(columns: set[str]) -> Format | None:
    """Return the format of rows with these normalised columns, or None if it is unknown."""
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
    if columns & _INSTRUCTION_QUESTIONS and columns & _INSTRUCTION_ANSWERS:
        return "instruction"
    return None
