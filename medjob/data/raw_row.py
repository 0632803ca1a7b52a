"""One row as it was read, and the checks that rows of all file types pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

MAX_ROW = 1 << 24
"""Largest row, in characters. Longer ones are rejected."""
MAX_TEXT = 1 << 28
"""How many characters are read in search of the end of a row, before the file is refused."""
_MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read."""

    file: str
    line: int
    """Line of the file in which the row starts. In a JSON list, a Parquet file and an Arrow file:
    the row's number."""
    fields: Mapping[str, Any]
    problem: str = ""
    """Why the row cannot be read. `fields` is then empty. It never contains the row's text."""

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Unusable:
    """A value that a file holds and Python cannot, or that is ambiguous."""

    reason: str


class _Problem(Exception):
    """A value makes its row unusable, for the reason in the message."""


def checked_row(file: str, line: int, value: Any) -> RawRow:
    """Return a row, with a problem if it is not an object, is too large, or holds text that no file
    could hold."""
    if isinstance(value, Unusable):
        return RawRow(file, line, {}, value.reason)
    if not isinstance(value, dict):
        return RawRow(file, line, {}, f"not a JSON object ({type(value).__name__})")
    if not value:
        return RawRow(file, line, {}, "has no columns")
    try:
        size = sum(_column_size(number, *item) for number, item in enumerate(value.items(), 1))
    except _Problem as problem:
        return RawRow(file, line, {}, str(problem))
    if size > MAX_ROW:
        return RawRow(file, line, {}, too_long(size))
    return RawRow(file, line, value)


def too_long(size: int | None = None) -> str:
    """Return the reason that a row is too long. `size` is its number of characters, if known."""
    found = "" if size is None else f", and it has {size:,}"
    return f"longer than a row may be (at most {MAX_ROW:,} characters{found})"


def _column_size(number: int, name: str, value: Any) -> int:
    try:
        return _size(name, 0) + _size(value, 0)
    except UnicodeEncodeError:
        raise _Problem(f"not UTF-8 (column {number})") from None
    except _Problem as problem:
        raise _Problem(f"{problem} (column {number})") from None


def _size(value: Any, depth: int) -> int:
    """Count the characters of all texts in a value.

    Raises:
        UnicodeEncodeError: one has a lone surrogate. Python decodes invalid bytes and broken JSON
            escapes to them.
    """
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
        return len(value)
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, Unusable):
        raise _Problem(value.reason)
    if not isinstance(value, dict | list | tuple):
        return 0
    if depth == _MAX_DEPTH:
        raise _Problem("nested too deeply")
    items = chain(value, value.values()) if isinstance(value, dict) else value
    return sum(_size(item, depth + 1) for item in items)


def equal_names(names: Sequence[str]) -> tuple[int, int] | None:
    """Return the positions, from 1, of the first two columns that have the same name. Columns
    without a name are left out."""
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if name and first.setdefault(name, number) != number:
            return first[name], number
    return None
