"""First pass over the rows: read, convert and reject.

Clean rows go to a Parquet file, so memory does not grow with the number of rows.
"""

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
from medjob.data.formats import CONVERTERS, Record, UnusableRow, detect, normalise_columns
from medjob.data.read import RawRow, read
from medjob.data.text import hash_text, question_words
from medjob.errors import DataError
from medjob.sources.locations import Location

BATCH = 1000
_EXAMPLES = 5
_JSON = ("options", "history")
_TEXT = tuple(f.name for f in fields(Record) if f.name not in (*_JSON, "later_exchanges"))
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_TEXT, *_JSON, "source")] + [("later_exchanges", pa.int32())]
)


@dataclass(slots=True)
class Rejections:
    """Rejected rows: all of them in a file, and the counts and first examples in memory."""

    file: TextIO
    rows: int = 0
    first: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, row: RawRow, reason: str) -> None:
        """Record a rejected row: its file, its line and the reason."""
        entry = {"file": row.file, "line": row.line, "reason": reason}
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.rows += 1
        self.reasons[_without_details(reason)] += 1
        if len(self.first) < _EXAMPLES:
            self.first.append(f"{row.file}:{row.line}: {reason}")

    def check(self, total: int, max_fraction: float) -> None:
        """Raise DataError if more than `max_fraction` of `total` rows were rejected."""
        if total and self.rows / total > max_fraction:
            examples = "\n  ".join(self.first)
            raise DataError(
                f"{self.rows} of {total} rows cannot be used ({self.rows / total:.1%}, and "
                f"run.prepare.max_rejected_fraction is {max_fraction:g}). The first:\n  {examples}",
                f"all are listed in {self.file.name}; fix the rows, or allow more with "
                "--set run.prepare.max_rejected_fraction=0.05",
            )


def _without_details(reason: str) -> str:
    """Cut the details after a colon or parenthesis, so that reasons can be counted."""
    return reason.split(":", maxsplit=1)[0].split("(", maxsplit=1)[0].strip()


@dataclass(frozen=True, slots=True)
class Table:
    """Clean rows on disk. Only their hashes are in memory, 8 bytes per row."""

    path: Path
    hashes: npt.NDArray[np.uint64]
    """Hash of each row's question, for splits and deduplication."""

    def batches(self, batch_size: int = BATCH) -> Iterator[list[tuple[Record, str]]]:
        """Yield batches of (record, source), in reading order."""
        for batch in pq.ParquetFile(self.path).iter_batches(batch_size=batch_size):
            yield [_from_table_row(row) for row in batch.to_pylist()]

    def records(self) -> Iterator[tuple[Record, str]]:
        """Yield every (record, source), in reading order."""
        for batch in self.batches():
            yield from batch

    def unique(self) -> list[tuple[Record, str]]:
        """Return one (record, source) per question and options.

        Of equal rows, the first is kept, at the position of the last.
        """
        kept: dict[str, tuple[Record, str]] = {}
        for record, source in self.records():
            first = kept.pop(record.id, (record, source))
            kept[record.id] = first
        return list(kept.values())


def _identify(record: Record, seed: int) -> int:
    """Set the record's id, and return the hash of its question. Both hash one normal form."""
    normal = question_words(record.identity)
    record.id = f"{hash_text(normal):016x}"
    return hash_text(normal, seed)


def _to_table(batch: list[tuple[Record, str]]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        name: [getattr(record, name) for record, _ in batch]
        for name in (*_TEXT, "later_exchanges")
    }
    for name in _JSON:
        columns[name] = [
            json.dumps(getattr(record, name), ensure_ascii=False) for record, _ in batch
        ]
    columns["source"] = [source for _, source in batch]
    return pa.Table.from_pydict(columns, _SCHEMA)


def _from_table_row(row: dict[str, Any]) -> tuple[Record, str]:
    source = row.pop("source")
    row["options"] = json.loads(row["options"])
    row["history"] = [tuple(exchange) for exchange in json.loads(row["history"])]
    return Record(**row), source


def clean(
    sources: Iterable[DataSource],
    locations: Mapping[str, Location],
    path: Path,
    rejections: Rejections,
    seed: int,
    advance: Callable[[int], None],
) -> Table:
    """Read `sources` and write their usable rows to `path`, a scratch file without compression.

    Args:
        locations: Where to read each source, by its key.
        advance: Called with the number of rows of each batch, to report progress.

    Raises:
        DataError: the columns of a source match no known format.
    """
    hashes: list[int] = []
    with pq.ParquetWriter(path, _SCHEMA, compression="none", use_dictionary=False) as writer:
        for batch in _batched(_convert(sources, locations, rejections)):
            hashes.extend(_identify(record, seed) for record, _ in batch)
            writer.write_table(_to_table(batch))
            advance(len(batch))
    return Table(path, np.array(hashes, dtype=np.uint64))


def _convert(
    sources: Iterable[DataSource], locations: Mapping[str, Location], rejections: Rejections
) -> Iterator[tuple[Record, str]]:
    for source in sources:
        label = _label(source)
        row_format = source.format
        for row in read(source, locations[source.key]):
            if row.problem:
                rejections.add(row, row.problem)
                continue
            columns = normalise_columns(row.fields)
            row_format = row_format or _detect(source, columns)
            try:
                yield CONVERTERS[row_format](columns), label
            except UnusableRow as problem:
                rejections.add(row, str(problem))


def _label(source: DataSource) -> str:
    """Name a source in the rows and the report: a file name, or a hub id with its configuration."""
    if source.name:
        return f"{source.path}/{source.name}"
    return Path(source.path).name if "/" in source.path else source.path


def _detect(source: DataSource, columns: dict[str, Any]) -> Format:
    found = detect(set(columns))
    if found is None:
        raise DataError(
            f"{source.path}: the columns match no known format: {', '.join(columns)}",
            f"set the source's format in the run file to one of: {', '.join(CONVERTERS)}",
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
