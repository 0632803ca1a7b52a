"""Columns of a raw row: their names, and their values as clean text.

Reasons for rejecting a row name columns that medjob knows, types, numbers and positions. They never
contain the row's text, because rows may be about patients.
"""

from __future__ import annotations

import ast
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

Fields = Mapping[str, Any]

# Python decodes invalid bytes and broken JSON escapes to surrogates.
_SURROGATE = re.compile("[\ud800-\udfff]")


def _is_blank(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in ("Cc", "Cf")


# White space, control characters and invisible ones such as the zero-width space and the byte-order
# mark. Fillers count as letters in Unicode. Signs of Arabic script in category Cf are visible.
_BLANK = (
    "".join(char for char in map(chr, (*range(0x600), *range(0x1000, 0x3001))) if _is_blank(char))
    + "\u115f\u1160\u2800\u3164\ufeff\uffa0"
)


class UnusableRow(Exception):
    """A row is rejected, for the reason in the message."""


def strip(text: str) -> str:
    """Remove white space and invisible characters from both ends."""
    return text.strip(_BLANK)


def is_empty(value: Any) -> bool:
    """Whether a cell is null or NaN, or has no visible text, items or keys."""
    if value is None:
        return True
    if isinstance(value, str):
        return not strip(value)
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, list | tuple | dict) and not value


def checked(text: str, name: str) -> str:
    """Return `text`, or reject the row because no file could hold it."""
    if not text.isascii() and _SURROGATE.search(text):
        raise UnusableRow(f"{name} is not UTF-8")
    if "\0" in text:
        raise UnusableRow(f"{name} contains a NUL character")
    return text


def to_text(value: Any, name: str, numbers: bool = False) -> str:
    """Return a cell as clean text.

    Args:
        numbers: Whether the cell may hold a number, which is then written in digits. A whole number
            has no decimal point, because pandas turns integers into floats if any are missing.

    Raises:
        UnusableRow: the cell is empty, or not text.
    """
    if numbers and is_number(value):
        whole = isinstance(value, float) and value.is_integer()
        return str(int(value) if whole else value)
    if is_empty(value):
        raise UnusableRow(f"{name} is {'empty' if isinstance(value, str) else 'null'}")
    if not isinstance(value, str):
        raise UnusableRow(f"{name} is not text ({type(value).__name__})")
    return strip(checked(value, name))


def is_number(value: Any) -> bool:
    """Whether a cell is a finite number. bool is a subclass of int."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parse_literal(cell: str, name: str) -> Any:
    """Parse JSON or a Python literal in a cell. No code can run.

    Raises:
        UnusableRow: it is neither.
    """
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # such as about escapes in the text
                return parse(cell)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise UnusableRow(f"{name} cannot be parsed")


def unpacked(value: Any) -> Any:
    """Parse a list or object that a CSV file holds as text. Return other values unchanged, also a
    text that only begins with a bracket."""
    if isinstance(value, str) and strip(value)[:1] in ("[", "{"):
        try:
            found = parse_literal(strip(value), "")
        except UnusableRow:
            return value
        return found if isinstance(found, list | tuple | dict) else value
    return value


@lru_cache(maxsize=4096)
def normal_name(name: str) -> str:
    """Return a column's name without case and separators: `Complex_CoT` and `complex cot` are both
    `complexcot`."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())


class Row:
    """The columns of a raw row, by name. Case and separators in names do not matter.

    A column is missing if its value is empty: files with the columns of several data sets have
    nulls in the columns that do not apply.
    """

    __slots__ = ("empty", "values")

    def __init__(self, fields: Fields) -> None:
        self.values: dict[str, Any] = {}
        self.empty: dict[str, Any] = {}
        inner = fields.get("data")
        if isinstance(inner, Mapping):  # some hub data sets have all columns in one
            fields = {**fields, **inner}
        for column, value in fields.items():
            name = normal_name(str(column))
            if not name:  # such as the index that pandas writes into a CSV file
                continue
            if is_empty(value):
                self.empty[name] = value
            elif name in self.values and self.values[name] != value:
                raise UnusableRow("two columns have the same name, except for case and separators")
            else:
                self.values[name] = value

    def has(self, *names: str) -> bool:
        """Whether any of these columns has a value."""
        return any(normal_name(name) in self.values for name in names)

    def mentions(self, *names: str) -> bool:
        """Whether the row has any of these columns, with or without a value."""
        return any(normal_name(name) in self.empty for name in names) or self.has(*names)

    def get(self, name: str) -> Any:
        """Return a column's value, or None."""
        return self.values.get(normal_name(name))

    def present(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Yield those of the columns that have a value, with it."""
        for name in names:
            value = self.values.get(normal_name(name))
            if value is not None:
                yield name, value

    def missing(self, names: tuple[str, ...]) -> UnusableRow:
        """Return the reason that none of these columns has a value."""
        for name in names:
            if normal_name(name) in self.empty:
                value = self.empty[normal_name(name)]
                return UnusableRow(f"{name} is {'empty' if isinstance(value, str) else 'null'}")
        return UnusableRow(f"{names[0]} is missing")

    def text(self, *names: str, numbers: bool = False) -> str:
        """Return the text of these columns, or nothing.

        Raises:
            UnusableRow: a column is not text, or two columns hold different texts.
        """
        texts = [(name, to_text(value, name, numbers)) for name, value in self.present(names)]
        for name, text in texts[1:]:
            if text != texts[0][1]:
                raise UnusableRow(f"{texts[0][0]} and {name} differ")
        return texts[0][1] if texts else ""
