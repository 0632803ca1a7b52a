"""Who goes where: by a hash of the normalised question, so that a question never sits in two splits and new rows move few old ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from medjob.data.formats import Record
from medjob.data.text import question_hash
from medjob.errors import DataError

TRAIN = "train"
Row = tuple[Record, str]
"""A record and the name of its source."""


def assign(
    hashes: npt.NDArray[np.uint64], usable: npt.NDArray[np.bool_], wanted: Mapping[str, int]
) -> npt.NDArray[np.str_]:
    """Name the split of each row: those with the lowest hashes fill the `wanted` splits in order, the rest is "train".

    Args:
        hashes: shape (rows,): hash of each normalised question; equal ones share a split.
        usable: shape (rows,): False for rows that were removed; they stay "".
        wanted: rows that each split other than train gets.

    Raises:
        DataError: nothing would be left to train on.
    """
    splits = np.where(usable, TRAIN, "").astype("U16")
    unique = np.unique(hashes[usable])
    total = sum(wanted.values())
    if len(unique) <= total:
        raise DataError(
            f"{len(unique)} usable rows are too few to set {total} apart ({', '.join(f'{k} {v}' for k, v in wanted.items())})",
            "lower run.prepare.validation_rows, evaluation_rows or preference_rows",
        )
    start = 0
    for name, count in wanted.items():
        if count:
            splits[np.isin(hashes, unique[start : start + count]) & usable] = name
            start += count
    return splits


def split_safety(rows: Sequence[Row], wanted: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and `wanted` held out: half of them harmful and half benign, as far as there are both."""
    ordered = sorted(rows, key=lambda row: question_hash(row[0].question, seed))
    benign = [row for row in ordered if row[0].kind == "benign"][: wanted // 2]
    harmful = [row for row in ordered if row[0].kind == "harmful"][: wanted - len(benign)]
    held = harmful + benign
    held_ids = {row[0].id for row in held}
    return [row for row in ordered if row[0].id not in held_ids], held
