"""prepare: turn raw rows into training, validation, preference and evaluation rows."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from medjob.config.prepare import DataSource
from medjob.data.clean import (
    BATCH,
    Rejections,
    Role,
    Table,
    as_prompt,
    clean,
    preference_role,
    safety_sources,
    source_labels,
)
from medjob.data.contamination import ContaminationFilter
from medjob.data.dedup import Duplicates, find_duplicates
from medjob.data.formats import Record
from medjob.data.mixing import SourceShare, mixed
from medjob.data.preferences import PreferenceChooser, answered
from medjob.data.prompts import (
    EVALUATION_SCHEMA,
    PAIR_SCHEMA,
    PREFERENCE_SCHEMA,
    RUBRIC,
    TRAIN_SCHEMA,
    RowBuilder,
    write_rows,
)
from medjob.data.row_examples import RowExamples
from medjob.data.sensitive import STATISTICS
from medjob.data.splits import TRAIN, Row, assign_splits, split_safety
from medjob.data.statistics import TokenCounts
from medjob.errors import DataError
from medjob.report.charts import bars, histogram
from medjob.report.page import write_page
from medjob.stage import Metrics, RowContext
from medjob.train.fit import check_model_fits
from medjob.train.model import load_tokenizer

_log = logging.getLogger(__name__)
_EXAMPLES = 10
_MANY_REMOVED = 0.05  # share of removed rows above which a warning is logged
_FEW_USED = 0.5  # share of rows used by weight below which a warning is logged
_REMOVED = {
    "rejected": "rejected",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "contaminated": "copies of evaluation rows",
}
# In the order of the report: what was read, what was left out, where the rest is, and remarks.
_COUNTS = (
    "read",
    *_REMOVED,
    *("preferences_also_in_training", "unused"),
    *("train", "safety_in_train", "validation", "evaluation", "preferences"),
    *("pairs", "repeated_pairs", "identical_pairs", "unused_pairs"),
    *("dialogues", "open_questions", "further_rows", "rows_with_control_tokens"),
)
_WRITTEN = (TRAIN, "validation", "preferences")
"""Splits of the sources that are written row by row."""
_SCHEMAS = {
    "train": TRAIN_SCHEMA,
    "validation": TRAIN_SCHEMA,
    "preferences": PREFERENCE_SCHEMA,
    "pairs": PAIR_SCHEMA,
}


def run(context: RowContext) -> Metrics:
    """Read and clean the rows in a first pass, and select, render and write them in a second."""
    params = context.run.prepare
    with (context.output / "rejected.jsonl").open("w", encoding="utf-8") as file:
        rejections = Rejections(file)
        tables = {
            "sources": _clean(context, "sources", params.sources, rejections),
            "preference": _clean(
                context, preference_role(context.run), params.preference_sources, rejections
            ),
            "evaluation": _clean(context, "evaluation", params.evaluation_sources, rejections),
            "safety": _clean(context, "safety", safety_sources(params), rejections),
        }
    total = rejections.rows + sum(len(table.hashes) for table in tables.values())
    rejections.check(total, params.max_rejected_fraction)
    counts = Counter(read=total, rejected=rejections.rows)
    return _SplitWriter(context, tables, counts).run(rejections)


def _clean(
    context: RowContext, name: Role, sources: list[DataSource], rejections: Rejections
) -> Table:
    with context.extras.progress.task(f"read {name}", total=0) as task:
        return clean(
            sources,
            context.locations,
            context.work / f"{name}.parquet",
            rejections,
            context.run.seed,
            task.advance,
            name,
        )


class _SplitWriter:
    """Second pass: writes the clean rows to five Parquet files, and counts them.

    Every row that was read is counted once: in a file, as rejected, as a duplicate, as
    contaminated, or as unused. A row of the preference sources is a prompt for candidates and, if
    it has two answers, also a pair. Prompts are not repeated, and several pairs can share one.
    """

    def __init__(self, context: RowContext, tables: dict[str, Table], counts: Counter[str]) -> None:
        self._context = context
        self._params = context.run.prepare
        self._tables = tables
        self._counts = counts
        base = context.location(context.run.base_model)
        self._tokenizer = load_tokenizer(base)
        if self._params.sources:
            check_model_fits(base, self._tokenizer, context.run.sft.max_length)
        self._builder = RowBuilder(self._tokenizer, context.run.prompt)
        self._tokens = TokenCounts()
        self._examples = RowExamples()
        self._rows_with_reasoning = 0
        self._pair_tokens = 0
        self._shares: dict[str, SourceShare] = {}
        self._prompts: set[str] = set()
        """Ids of the preference prompts so far."""

    def run(self, rejections: Rejections) -> Metrics:
        duplicates = self._find_duplicates("sources")
        splits = self._assign_splits(duplicates)
        repeated = self._find_duplicates("preference")
        held_out = self._held_out_preferences(repeated)
        safety_train, safety_evaluation = self._split_safety()
        evaluation = self._evaluation_rows(splits, safety_evaluation, repeated, held_out)
        self._check_letters(evaluation)
        contamination = ContaminationFilter(
            [record for record, _ in evaluation],
            self._params.contamination,
            self._training_records(splits, safety_train),
        )
        self._remove_copies(splits, contamination)
        if self._params.is_weighted:
            self._mix(splits)
        with ExitStack() as stack:
            writers = {name: stack.enter_context(self._open(name)) for name in _SCHEMAS}
            self._write_sources(writers, splits)
            self._write_preferences(writers, contamination, repeated, held_out)
            passing = [row for row in safety_train if contamination.passes(row[0])]
            self._write_safety(writers["train"], passing)
        self._counts["contaminated"] = contamination.removed
        self._check_rows_left()
        self._check_style()
        self._write_evaluation(evaluation)
        self._warn()
        return self._report(duplicates, contamination, rejections)

    def _find_duplicates(self, name: str) -> Duplicates:
        table = self._tables[name]
        if not len(table.hashes):
            return Duplicates()
        threshold = self._params.near_duplicate_threshold
        with self._context.extras.progress.task("compare", total=len(table.hashes)) as task:
            found = find_duplicates(
                table.hashes,
                lambda: (record for record, _ in table.records()),
                threshold,
                task.advance,
            )
        self._counts["exact_duplicates"] += len(found.exact)
        self._counts["near_duplicates"] += len(found.near)
        return found

    def _assign_splits(self, duplicates: Duplicates) -> npt.NDArray[np.str_]:
        hashes = self._tables["sources"].prompts
        if not self._params.sources:
            return np.array([], dtype="U16")
        usable = np.ones(len(hashes), dtype=bool)
        usable[[*duplicates.exact, *duplicates.near]] = False
        # Preference prompts come from the sources only if they have no sources themselves.
        preferences = 0 if self._params.preference_sources else self._params.preference_rows
        wanted = {
            "validation": self._params.validation_rows,
            "evaluation": self._params.evaluation_rows,
            "preferences": preferences,
        }
        removed = {
            _REMOVED[name]: self._counts[name]
            for name in ("rejected", "exact_duplicates", "near_duplicates")
        }
        return assign_splits(hashes, usable, wanted, removed)

    def _held_out_preferences(self, duplicates: Duplicates) -> frozenset[int]:
        """Hashes of the preference questions that are evaluation rows, if there are no sources to
        take them of."""
        hashes = self._tables["preference"].prompts
        if self._params.sources or not len(hashes) or not self._params.evaluation_rows:
            return frozenset()
        usable = np.ones(len(hashes), dtype=bool)
        usable[[*duplicates.exact, *duplicates.near]] = False
        splits = assign_splits(hashes, usable, {"evaluation": self._params.evaluation_rows})
        return frozenset(hashes[splits == "evaluation"].tolist())

    def _training_records(
        self, splits: npt.NDArray[np.str_], safety: list[Row]
    ) -> Iterator[Record]:
        """Yield the records from which the training and preference rows are taken."""
        for row, split in zip(self._tables["sources"].records(), splits, strict=True):
            if split and split != "evaluation":
                yield row[0]
        for row in chain(self._tables["preference"].records(), safety):
            yield row[0]

    def _split_safety(self) -> tuple[list[Row], list[Row]]:
        wanted = self._params.safety.evaluation_rows if self._params.safety else 0
        return split_safety(self._unique("safety"), wanted, self._context.run.seed)

    def _unique(self, name: str) -> list[Row]:
        rows = self._tables[name].unique()
        self._counts["exact_duplicates"] += len(self._tables[name].hashes) - len(rows)
        return rows

    def _evaluation_rows(
        self,
        splits: npt.NDArray[np.str_],
        safety_evaluation: list[Row],
        repeated: Duplicates,
        held_out_preferences: frozenset[int],
    ) -> list[Row]:
        """Collect the evaluation rows of all tables, without repeats."""
        held_out = [
            row
            for row, split in zip(self._tables["sources"].records(), splits, strict=True)
            if split == "evaluation"
        ]
        table = self._tables["preference"]
        keys = enumerate(table.prompts.tolist())
        preferred = [
            (answered(record), source)
            for (record, source), (number, key) in zip(table.records(), keys, strict=True)
            if key in held_out_preferences and number not in repeated
        ]
        held_out = _as_prompts([*held_out, *preferred])
        rows = [*_as_prompts(safety_evaluation), *self._unique("evaluation"), *held_out]
        by_id = {row[0].id: row for row in rows}
        self._counts["exact_duplicates"] += len(rows) - len(by_id)
        return list(by_id.values())

    def _check_letters(self, evaluation: list[Row]) -> None:
        """Refuse a tokenizer that cannot tell the option letters apart, before any training."""
        for letters in {tuple(record.options) for record, _ in evaluation if record.options}:
            self._builder.check_letters(letters)

    def _open(self, name: str) -> Any:
        path = self._context.output / f"{name}.parquet"
        schema = _SCHEMAS[name]
        tables = (self._tables["sources"], self._tables["preference"])
        if name == "preferences" and any(table.has_rubrics for table in tables):
            schema = schema.append(RUBRIC)
        return pq.ParquetWriter(path, schema, compression="zstd")

    def _remove_copies(
        self, splits: npt.NDArray[np.str_], contamination: ContaminationFilter
    ) -> None:
        """Take rows that copy an evaluation row out of their split."""
        position = 0
        with self._context.extras.progress.task("contamination", total=len(splits)) as task:
            for batch in self._tables["sources"].batches():
                for record, _ in batch:
                    if splits[position] in _WRITTEN and not contamination.passes(record):
                        splits[position] = ""
                    position += 1
                task.advance(len(batch))

    def _mix(self, splits: npt.NDArray[np.str_]) -> None:
        """Take rows out of the training until each source has the share of its weight.

        Duplicates and copies are removed before, so that the shares are those of the rows that are
        trained.
        """
        table = self._tables["sources"]
        labels = source_labels(self._params.sources)
        weights = [source.weight or 1.0 for source in self._params.sources]
        training = splits == TRAIN
        chosen, shares = mixed(table.sources(labels), table.hashes, training, weights)
        splits[training & ~chosen] = ""
        self._counts["unused"] += int((training & ~chosen).sum())
        self._shares = dict(zip(labels, shares, strict=True))
        used = sum(share.used for share in shares)
        parts = (
            f"{label} {share.used:,} of {share.rows:,} rows (weight {share.weight:g}, "
            f"{share.used / used:.1%})"
            for label, share in self._shares.items()
        )
        _log.info("prepare: training rows by weight: %s", ", ".join(parts))
        if used < _FEW_USED * training.sum():
            label, share = min(self._shares.items(), key=lambda item: item[1].rows / item[1].weight)
            _log.warning(
                "prepare: the weights leave out %d of %d training rows, because %s has only %d for "
                "its weight of %g; lower that weight, or leave the source out",
                training.sum() - used,
                training.sum(),
                label,
                share.rows,
                share.weight,
            )

    def _write_sources(self, writers: dict[str, Any], splits: npt.NDArray[np.str_]) -> None:
        position = 0
        with self._context.extras.progress.task("render", total=len(splits)) as task:
            for batch in self._tables["sources"].batches():
                names = splits[position : position + len(batch)].tolist()
                position += len(batch)
                kept: dict[str, list[Row]] = {name: [] for name in _WRITTEN}
                for row, name in zip(batch, names, strict=True):
                    if name in kept:
                        kept[name].append(row)
                self._write_train(writers[TRAIN], TRAIN, kept[TRAIN])
                self._write_train(writers["validation"], "validation", kept["validation"])
                self._write_prompts(writers["preferences"], kept["preferences"])
                task.advance(len(batch))

    def _write_train(self, writer: Any, name: str, batch: list[Row]) -> None:
        records = [record for record, _ in batch]
        self._counts["dialogues"] += sum(bool(each.history or each.later) for each in records)
        self._counts["open_questions"] += sum(each.has_open_question for each in records)
        self._rows_with_reasoning += sum(map(_has_reasoning, records))
        rows = self._builder.train(batch)
        write_rows(writer, rows)
        self._counts[name] += len(batch)
        if name == TRAIN:
            self._counts["further_rows"] += len(rows) - len(batch)
            self._tokens.add(rows)
            self._examples.add(batch, rows)

    def _write_prompts(self, writer: Any, batch: list[Row]) -> None:
        """Write prompts. Dialogues that begin with the same question have the same prompt."""
        prompts = {record.id: (record, source) for record, source in _as_prompts(batch)}
        new = [row for id_, row in prompts.items() if id_ not in self._prompts]
        self._prompts.update(prompts)
        self._counts["exact_duplicates"] += len(batch) - len(new)
        write_rows(writer, self._builder.preferences(new))
        self._counts["preferences"] += len(new)

    def _write_preferences(
        self,
        writers: dict[str, Any],
        contamination: ContaminationFilter,
        duplicates: Duplicates,
        held_out: frozenset[int],
    ) -> None:
        """Write the prompts and the pairs of the preference sources, without those whose question
        is also one of training or evaluation."""
        table = self._tables["preference"]
        wanted = self._params.preference_rows or len(table.hashes)
        training = self._tables["sources"].prompts
        chooser = PreferenceChooser(
            table, duplicates, training, contamination, held_out, self._counts
        )
        with self._context.extras.progress.task("preferences", total=len(table.hashes)) as task:
            position = 0
            for batch in table.batches():
                prompts, pairs = chooser.choose(batch, position)
                position += len(batch)
                used = prompts[: wanted - self._counts["preferences"]]
                self._counts["unused"] += len(prompts) - len(used)
                self._write_prompts(writers["preferences"], used)
                built = chooser.distinct(self._builder.pairs(pairs))
                rows = built[: wanted - self._counts["pairs"]]
                self._counts["unused_pairs"] += len(built) - len(rows)
                self._write_pairs(writers["pairs"], rows)
                task.advance(len(batch))

    def _write_pairs(self, writer: Any, rows: list[dict[str, Any]]) -> None:
        write_rows(writer, rows)
        self._counts["pairs"] += len(rows)
        self._pair_tokens += sum(
            2 * len(row["prompt_ids"]) + row["chosen_tokens"] + row["rejected_tokens"]
            for row in rows
        )

    def _write_safety(self, writer: Any, rows: list[Row]) -> None:
        if not self._params.safety:
            return
        share = self._params.safety.share
        wanted = round(self._counts[TRAIN] * share / (1 - share))
        if wanted > len(rows):
            _log.warning(
                "prepare: a safety share of %g needs %d rows, but there are only %d",
                share,
                wanted,
                len(rows),
            )
        self._counts["safety_in_train"] = min(wanted, len(rows))
        self._counts["unused"] += max(0, len(rows) - wanted)
        self._write_train(writer, TRAIN, rows[:wanted])

    def _check_rows_left(self) -> None:
        """Refuse to publish an empty training set. Without sources there is nothing to train on but
        pairs."""
        if not self._params.sources or self._counts[TRAIN] > self._counts["safety_in_train"]:
            return
        counts = ", ".join(f"{self._counts[name]} {text}" for name, text in _REMOVED.items())
        raise DataError(
            f"no training row is left: of {self._counts['read']} rows that were read, {counts}",
            "see run.prepare.near_duplicate_threshold and run.prepare.contamination, or use more "
            "rows",
        )

    def _warn(self) -> None:
        """Log what a user should look at before spending anything on a training."""
        total = self._counts["read"] - self._counts["rejected"]
        for name in ("exact_duplicates", "near_duplicates", "contaminated"):
            if self._counts[name] > _MANY_REMOVED * total:
                _log.warning(
                    "prepare: %d of %d rows were %s; report.html and statistics.json of the "
                    "artifact have examples",
                    self._counts[name],
                    total,
                    _REMOVED[name],
                )
        self._counts["rows_with_control_tokens"] = self._builder.rows_with_control_tokens
        if self._counts["rows_with_control_tokens"]:
            _log.warning(
                "prepare: %d rows spell out control tokens of the model, which are encoded as "
                "ordinary text",
                self._counts["rows_with_control_tokens"],
            )
        if self._counts["further_rows"]:
            _log.info(
                "prepare: the chat template changes earlier turns, so %d answers of dialogues are "
                "in separate training rows",
                self._counts["further_rows"],
            )

    def _check_style(self) -> None:
        """Refuse a style with reasoning if no row has any. Such rows are rendered as plain answers,
        so the model would never learn the style."""
        style = self._context.run.prompt.style
        if self._params.sources and style != "plain" and self._rows_with_reasoning == 0:
            raise DataError(
                f"run.prompt.style is {style}, but no training row has any reasoning",
                "--set run.prompt.style=plain, or use rows with a reasoning column (Complex_CoT)",
            )

    def _write_evaluation(self, evaluation: list[Row]) -> None:
        path = self._context.output / "evaluation.parquet"
        has_rubrics = any(record.rubric for record, _ in evaluation)
        schema = EVALUATION_SCHEMA.append(RUBRIC) if has_rubrics else EVALUATION_SCHEMA
        with (
            pq.ParquetWriter(path, schema) as writer,
            self._context.extras.progress.task("evaluation", total=len(evaluation)) as task,
        ):
            for start in range(0, len(evaluation), BATCH):
                batch = evaluation[start : start + BATCH]
                write_rows(writer, self._builder.evaluation(batch))
                task.advance(len(batch))
        self._counts["evaluation"] = len(evaluation)

    def _report(
        self, duplicates: Duplicates, contamination: ContaminationFilter, rejections: Rejections
    ) -> Metrics:
        max_length = self._context.run.sft.max_length
        shows_rows = not self._params.sensitive
        statistics: dict[str, Any] = {
            "rows": {name: int(self._counts[name]) for name in _COUNTS},
            "rejected_reasons": dict(rejections.reasons.most_common()),
            "tokens": self._tokens.summary(max_length),
            "max_length": max_length,
            "lengths": self._tokens.by_source(max_length),
            "openings": self._examples.openings() if shows_rows else {},
            "scripts": self._examples.scripts(),
            "duplicate_examples": self._duplicate_examples(duplicates) if shows_rows else [],
            "contamination": {
                "rows": contamination.rows,
                "examples": contamination.examples if shows_rows else [],
                **self._params.contamination.model_dump(),
            },
        }
        if not shows_rows:
            statistics["sensitive"] = True  # read by `may_be_shown`
        if self._shares:
            shares = {label: asdict(share) for label, share in self._shares.items()}
            statistics["weights"] = shares
        output = self._context.output
        text = json.dumps(statistics, indent=1, ensure_ascii=False)
        (output / STATISTICS).write_text(text, encoding="utf-8")
        charts = {
            "tokens": histogram(self._tokens.totals, "tokens per row", limit=max_length),
            "sources": bars(statistics["tokens"]["sources"], "training rows per source"),
        }
        write_page(
            output / "report.html",
            "prepare.html",
            charts,
            s=statistics,
            places=rejections.examples,
            groups=self._examples.shown(self._tokenizer, max_length) if shows_rows else [],
            shows_rows=shows_rows,
        )
        tokens = {name: statistics["tokens"][name] for name in ("tokens", "overlong_fraction")}
        return {**statistics["rows"], **tokens, "pair_tokens": self._pair_tokens}

    def _duplicate_examples(self, duplicates: Duplicates) -> list[dict[str, str]]:
        pairs = [*duplicates.near.items(), *duplicates.exact.items()][:_EXAMPLES]
        shown = {position for pair in pairs for position in pair}
        questions = {}
        for position, (record, _) in enumerate(self._tables["sources"].records()):
            if position in shown:
                questions[position] = record.question
        return [{"removed": questions[removed], "kept": questions[kept]} for removed, kept in pairs]


def _as_prompts(rows: Iterable[Row]) -> list[Row]:
    return [(as_prompt(record), source) for record, source in rows]


def _has_reasoning(record: Record) -> bool:
    return bool(record.reasoning) or any(each.reasoning for each in record.other_trained)
