"""Mix the training rows of several sources by their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medjob.errors import DataError


@dataclass(frozen=True, slots=True)
class SourceShare:
    """How many training rows of a source are used."""

    weight: float
    rows: int
    """Training rows that the source has."""
    used: int


def shares_of(rows: Sequence[int], weights: Sequence[float]) -> list[SourceShare]:
    """Use as many rows of each source as its weight allows, and all rows of the source that has the
    fewest for its weight.

    Raises:
        DataError: a source has no rows.
    """
    if not all(rows):
        number = list(rows).index(0)
        raise DataError(
            f"run.prepare.sources.{number}: no row is left for training, so the sources cannot be "
            "mixed by weight",
            "remove the source or all weights; its rows may be duplicates, or copies of evaluation "
            "rows",
        )
    scale = min(count / weight for count, weight in zip(rows, weights, strict=True))
    return [
        SourceShare(weight, count, min(count, round(scale * weight)))
        for count, weight in zip(rows, weights, strict=True)
    ]


def mixed(
    sources: npt.NDArray[np.int32],
    hashes: npt.NDArray[np.uint64],
    training: npt.NDArray[np.bool_],
    weights: Sequence[float],
) -> tuple[npt.NDArray[np.bool_], list[SourceShare]]:
    """Choose the training rows of each source that have the lowest hashes, and return which rows
    are chosen.

    A row that is chosen for one weight is also chosen for a higher one.

    Args:
        sources: Position of each row's source in `weights`, of shape (rows,).
        hashes: Hash of each row's question, of shape (rows,).
        training: Whether each row is a training row, of shape (rows,).

    Raises:
        DataError: a source has no training rows.
    """
    counts = np.bincount(sources[training], minlength=len(weights)).tolist()
    shares = shares_of(counts, weights)
    chosen = np.zeros(len(sources), dtype=bool)
    for number, share in enumerate(shares):
        rows = np.flatnonzero(training & (sources == number))
        # Equal questions keep the order of the file.
        order = np.argsort(hashes[rows], kind="stable")
        chosen[rows[order[: share.used]]] = True
    return chosen, shares
