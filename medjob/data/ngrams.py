"""Hashes of word n-grams, for many texts at once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class NGrams:
    """The hashes of all n-grams of some texts, in order and with repeats."""

    hashes: Hashes
    offsets: npt.NDArray[np.int64]
    """Text i has `hashes[offsets[i] : offsets[i + 1]]`. Shape (texts + 1,)."""

    def select(self, chosen: npt.NDArray[np.bool_]) -> NGrams:
        """Keep the n-grams for which `chosen`, of the shape of `hashes`, is true."""
        before = np.concatenate(([0], np.cumsum(chosen)))
        return NGrams(self.hashes[chosen], before[self.offsets])

    @property
    def texts(self) -> npt.NDArray[np.int64]:
        """Position of each n-gram's text, of the shape of `hashes`."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


def ngrams(texts: Sequence[list[str]], n: int) -> NGrams:
    """Hash the n-grams of each text, given as its words. A text with fewer words has none.

    The hashes are the same in every process.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    ends = np.cumsum(lengths)
    words = np.fromiter(map(_word_hash, chain.from_iterable(texts)), np.uint64, int(lengths.sum()))
    counts = np.maximum(lengths - n + 1, 0)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    if len(words) < n:
        return NGrams(np.zeros(0, np.uint64), offsets)
    windows = np.zeros(len(words) - n + 1, np.uint64)
    for position in range(n):
        windows = windows * _FACTOR + words[position : position + len(windows)]
    # Leave out windows that span two texts.
    starts = np.arange(offsets[-1]) + np.repeat(ends - lengths - offsets[:-1], counts)
    hashes = windows[starts]
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _FACTOR
    return NGrams(hashes ^ (hashes >> np.uint64(29)), offsets)


@functools.lru_cache(maxsize=1 << 19)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
