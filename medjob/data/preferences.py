"""Preference rows: which of them are prompts, which are pairs, and which are held out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from medjob.data.clean import Table
from medjob.data.contamination import ContaminationFilter
from medjob.data.dedup import Duplicates
from medjob.data.formats import Record
from medjob.data.splits import Row
from medjob.data.text import hash_text


class PreferenceChooser:
    """Decides which rows of the preference sources are prompts, and which are pairs."""

    def __init__(
        self,
        table: Table,
        duplicates: Duplicates,
        training: npt.NDArray[np.uint64],
        contamination: ContaminationFilter,
        held_out: frozenset[int],
        counts: Counter[str],
    ) -> None:
        """Prepare to choose.

        Args:
            table: The preference rows.
            training: Hashes of the training questions, of shape (rows,).
            held_out: Hashes of questions that are evaluation rows.
            counts: Counts `preferences_also_in_training`, `repeated_pairs` and `identical_pairs`.
        """
        self._table = table
        self._duplicates = duplicates
        self._training = frozenset(training.tolist())
        self._contamination = contamination
        self._held_out = held_out
        self._counts = counts
        self._refused: set[int] = set()
        """Hashes of questions that are not used. Rows that repeat one are not used either."""
        self._seen: set[int] = set()

    def choose(self, batch: list[Row], position: int) -> tuple[list[Row], list[Row]]:
        """Return the prompts and the pairs of a batch.

        Args:
            position: Number of rows before this batch.
        """
        prompts, pairs = [], []
        for number, row in enumerate(batch, position):
            repeats = number in self._duplicates.exact
            if not self._is_usable(row, number, repeats):
                continue
            if not repeats:
                prompts.append(row)
            if row[0].chosen:
                pairs.append(row)
        return prompts, pairs

    def _is_usable(self, row: Row, number: int, repeats: bool) -> bool:
        key = int(self._table.hashes[number])
        if repeats:
            return key not in self._refused
        usable = self._is_free(int(self._table.prompts[number]), number)
        usable = usable and self._contamination.passes(row[0])
        if not usable:
            self._refused.add(key)
        return usable

    def _is_free(self, prompt: int, number: int) -> bool:
        if number in self._duplicates.near or prompt in self._held_out:
            return False
        if prompt in self._training:
            self._counts["preferences_also_in_training"] += 1
            return False
        return True

    def distinct(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave out rows of PAIR_SCHEMA that repeat one, or whose sides are the same in the run's
        layout: with `style: plain`, answers that differ only in their reasoning."""
        return [row for row in rows if self._is_pair(row) and self._is_new(row)]

    def _is_pair(self, row: dict[str, Any]) -> bool:
        is_pair: bool = row["chosen"] != row["rejected"]
        self._counts["identical_pairs"] += not is_pair
        return is_pair

    def _is_new(self, row: dict[str, Any]) -> bool:
        pair = hash_text(f"{row['id']}\0{row['chosen']}\0{row['rejected']}")
        if pair in self._seen:
            self._counts["repeated_pairs"] += 1
            return False
        self._seen.add(pair)
        return True


def answered(record: Record) -> Record:
    """Return a preference record as an evaluation row: the chosen answer is the reference."""
    if not record.chosen:
        return record
    return replace(record, response=record.chosen, reasoning=record.chosen_reasoning)
