"""Read rows from JSON lines, lists and objects. The contents decide, and not the file's ending."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from medjob.data.open_text import first_invalid_byte, lines, open_text
from medjob.data.raw_row import MAX_ROW, MAX_TEXT, RawRow, Unusable, checked_row, too_long
from medjob.errors import DataError

_CHUNK = 1 << 20
_MAX_DOCUMENT = 1 << 30
_BLANK = "\ufeff \t\r\n"
_SPACE = re.compile(r"[\ufeff \t\r\n]*")
_CSV_HINT = "if it is CSV, its name must end in .csv or .tsv"
_LINES_HINT = "save the rows as JSON lines: one object per line, in a file that ends in .jsonl"
_WORD = re.compile("[A-Za-z_-]{1,30}")
_MOST_LISTS = 8
# Columns of a row that hold a list of objects. An object with one of them is a row.
_OBJECT_LISTS = {
    "messages",
    "conversations",
    "conversation",
    "dialogue",
    "turns",
    "history",
    "prompt",
    "chosen",
    "rejected",
    "options",
    "choices",
}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unusable:
    result = dict(pairs)
    if len(result) != len(pairs):
        return Unusable("an object has the same key twice")
    return result


def _constant(name: str) -> Unusable:
    return Unusable(f"not valid JSON: {name} is not a number")


def _float(text: str) -> float | Unusable:
    value = float(text)
    return value if math.isfinite(value) else Unusable("a number is too large")


def _integer(text: str) -> int | Unusable:
    # Python refuses to convert more than 4300 digits.
    return int(text) if len(text) < 1000 else Unusable("a number has too many digits")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_constant=_constant,
    parse_float=_float,
    parse_int=_integer,
)


def read_json(path: Path, name: str, has_lines: bool) -> Iterator[RawRow]:
    """Yield the rows of a JSON file.

    It may hold one object per line, a list of objects, an object of them by id, or a list for each
    column. The rows may also be the only list of objects in an object.

    Args:
        name: The file's name in the rows.
        has_lines: Whether the file's name says that it has one object per line.

    Raises:
        DataError: the file is not valid JSON, or holds no rows.
    """
    with open_text(path) as file:
        first, has_more = _first_line(file)
    if not first:
        return
    with open_text(path) as file:
        if first.startswith("["):
            yield from _list_rows(path, name, file)
        elif _are_lines(first, has_lines, has_more):
            yield from _line_rows(name, file)
        else:
            yield from _document_rows(path, name, file)


def _first_line(file: TextIO) -> tuple[str, bool]:
    """Return the beginning of the first line that is not blank, and whether more text follows."""
    first = ""
    while line := file.readline(MAX_ROW):
        if first and _is_text(line):
            return first, True
        if _is_text(line):
            first = line.lstrip(_BLANK)
    return first, False


def _is_text(line: str) -> bool:
    return bool(line.strip(_BLANK))


def _are_lines(start: str, has_lines: bool, has_more: bool) -> bool:
    """Whether a file that starts with the line `start` has one object per line."""
    if start.strip() == "{":
        return False
    if has_lines:
        return True
    return has_more and isinstance(_parse(start), dict)


def _parse(text: str) -> Any:
    """Parse one JSON value. A problem is returned as an `Unusable` value."""
    try:
        return _DECODER.decode(text.strip(_BLANK))
    except json.JSONDecodeError as error:
        invalid = first_invalid_byte(text)
        if invalid is not None:
            return Unusable(f"not UTF-8 (byte {invalid})")
        return Unusable(f"not valid JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return Unusable("nested too deeply")


def _line_rows(name: str, file: TextIO) -> Iterator[RawRow]:
    for number, line in lines(file):
        if line is None:
            yield RawRow(name, number, {}, too_long())
        elif _is_text(line):
            yield checked_row(name, number, _parse(line))


class _Stream:
    """Reads one JSON value after another, so that a long list is never in memory at once."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._position = 0
        self._lines = 1

    def take(self) -> str:
        """Return the next character that is not white space, or an empty string at the end."""
        found = self.peek()
        self._position += len(found)
        return found

    def peek(self) -> str:
        """Return what `take` would return, and stay in front of it."""
        while True:
            match = _SPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._more(_CHUNK):
                return ""

    def value(self) -> Any:
        """Return the next value. Raises ValueError if there is none, or if it is too long."""
        self.peek()
        while True:
            rest = len(self._text) - self._position
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError:
                if rest > MAX_TEXT or not self._more(max(_CHUNK, rest)):
                    raise
                continue
            self._position = end
            return value

    def line(self, position: int | None = None) -> int:
        """Return the line of a position in the text that is in memory."""
        end = self._position if position is None else position
        return self._lines + self._text.count("\n", 0, end)

    def _more(self, size: int) -> bool:
        """Read on, and forget what was read before."""
        more = self._file.read(size)
        if more:
            self._lines = self.line()
            self._text = self._text[self._position :] + more
            self._position = 0
        return bool(more)


def _list_rows(path: Path, name: str, file: TextIO) -> Iterator[RawRow]:
    stream = _Stream(file)
    stream.take()
    number = 0
    if stream.peek() == "]":
        return
    while True:
        number += 1
        yield checked_row(name, number, _list_item(path, number, stream))
        separator = stream.take()
        if separator == "]":
            break
        if separator != ",":
            raise DataError(
                f"{path}: not valid JSON: the list does not continue after row {number} "
                f"(line {stream.line()})",
                "the file may be cut off; " + _LINES_HINT,
            )
    if stream.peek():
        raise DataError(
            f"{path}: not valid JSON: text follows the list (line {stream.line()})", _LINES_HINT
        )


