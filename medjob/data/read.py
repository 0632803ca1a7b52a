"""Read raw rows from files and hub data sets, each with its file and line.

Unreadable rows are returned with a reason, and never dropped silently.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from medjob.config.data_suffixes import COMPRESSIONS, data_suffix
from medjob.config.prepare import DataSource
from medjob.data.columns import normal_name
from medjob.data.raw_row import RawRow, checked_row
from medjob.data.read_arrow import batch_rows, read_arrow, read_parquet
from medjob.data.read_csv import read_csv
from medjob.data.read_json import read_json
from medjob.errors import DataError, InputError, MedjobError, RetryError, translate
from medjob.sources.data_files import describe_others, other_files, splits_in
from medjob.sources.hub import hub_errors
from medjob.sources.locations import Location
from medjob.sources.references import data_files

__all__ = ["RawRow", "read"]

_log = logging.getLogger(__name__)


def read(source: DataSource, location: Location, scan: int | None = None) -> Iterator[RawRow]:
    """Yield the first `limit` rows of `source` that match its `where`. Unreadable rows count too.

    Files that are not read, and files without rows, are logged.

    Args:
        scan: Read at most this many rows, matching or not. Default: all.

    Raises:
        DataError: a file cannot be parsed, `where` names an unknown column, or no row matches it.
        InputError: a file, or a hub data set's configuration or split, does not exist; or there are
            no rows.
        RetryError: the hub cannot be reached.
    """
    if location.on_hub:
        rows = _read_hub(source, location)
    else:
        rows = _read_files(location.path, source.split)
    return islice(_matching(islice(rows, scan), source, scan), source.limit)


def _matching(rows: Iterator[RawRow], source: DataSource, scan: int | None) -> Iterator[RawRow]:
    read = matching = 0
    for row in rows:
        read += 1
        if row.problem or _matches(row, source):
            matching += 1
            yield row
    if not read:
        raise InputError(f"{source.path}: has no rows", "name a file that has rows")
    if not matching and read != scan:  # rows after the scanned ones can match
        raise DataError(
            f"{source.path}: none of its {read} rows match where",
            "each column must begin with one of its prefixes, in the same case",
        )


def _matches(row: RawRow, source: DataSource) -> bool:
    for column, prefixes in source.where.items():
        if column not in row.fields:
            raise _unknown_column(row, source, column)
        value = row.fields[column]
        if value is None or not str(value).startswith(tuple(prefixes)):
            return False
    return True


def _unknown_column(row: RawRow, source: DataSource, column: str) -> DataError:
    """Say what is wrong without naming the row's columns. In a file without a header line, they are
    the text of a row."""
    similar = [name for name in row.fields if normal_name(name) == normal_name(column)]
    return DataError(
        f"{source.path}: unknown column {column!r} in where: the row in {row.file}:{row.line} has "
        f"{len(row.fields)} other columns",
        f"write it as in the file: {similar[0]!r}" if similar else "correct the name of the column",
    )


def _read_files(location: str, split: str | None) -> Iterator[RawRow]:
    paths = data_files(location, split)
    others = other_files(location, split)
    if others:
        _log.warning("%s: %s", location, describe_others(path.name for path in others))
    splits = splits_in(paths)
    if len(splits) > 1:
        _log.warning(
            "%s: files of several splits are read together (%s); for one of them, end the path "
            "in a pattern such as *%s*",
            location,
            ", ".join(splits),
            splits[0],
        )
    # Files of one name in several directories are told apart in the list of rejected rows.
    root = os.path.commonpath([path.parent for path in paths])
    for path in paths:
        empty = True
        for row in _read_file(path, path.relative_to(root).as_posix()):
            empty = False
            yield row
        if empty:
            _log.warning("%s: has no rows", path)


def _read_file(path: Path, name: str) -> Iterator[RawRow]:
    try:
        yield from _rows_of(path, name)
    except MedjobError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise RetryError(f"{path}: not enough memory to read it") from None
    except Exception as error:  # its message may quote a row
        raise DataError(f"{path}: cannot be read ({type(error).__name__})") from None


def _rows_of(path: Path, name: str) -> Iterator[RawRow]:
    suffix = data_suffix(path.name)
    for compression in COMPRESSIONS:
        suffix = suffix.removesuffix(compression)
    match suffix:
        case ".jsonl" | ".ndjson" | ".json":
            return read_json(path, name, has_lines=suffix != ".json")
        case ".csv" | ".tsv":
            return read_csv(path, name, "," if suffix == ".csv" else "\t")
        case ".parquet":
            return read_parquet(path, name)
        case _:
            return read_arrow(path, name)


def _read_hub(source: DataSource, location: Location) -> Iterator[RawRow]:
    split = source.split or "train"
    name = f"{source.path}/{source.name or 'default'}/{split}"
    number = 0
    for table in _hub_tables(source, location, split):
        for batch in table.to_batches():
            for row in batch_rows(batch):
                number += 1
                yield checked_row(name, number, row)


def _hub_tables(source: DataSource, location: Location, split: str) -> Iterator[Any]:
    """Yield the Arrow tables of a hub data set. Images and sounds in it are not decoded."""
    import datasets

    try:
        with hub_errors(source.path, "dataset"):
            rows = datasets.load_dataset(
                source.path, source.name, split=split, revision=location.revision
            )
            yield from rows.with_format("arrow").iter(batch_size=1000)
    except MedjobError:
        raise
    except Exception as error:
        if translate(error) is not error:
            raise  # such as a full disk
        raise _hub_problem(source, error) from None


def _hub_problem(source: DataSource, error: Exception) -> InputError:
    """Describe an error of datasets. Only some of its messages never quote a row."""
    from datasets import exceptions

    safe = (
        exceptions.DatasetNotFoundError,
        exceptions.DataFilesNotFoundError,
        exceptions.DefunctDatasetError,
    )
    # A plain ValueError is about an unknown configuration or split.
    if type(error) is ValueError or isinstance(error, safe):
        return InputError(f"{source.path}: {' '.join(str(error).split())}")
    return InputError(
        f"{source.path}: datasets cannot load it ({type(error).__name__})",
        "download its files, and name their directory",
    )
