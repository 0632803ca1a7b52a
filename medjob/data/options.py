"""The options of a multiple-choice row.

Options are relabelled A, B, C, ... in their order. Labels in rows can be digits, lower case or left
over from a web page, and a model's answer is compared by single letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from string import ascii_uppercase
from typing import Any

from medjob.data.columns import (
    Row,
    UnusableRow,
    is_empty,
    is_number,
    normal_name,
    parse_literal,
    strip,
    to_text,
)

_OPTION_COLUMNS = (
    *("options", "choices", "answer_choices", "answer_options", "option_list", "option"),
    *("endings", "candidates"),
)
# Groups of columns such as opa and opb, option_1 and option_2, or A and B.
_PREFIXES = ("op", "opt", "option", "choice", "ending", "answer", "")
_PLURALS = ("ops", "opts", "options", "choices", "endings", "answers")
_TEXT_KEYS = (
    *("text", "value", "content", "atext", "body", "answer", "option_text", "option", "choice"),
)
_LABEL_KEYS = (
    *("label", "key", "letter", "id", "aid", "option_id", "idx", "index", "option", "choice"),
)
_RIGHT_KEYS = ("is_correct", "correct", "is_answer", "is_right")
_HEADING = re.compile(r"(?:answer\s+)?(?:choices|options)\s*:\s*", re.IGNORECASE)
_MAX_OPTIONS = len(ascii_uppercase)
ANSWERS = (
    *("answer_idx", "answer_index", "answer_key", "answer_label", "answer_letter", "answer_id"),
    *("answer_option", "cop", "correct", "correct_idx", "correct_index", "correct_letter"),
    *("correct_option", "correct_options", "correct_choice", "correct_answer", "correct_answers"),
    *("correct_answer_idx", "correct_answer_index", "correct_answer_key", "correct_option_index"),
    *("correct_option_idx", "right_answer", "right_option", "gold_answer", "gold_index", "gold"),
    *("gold_idx", "final_decision", "ra", "answer", "ground_truth", "ground_truth_answer"),
    *("final_answer", "standard_answer"),
)
LETTERS = (
    *("answer_idx", "answer_index", "answer_key", "answer_letter", "cop", "correct_option"),
    *("correct_letter", "correct_choice", "correct_option_index", "correct_answer_idx"),
)
"""Columns that only multiple-choice rows have."""
# These can also be a topic or a difficulty, so they only count if there is no clearer column.
UNCLEAR_ANSWERS = ("label", "labels", "target", "targets")
# A label, and the text after it. "1.5 mg" and "1:2" do not begin with a label.
LABELLED = re.compile(r"[(\[]?([A-Za-z]|\d{1,2})[)\].:、．：](?!\d)\s*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Options:
    """Options as listed in a row."""

    labels: list[str]
    texts: list[str]
    """An empty text is a null option. It keeps its place, because the row's index counts it."""
    marked: list[int] = field(default_factory=list)
    """Positions that the options themselves mark as right."""
    are_numbers: bool = False
    """Whether the row holds numbers as options, rather than texts."""

    def letters(self) -> dict[int, str]:
        """Return the new letter of each position that has a text."""
        positions = [position for position, text in enumerate(self.texts) if text]
        return dict(zip(positions, ascii_uppercase, strict=False))


def has_options(row: Row) -> bool:
    """Whether a row has options, in any layout."""
    return row.has(*_OPTION_COLUMNS, "final_decision") or bool(_group(row)) or lists_answers(row)


def option_columns(names: Iterable[str]) -> set[str]:
    """Return the columns in which options would be looked for, of those with these normal names."""
    names = tuple(sorted(names))
    groups = {prefix + label for prefix, labels in _groups(names) for label in labels}
    return groups | {normal_name(name) for name in _OPTION_COLUMNS}


def lists_answers(row: Row) -> bool:
    """Whether `answers` lists the options, as in HEAD-QA, rather than the right answers."""
    answers = row.get("answers")
    return (
        isinstance(answers, list)
        and len(answers) > 1
        and all(isinstance(answer, Mapping) for answer in answers)
    )


def read_options(row: Row) -> Options:
    """Read the options of a row.

    Raises:
        UnusableRow: they cannot be read, or there are fewer than 2 or more than 26.
    """
    options = _without_labels(_listed(row))
    count = sum(map(bool, options.texts))
    if count < 2:
        raise UnusableRow(f"options are missing ({count} found)")
    if count > _MAX_OPTIONS:
        raise UnusableRow(f"too many options ({count}, and the maximum is {_MAX_OPTIONS})")
    return options


