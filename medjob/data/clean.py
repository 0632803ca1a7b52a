"""First pass over the rows: read, convert and reject.

Clean rows go to a Parquet file, so memory does not grow with the number of rows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from medjob.config import Run
from medjob.config.prepare import DataSource, Format, PrepareParams
from medjob.data.columns import Row, UnusableRow
from medjob.data.dialogues import Exchange
from medjob.data.formats import Record, convert, detect, known_names
from medjob.data.index_base import IndexBases
from medjob.data.mapped_columns import MappedColumns
from medjob.data.open_text import UTF8_HINT
from medjob.data.raw_row import RawRow
from medjob.data.read import read
from medjob.data.scored_answers import has_single_label
from medjob.data.text import hash_text, question_hash, question_words
from medjob.errors import DataError, MedjobError
from medjob.sources.locations import Location

Role = Literal["sources", "preference", "pairs", "evaluation", "safety"]
"""What the rows of a source are for. `pairs` are preference rows that DPO trains on as they are."""

BATCH = 1000
_EXAMPLES = 5
_NESTED = "the row has several questions in qas, as in SQuAD"
# What to do if all rows of a source are rejected for one reason.
_HINTS = {
    _NESTED: (
        "write one row per question, such as with: jq -c '.data[].paragraphs[] | .context as $c | "
        ".qas[] | {context: $c, question, answer: .answers[0].text}' x.json > x.jsonl"
    ),
    "not valid JSON": (
        "the file holds no JSON: if it is CSV, its name must end in .csv or .tsv; otherwise write "
        "one object per line"
    ),
    "not UTF-8": UTF8_HINT,
    "not a JSON object": (
        'each row must be an object with names, such as {"question": "...", "response": "..."}'
    ),
}
_JSON = ("options", "history", "later")
_FLAG = "has_open_question"
_TEXT = tuple(f.name for f in fields(Record) if f.name not in (*_JSON, _FLAG))
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_TEXT, *_JSON, "source")] + [(_FLAG, pa.bool_())]
)


@dataclass(slots=True)
class Rejections:
    """Rejected rows: all of them in a file, and the counts and first examples in memory."""

    file: TextIO
    rows: int = 0
    first: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """File and line of the first rows, by reason."""

    def add(self, row: RawRow, reason: str) -> str:
        """Record a rejected row, and return its file, its line and the reason as one text."""
        entry = {"file": row.file, "line": row.line, "reason": reason}
        self.file.write(json.dumps(entry) + "\n")
        self.rows += 1
        short = _without_details(reason)
        self.reasons[short] += 1
        places = self.examples.setdefault(short, [])
        if len(places) < _EXAMPLES:
            places.append(row.place)
        example = f"{row.place}: {reason}"
        if len(self.first) < _EXAMPLES:
            self.first.append(example)
        return example

    def check(self, total: int, max_fraction: float) -> None:
        """Raise DataError if more than `max_fraction` of `total` rows were rejected."""
        if total and self.rows / total > max_fraction:
            examples = "\n  ".join(self.first)
            enough = math.ceil(1000 * self.rows / total) / 1000
            raise DataError(
                f"{self.rows} of {total} rows cannot be used ({self.rows / total:.1%}, and "
                f"run.prepare.max_rejected_fraction is {max_fraction:g}). The first:\n  {examples}",
                f"all are listed in {self.file.name}; fix them, or continue without them with "
                f"--set run.prepare.max_rejected_fraction={enough:g}",
            )


def _without_details(reason: str) -> str:
    """Cut the details after a colon or parenthesis, so that reasons can be counted."""
    return reason.split(":", maxsplit=1)[0].split("(", maxsplit=1)[0].strip()


@dataclass(frozen=True, slots=True)
class Table:
    """Clean rows on disk. Only their hashes are in memory, 8 bytes per row."""

    path: Path
    hashes: npt.NDArray[np.uint64]
    """Hash of each row's question, for deduplication. Of a dialogue it covers all turns but the
    last answer."""
    prompts: npt.NDArray[np.uint64]
    """Hash of each row's prompt, for splits: dialogues that begin with the same question share
    one."""
    has_rubrics: bool = False
    """Whether any row has criteria of a good answer."""

    def batches(self, batch_size: int = BATCH) -> Iterator[list[tuple[Record, str]]]:
        """Yield batches of (record, source), in reading order."""
        for batch in pq.ParquetFile(self.path).iter_batches(batch_size=batch_size):
            yield [_from_table_row(row) for row in batch.to_pylist()]

    def records(self) -> Iterator[tuple[Record, str]]:
        """Yield every (record, source), in reading order."""
        for batch in self.batches():
            yield from batch

    def sources(self, names: Sequence[str]) -> npt.NDArray[np.int32]:
        """Return the position of each row's source in `names`."""
        position = {name: number for number, name in enumerate(names)}
        batches = pq.ParquetFile(self.path).iter_batches(batch_size=BATCH, columns=["source"])
        found = (position[name] for batch in batches for name in batch["source"].to_pylist())
        return np.fromiter(found, np.int32, len(self.hashes))

    def unique(self) -> list[tuple[Record, str]]:
        """Return one (record, source) per question and options.

        Of equal rows, the first is kept, at the position of the last.
        """
        kept: dict[str, tuple[Record, str]] = {}
        for record, source in self.records():
            first = kept.pop(record.id, (record, source))
            kept[record.id] = first
        return list(kept.values())


