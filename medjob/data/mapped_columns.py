"""Read the columns that a source's `columns` names, in place of those that medjob recognises."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from medjob.config.data_suffixes import data_suffix
from medjob.config.prepare import DataSource, RowField
from medjob.data import criteria
from medjob.data import known_columns as known
from medjob.data.columns import normal_name
from medjob.data.options import ANSWERS, UNCLEAR_ANSWERS, option_columns
from medjob.data.raw_row import RawRow
from medjob.errors import DataError

# Columns that would be read for the same field. They are ignored if it has a column.
# The ground truth is not among the answers, because a row can have both.
_ANSWERS = {*known.ANSWERS, *ANSWERS, *UNCLEAR_ANSWERS} - {*known.TRUTHS, *known.VERDICTS}
_RIVALS: dict[RowField, Sequence[str]] = {
    "question": (*known.QUESTIONS, "instruction", "input", *known.PATIENTS),
    "context": (*known.CONTEXTS, "description", "text"),
    "system": known.SYSTEMS,
    "messages": known.DIALOGUES,
    "reasoning": known.REASONING,
    "response": known.RESPONSES,
    "reference": known.TRUTHS,
    "answer": sorted(_ANSWERS),
    "rubric": criteria.COLUMNS,
}
# Where the converters look for a field, if it is not a column of the same name.
_NAMES: dict[RowField, str] = {"reference": known.TRUTHS[0]}
_MISSING = object()
_MOST_NAMES = 30
_MOST_CHARACTERS = 40


class MappedColumns:
    """Renames the columns of a source's rows, and counts the rows that have each."""

    def __init__(self, source: DataSource) -> None:
        self._source = source
        self._names = {field: _name(source, field) for field in source.columns}
        self._found: dict[str, None] = {}
        self._has_csv = False
        self.rows = 0
        """Rows that could be read."""
        self.counts: Counter[RowField] = Counter()
        """How many of them have the column of each field."""

    def apply(self, row: RawRow) -> RawRow:
        """Return the row with its columns under the names of their fields."""
        if row.problem or not self._source.columns:
            return row
        fields = _flat(row.fields)
        found = {field: _find(fields, name) for field, name in self._source.columns.items()}
        found = {field: value for field, value in found.items() if value is not _MISSING}
        self.rows += 1
        self.counts.update(list(found))
        self._remember(row.file, fields)
        return replace(row, fields=self._rest(fields) | self._renamed(found))

    def check(self) -> None:
        """Raise DataError if a column is in none of the rows."""
        missing = [field for field in self._source.columns if not self.counts[field]]
        if missing and self.rows:
            raise self._unknown(missing)

    def _rest(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the columns that are mapped, and those that others are mapped in place of."""
        mapped = tuple(_top(fields, name) for name in self._source.columns.values())
        kept = _kept(tuple(fields), frozenset(self._names), mapped)
        return {name: fields[name] for name in kept}

    def _renamed(self, found: Mapping[RowField, Any]) -> dict[str, Any]:
        return {self._names[field]: value for field, value in found.items()}

    def _remember(self, file: str, fields: Mapping[str, Any]) -> None:
        if len(self._found) <= _MOST_NAMES and not self._found.keys() >= fields.keys():
            self._found |= dict.fromkeys(fields)
            self._has_csv |= data_suffix(file).startswith((".csv", ".tsv"))

    def _unknown(self, missing: Sequence[RowField]) -> DataError:
        names = " and ".join(f"{self._source.columns[field]!r} ({field})" for field in missing)
        plural = "columns" if len(missing) > 1 else "column"
        return DataError(
            f"{self._source.path}: columns names the {plural} {names}, which none of the "
            f"{self.rows} rows has",
            self._hint(missing),
        )

    def _hint(self, missing: Sequence[RowField]) -> str:
        """Name the columns that exist. In a CSV file without a header line they are the text of a
        row, so they are shown only if one of them is what it should be."""
        if not self._has_csv or self.counts:
            shown = [name[:_MOST_CHARACTERS] for name in self._found][:_MOST_NAMES]
            more = ", ..." if len(self._found) > _MOST_NAMES else ""
            return f"the columns are: {', '.join(shown)}{more}"
        wanted = [self._source.columns[field] for field in missing]
        close = [name for each in wanted for name in difflib.get_close_matches(each, self._found)]
        if close:
            return f"did you mean {close[0]!r}? Write the name as in the file"
        return (
            f"write the names as in the file, which has {len(self._found)} columns; its first line "
            "must contain their names"
        )


def _name(source: DataSource, field: RowField) -> str:
    if field == "reasoning" and source.format == "medical_o1":
        return "complex_cot"  # the column that this format requires
    return _NAMES.get(field, field)


def _flat(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the columns out of a column `data` that holds them all, as `Row` does."""
    inner = fields.get("data")
    if not isinstance(inner, Mapping):
        return fields
    return {name: value for name, value in fields.items() if name != "data"} | dict(inner)


def _find(fields: Mapping[str, Any], name: str) -> Any:
    """Return the column `name`, or what a path such as `output.text` or `choices.0.text` leads
    to."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.removeprefix("data." if "data" not in fields else "").split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            return _MISSING
    return value


def _top(fields: Mapping[str, Any], name: str) -> str:
    """Return the column that a path begins with."""
    if name in fields:
        return name
    return name.removeprefix("data." if "data" not in fields else "").partition(".")[0]


@lru_cache(maxsize=256)
def _kept(
    names: tuple[str, ...], mapped_fields: frozenset[RowField], mapped: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the columns that keep their meaning beside those that are mapped."""
    rivals = {normal_name(rival) for field in mapped_fields for rival in _rivals(field)}
    if any(field.startswith("option") for field in mapped_fields):
        rivals |= option_columns(map(normal_name, names))
    return tuple(name for name in names if name not in mapped and normal_name(name) not in rivals)


def _rivals(field: RowField) -> Sequence[str]:
    return (field, *_RIVALS.get(field, ()))
