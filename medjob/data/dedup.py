"""Find exact and near duplicates among questions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
import rensa

_PERMUTATIONS = 64
# 16 bands of 4 values. At least one band of a pair agrees with probability 1 - 1e-5 at a Jaccard
# similarity of 0.85, and 0.12 at 0.3.
_BANDS = 16
_SHINGLE = 5
_BATCH = 4096
_SEED = 42


@dataclass(slots=True)
class Duplicates:
    """Rows that repeat an earlier one: each row's position, and the position of the earlier row."""

    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, int] = field(default_factory=dict)

    def __contains__(self, row: int) -> bool:
        return row in self.exact or row in self.near


def find_duplicates(
    hashes: npt.NDArray[np.uint64], questions: Iterable[list[str]], threshold: float | None
) -> Duplicates:
    """Find rows whose question repeats that of an earlier row.

    Args:
        hashes: Hash of each normalised question, of shape (rows,).
        questions: Words of each question, in the same order. Read once, in batches.
        threshold: Estimated Jaccard similarity of word 5-shingles at which two questions are
            duplicates. None finds exact duplicates only.
    """
    found = Duplicates()
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    origin = first[inverse]
    repeats = np.flatnonzero(origin != np.arange(len(hashes)))
    found.exact = {int(row): int(origin[row]) for row in repeats}
    if threshold is not None:
        signatures = _signatures(questions)
        found.near = _near(signatures, threshold, skip=found.exact)
    return found


def _signatures(questions: Iterable[list[str]]) -> npt.NDArray[np.uint32]:
    """Compute MinHash signatures, of shape (rows, permutations)."""
    parts = []
    iterator = iter(questions)
    while batch := list(islice(iterator, _BATCH)):
        shingles = [_shingles(question) for question in batch]
        matrix = rensa.RMinHash.digest_matrix_from_token_sets(shingles, _PERMUTATIONS, _SEED)
        parts.append(np.asarray(matrix.to_rows(), dtype=np.uint32))
    return np.concatenate(parts) if parts else np.zeros((0, _PERMUTATIONS), np.uint32)


def _shingles(question: list[str]) -> list[str]:
    count = max(1, len(question) - _SHINGLE + 1)
    return [" ".join(question[i : i + _SHINGLE]) for i in range(count)]


def _near(
    signatures: npt.NDArray[np.uint32], threshold: float, skip: dict[int, int]
) -> dict[int, int]:
    """Find rows whose signature agrees with that of an earlier kept row in at least `threshold` of
    its values."""
    near: dict[int, int] = {}
    for row, others in sorted(_candidates(signatures).items()):
        if row in skip:
            continue
        originals = [other for other in sorted(others) if other not in near and other not in skip]
        kept = np.array(originals, dtype=np.int64)
        if len(kept):
            similarity = (signatures[kept] == signatures[row]).mean(axis=1)
            if similarity.max() >= threshold:
                near[row] = int(kept[similarity.argmax()])
    return near


def _candidates(signatures: npt.NDArray[np.uint32]) -> dict[int, set[int]]:
    """Find, for each row, earlier rows that share a band with it (locality-sensitive hashing).

    In a bucket of rows with the same band, each row gets its neighbour and the bucket's first row.
    That is enough to join the rows of a cluster.
    """
    candidates: dict[int, set[int]] = {}
    width = _PERMUTATIONS // _BANDS
    for band in range(_BANDS):
        columns = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        keys = columns.view([("", np.uint32)] * width).ravel()
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        for position in np.flatnonzero(same).tolist():
            neighbour = int(order[position])
            candidates.setdefault(int(order[position + 1]), set()).add(neighbour)
        starts = np.flatnonzero(np.concatenate(([True], ~same)))
        for start, end in itertools.pairwise([*starts.tolist(), len(order)]):
            first = int(order[start])
            for position in range(start + 2, end):
                candidates.setdefault(int(order[position]), set()).add(first)
    return candidates
