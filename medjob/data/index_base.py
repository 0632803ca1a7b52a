"""Whether the indices of right options count from 0 or from 1, decided over a whole column.

MedMCQA's `cop` counts from 1 on its own site, and from 0 on the Hugging Face hub. A single row does
not show which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from medjob.data.columns import Row
from medjob.data.options import Options, has_options, read_options
from medjob.data.raw_row import RawRow
from medjob.data.right_option import Reading, read_answers
from medjob.errors import DataError


@dataclass(slots=True)
class _Column:
    """What the rows of a file show about a column of indices."""

    low: int
    high: int
    fewest: int
    most: int
    """Fewest and most options of a row."""
    from_zero: int = 0
    """Rows whose index can only count from 0."""
    from_one: int = 0

    def add(self, number: int, options: int, position: int | None) -> None:
        self.low, self.high = min(self.low, number), max(self.high, number)
        self.fewest, self.most = min(self.fewest, options), max(self.most, options)
        self.from_zero += number in (0, position)
        self.from_one += number == options or (position is not None and number == position + 1)

    @property
    def base(self) -> int | None:
        """0 or 1, or None if the rows show neither or both."""
        if bool(self.from_zero) == bool(self.from_one):
            return None
        return 1 if self.from_one else 0


@dataclass(slots=True)
class IndexBases:
    """Index bases of the columns of a source. It is read again once, when the first one is needed.

    Only the range of each column is kept, so memory does not grow with the number of rows.
    """

    rows: Callable[[], Iterable[RawRow]]
    """Reads the rows of the source from the start."""
    _columns: dict[tuple[str, str], _Column] = field(default_factory=dict)
    _bases: dict[tuple[str, str], int] = field(default_factory=dict)
    _is_read: bool = False

    def base(self, file: str, column: str) -> int:
        """Return 0 or 1: the index of the first option, in this column of this file.

        Raises:
            DataError: the column's values show neither, or both.
        """
        if (file, column) not in self._bases:
            if not self._is_read:
                self._read()
            self._bases[file, column] = self._decide(file, column)
        return self._bases[file, column]

    def _decide(self, file: str, column: str) -> int:
        found = self._columns.get((file, column))
        others = {seen.base for (_, name), seen in self._columns.items() if name == column}
        base = found.base if found else None
        if base is None and not (found and found.from_zero) and len(others - {None}) == 1:
            base = next(iter(others - {None}))  # the other files of the source agree
        if base is None:
            raise _undecided(file, column, found)
        return base

    def _read(self) -> None:
        self._is_read = True
        for raw in self.rows():
            try:
                row = Row(raw.fields)
                if has_options(row):
                    options = read_options(row)
                    self._add(raw.file, options, read_answers(row, options))
            except Exception:
                continue

    def _add(self, file: str, options: Options, readings: dict[str, Reading]) -> None:
        count = len(options.texts)
        certain = {reading.position() for reading in readings.values()} - {None}
        position = certain.pop() if len(certain) == 1 else None
        for name, reading in readings.items():
            number = reading.number
            if number is None or reading.texts or number > count:
                continue
            column = self._columns.setdefault((file, name), _Column(number, number, count, count))
            column.add(number, count, position)


def _undecided(file: str, column: str, found: _Column | None) -> DataError:
    if found is None:
        detail = "no row has a usable index"
    else:
        options = (
            f"{found.fewest}" if found.fewest == found.most else f"{found.fewest}-{found.most}"
        )
        detail = f"its values are {found.low} to {found.high}, and rows have {options} options"
        if found.from_zero:
            detail += "; some rows only fit 0, and others only fit 1"
    return DataError(
        f"{file}: cannot tell whether {column} counts the options from 0 or from 1 ({detail})",
        f"replace the numbers in {column} by the letters of the right options: A for the first",
    )
