"""prepare: raw rows in; train, validation, preference prompts and evaluation out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from medjob.config.prepare import DataSource, PrepareParams
from medjob.data.clean import Rejections, Table, clean
from medjob.data.contamination import Screen
from medjob.data.dedup import Duplicates, find_duplicates
from medjob.data.prompts import (
    EVALUATION_SCHEMA,
    PREFERENCE_SCHEMA,
    TRAIN_SCHEMA,
    RowMaker,
    write_rows,
)
from medjob.data.splits import TRAIN, Row, assign, split_safety
from medjob.data.statistics import Tokens
from medjob.data.text import words
from medjob.errors import DataError
from medjob.report.charts import bars, histogram
from medjob.report.page import write_page
from medjob.stage import Metrics, RowContext
from medjob.train.model import load_tokenizer

_log = logging.getLogger(__name__)
_EXAMPLES = 10


def run(context: RowContext) -> Metrics:
    """Two passes over the rows, in batches: read and clean; then screen, render and write."""
    params = context.run.prepare
    with (context.output / "rejected.jsonl").open("w", encoding="utf-8") as file:
        rejections = Rejections(file)
        tables = {
            "sources": _clean(context, "sources", params.sources, rejections),
            "preference": _clean(context, "preference", params.preference_sources, rejections),
            "evaluation": _clean(context, "evaluation", params.evaluation_sources, rejections),
            "safety": _clean(context, "safety", _safety_sources(params), rejections),
        }
    total = rejections.rows + sum(len(table.hashes) for table in tables.values())
    rejections.check(total, params.max_rejected_fraction)
    return _Writer(context, tables, Counter(read=total, rejected=rejections.rows)).run(rejections)


def _safety_sources(params: PrepareParams) -> list[DataSource]:
    """Safety rows are of that format unless their source says otherwise: without `kind` they look like instructions."""
    return (
        [
            source.model_copy(update={"format": source.format or "safety"})
            for source in params.safety.sources
        ]
        if params.safety
        else []
    )


def _clean(
    context: RowContext, name: str, sources: list[DataSource], rejections: Rejections
) -> Table:
    with context.extras.progress.task(f"read {name}", total=0) as task:
        return clean(
            sources,
            context.locations,
            context.work / f"{name}.parquet",
            rejections,
            context.run.seed,
            task.advance,
        )


class _Writer:
    """The second pass: clean tables to the four Parquet files, counting what it does."""

    def __init__(self, context: RowContext, tables: dict[str, Table], counts: Counter[str]) -> None:
        self._context = context
        self._params = context.run.prepare
        self._tables = tables
        self._counts = counts
        self._maker = RowMaker(
            load_tokenizer(context.location(context.run.base_model)), context.run.prompt
        )
        self._tokens = Tokens()
        self._reasoned = 0

    def run(self, rejections: Rejections) -> Metrics:
        duplicates = self._duplicates("sources")
        splits = self._split(duplicates)
        held_safety = self._params.safety.evaluation_rows if self._params.safety else 0
        safety_train, safety_held = split_safety(
            self._tables["safety"].unique(), held_safety, self._context.run.seed
        )
        held_out = [
            row
            for row, name in zip(self._tables["sources"].records(), splits, strict=True)
            if name == "evaluation"
        ]
        evaluation = list(
            {
                row[0].id: row
                for row in (*safety_held, *self._tables["evaluation"].unique(), *held_out)
            }.values()
        )
        screen = Screen([record for record, _ in evaluation], self._params.contamination)
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(
                    pq.ParquetWriter(
                        self._context.output / f"{name}.parquet", schema, compression="zstd"
                    )
                )
                for name, schema in (
                    ("train", TRAIN_SCHEMA),
                    ("validation", TRAIN_SCHEMA),
                    ("preferences", PREFERENCE_SCHEMA),
                )
            }
            self._write_sources(writers, splits, screen)
            self._write_preferences(writers["preferences"], screen)
            self._write_safety(
                writers["train"], [row for row in safety_train if screen.passes(row[0])]
            )
        self._check_style()
        rows = [self._maker.evaluation(record, source) for record, source in evaluation]
        pq.write_table(
            pa.Table.from_pylist(rows, EVALUATION_SCHEMA),
            self._context.output / "evaluation.parquet",
        )
        self._counts["evaluation"] = len(rows)
        self._counts["contaminated"] = screen.rows
        return self._report(duplicates, screen, rejections)

    def _check_style(self) -> None:
        """Rows without reasoning are trained on as plain answers, so a layout with reasoning would never be learned."""
        style = self._context.run.prompt.style
        if style != "plain" and self._reasoned == 0:
            raise DataError(
                f"run.prompt.style is {style}, but no training row has any reasoning",
                "--set run.prompt.style=plain, or use rows with a reasoning column (Complex_CoT)",
            )

    def _duplicates(self, name: str) -> Duplicates:
        table = self._tables[name]
        questions = (words(record.identity) for record, _ in table.records())
        found = find_duplicates(table.hashes, questions, self._params.near_duplicate_threshold)
        self._counts["exact_duplicates"] += len(found.exact)
        self._counts["near_duplicates"] += len(found.near)
        return found

    def _split(self, duplicates: Duplicates) -> npt.NDArray[np.str_]:
        hashes = self._tables["sources"].hashes
        usable = np.ones(len(hashes), dtype=bool)
        usable[[*duplicates.exact, *duplicates.near]] = False
        own_preferences = 0 if self._params.preference_sources else self._params.preference_rows
        wanted = {
            "validation": self._params.validation_rows,
            "evaluation": self._params.evaluation_rows,
            "preferences": own_preferences,
        }
        return assign(hashes, usable, wanted)

    def _write_sources(
        self, writers: dict[str, Any], splits: npt.NDArray[np.str_], screen: Screen
    ) -> None:
        position = 0
        with self._context.extras.progress.task("render", total=len(splits)) as task:
            for batch in self._tables["sources"].batches():
                names = splits[position : position + len(batch)].tolist()
                position += len(batch)
                kept: dict[str, list[Row]] = {TRAIN: [], "validation": [], "preferences": []}
                for row, name in zip(batch, names, strict=True):
                    if name in kept and screen.passes(row[0]):
                        kept[name].append(row)
                self._write_train(writers[TRAIN], TRAIN, kept[TRAIN])
                self._write_train(writers["validation"], "validation", kept["validation"])
                self._write_prompts(writers["preferences"], kept["preferences"])
                task.advance(len(batch))

    def _write_train(self, writer: Any, name: str, batch: list[Row]) -> None:
        self._reasoned += sum(bool(record.reasoning) for record, _ in batch)
        rows = self._maker.train(batch)
        write_rows(writer, rows, TRAIN_SCHEMA)
        self._counts[name] += len(rows)
        if name == TRAIN:
            self._tokens.add(rows)

    def _write_prompts(self, writer: Any, batch: list[Row]) -> None:
        rows = [self._maker.preference(record, source) for record, source in batch]
        write_rows(writer, rows, PREFERENCE_SCHEMA)
        self._counts["preferences"] += len(rows)

    def _write_preferences(self, writer: Any, screen: Screen) -> None:
        """Prompts of their own source: none twice, none that is trained or evaluated on."""
        table = self._tables["preference"]
        if not len(table.hashes):
            return
        duplicates = self._duplicates("preference")
        trained = set(self._tables["sources"].hashes.tolist())
        kept = []
        for position, row in enumerate(table.records()):
            known = int(table.hashes[position]) in trained
            self._counts["preferences_also_in_training"] += known
            if position not in duplicates and not known and screen.passes(row[0]):
                kept.append(row)
            if len(kept) == (self._params.preference_rows or len(table.hashes)):
                break
        self._write_prompts(writer, kept)

    def _write_safety(self, writer: Any, rows: list[Row]) -> None:
        if not self._params.safety:
            return
        share = self._params.safety.share
        wanted = round(self._counts[TRAIN] * share / (1 - share))
        if wanted > len(rows):
            _log.warning(
                "prepare: %d safety rows make less than the wanted share of %g (%d rows)",
                len(rows),
                share,
                wanted,
            )
        self._counts["safety_in_train"] = min(wanted, len(rows))
        self._write_train(writer, TRAIN, rows[:wanted])

    def _report(self, duplicates: Duplicates, screen: Screen, rejections: Rejections) -> Metrics:
        statistics: dict[str, Any] = {
            "rows": {
                name: int(self._counts[name])
                for name in [*self._counts, "validation", "preferences"]
            },
            "rejected_reasons": dict(rejections.reasons.most_common()),
            "tokens": self._tokens.summary(self._context.run.sft.max_length),
            "max_length": self._context.run.sft.max_length,
            "duplicate_examples": self._duplicate_examples(duplicates),
            "contamination": {
                "rows": screen.rows,
                "examples": screen.examples,
                **self._params.contamination.model_dump(),
            },
        }
        output = self._context.output
        (output / "statistics.json").write_text(
            json.dumps(statistics, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        charts = {
            "tokens": histogram(
                self._tokens.totals, "tokens a row", limit=statistics["max_length"]
            ),
            "sources": bars(statistics["tokens"]["sources"], "training rows a source"),
        }
        write_page(output / "report.html", "prepare.html", charts, s=statistics)
        tokens = {name: statistics["tokens"][name] for name in ("tokens", "overlong_fraction")}
        return {**statistics["rows"], **tokens}

    def _duplicate_examples(self, duplicates: Duplicates) -> list[dict[str, str]]:
        pairs = [*duplicates.near.items(), *duplicates.exact.items()][:_EXAMPLES]
        wanted = {row for pair in pairs for row in pair}
        texts = {
            i: record.question
            for i, (record, _) in enumerate(self._tables["sources"].records())
            if i in wanted
        }
        return [{"removed": texts[row], "kept": texts[kept]} for row, kept in pairs]
