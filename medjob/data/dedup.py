"""Exact and near duplicates among questions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
import rensa

_PERMUTATIONS = 64
_BANDS = 16  # of 4 rows each: pairs of Jaccard 0.85 meet in some band with probability 1 - 1e-5, pairs of 0.3 with 0.12
_SHINGLE = 5
_BATCH = 4096


@dataclass(slots=True)
class Duplicates:
    """Which rows repeat an earlier one: positions of the later, by position of the earlier."""

    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, int] = field(default_factory=dict)

    def __contains__(self, row: int) -> bool:
        return row in self.exact or row in self.near


def find_duplicates(
    hashes: npt.NDArray[np.uint64], questions: Iterable[list[str]], threshold: float | None
) -> Duplicates:
    """Find rows whose question is that of an earlier row.

    Args:
        hashes: shape (rows,): hash of each normalised question.
        questions: each question's words, in the same order; read once, in batches.
        threshold: estimated Jaccard similarity of word 5-shingles from which two questions are one; None: exact only.
    """
    found = Duplicates()
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    origin = first[inverse]
    found.exact = {
        int(row): int(origin[row]) for row in np.flatnonzero(origin != np.arange(len(hashes)))
    }
    if threshold is not None:
        signatures = _signatures(questions)
        found.near = _near(signatures, threshold, skip=found.exact)
    return found


def _signatures(questions: Iterable[list[str]]) -> npt.NDArray[np.uint32]:
    """MinHash signatures, shape (rows, permutations)."""
    parts = []
    iterator = iter(questions)
    while batch := list(islice(iterator, _BATCH)):
        matrix = rensa.RMinHash.digest_matrix_from_token_sets(
            [_shingles(q) for q in batch], _PERMUTATIONS, 42
        )
        parts.append(np.asarray(matrix.to_rows(), dtype=np.uint32))
    return np.concatenate(parts) if parts else np.zeros((0, _PERMUTATIONS), np.uint32)


def _shingles(question: list[str]) -> list[str]:
    return [
        " ".join(question[i : i + _SHINGLE]) for i in range(max(1, len(question) - _SHINGLE + 1))
    ]


def _near(
    signatures: npt.NDArray[np.uint32], threshold: float, skip: dict[int, int]
) -> dict[int, int]:
    """Rows whose signature agrees with an earlier kept row's in at least `threshold` of its places."""
    near: dict[int, int] = {}
    for row, others in sorted(_candidates(signatures).items()):
        if row in skip:
            continue
        kept = np.array(
            [o for o in sorted(others) if o not in near and o not in skip], dtype=np.int64
        )
        if len(kept):
            similarity = (signatures[kept] == signatures[row]).mean(axis=1)
            if similarity.max() >= threshold:
                near[row] = int(kept[similarity.argmax()])
    return near


def _candidates(signatures: npt.NDArray[np.uint32]) -> dict[int, set[int]]:
    """For each row the earlier rows that share a whole band with it (locality-sensitive hashing)."""
    candidates: dict[int, set[int]] = {}
    width = _PERMUTATIONS // _BANDS
    for band in range(_BANDS):
        keys = (
            np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
            .view([("", np.uint32)] * width)
            .ravel()
        )
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        for position in np.flatnonzero(same).tolist():
            # Each row is compared with its neighbour in the bucket and the bucket's first row: enough to join a cluster.
            earlier, row = int(order[position]), int(order[position + 1])
            candidates.setdefault(row, set()).add(earlier)
        starts = np.flatnonzero(np.concatenate(([True], ~same)))
        for start, end in itertools.pairwise([*starts.tolist(), len(order)]):
            for position in range(start + 2, end):
                candidates.setdefault(int(order[position]), set()).add(int(order[start]))
    return candidates
