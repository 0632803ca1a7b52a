"""Assign rows to splits by a hash of the normalised question.

So a question is never in two splits, and new rows move few old ones to another split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from medjob.data.formats import Record
from medjob.data.text import question_hash
from medjob.errors import DataError

TRAIN = "train"
Row = tuple[Record, str]
"""A record and the name of its source."""


def assign_splits(
    hashes: npt.NDArray[np.uint64],
    usable: npt.NDArray[np.bool_],
    wanted: Mapping[str, int],
    removed: Mapping[str, int] = MappingProxyType({}),
) -> npt.NDArray[np.str_]:
    """Return the name of each row's split. The lowest hashes fill the `wanted` splits in order, and
    the rest is "train".

    Args:
        hashes: Hash of each normalised question, of shape (rows,). Equal hashes share a split.
        usable: False for rows that were removed, of shape (rows,). Their split is "".
        wanted: Number of questions in each split other than train.
        removed: Number of rows that were removed before, by reason, for the error message.

    Raises:
        DataError: no row would be left for training.
    """
    splits = np.where(usable, TRAIN, "").astype("U16")
    unique = np.unique(hashes[usable])
    total = sum(wanted.values())
    if len(unique) <= total:
        raise _too_few(len(unique), wanted, removed)
    start = 0
    for name, count in wanted.items():
        if count:
            splits[np.isin(hashes, unique[start : start + count]) & usable] = name
            start += count
    return splits


def _too_few(usable: int, wanted: Mapping[str, int], removed: Mapping[str, int]) -> DataError:
    sizes = ", ".join(f"{name} {count}" for name, count in wanted.items())
    message = (
        f"{usable} usable rows are too few: {sum(wanted.values())} are needed outside training "
        f"({sizes})"
    )
    if any(removed.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in removed.items())
        message += f"; {sum(removed.values())} other rows were removed: {reasons}"
    return DataError(
        message,
        "use more rows, or lower run.prepare.validation_rows, evaluation_rows or preference_rows",
    )


def split_safety(rows: Sequence[Row], wanted: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Split safety rows into those for training and `wanted` for evaluation.

    Half of the evaluation rows are harmful and half benign, if there are enough of both.
    """
    ordered = sorted(rows, key=lambda row: question_hash(row[0].question, seed))
    benign = [row for row in ordered if row[0].kind == "benign"][: wanted // 2]
    harmful = [row for row in ordered if row[0].kind == "harmful"][: wanted - len(benign)]
    evaluation = harmful + benign
    evaluation_ids = {record.id for record, _ in evaluation}
    training = [row for row in ordered if row[0].id not in evaluation_ids]
    return training, evaluation
