"""Which option of a multiple-choice row is right."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from medjob.data.columns import Row, UnusableRow, is_number, strip, to_text, unpacked
from medjob.data.options import ANSWERS, LABELLED, UNCLEAR_ANSWERS, Options, lists_answers

IndexBase = Callable[[str], int]
"""Returns the index of the first option, 0 or 1, in the column of this name."""

_DECORATED = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*)?"
    r"[(\[]?\s*(\w{1,3})\s*[)\].:、．：]*",
    re.IGNORECASE,
)
# A letter and then a punctuation mark or the end. "The answer is A blood clot" names no option.
_STATED = re.compile(
    r"\b(?i:answer|option|choice)(?i:\s{1,3}is)?\s{0,3}:?\s{0,3}"
    r"\**[(\[]?([A-Z])(?=[)\].:,;*]|\s*\Z|\n)"
)
# Numbers in these columns are indices, also if an option is the same number.
_INDEX_COLUMNS = (
    *("answer_idx", "answer_index", "cop", "correct_idx", "correct_index", "correct_answer_idx"),
    *("correct_answer_index", "correct_option_index", "correct_option_idx", "gold_index"),
    *("gold_idx", "label", "ra"),
)
_SHORT = 100
"""Longest text, in characters, that is only a label or a list of labels."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer can mean: positions of options in the list."""

    label: int | None = None
    """The option with this label. It has precedence over the other readings."""
    number: int | None = None
    """An index. Whether it counts from 0 or 1 depends on the column."""
    texts: tuple[int, ...] = ()
    """Options with this text."""

    def position(self) -> int | None:
        """Return the position that the answer means regardless of the column, if it is certain."""
        if self.label is not None:
            return self.label
        return self.texts[0] if len(self.texts) == 1 and self.number is None else None


def read_answers(row: Row, options: Options) -> dict[str, Reading]:
    """Read the columns that say which option is right.

    Raises:
        UnusableRow: there are none, or one of them fits no option or several.
    """
    names = ANSWERS if lists_answers(row) else (*ANSWERS, "answers")
    columns = dict(row.present(names)) or dict(row.present(UNCLEAR_ANSWERS))
    readings = {name: read_answer(value, options, name) for name, value in columns.items()}
    if len(options.marked) > 1:
        raise UnusableRow(f"several options are right ({len(options.marked)} are marked)")
    if options.marked:
        readings["options"] = Reading(label=options.marked[0])
    return readings


def no_answer(row: Row) -> UnusableRow:
    """Return the reason that no column says which option is right."""
    return row.missing(("answer_idx", *ANSWERS))


def read_answer(value: Any, options: Options, name: str) -> Reading:
    """Read a cell that says which option is right.

    Raises:
        UnusableRow: it fits no option or several.
    """
    value = unpacked(value)
    if isinstance(value, list | tuple):
        return _read_list(list(value), options, name)
    if isinstance(value, bool):
        return Reading(texts=_with_text(str(value), options))
    text = to_text(value, name, numbers=True)
    if len(labels := _with_label(text, options)) == 1:
        return Reading(label=labels[0], texts=_with_text(text, options))
    texts = _with_text(text, options)
    if re.fullmatch(r"-?\d{1,9}(\.0+)?", text):
        is_index = name in _INDEX_COLUMNS or (is_number(value) and not options.are_numbers)
        return _read_number(int(float(text)), () if is_index else texts, name)
    if texts:
        return Reading(texts=texts)
    return _read_decorated(text, options, name)


def _read_number(number: int, texts: tuple[int, ...], name: str) -> Reading:
    if number < 0 and not texts:  # MedMCQA's test split has -1
        raise UnusableRow(f"{name} is {number}, so the right option is unknown")
    return Reading(number=number if number >= 0 else None, texts=texts)


def _read_list(values: list[Any], options: Options, name: str) -> Reading:
    if len(values) == 1:
        return read_answer(values[0], options, name)
    if len(values) == len(options.texts) and all(
        is_number(value) or isinstance(value, bool) for value in values
    ):
        right = [position for position, value in enumerate(values) if value == 1]
        if len(right) == 1 and all(value in (0, 1) for value in values):
            return Reading(label=right[0])
    raise UnusableRow(f"several options are right ({len(values)} values in {name})")


