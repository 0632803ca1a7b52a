"""Find exact and near duplicates among questions.

MinHash proposes pairs of rows, and `compare` decides about each pair.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import rensa

from medjob.data.compare import SHINGLE, Answer, Question
from medjob.data.formats import Record
from medjob.data.ngrams import Hashes, NGrams, ngrams
from medjob.data.text import hash_text

Records = Callable[[], Iterable[Record]]
"""Starts a new pass over the same records."""
_Rows = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]
_Signatures = npt.NDArray[np.uint32]

_PERMUTATIONS = 64
# 16 bands of 4 values. At least one band of a pair agrees with probability 1 - 1e-5 at a Jaccard
# similarity of 0.85, and 0.12 at 0.3.
_BANDS = 16
_BATCH = 4096
_SEED = 42
# Estimated similarity from which a pair is compared. A typo in the middle of 25 words leaves 0.6.
_SIMILAR = 0.45
# In large buckets, rows are paired with their neighbours in this many bands.
_NEIGHBOUR_BANDS = 2
# A shingle or an answer that more rows share says nothing about two of them.
_COMMON = 16
# Shingles are counted by their first bits. 50 million different ones put 1.5 on each counter.
_COUNTER_BITS = 25
# Number of rows whose texts are in memory at once.
_HELD = 100_000


@dataclass(slots=True)
class Duplicates:
    """Rows that repeat an earlier one: each row's position, and the position of the earlier row."""

    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, int] = field(default_factory=dict)

    def __contains__(self, row: int) -> bool:
        return row in self.exact or row in self.near


def find_duplicates(
    hashes: Hashes,
    records: Records,
    threshold: float | None,
    advance: Callable[[int], None],
) -> Duplicates:
    """Find rows whose question repeats that of an earlier row.

    Args:
        hashes: Hash of each normalised question, of shape (rows,).
        records: Starts a pass over the rows, in the same order. There are up to three passes, and
            one more for every 100,000 rows that resemble a later one.
        threshold: Jaccard similarity of word 5-shingles from which reworded texts can be
            duplicates; `compare` has the other conditions. None finds exact duplicates only.
        advance: Called with the number of rows of each batch of the first pass, to report progress.
    """
    found = Duplicates()
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    origin = first[inverse]
    repeats = np.flatnonzero(origin != np.arange(len(hashes)))
    found.exact = {int(row): int(origin[row]) for row in repeats}
    if threshold is not None:
        unique = origin == np.arange(len(hashes))
        positions = np.flatnonzero(unique)
        near = _near(_Selection(records, unique), threshold, advance)
        found.near = {int(positions[row]): int(positions[other]) for row, other in near.items()}
    return found


@dataclass(frozen=True, slots=True)
class _Selection:
    """Some of the records. They are numbered from 0."""

    records: Records
    chosen: _Flags

    def __iter__(self) -> Iterator[Record]:
        for record, chosen in zip(self.records(), self.chosen.tolist(), strict=True):
            if chosen:
                yield record

    def __len__(self) -> int:
        return int(self.chosen.sum())

    def select(self, rows: _Rows) -> _Selection:
        """Select some of these records."""
        chosen = np.zeros_like(self.chosen)
        chosen[np.flatnonzero(self.chosen)[rows]] = True
        return _Selection(self.records, chosen)


