"""Read raw rows from files and hub data sets, each with its file and line.

Unreadable rows are returned with a reason, and never dropped silently.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from medjob.config.prepare import DataSource
from medjob.errors import DataError, InputError
from medjob.sources.hub import hub_errors
from medjob.sources.locations import Location
from medjob.sources.references import data_files


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read."""

    file: str
    line: int
    fields: Mapping[str, Any]
    problem: str = ""
    """Why the row cannot be read. `fields` is then empty."""


def read(source: DataSource, location: Location) -> Iterator[RawRow]:
    """Yield the first `limit` rows of `source` that match its `where`. Unreadable rows count too.

    Raises:
        DataError: a file cannot be parsed, or `where` names an unknown column.
        InputError: a file, or a hub data set's configuration or split, does not exist.
        RetryError: the hub cannot be reached.
    """
    rows = _read_hub(source, location) if location.on_hub else _read_files(location.path)
    matching = (row for row in rows if row.problem or _matches(row.fields, source))
    return islice(matching, source.limit)


def _matches(fields: Mapping[str, Any], source: DataSource) -> bool:
    for column, prefixes in source.where.items():
        if column not in fields:
            raise DataError(
                f"{source.path}: unknown column {column!r} in where",
                f"columns: {', '.join(fields)}",
            )
        if not str(fields[column]).startswith(tuple(prefixes)):
            return False
    return True


def _read_files(location: str) -> Iterator[RawRow]:
    for path in data_files(location):
        name = path.name
        try:
            match path.suffix:
                case ".jsonl":
                    yield from _read_jsonl(path, name)
                case ".json":
                    yield from _read_json(path, name)
                case ".csv":
                    yield from _read_csv(path, name)
                case _:
                    yield from _read_parquet(path, name)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_jsonl(path: Path, name: str) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_row(name, number, line)


def _json_row(name: str, number: int, line: bytes) -> RawRow:
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return RawRow(name, number, {}, f"not UTF-8 (byte {error.start})")
    except ValueError as error:
        return RawRow(name, number, {}, f"not valid JSON: {error}")
    return _object_row(name, number, value)


def _object_row(name: str, number: int, value: Any) -> RawRow:
    if not isinstance(value, dict):
        return RawRow(name, number, {}, f"not a JSON object ({type(value).__name__})")
    return RawRow(name, number, value)


def _read_json(path: Path, name: str) -> Iterator[RawRow]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON: {error}",
            "the name of a file with one object per line must end in .jsonl",
        ) from None
    if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
        # PubMedQA has a map from id to row.
        rows = [{"id": key, **row} for key, row in rows.items()]
    if not isinstance(rows, list):
        raise DataError(f"{path}: must contain a list of objects (got {type(rows).__name__})")
    for number, value in enumerate(rows, 1):
        yield _object_row(name, number, value)


def _read_csv(path: Path, name: str) -> Iterator[RawRow]:
    """Read a CSV file. Invalid bytes become surrogates, which reject only the row they are in."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        expected = len(reader.fieldnames or ())
        for row in reader:
            # DictReader keeps surplus columns under None, and fills missing ones with None.
            surplus = len(row.get(None, ()))
            missing = sum(value is None for value in row.values())
            if surplus or missing:
                found = expected + surplus - missing
                problem = f"wrong number of columns: {found}, but the header has {expected}"
                yield RawRow(name, reader.line_num, {}, problem)
            else:
                yield RawRow(name, reader.line_num, row)


def _read_parquet(path: Path, name: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(name, number, row)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _read_hub(source: DataSource, location: Location) -> Iterator[RawRow]:
    import datasets

    split = source.split or "train"
    name = f"{source.path}/{source.name or 'default'}/{split}"
    with hub_errors(source.path, "dataset"):
        try:
            rows = datasets.load_dataset(
                source.path, source.name, split=split, revision=location.revision
            )
        except ValueError as error:  # an unknown configuration or split
            raise InputError(f"{source.path}: {' '.join(str(error).split())}") from None
    for number, row in enumerate(rows, 1):
        yield RawRow(name, number, row)
