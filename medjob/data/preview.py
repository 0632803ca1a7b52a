"""Look at a sample of rows as the stages will use them, without reading all of a source."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np

from medjob.config import Run
from medjob.config.prepare import DataSource, PrepareParams
from medjob.config.train import AssistantTurns
from medjob.data.clean import (
    Rejections,
    Role,
    identify,
    preference_role,
    safety_sources,
    usable_rows,
)
from medjob.data.contamination import ContaminationFilter
from medjob.data.dedup import find_duplicates
from medjob.data.formats import Record
from medjob.data.labels import (
    Span,
    is_trained,
    spans,
    trained_tokens,
    trained_turns,
    with_labels,
)
from medjob.data.mapped_columns import MappedColumns
from medjob.data.prompts import RowBuilder
from medjob.data.statistics import TokenCounts
from medjob.errors import MedjobError
from medjob.sources.buckets import with_run_file_key
from medjob.sources.locations import Location
from medjob.sources.references import Reference

SAMPLE = 1000
"""Rows that are read of each source."""
SCAN = 10 * SAMPLE
"""Rows that are searched for those that match `where`, and for the base of option indices."""


@dataclass(slots=True)
class Sample:
    """The first rows of a source."""

    key: str
    """Path of the source in the run file."""
    source: DataSource
    role: Role
    rejections: Rejections = field(default_factory=lambda: Rejections(io.StringIO()))
    records: list[Record] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    """File and line of each record."""
    repeats: dict[int, str] = field(default_factory=dict)
    """Place of the earlier row that a record repeats, by the record's position."""
    near: int = 0
    """How many of `repeats` are only nearly equal."""
    copies: list[str] = field(default_factory=list)
    """Places of the rows that copy an evaluation row of the sample."""
    mapped: MappedColumns = field(init=False)
    """How many rows have the columns that `columns` names."""

    def __post_init__(self) -> None:
        self.mapped = MappedColumns(self.source)

    @property
    def read(self) -> int:
        """Rows that were read, usable or not."""
        return len(self.records) + self.rejections.rows

    @property
    def is_partial(self) -> bool:
        """Whether the source can have rows that were not read."""
        return self.read == SAMPLE != self.source.limit


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row as the model sees it."""

    place: str
    spans: tuple[Span, ...]
    context_tokens: int
    """Tokens of the prompt, and of a dialogue's other texts that are not trained."""
    answer_tokens: int | None
    """None if the row is only a prompt."""
    turns: int
    """Number of answers that can be trained."""
    is_trained: bool
    is_overlong: bool
    answers: dict[str, str] = field(default_factory=dict)
    """Texts that belong to the row and that no model is trained on here, by name."""


@dataclass(frozen=True, slots=True)
class Preview:
    """A sample of a source, with some of its rows rendered."""

    sample: Sample
    rows: list[ShownRow]
    lengths: dict[str, Any]
    """`TokenCounts.summary` of the sample."""


def take_samples(run: Run, locations: Mapping[str, Location]) -> list[Sample]:
    """Read the first rows of every source, and compare them with one another.

    Raises:
        DataError: no row of a source can be used.
        InputError: a file is missing.
    """
    samples = [
        _take_sample(key, source, role, locations, run.seed) for key, source, role in _sources(run)
    ]
    _compare_samples(samples, run.prepare)
    return samples


@contextlib.contextmanager
def naming(key: str, reference: Reference) -> Iterator[None]:
    """Name the key and the value of the run file in an error."""
    try:
        yield
    except MedjobError as error:
        raise with_run_file_key(key, reference, error) from None


def _sources(run: Run) -> Iterator[tuple[str, DataSource, Role]]:
    params = run.prepare
    lists: dict[Role, tuple[str, list[DataSource]]] = {
        "sources": ("sources", params.sources),
        "safety": ("safety.sources", safety_sources(params)),
        preference_role(run): ("preference_sources", params.preference_sources),
        "evaluation": ("evaluation_sources", params.evaluation_sources),
    }
    for role, (name, sources) in lists.items():
        for number, source in enumerate(sources):
            yield f"run.prepare.{name}.{number}", source, role


def _take_sample(
    key: str, source: DataSource, role: Role, locations: Mapping[str, Location], seed: int
) -> Sample:
    sample = Sample(key, source, role)
    limit = min(source.limit or SAMPLE, SAMPLE)
    limited = source.model_copy(update={"limit": limit})
    with naming(key, source):
        usable = usable_rows(
            limited, locations[source.key], sample.rejections, role, SCAN, sample.mapped
        )
        for record, raw in usable:
            sample.hashes.append(identify(record, seed))
            sample.records.append(record)
            sample.places.append(raw.place)
    return sample