@dataclass(slots=True)
class _Facts:
    """What the first pass keeps of each row."""

    signatures: _Signatures
    """MinHash of the shingles, of shape (rows, permutations)."""
    exact_words: Hashes
    """Hash of the numbers and signs, or of the whole question if it has no words."""
    answers: Hashes
    is_checked: _Flags
    is_telling: _Flags
    """Whether the answer has several words, and few rows share it."""
    shingle_counts: npt.NDArray[np.uint8]
    """Number of rows with a shingle, up to 255, by the first bits of its hash."""

    @classmethod
    def of(cls, rows: _Selection, advance: Callable[[int], None]) -> _Facts:
        size = len(rows)
        facts = cls(
            signatures=np.zeros((size, _PERMUTATIONS), np.uint32),
            exact_words=np.zeros(size, np.uint64),
            answers=np.zeros(size, np.uint64),
            is_checked=np.zeros(size, bool),
            is_telling=np.zeros(size, bool),
            shingle_counts=np.zeros(1 << _COUNTER_BITS, np.uint8),
        )
        start = 0
        for batch in _batched(rows):
            facts._add(start, batch)
            start += len(batch)
            advance(len(batch))
        _, inverse, counts = np.unique(facts.answers, return_inverse=True, return_counts=True)
        facts.is_telling &= counts[inverse] <= _COMMON
        return facts

    def _add(self, start: int, batch: list[Record]) -> None:
        questions = [Question.of(record) for record in batch]
        shingles = _shingles(questions)
        rows = slice(start, start + len(batch))
        self.signatures[rows] = _signatures(shingles)
        self.exact_words[rows] = [
            hash_text(question.exact_words if question.words else record.identity)
            for question, record in zip(questions, batch, strict=True)
        ]
        answers = [Answer.of(record) for record in batch]
        self.answers[rows] = [answer.hash for answer in answers]
        self.is_checked[rows] = [answer.is_checked for answer in answers]
        self.is_telling[rows] = [answer.has_words for answer in answers]
        counters, counts = np.unique(_counters(shingles), return_counts=True)
        total = self.shingle_counts[counters] + counts
        self.shingle_counts[counters] = np.minimum(total, 255).astype(np.uint8)


def _near(rows: _Selection, threshold: float, advance: Callable[[int], None]) -> dict[int, int]:
    """Return each near duplicate, and the earlier row that it repeats."""
    facts = _Facts.of(rows, advance)
    pairs, crowded = _candidates(facts.signatures)
    pairs = pairs[_similarity(facts.signatures, pairs) >= _SIMILAR]
    if len(crowded):
        distinctive = _distinctive_pairs(rows, crowded, facts.shingle_counts)
        pairs = _unique(np.concatenate((pairs, distinctive)))
    near: dict[int, int] = {}
    for earlier, later in sorted(_verified(rows, facts, pairs, threshold), key=lambda p: p[::-1]):
        if earlier not in near:
            near.setdefault(later, earlier)
    return near


def _batched(rows: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _shingles(questions: list[Question]) -> NGrams:
    """Hash the shingles of each question. A shorter question is one shingle."""
    texts = [question.words for question in questions]
    return ngrams([text + [""] * (SHINGLE - len(text)) for text in texts], SHINGLE)


def _signatures(shingles: NGrams) -> _Signatures:
    """Compute MinHash signatures, of shape (rows, permutations)."""
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        shingles.hashes, shingles.offsets.astype(np.uint64), _PERMUTATIONS, _SEED
    )
    return np.asarray(matrix.to_rows(), dtype=np.uint32)


def _counters(shingles: NGrams) -> Hashes:
    return shingles.hashes >> np.uint64(64 - _COUNTER_BITS)


def _candidates(signatures: _Signatures) -> tuple[_Rows, _Rows]:
    """Find rows that share a band of their signatures (locality-sensitive hashing).

    Returns:
        Pairs (earlier row, later row), of shape (pairs, 2): all pairs of a bucket of up to 16 rows.
        In a larger one, each row is paired with the first row, and in two bands with its neighbour,
        which joins a cluster of near duplicates.

        Rows in larger buckets. They share a long text with many rows, which can hide a duplicate.
    """
    found = [np.zeros((0, 2), np.int64)]
    crowded = np.zeros(len(signatures), bool)
    width = _PERMUTATIONS // _BANDS
    for band in range(_BANDS if len(signatures) else 0):
        columns = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        keys = columns.view([("", np.uint32)] * width).ravel()
        order = np.argsort(keys, kind="stable")
        bucket = np.concatenate(([0], np.cumsum(keys[order[1:]] != keys[order[:-1]])))
        is_large = np.bincount(bucket)[bucket] > _COMMON
        found.append(_bucket_pairs(order, bucket, is_large, neighbours=band < _NEIGHBOUR_BANDS))
        crowded[order[is_large]] = True
    return _unique(np.concatenate(found)), np.flatnonzero(crowded)