def identify(record: Record, seed: int) -> int:
    """Set the record's id, and return the hash of its question. Both hash one normal form."""
    normal = question_words(record.identity)
    record.id = f"{hash_text(normal):016x}"
    return hash_text(normal, seed)


def as_prompt(record: Record) -> Record:
    """Return the record as an evaluation or preference prompt, without the later exchanges of a
    dialogue: they refer to an answer that the model would not have given."""
    if not record.later:
        return record
    prompt = replace(record, later=[], has_open_question=False)
    if record.id:
        identify(prompt, seed=0)
    return prompt


def _to_table(batch: list[tuple[Record, str]]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        name: [getattr(record, name) for record, _ in batch] for name in (*_TEXT, _FLAG)
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
    for name in ("history", "later"):
        row[name] = [Exchange(*exchange) for exchange in json.loads(row[name])]
    return Record(**row), source


def clean(
    sources: Iterable[DataSource],
    locations: Mapping[str, Location],
    path: Path,
    rejections: Rejections,
    seed: int,
    advance: Callable[[int], None],
    role: Role = "sources",
) -> Table:
    """Read `sources` and write their usable rows to `path`, a scratch file without compression.

    Args:
        locations: Where to read each source, by its key.
        advance: Called with the number of rows of each batch, to report progress.
        role: What the rows are for. Rows with a chosen and a rejected answer are only preferences.

    Raises:
        DataError: no row of a source can be used, or it does not show whether the indices of right
            options count from 0 or 1.
    """
    hashes: list[int] = []
    prompts: list[int] = []
    has_rubrics = False
    with pq.ParquetWriter(path, _SCHEMA, compression="none", use_dictionary=False) as writer:
        for batch in _batched(_convert(sources, locations, rejections, role)):
            for record, _ in batch:
                hashes.append(identify(record, seed))
                has_rubrics |= bool(record.rubric)
                begins = record.prompt_identity
                prompts.append(question_hash(begins, seed) if record.later else hashes[-1])
            writer.write_table(_to_table(batch))
            advance(len(batch))
    return Table(
        path,
        np.array(hashes, dtype=np.uint64),
        np.array(prompts, dtype=np.uint64),
        has_rubrics,
    )


def preference_role(run: Run) -> Role:
    """What the rows of `run.prepare.preference_sources` are for."""
    return "pairs" if run.dpo.pairs == "data" else "preference"


def safety_sources(params: PrepareParams) -> list[DataSource]:
    """Give safety sources their format. Rows without `kind` would be detected as instructions."""
    if params.safety is None:
        return []
    return [
        source.model_copy(update={"format": source.format or "safety"})
        for source in params.safety.sources
    ]


def _convert(
    sources: Iterable[DataSource],
    locations: Mapping[str, Location],
    rejections: Rejections,
    role: Role,
) -> Iterator[tuple[Record, str]]:
    sources = list(sources)
    for source, label in zip(sources, source_labels(sources), strict=True):
        for record, _ in usable_rows(source, locations[source.key], rejections, role):
            yield record, label


def usable_rows(
    source: DataSource,
    location: Location,
    rejections: Rejections,
    role: Role,
    scan: int | None = None,
    mapped: MappedColumns | None = None,
) -> Iterator[tuple[Record, RawRow]]:
    """Read a source, and yield each usable row as a record and as it was read.

    Args:
        scan: Read at most this many rows, matching or not. Default: all.
        mapped: Applies the source's `columns`, and counts them for the caller.

    Raises:
        DataError: as `clean`, or `columns` names a column that no row has. With `scan` that is only
            an error if no row can be used, because a row that was not read can have the column.
    """
    used, before = 0, rejections.rows
    first: dict[str, str] = {}
    mapped = mapped or MappedColumns(source)
    bases = IndexBases(partial(_read_all, source, location, scan))
    for row in map(mapped.apply, read(source, location, scan)):
        try:
            record = _record(source, row, bases, role)
        except UnusableRow as problem:
            example = rejections.add(row, str(problem))
            if len(first) < _EXAMPLES:
                first[example] = str(problem)
        else:
            used += 1
            yield record, row
    if scan is None or not used:
        mapped.check()
    if first and not used:
        raise _nothing_usable(source, rejections.rows - before, first)


def _read_all(source: DataSource, location: Location, scan: int | None) -> Iterator[RawRow]:
    """Read a source without its limit, because more rows say more about its columns."""
    rows = read(source.model_copy(update={"limit": None}), location, scan)
    return map(MappedColumns(source).apply, rows)


def _record(source: DataSource, raw: RawRow, bases: IndexBases, role: Role) -> Record:
    """Convert a row by the format of its source, or else by the format that fits it best."""
    if raw.problem:
        raise UnusableRow(raw.problem)
    try:
        row = Row(raw.fields)
        row_format = source.format or detect(row)
        is_preference = role in ("preference", "pairs")
        if is_preference and row_format != "preference" and has_single_label(row):
            row_format = "preference"  # which refuses it with the reason
        if row_format is None:
            raise UnusableRow(_NESTED) if _is_nested(row) else _unknown_format(row)
        if row_format == "preference" and not is_preference:
            raise UnusableRow(
                "the row has chosen and rejected answers, which belong in "
                "run.prepare.preference_sources"
            )
        record = convert(row, row_format, partial(bases.base, raw.file))
        if role == "pairs" and not record.chosen:
            raise UnusableRow(
                "the row has no chosen and rejected answer, and run.dpo.pairs is data"
            )
        if role == "sources" and not record.response:
            raise UnusableRow("the row has no answer")
        if is_preference or role == "evaluation":
            record = as_prompt(record)
    except (UnusableRow, MedjobError):
        raise
    except Exception as error:
        # A row can be broken in ways that nobody has thought of. It must not end the stage, and the
        # error's text may contain the row's.
        raise UnusableRow(f"cannot be converted ({type(error).__name__})") from None
    return record


def _is_nested(row: Row) -> bool:
    """Whether a row has several questions, in the form of SQuAD's articles or paragraphs."""
    paragraphs = row.get("paragraphs")
    parts = paragraphs if isinstance(paragraphs, list) else []
    return row.has("qas") or any(isinstance(part, Mapping) and "qas" in part for part in parts)


def source_labels(sources: Sequence[DataSource]) -> list[str]:
    """Name each source. Repeated names are numbered, such as those of files in two directories."""
    labels: list[str] = []
    for name in map(_label, sources):
        numbered = (f"{name} ({number})" for number in count(2))
        labels.append(next(label for label in chain([name], numbered) if label not in labels))
    return labels


def _label(source: DataSource) -> str:
    """Name a source in the rows and the report: a file name, or a hub id with its configuration."""
    if source.name:
        return f"{source.path}/{source.name}"
    return Path(source.path).name if "/" in source.path else source.path


def _unknown_format(row: Row) -> UnusableRow:
    """Name only the columns that medjob knows. In a CSV file without a header, the names of the
    columns are the first row."""
    names = ", ".join(known_names(row)) or "none"
    columns = len(row.values) + len(row.empty)
    return UnusableRow(f"the columns match no known format ({columns} columns; known: {names})")


def _nothing_usable(source: DataSource, rows: int, first: Mapping[str, str]) -> DataError:
    """Describe a source whose rows are all rejected.

    Args:
        first: The reasons of the first ones, by their places and reasons.
    """
    examples = "\n  ".join(first)
    return DataError(
        f"{source.path}: none of the {rows} rows can be used. The first:\n  {examples}",
        _hint_for(set(map(_without_details, first.values()))),
    )


def _hint_for(reasons: set[str]) -> str:
    """What to do if rows were rejected for these reasons only."""
    if len(reasons) == 1 and (hint := _HINTS.get(min(reasons))):
        return hint
    return (
        "check that the first line of a CSV file holds the names of the columns; if they have "
        "other names, set columns, such as {question: Frage, response: Antwort}; if the format was "
        f"not recognised, set the source's format to one of: {', '.join(get_args(Format))}"
    )


def _batched(rows: Iterator[tuple[Record, str]]) -> Iterator[list[tuple[Record, str]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
