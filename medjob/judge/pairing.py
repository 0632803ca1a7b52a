"""Scores to preference pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored answer. `usable`: it was not cut; `complies`: it has the wanted layout, so it may be the chosen one."""

    text: str
    score: float
    usable: bool
    complies: bool


def pair(candidates: Sequence[Candidate], min_margin: float, threshold: float | None, dropped: Counter[str]) -> tuple[int, int] | None:
    """Indices of the chosen and the rejected answer, or None; `dropped` counts why not.

    The best complying answer against the worst one; equal scores resolve to the lower index, so that a rerun picks the
    same pair. With `threshold`, only an answer at or above it against one below it.
    """
    usable = [i for i, candidate in enumerate(candidates) if candidate.usable]
    if len(usable) < 2:
        dropped["truncated"] += 1
        return None
    complying = [i for i in usable if candidates[i].complies]
    if not complying:
        dropped["wrong layout"] += 1
        return None
    best = max(complying, key=lambda i: (candidates[i].score, -i))
    worst = min((i for i in usable if i != best), key=lambda i: (candidates[i].score, i))
    if candidates[best].text == candidates[worst].text:
        dropped["same text"] += 1
        return None
    if candidates[best].score - candidates[worst].score < max(min_margin, 1e-9):
        dropped["tie"] += 1
        return None
    if threshold is not None and not candidates[worst].score < threshold <= candidates[best].score:
        dropped["not correct against wrong"] += 1
        return None
    return best, worst