def _bucket_pairs(order: _Rows, bucket: _Rows, is_large: _Flags, neighbours: bool) -> _Rows:
    """Pair the rows in `order`, of which those with the same number in `bucket` are together."""
    first = order[np.searchsorted(bucket, bucket)]
    pairs = [np.stack((first, order), axis=1)[is_large & (first != order)]]
    for distance in range(1, _COMMON):
        together = bucket[distance:] == bucket[:-distance]
        if distance > 1 or not neighbours:
            together &= ~is_large[distance:]
        pairs.append(np.stack((order[:-distance], order[distance:]), axis=1)[together])
    return np.concatenate(pairs)


def _unique(pairs: _Rows) -> _Rows:
    """Sort the pairs and drop repeats."""
    rows = int(pairs.max(initial=0)) + 1
    codes = np.unique(pairs[:, 0] * rows + pairs[:, 1])
    return np.stack(np.divmod(codes, rows), axis=1)


def _similarity(signatures: _Signatures, pairs: _Rows) -> npt.NDArray[np.float64]:
    """Estimate the Jaccard similarity of each pair."""
    parts = [
        (signatures[some[:, 0]] == signatures[some[:, 1]]).mean(axis=1)
        for some in np.array_split(pairs, len(pairs) // 100_000 + 1)
    ]
    return np.concatenate(parts)


def _distinctive_pairs(
    rows: _Selection, crowded: _Rows, shingle_counts: npt.NDArray[np.uint8]
) -> _Rows:
    """Find pairs among rows that share a long text, by the shingles that few rows have.

    Each such shingle is in at most 16 rows, so no bucket is larger.
    """
    kept, signatures = [np.zeros(0, np.int64)], [np.zeros((0, _PERMUTATIONS), np.uint32)]
    start = 0
    for batch in _batched(rows.select(crowded)):
        shingles = _shingles([Question.of(record) for record in batch])
        shingles = shingles.select(shingle_counts[_counters(shingles)] <= _COMMON)
        has_any = np.diff(shingles.offsets) > 0
        kept.append(crowded[start : start + len(batch)][has_any])
        signatures.append(_signatures(shingles)[has_any])
        start += len(batch)
    pairs, _ = _candidates(np.concatenate(signatures))
    return np.concatenate(kept)[pairs]


def _verified(
    rows: _Selection, facts: _Facts, pairs: _Rows, threshold: float
) -> Iterator[tuple[int, int]]:
    """Yield the pairs that ask the same question."""
    earlier, later = pairs.T
    same_answer = facts.answers[earlier] == facts.answers[later]
    is_checked = facts.is_checked[earlier] & facts.is_checked[later]
    same_exact_words = facts.exact_words[earlier] == facts.exact_words[later]
    pairs = pairs[same_exact_words & (same_answer | ~is_checked)]
    texts = np.unique(pairs[:, 0])
    for start in range(0, len(texts), _HELD):
        held = texts[start : start + _HELD]
        yield from _compare(rows, facts, pairs[np.isin(pairs[:, 0], held)], threshold)


def _compare(
    rows: _Selection, facts: _Facts, pairs: _Rows, threshold: float
) -> Iterator[tuple[int, int]]:
    """Compare the texts of `pairs`, in one pass over the rows."""
    earlier_rows: dict[int, list[int]] = defaultdict(list)
    for earlier, later in pairs.tolist():
        earlier_rows[later].append(earlier)
    held: dict[int, Record] = dict.fromkeys(pairs[:, 0].tolist(), Record(""))
    wanted = np.unique(pairs)

    # The first row of a large bucket is in many pairs.
    @functools.lru_cache(maxsize=1000)
    def held_question(row: int) -> Question:
        return Question.of(held[row])

    for row, record in zip(wanted.tolist(), rows.select(wanted), strict=True):
        if row in held:
            response = record.response if record.later else ""
            held[row] = replace(record, response=response, reasoning="", chosen="", rejected="")
        if row not in earlier_rows:
            continue
        question = Question.of(record)
        for earlier in earlier_rows[row]:
            reworded = facts.answers[earlier] == facts.answers[row] and facts.is_telling[row]
            if question.is_same(held_question(earlier), threshold, bool(reworded)):
                yield earlier, row
