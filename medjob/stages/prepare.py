"""prepare: raw rows in; train, validation, preference prompts and evaluation out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from medjob.config.prepare import DataSource
from medjob.data.clean import Rejections, Table, clean
from medjob.data.contamination import Detector
from medjob.data.dedup import Duplicates, find_duplicates
from medjob.data.formats import Record
from medjob.data.prompts import EVALUATION_SCHEMA, PREFERENCE_SCHEMA, TRAIN_SCHEMA, RowMaker, write_rows
from medjob.data.splits import TRAIN, assign
from medjob.data.statistics import Tokens
from medjob.data.text import question_hash, words
from medjob.report.charts import bars, histogram
from medjob.report.page import write_page
from medjob.stage import Metrics, StageContext
from medjob.train.model import load_tokenizer

_log = logging.getLogger(__name__)
_EXAMPLES = 10


def run(context: StageContext) -> Metrics:
    """Two passes over the rows, in batches: read and clean, then render and write."""
    params = context.run.prepare
    with (context.output / "rejected.jsonl").open("w", encoding="utf-8") as file:
        rejections = Rejections(file)
        tables = {
            "sources": _clean(context, "sources", params.sources, rejections),
            "preference": _clean(context, "preference", params.preference_sources, rejections),
            "evaluation": _clean(context, "evaluation", params.evaluation_sources, rejections),
            "safety": _clean(context, "safety", params.safety.sources if params.safety else [], rejections),
        }
    total = rejections.rows + sum(len(table.hashes) for table in tables.values())
    rejections.check(total, params.max_rejected_fraction)
    return _Preparation(context, tables, rejections, total).run()


def _clean(context: StageContext, name: str, sources: list[DataSource], rejections: Rejections) -> Table:
    with context.progress.task(f"read {name}", total=0) as task:
        return clean(sources, context.pins, context.work / f"{name}.parquet", rejections, context.run.seed, task.advance)


class _Preparation:
    """The second pass, with everything it counts."""

    def __init__(self, context: StageContext, tables: dict[str, Table], rejections: Rejections, total: int) -> None:
        self._context = context
        self._params = context.run.prepare
        self._tables = tables
        self._rejections = rejections
        tokenizer = load_tokenizer(context.run.base_model, context.pins, context.cache)
        self._maker = RowMaker(tokenizer, context.run.prompt)
        self._counts: Counter[str] = Counter(read=total, rejected=rejections.rows)
        self._tokens = Tokens()
        self._examples: list[dict[str, Any]] = []

    def run(self) -> Metrics:
        safety_train, safety_held = self._split_safety()
        duplicates = self._duplicates("sources")
        splits = self._split_sources(duplicates)
        evaluation = [*self._held_out(splits), *self._read_unique("evaluation"), *safety_held]
        detector = Detector([record for record, _ in evaluation], self._params.contamination)
        questions = {question_hash(record.question) for record, _ in evaluation}
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(pq.ParquetWriter(self._context.output / f"{name}.parquet", schema, compression="zstd"))
                for name, schema in (("train", TRAIN_SCHEMA), ("validation", TRAIN_SCHEMA), ("preferences", PREFERENCE_SCHEMA))
            }
            self._evaluation_records = evaluation
            self._write_sources(writers, splits, detector, questions)
            self._write_preferences(writers["preferences"], detector, questions)
            self._write_safety(writers["train"], safety_train)
        rows = [self._maker.evaluation(record, source) for record, source in evaluation]
        pq.write_table(pa.Table.from_pylist(rows, EVALUATION_SCHEMA), self._context.output / "evaluation.parquet")
        self._counts["evaluation"] = len(rows)
        return self._report(duplicates)

    def _duplicates(self, name: str) -> Duplicates:
        table = self._tables[name]
        questions = (words(record.question) for record, _ in table.records())
        found = find_duplicates(table.hashes, questions, self._params.near_duplicate_threshold)
        self._counts["exact_duplicates"] += len(found.exact)
        self._counts["near_duplicates"] += len(found.near)
        return found

    def _split_sources(self, duplicates: Duplicates) -> npt.NDArray[np.str_]:
        hashes = self._tables["sources"].hashes
        usable = np.ones(len(hashes), dtype=bool)
        usable[list(duplicates.exact) + list(duplicates.near)] = False
        own_preferences = 0 if self._params.preference_sources else self._params.preference_rows
        wanted = {"validation": self._params.validation_rows, "evaluation": self._params.evaluation_rows, "preferences": own_preferences}
        return assign(hashes, usable, wanted)

    def _held_out(self, splits: npt.NDArray[np.str_]) -> list[tuple[Record, str]]:
        rows = self._tables["sources"].records()
        return [row for row, split in zip(rows, splits, strict=True) if split == "evaluation"]

    def _read_unique(self, name: str) -> list[tuple[Record, str]]:
        seen: dict[str, tuple[Record, str]] = {}
        for record, source in self._tables[name].records():
            seen.setdefault(record.question + "\n".join(record.options.values()), (record, source))
        return list(seen.values())

    def _split_safety(self) -> tuple[list[tuple[Record, str]], list[tuple[Record, str]]]:
        """Safety rows to train on, and those held out: half of them harmful, half benign, as far as there are both."""
        rows = self._read_unique("safety")
        rows.sort(key=lambda row: question_hash(row[0].question, self._context.run.seed))
        wanted = self._params.safety.evaluation_rows if self._params.safety else 0
        harmful = [row for row in rows if row[0].kind == "harmful"]
        benign = [row for row in rows if row[0].kind == "benign"]
        from_benign = min(len(benign), wanted // 2)
        held = harmful[: wanted - from_benign] + benign[:from_benign]
        held_ids = {id(row) for row in held}
        return [row for row in rows if id(row) not in held_ids], held

    def _write_sources(self, writers: dict[str, Any], splits: npt.NDArray[np.str_], detector: Detector, questions: set[int]) -> None:
        position = 0
        with self._context.progress.task("render", total=len(splits)) as task:
            for batch in self._tables["sources"].batches():
                names = splits[position : position + len(batch)]
                position += len(batch)
                kept = [
                    (row, name)
                    for row, name in zip(batch, names, strict=True)
                    if name and name != "evaluation" and self._is_clean(row[0], detector, questions)
                ]
                for name in (TRAIN, "validation"):
                    self._write_train(writers[name], name, [row for row, split in kept if split == name])
                self._write_prompts(writers["preferences"], [row for row, split in kept if split == "preferences"])
                task.advance(len(batch))

    def _write_train(self, writer: Any, name: str, batch: list[tuple[Record, str]]) -> None:
        rows = self._maker.train(batch)
        write_rows(writer, rows, TRAIN_SCHEMA)
        self._counts[name] += len(rows)
        if name == TRAIN:
            self._tokens.add(rows)

    def _write_prompts(self, writer: Any, batch: list[tuple[Record, str]]) -> None:
        rows = [self._maker.preference(record, source) for record, source in batch]
        write_rows(writer, rows, PREFERENCE_SCHEMA)
        self._counts["preferences"] += len(rows)

    def _write_preferences(self, writer: Any, detector: Detector, questions: set[int]) -> None:
        """Prompts of their own source: none twice, none that is trained or evaluated on."""
        table = self._tables["preference"]
        if not len(table.hashes):
            return
        duplicates = self._duplicates("preference")
        trained = set(self._tables["sources"].hashes.tolist())
        limit = self._params.preference_rows or len(table.hashes)
        position = 0
        for batch in table.batches():
            kept = []
            for row in batch:
                known = int(table.hashes[position]) in trained
                self._counts["preferences_also_in_training"] += known
                if position not in duplicates and not known and self._is_clean(row[0], detector, questions):
                    kept.append(row)
                position += 1
            self._write_prompts(writer, kept[: limit - self._counts["preferences"]])

    def _write_safety(self, writer: Any, rows: list[tuple[Record, str]]) -> None:
        if not self._params.safety:
            return
        share = self._params.safety.share
        wanted = round(self._counts[TRAIN] * share / (1 - share))
        if wanted > len(rows):
            _log.warning("prepare: %d safety rows make less than the wanted share of %g (%d rows)", len(rows), share, wanted)
        self._counts["safety_in_train"] = min(wanted, len(rows))
        self._write_train(writer, TRAIN, rows[:wanted])

    def _is_clean(self, record: Record, detector: Detector, questions: set[int]) -> bool:
        hit = detector.find(record)
        same = question_hash(record.question) in questions
        if hit is None and not same:
            return True
        self._counts["contaminated"] += 1
        if hit and len(self._examples) < _EXAMPLES:
            copied = self._evaluation_records[hit.evaluation_row][0]
            self._examples.append({"ratio": round(hit.ratio, 3), "training": record.question, "evaluation": copied.question})
        return self._params.contamination.action == "report" and not same

    def _report(self, duplicates: Duplicates) -> Metrics:
        max_length = self._context.run.sft.max_length
        contamination = self._params.contamination
        statistics: dict[str, Any] = {
            "rows": {name: int(count) for name, count in self._counts.items()}
            | {name: self._counts[name] for name in ("validation", "preferences", "contaminated")},
            "rejected_reasons": dict(self._rejections.reasons.most_common()),
            "tokens": self._tokens.summary(max_length),
            "max_length": max_length,
            "duplicate_examples": self._duplicate_examples(duplicates),
            "contamination": {
                "rows": self._counts["contaminated"],
                "examples": self._examples,
                **contamination.model_dump(),
            },
        }
        (self._context.output / "statistics.json").write_text(json.dumps(statistics, indent=1, ensure_ascii=False), encoding="utf-8")
        _write_report(self._context.output / "report.html", statistics, self._tokens)
        return {
            **statistics["rows"],
            "tokens": statistics["tokens"]["tokens"],
            "overlong_fraction": statistics["tokens"]["overlong_fraction"],
        }

    def _duplicate_examples(self, duplicates: Duplicates) -> list[dict[str, str]]:
        pairs = [*duplicates.near.items(), *duplicates.exact.items()][:_EXAMPLES]
        wanted = {row for pair in pairs for row in pair}
        texts = {i: record.question for i, (record, _) in enumerate(self._tables["sources"].records()) if i in wanted}
        return [{"removed": texts[row], "kept": texts[kept]} for row, kept in pairs]


def _write_report(path: Path, statistics: dict[str, Any], tokens: Tokens) -> None:
    charts = {
        "tokens": histogram(tokens.totals, "tokens a row", limit=statistics["max_length"]),
        "sources": bars(statistics["tokens"]["sources"], "training rows a source"),
    }
    write_page(path, "prepare.html", charts, s=statistics)