def _read_decorated(text: str, options: Options, name: str) -> Reading:
    """Read a label with something around it, such as "(B)", "Option B", "B) liver" or "A,C"."""
    if len(text) <= _SHORT and (match := _DECORATED.fullmatch(text)):
        labels = _by_letter(match[1], options)
        if len(labels) == 1:
            return Reading(label=labels[0])
        if match[1].isdigit() and match[1].isascii():
            return Reading(number=int(match[1]))
    if match := LABELLED.fullmatch(text):
        rest = strip(match[2])
        texts = _with_text(rest, options) or _beginning_with(rest, options)
        labels = _by_letter(match[1], options)
        if len(labels) == 1 and labels[0] in texts:
            return Reading(label=labels[0])
    if count := _several_labels(text, options):
        raise UnusableRow(f"several options are right ({count} labels in {name})")
    if texts := _beginning_with(text, options):
        return Reading(texts=texts)
    raise UnusableRow(f"{name} is not one of the options")


def _several_labels(text: str, options: Options) -> int:
    """Return the number of labels in a text such as "A,C" or "AC", or 0 for another text."""
    if len(text) > _SHORT:
        return 0
    parts = re.split(r"\s*(?:[,;/&+、，；]|\band\b)\s*|\s+", text)
    if len(parts) == 1 and text.isupper():
        parts = list(text)
    known = all(len(_with_label(part, options)) == 1 for part in parts)
    return len(parts) if known and len(parts) > 1 else 0


def _beginning_with(text: str, options: Options) -> tuple[int, ...]:
    """Return the options that a longer answer begins with, such as "Spleen. Explanation: ...".
    Of two such options, the longer one is meant."""
    found = [
        place
        for place, option in enumerate(options.texts)
        if option and re.match(re.escape(option.rstrip(".")) + r"\s*[.:;\n]", text, re.IGNORECASE)
    ]
    longest = max((len(options.texts[place]) for place in found), default=0)
    return tuple(place for place in found if len(options.texts[place]) == longest)


def check_stated(response: str, position: int, options: Options) -> None:
    """Reject a row whose response ends by naming another option than the right one."""
    stated = [_with_label(found[1], options) for found in _STATED.finditer(response)]
    stated = [places for places in stated if len(places) == 1]
    if stated and stated[-1] != [position]:
        raise UnusableRow("the response names another option than the right one")


def _with_label(text: str, options: Options) -> list[int]:
    exact = [place for place, label in enumerate(options.labels) if label and label == text]
    if exact:
        return exact
    bare = _bare(text)
    return [place for place, label in enumerate(options.labels) if bare and _bare(label) == bare]


def _by_letter(text: str, options: Options) -> list[int]:
    """Return the option with this label. If labels are digits, B is the second option."""
    found = _with_label(text, options)
    if not found and re.fullmatch("[A-Za-z]", text) and not any(map(str.isalpha, options.labels)):
        place = ascii_uppercase.index(text.upper())
        return [place] if place < len(options.labels) else []
    return found


def _bare(label: str) -> str:
    """Return a label without case, brackets and words: "(B)" and "option_b" are both "b"."""
    if len(label) > _SHORT:
        return label
    return re.sub(r"^(?:option|choice|opt)[\s_-]*(?=\w)", "", label.casefold()).strip("()[].:、． ")


def _with_text(text: str, options: Options) -> tuple[int, ...]:
    exact = tuple(place for place, option in enumerate(options.texts) if option == text)
    if len(exact) == 1 or not text:
        return exact
    normal = _normal(text)
    return tuple(
        place for place, option in enumerate(options.texts) if option and _normal(option) == normal
    )


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().rstrip(".。 ").split())


def right_option(readings: Mapping[str, Reading], options: Options, index_base: IndexBase) -> int:
    """Return the position of the right option.

    Raises:
        UnusableRow: the columns disagree, fit several options, or fit none.
    """
    meanings = {
        name: list(_meanings(name, reading, options, index_base))
        for name, reading in readings.items()
    }
    for name, positions in meanings.items():
        if not positions:
            raise UnusableRow(f"{name} is not one of the options")
    (first_name, first), *others = meanings.items()
    common = [place for place in first if all(place in positions for _, positions in others)]
    if not common:
        raise UnusableRow(f"{' and '.join(meanings)} mean different options")
    if len(common) > 1 and readings[first_name].label is None:
        raise UnusableRow(f"{first_name} fits {len(common)} options")
    if not options.texts[common[0]]:
        raise UnusableRow(f"{first_name} means an option that is empty")
    return common[0]


def _meanings(
    name: str, reading: Reading, options: Options, index_base: IndexBase
) -> Iterator[int]:
    """Yield the positions that a column can mean, the likeliest first, without repeats."""
    seen = []
    if reading.label is not None:
        seen.append(reading.label)
    if reading.number is not None and reading.number <= len(options.texts):
        position = reading.number - index_base(name)
        if 0 <= position < len(options.texts):
            seen.append(position)
    seen.extend(reading.texts)
    yield from dict.fromkeys(seen)
