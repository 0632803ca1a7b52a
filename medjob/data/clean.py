"""First pass over the rows: read, convert, reject; clean rows go to a Parquet file, so that memory stays flat."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from medjob.config.prepare import DataSource, Format
from medjob.data.formats import CONVERTERS, Record, Unusable, detect, normalise_columns
from medjob.data.read import RawRow, read
from medjob.data.text import hash_of, question_words
from medjob.errors import DataError
from medjob.sources.locations import Location

BATCH = 1000
_TEXT = tuple(f.name for f in fields(Record) if f.name != "options")
_SCHEMA = pa.schema([(name, pa.string()) for name in (*_TEXT, "options", "source")])


@dataclass(slots=True)
class Rejections:
    """Rows that could not be used: all of them in a file, the first few and the counts here."""

    file: TextIO
    rows: int = 0
    first: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, row: RawRow, reason: str) -> None:
        """Keep one rejected row: its place and the reason."""
        self.file.write(
            json.dumps({"file": row.file, "line": row.line, "reason": reason}, ensure_ascii=False)
            + "\n"
        )
        self.rows += 1
        self.reasons[reason.split(":", maxsplit=1)[0].split("(", maxsplit=1)[0].strip()] += 1
        if len(self.first) < 5:
            self.first.append(f"{row.file}:{row.line}: {reason}")

    def check(self, total: int, max_fraction: float) -> None:
        """Raise DataError when more than `max_fraction` of `total` rows were rejected."""
        if total and self.rows / total > max_fraction:
            raise DataError(
                f"{self.rows} of {total} rows cannot be used ({self.rows / total:.1%}, run.prepare.max_rejected_fraction is "
                f"{max_fraction:g}); the first:\n  " + "\n  ".join(self.first),
                f"all are in {self.file.name}; mend the rows, or allow more with --set run.prepare.max_rejected_fraction=0.05",
            )


@dataclass(frozen=True, slots=True)
class Table:
    """Clean rows on disk, with what splitting and deduplication need in memory: 8 bytes a row."""

    path: Path
    hashes: npt.NDArray[np.uint64]

    def batches(self, batch_size: int = BATCH) -> Iterator[list[tuple[Record, str]]]:
        """(record, source) pairs, in the order of reading."""
        for batch in pq.ParquetFile(self.path).iter_batches(batch_size=batch_size):
            yield [_record(row) for row in batch.to_pylist()]

    def records(self) -> Iterator[tuple[Record, str]]:
        """All (record, source) pairs."""
        for batch in self.batches():
            yield from batch

    def unique(self) -> list[tuple[Record, str]]:
        """All pairs but those whose question and options came before."""
        return list({row[0].id: row for row in reversed(list(self.records()))}.values())[::-1]


def _identify(record: Record, seed: int) -> int:
    """Set the record's id; return its question's hash. One normalisation serves both."""
    normal = question_words(record.identity)
    record.id = f"{hash_of(normal):016x}"
    return hash_of(normal, seed)


def _as_table(batch: list[tuple[Record, str]]) -> pa.Table:
    columns: dict[str, list[str]] = {
        name: [getattr(record, name) for record, _ in batch] for name in _TEXT
    }
    columns["options"] = [json.dumps(record.options, ensure_ascii=False) for record, _ in batch]
    columns["source"] = [source for _, source in batch]
    return pa.Table.from_pydict(columns, _SCHEMA)


def _record(row: dict[str, Any]) -> tuple[Record, str]:
    source = row.pop("source")
    return Record(**row | {"options": json.loads(row["options"])}), source


def clean(
    sources: Iterable[DataSource],
    locations: Mapping[str, Location],
    path: Path,
    rejections: Rejections,
    seed: int,
    advance: Callable[[int], None],
) -> Table:
    """Read all of `sources` into `path`, a scratch file and so not compressed.

    Raises:
        DataError: a source's columns fit no known format.
    """
    hashes: list[int] = []
    with pq.ParquetWriter(path, _SCHEMA, compression="none", use_dictionary=False) as writer:
        for batch in _batched(_converted(sources, locations, rejections)):
            hashes.extend(_identify(record, seed) for record, _ in batch)
            writer.write_table(_as_table(batch))
            advance(len(batch))
    return Table(path, np.array(hashes, dtype=np.uint64))


def _converted(
    sources: Iterable[DataSource], locations: Mapping[str, Location], rejections: Rejections
) -> Iterator[tuple[Record, str]]:
    for source in sources:
        label = (
            Path(source.path).name
            if "/" in source.path and not source.name
            else f"{source.path}{f'/{source.name}' if source.name else ''}"
        )
        row_format = source.format
        for row in read(source, locations[source.key]):
            if row.problem:
                rejections.add(row, row.problem)
                continue
            columns = normalise_columns(row.fields)
            row_format = row_format or _detect(source, columns)
            try:
                yield CONVERTERS[row_format](columns), label
            except Unusable as problem:
                rejections.add(row, str(problem))


def _detect(source: DataSource, columns: dict[str, Any]) -> Format:
    found = detect(set(columns))
    if found is None:
        raise DataError(
            f"{source.path}: columns {', '.join(columns)} fit no known format",
            f"name one as format in the run file: {', '.join(CONVERTERS)}",
        )
    return found


def _batched(rows: Iterator[tuple[Record, str]]) -> Iterator[list[tuple[Record, str]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