def _listed(row: Row) -> Options:
    for name, value in row.present(_OPTION_COLUMNS):
        return _convert(value, name)
    if group := _group(row):
        return _made(list(group), list(group.values()))
    if row.has("final_decision"):  # PubMedQA
        return Options(["yes", "no", "maybe"], ["yes", "no", "maybe"])
    if lists_answers(row):
        return _convert(row.get("answers"), "answers")
    raise UnusableRow("options are missing")


def _made(labels: list[str], values: list[Any]) -> Options:
    numbers = any(is_number(value) and not is_empty(value) for value in values)
    return Options(labels, [_option(value) for value in values], are_numbers=numbers)


def _option(value: Any) -> str:
    if is_empty(value):
        return ""
    return str(value) if isinstance(value, bool) else to_text(value, "option", numbers=True)


def _group(row: Row) -> dict[str, Any]:
    """Return the options in columns such as opa and opb, by the last part of their names."""
    for prefix, labels in _groups(tuple(sorted({*row.values, *row.empty}))):
        values = {label: row.get(prefix + label) for label in labels}
        if _is_group(row, prefix) and any(value is not None for value in values.values()):
            _check_gaps(labels)
            return values
    return {}


@lru_cache(maxsize=256)
def _groups(columns: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the prefixes and labels of columns whose names differ only in a letter or number."""
    groups = []
    for prefix in _PREFIXES:
        labels = [
            name.removeprefix(prefix)
            for name in columns
            if name.startswith(prefix) and name not in _PLURALS
        ]
        letters = sorted(
            label for label in labels if re.fullmatch("[a-z]" if prefix else "[a-j]", label)
        )
        numbers = sorted((label for label in labels if re.fullmatch(r"[0-9]{1,2}", label)), key=int)
        if len(letters) > 1 and letters[0] == "a":
            groups.append((prefix, tuple(letters)))
        if len(numbers) > 1 and numbers[0] in "01" and prefix:
            groups.append((prefix, tuple(numbers)))
    return groups


def _is_group(row: Row, prefix: str) -> bool:
    if prefix == "":  # columns A and B
        return row.mentions(*ANSWERS, *UNCLEAR_ANSWERS)
    if prefix == "answer":  # without a right one, they are the answers of several models
        return row.mentions("correct_answer", "correct_answers", "correct")
    return True


def _check_gaps(labels: tuple[str, ...]) -> None:
    codes = [int(label) if label.isdigit() else ord(label) for label in labels]
    if codes != list(range(codes[0], codes[0] + len(codes))):
        raise UnusableRow("the columns of the options have gaps")


def _convert(value: Any, name: str) -> Options:
    if isinstance(value, str):
        return _from_cell(value, name)
    if isinstance(value, Mapping):
        return _from_object(value, name)
    if isinstance(value, list | tuple):
        return _from_list(list(value), name)
    raise UnusableRow(f"{name} is not a list of options ({type(value).__name__})")


def _from_cell(cell: str, name: str) -> Options:
    text = to_text(cell, name)
    if text[0] in "[{(" and not LABELLED.match(text):
        value = parse_literal(text, name)
        if isinstance(value, str):
            raise UnusableRow(f"{name} cannot be parsed")
        return _convert(value, name)
    return _from_text(_HEADING.sub("", text, count=1) if _HEADING.match(text) else text, name)


def _from_text(text: str, name: str) -> Options:
    """Split a text such as "A) liver B) spleen" at its labels. Each must occur exactly once."""
    first = re.match(r"([(\[]?)(A|a|1)([)\].:、．：])(?!\d)\s*", text) or re.match(
        r"()(A|a|1)([ \t])(?=.*\n\s*[Bb2][ \t])", text
    )
    if first is None:
        raise UnusableRow(f"{name} cannot be parsed")
    opening, label, closing = (re.escape(part) for part in first.groups())
    labels = _labels_from(label)
    on_lines = re.search(rf"\n[ \t]{{0,9}}{opening}{labels[1]}{closing}", text) is not None
    before = r"\n[ \t]{0,9}" if on_lines else r"(?<!\w)"
    texts: list[str] = []
    rest = text[first.end() :]
    for label in labels[1:]:
        found = re.split(rf"{before}{opening}{label}{closing}(?!\d)", rest)
        if len(found) > 2:
            raise UnusableRow(f"{name} cannot be parsed (label {len(texts) + 2} occurs twice)")
        texts.append(found[0])
        if len(found) == 1:
            break
        rest = found[1]
    following = "|".join(labels[len(texts) + 1 :])
    if re.search(rf"{before}{opening}(?:{following}){closing}(?!\d)", texts[-1]):
        raise UnusableRow(f"{name} cannot be parsed (label {len(texts) + 1} is missing)")
    texts = _without_separator(texts)
    return Options(labels[: len(texts)], [to_text(option, "option") for option in texts])


def _without_separator(texts: list[str]) -> list[str]:
    """Remove the comma, semicolon or bar between options, if it is the same everywhere."""
    texts = [strip(text) for text in texts]
    ends = {text[-1:] for text in texts[:-1]}
    if len(ends) == 1 and ends <= {",", ";", "|"}:
        return [*(text[:-1] for text in texts[:-1]), texts[-1].rstrip("".join(ends))]
    return texts


def _labels_from(first: str) -> list[str]:
    if first.isdigit():
        return [str(number) for number in range(int(first), int(first) + _MAX_OPTIONS)]
    return list(ascii_uppercase if first == "A" else ascii_uppercase.lower())


def _from_object(value: Mapping[Any, Any], name: str) -> Options:
    """Convert {label: text}, or an object with a list of texts and a list of labels (ARC)."""
    lists = {normal_name(str(key)): part for key, part in value.items() if isinstance(part, list)}
    if not lists:
        items = list(value.items())
        if {str(key) for key in value} == set(ascii_uppercase[: len(value)]):
            items.sort(key=lambda item: str(item[0]))  # the question may refer to the letters
        return _made([str(key) for key, _ in items], [text for _, text in items])
    text_key = _first_key(_TEXT_KEYS, lists)
    label_key = _first_key(_LABEL_KEYS, lists, text_key)
    if text_key is None:
        raise UnusableRow(f"{name} is an object of lists without a list of texts")
    texts = lists[text_key]
    labels = lists[label_key] if label_key else ascii_uppercase[: len(texts)]
    if len(labels) != len(texts):
        raise UnusableRow(f"{name} has {len(texts)} texts, but {len(labels)} labels")
    return _made([_label(label) for label in labels], texts)


def _from_list(values: list[Any], name: str) -> Options:
    """Convert a list of texts, or of objects with a text and possibly a label."""
    if not any(isinstance(value, Mapping) for value in values):
        labels = [*ascii_uppercase, *[""] * len(values)][: len(values)]
        return _made(labels, values)
    pairs, marked = [], []
    for position, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise UnusableRow(f"{name} mixes objects and {type(value).__name__}")
        pairs.append(_from_item(value, position, name))
        if _is_marked(value):
            marked.append(position)
    return Options([label for label, _ in pairs], [text for _, text in pairs], marked)


def _from_item(value: Mapping[Any, Any], position: int, name: str) -> tuple[str, str]:
    keys = {normal_name(str(key)): part for key, part in value.items()}
    text_key = _first_key(_TEXT_KEYS, keys)
    if text_key is None and len(value) == 1:  # {"A": "liver"}
        [(label, text)] = value.items()
        return _label(label), _option(text)
    if text_key is None:
        raise UnusableRow(f"option {position + 1} of {name} has no text, label or key")
    label_key = _first_key(_LABEL_KEYS, keys, text_key)
    default = ascii_uppercase[position] if position < _MAX_OPTIONS else ""
    return _label(keys[label_key]) if label_key else default, _option(keys[text_key])


def _is_marked(value: Mapping[Any, Any]) -> bool:
    marks = {normal_name(str(key)): part for key, part in value.items()}
    return any(marks.get(normal_name(key)) in (True, "true", "True") for key in _RIGHT_KEYS)


def _first_key(names: tuple[str, ...], keys: Mapping[str, Any], other: str | None = None) -> Any:
    normal = (normal_name(name) for name in names)
    return next((name for name in normal if name in keys and name != other), None)


def _label(value: Any) -> str:
    return "" if is_empty(value) else to_text(value, "option label", numbers=True)


def _without_labels(options: Options) -> Options:
    """Remove labels that every text repeats, such as in ["A. liver", "B. spleen"]."""
    matches = [LABELLED.fullmatch(text) if text else None for text in options.texts]
    found = [match[1] for match in matches if match]
    if len(found) < 2 or len(found) != sum(map(bool, options.texts)):
        return options
    if found not in (_labels_from(first)[: len(found)] for first in ("A", "a", "0", "1")):
        return options
    own = [
        label.casefold() for label, text in zip(options.labels, options.texts, strict=True) if text
    ]
    if own != [label.casefold() for label in found] and options.labels[0] not in ("A", "0", "1"):
        return options
    labels = [match[1] if match else "" for match in matches]
    return replace(
        options, labels=labels, texts=[strip(match[2]) if match else "" for match in matches]
    )