def _compare_samples(samples: Sequence[Sample], params: PrepareParams) -> None:
    """Find duplicates among samples of the same role, and copies of evaluation rows."""
    for role in ("sources", "preference"):
        _find_repeats([each for each in samples if each.role == role], params)
    evaluation = [
        each for sample in samples if sample.role == "evaluation" for each in sample.records
    ]
    others = [sample for sample in samples if sample.role != "evaluation"]
    training = [record for sample in others for record in sample.records]
    checked = ContaminationFilter(evaluation, params.contamination, training)
    for sample in others if evaluation else ():
        for record, place in zip(sample.records, sample.places, strict=True):
            before = checked.rows
            checked.passes(record)
            if checked.rows > before:
                sample.copies.append(place)


def _find_repeats(samples: Sequence[Sample], params: PrepareParams) -> None:
    rows = [(sample, position) for sample in samples for position in range(len(sample.records))]
    if not rows:
        return
    hashes = np.array([sample.hashes[position] for sample, position in rows], dtype=np.uint64)
    found = find_duplicates(
        hashes,
        lambda: (sample.records[position] for sample, position in rows),
        params.near_duplicate_threshold,
        lambda _: None,
    )
    for later, earlier in {**found.near, **found.exact}.items():
        (sample, position), (first, at) = rows[later], rows[earlier]
        sample.repeats[position] = first.places[at]
        sample.near += later in found.near


@dataclass(frozen=True, slots=True)
class RowViewer:
    """Renders rows of a sample with the run's tokenizer."""

    tokenizer: Any
    builder: RowBuilder
    max_length: int
    overlong: Literal["drop", "truncate"]
    assistant_turns: AssistantTurns

    def show(self, sample: Sample, rows: int) -> Preview:
        """Count the tokens of a sample, and render its first `rows` rows that are kept."""
        built = self._build(sample)
        counts = TokenCounts()
        counts.add([*chain(*built)])
        kept = [n for n in range(len(built)) if n not in sample.repeats][:rows]
        shown = [self._row(sample.places[n], row) for n in kept for row in built[n]]
        return Preview(sample, shown, counts.summary(self.max_length))

    def _build(self, sample: Sample) -> list[list[dict[str, Any]]]:
        """Build the rows of each record. A dialogue can have several."""
        batch = [(record, sample.source.path) for record in sample.records]
        if sample.role == "preference":
            return [[_without_labels(row)] for row in self.builder.preferences(batch)]
        if sample.role == "pairs":
            return [[_without_labels(row)] for row in self.builder.pairs(batch)]
        if sample.role == "evaluation":
            return [[_without_labels(row)] for row in self.builder.evaluation(batch)]
        return [
            [row for row in rows if trained_turns(row, self.assistant_turns)]
            for rows in self.builder.train_each(batch)
        ]

    def _row(self, place: str, row: dict[str, Any]) -> ShownRow:
        ids = row["input_ids"]
        is_prompt = "answers" in row
        turns = self.assistant_turns
        trained = not is_prompt and is_trained(row, self.max_length, self.overlong, turns)
        labels = with_labels(row, self.max_length, turns)["labels"] if trained else []
        labels += [-100] * (len(ids) - len(labels))
        answer_tokens = 0 if is_prompt else trained_tokens(row, turns)
        return ShownRow(
            place=place,
            spans=spans(self.tokenizer, ids, labels),
            context_tokens=len(ids) - answer_tokens,
            answer_tokens=row["answer_tokens"] if is_prompt else answer_tokens,
            turns=1 if is_prompt else len(trained_turns(row, turns)),
            is_trained=trained,
            is_overlong=not is_prompt and len(ids) > self.max_length,
            answers=row.get("answers", {}),
        )


def _without_labels(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a preference or evaluation row: the model is given its prompt, and its answers are
    used elsewhere."""
    names = {name: name for name in ("reference", "chosen", "rejected")}
    names["answer_idx"] = "right option"
    ids = row["prompt_ids"]
    return {
        "source": row["source"],
        "input_ids": ids,
        "completion_mask": [],
        "answer_tokens": len(row["completion_ids"]) if "completion_ids" in row else None,
        "answers": {title: row[name] for name, title in names.items() if row.get(name)},
    }
