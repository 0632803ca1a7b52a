"""Read rows from text with a delimiter between columns, such as CSV."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from medjob.data.columns import normal_name
from medjob.data.open_text import UTF8_HINT, first_invalid_byte, open_text
from medjob.data.raw_row import MAX_TEXT, RawRow, checked_row, equal_names
from medjob.errors import DataError

_DELIMITERS = (",", ";", "\t", "|")
_SAMPLE = 1 << 16
_QUOTE_HINT = 'close the quote; inside a cell in quotes, write "" for a quote'


class _Dialect(NamedTuple):
    delimiter: str
    skips_spaces: bool
    """Whether a space after the delimiter is not part of the cell."""


class _TooLong(Exception):
    """No end of the row is in sight."""


class _Lines:
    """Lines of a file. Keeps those of the current row, to find a quote that is not closed."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._size = 0
        self.row: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_TEXT)
        self._size += len(line)
        if self._size >= MAX_TEXT:
            raise _TooLong
        if not line:
            raise StopIteration
        self.row.append(line)
        return line

    def next_row(self) -> None:
        self.row.clear()
        self._size = 0


def read_csv(path: Path, name: str, default: str) -> Iterator[RawRow]:
    """Yield the rows of a CSV file. Its first line names the columns, and shows the delimiter.

    Args:
        name: The file's name in the rows.
        default: The delimiter, unless another one fits better.

    Raises:
        DataError: two columns have the same name, a quote is not closed, or the file holds JSON.
    """
    with open_text(path) as file:
        sample = file.read(_SAMPLE)
    _refuse_json(path, sample)
    dialect = _find_dialect(sample, default)
    with open_text(path) as file:
        rows = _read_cells(path, file, dialect)
        _, header = next(rows, (0, []))
        _check_header(path, header)
        for line, cells in rows:
            problem = _problem(header, cells)
            if problem:
                yield RawRow(name, line, {}, problem)
            else:
                yield checked_row(name, line, _named(header, cells))


def _refuse_json(path: Path, sample: str) -> None:
    if re.match(r'\s*(?:\[\s*)?\{\s*"', sample):
        raise DataError(
            f"{path}: holds JSON, although its name says that it is CSV",
            "its name must end in .jsonl or .json",
        )


def _find_dialect(sample: str, default: str) -> _Dialect:
    """Choose the delimiter that splits the first rows into the columns of the header."""
    lines = [line for line in io.StringIO(sample, newline="") if line.strip()]
    if not lines:
        return _Dialect(default, False)
    best = max(_DELIMITERS, key=lambda delimiter: _fit(lines, delimiter, default))
    return _Dialect(best, re.search(rf"{re.escape(best)} +\S", lines[0]) is not None)


def _fit(lines: list[str], delimiter: str, default: str) -> tuple[float, bool, int]:
    """Rate a delimiter. One that does not occur in the header is only used by default."""
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    width = len(next(rows))
    if width < 2:
        return 0.0, delimiter == default, 1
    widths = [len(row) for row in rows][:-1]  # the last one may be cut off
    share = sum(each == width for each in widths) / len(widths) if widths else 1.0
    return 1.0 + share, delimiter == default, width


def _read_cells(path: Path, file: TextIO, dialect: _Dialect) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of every row, with the line in which it starts."""
    csv.field_size_limit(sys.maxsize)
    lines = _Lines(file)
    reader = csv.reader(
        lines, delimiter=dialect.delimiter, skipinitialspace=dialect.skips_spaces, strict=True
    )
    start, width = 1, 0
    try:
        for cells in reader:
            width = width or len(cells)
            if len(lines.row) > 1 and len(cells) != width:
                raise _swallowed(path, start, reader.line_num, len(cells), width)
            if cells:
                yield start, cells
            start = reader.line_num + 1
            lines.next_row()
    except (csv.Error, _TooLong):
        raise _bad_quote(path, start, lines.row, dialect) from None


def _swallowed(path: Path, first: int, last: int, found: int, width: int) -> DataError:
    return DataError(
        f"{path}: lines {first} to {last} are one row with {found} columns, but the header has "
        f"{width}: a quote in line {first} or after it is in the wrong place",
        _QUOTE_HINT,
    )


def _bad_quote(path: Path, start: int, row: Sequence[str], dialect: _Dialect) -> DataError:
    """Describe a row that csv refused. It accepts everything outside of quotes."""
    opened, ended = _find_bad_quote("".join(row), dialect)
    if opened is None:
        return DataError(
            f"{path}: the row in line {start} does not end within {MAX_TEXT:,} characters"
        )
    line = start + _lines_before(row, opened)
    if ended is None:
        return DataError(f"{path}: the quote that opens in line {line} is not closed", _QUOTE_HINT)
    last = start + _lines_before(row, ended)
    where = "the same line" if line == last else f"line {last}"
    return DataError(
        f"{path}: the quote that opens in line {line} ends within a cell in {where}", _QUOTE_HINT
    )


def _find_bad_quote(text: str, dialect: _Dialect) -> tuple[int | None, int | None]:
    """Return where the quote opens that is not closed at the end of a cell, and where it ends. None
    if there is no such place."""
    space = " *" if dialect.skips_spaces else ""
    end = rf"{re.escape(dialect.delimiter)}|\r\n|\n|\r|\Z"
    cell = re.compile(
        rf'{space}(?:(?P<open>")(?:[^"]|"")*+(?P<close>"?)|[^"{re.escape(dialect.delimiter)}\r\n]'
        rf"[^{re.escape(dialect.delimiter)}\r\n]*+|)(?P<end>{end})?"
    )
    position = 0
    while found := cell.match(text, position):
        if found["open"] and (not found["close"] or found["end"] is None):
            return found.start("open"), found.end("close") if found["close"] else None
        if found.end() == position:
            break
        position = found.end()
    return None, None


def _lines_before(row: Sequence[str], position: int) -> int:
    """Count the lines of a row that end at or before a position in it."""
    count = 0
    for line in row:
        position -= len(line)
        if position < 0:
            break
        count += 1
    return min(count, max(len(row) - 1, 0))


def _check_header(path: Path, header: list[str]) -> None:
    same = equal_names([normal_name(name) for name in header])
    if same:
        raise DataError(
            f"{path}: columns {same[0]} and {same[1]} have the same name, except for case and "
            "separators",
            "rename or remove one of them; the first line must contain the names of the columns",
        )
    if first_invalid_byte("".join(header)) is not None:
        raise DataError(f"{path}: the names of the columns are not UTF-8", UTF8_HINT)


def _problem(header: list[str], cells: list[str]) -> str:
    if len(cells) != len(header):
        return f"wrong number of columns: {len(cells)}, but the header has {len(header)}"
    if cells == header:
        return "repeats the header"
    # pandas writes its index into a first column without a name.
    for number, (name, cell) in enumerate(zip(header, cells, strict=True), 1):
        if number > 1 and cell.strip() and not name.strip():
            return f"a cell in a column without a name (column {number})"
    return ""


def _named(header: list[str], cells: list[str]) -> dict[str, str]:
    return {
        name: cell
        for number, (name, cell) in enumerate(zip(header, cells, strict=True), 1)
        if name.strip() or number == 1
    }