def _list_item(path: Path, number: int, stream: _Stream) -> Any:
    try:
        return stream.value()
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not valid JSON: {error.msg} in row {number} (line {stream.line(error.pos)})",
            "the file may be cut off; correct the row",
        ) from None
    except RecursionError:
        raise DataError(f"{path}: row {number} is nested too deeply") from None


def _document_rows(path: Path, name: str, file: TextIO) -> Iterator[RawRow]:
    text = file.read(_MAX_DOCUMENT + 1)
    if len(text) > _MAX_DOCUMENT:
        raise DataError(
            f"{path}: a JSON object of more than {_MAX_DOCUMENT:,} characters", _LINES_HINT
        )
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        is_other = text.lstrip(_BLANK)[:1] not in "{["
        hint = f"{_CSV_HINT}; {_LINES_HINT}" if is_other else _LINES_HINT
        raise DataError(f"{path}: not valid JSON: {error}", hint) from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply", _LINES_HINT) from None
    if isinstance(value, Unusable):
        raise DataError(f"{path}: {value.reason}", _LINES_HINT)
    if not isinstance(value, dict):
        raise DataError(f"{path}: must contain a list of objects (got {type(value).__name__})")
    del text
    for number, row in enumerate(_rows_of(path, value), 1):
        yield checked_row(name, number, row)


def _rows_of(path: Path, value: dict[str, Any]) -> Iterator[Any]:
    """Find the rows in an object."""
    parts = list(value.values())
    if _is_wrapped(parts):
        return _rows_of(path, parts[0])
    if _has_objects(parts) and all(isinstance(part, dict | Unusable) for part in parts):
        return _rows_by_id(value)
    if _is_split(value):
        return _rows_of_split(path, value)
    lists = [key for key, part in value.items() if isinstance(part, list) and _has_objects(part)]
    if _is_row(value) and not any(_is_row(item) for key in lists for item in value[key]):
        lists = []
    if len(lists) > 1:
        raise _several_lists(path, lists)
    if lists:
        return map(_api_row, value[lists[0]])
    if parts and all(isinstance(part, list) and not _has_objects(part) for part in parts):
        return _rows_of_columns(path, value)
    return iter([value])


def _is_wrapped(parts: list[Any]) -> bool:
    """Whether an object has a single key with another object that holds the rows, such as
    `{"result": {"items": [...]}}`. A text in that object means that it is a row."""
    if len(parts) != 1 or not isinstance(parts[0], dict) or all(map(str.isdecimal, parts[0])):
        return False
    return not any(isinstance(part, str) for part in parts[0].values())


def _several_lists(path: Path, keys: list[str]) -> DataError:
    """Name the lists, unless their names could be those of patients."""
    are_words = len(keys) <= _MOST_LISTS and all(map(_WORD.fullmatch, keys))
    names = f": {', '.join(keys)}" if are_words else ""
    first = keys[0] if are_words else "NAME"
    return DataError(
        f"{path}: contains {len(keys)} lists of objects{names}",
        f"keep one of them, such as with: jq '.[\"{first}\"]' {path.name} > rows.json",
    )


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and not _OBJECT_LISTS.isdisjoint(value)


def _has_objects(values: list[Any]) -> bool:
    return any(isinstance(value, dict) for value in values)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, kind) for row in value)


def _rows_by_id(value: dict[str, Any]) -> Iterator[Any]:
    """PubMedQA has objects by id. pandas writes the cells of each column by the row's number."""
    first = next(row for row in value.values() if isinstance(row, dict))
    if first and all(map(str.isdecimal, first)) and not any(map(str.isdecimal, value)):
        columns = {name: cells for name, cells in value.items() if isinstance(cells, dict)}
        numbers = dict.fromkeys(number for cells in columns.values() for number in cells)
        return ({name: cells.get(row) for name, cells in columns.items()} for row in numbers)
    return ({"id": key, **row} if isinstance(row, dict) else row for key, row in value.items())


def _is_split(value: dict[str, Any]) -> bool:
    """Whether it has the form of pandas' `orient="split"`."""
    return _is_list_of(str, value.get("columns")) and _is_list_of(list, value.get("data"))


def _rows_of_split(path: Path, value: dict[str, Any]) -> Iterator[Any]:
    names = value["columns"]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: two columns have the same name")
    for cells in value["data"]:
        if len(cells) == len(names):
            yield dict(zip(names, cells, strict=True))
        else:
            yield Unusable(f"wrong number of columns: {len(cells)}, and there are {len(names)}")


def _rows_of_columns(path: Path, value: Mapping[str, list[Any]]) -> Iterator[Any]:
    lengths = sorted({len(cells) for cells in value.values()})
    if len(lengths) > 1:
        raise DataError(
            f"{path}: the columns have different lengths, from {lengths[0]} to {lengths[-1]}"
        )
    return (dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True))


def _api_row(row: Any) -> Any:
    """The Hugging Face API for rows wraps each one, and cuts long cells."""
    if not isinstance(row, dict) or not isinstance(row.get("row"), dict) or "row_idx" not in row:
        return row
    if row.get("truncated_cells"):
        return Unusable("the Hugging Face API has cut cells of this row")
    return row["row"]
