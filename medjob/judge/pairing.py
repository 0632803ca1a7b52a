"""Build preference pairs from scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medjob.config.prepare import Style
from medjob.data.styles import take_apart
from medjob.judge.questions import Comparison, Item
from medjob.judge.scoring import Comparer, Score
from medjob.judge.statistics import correlation
from medjob.stage import RowExtras

Pair = dict[str, Any]
"""Keys: id, question, prompt, chosen, rejected, chosen_score, rejected_score."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored answer."""

    text: str
    score: float
    usable: bool
    """Whether it is complete. Truncated answers are in no pair."""
    complies: bool
    """Whether it has the wanted layout, so that it may be the chosen answer."""


def choose_pair(
    candidates: Sequence[Candidate],
    min_margin: float,
    threshold: float | None,
    dropped: Counter[str],
) -> tuple[int, int] | None:
    """Return the indices of the chosen and the rejected answer, or None.

    The chosen answer is the best one that complies, and the rejected one is the worst. Equal scores
    resolve to the lower index, so that a rerun picks the same pair.

    Args:
        threshold: If set, the chosen answer must reach it and the rejected one must not.
        dropped: Counts the reasons for None.
    """
    is_scored = all(math.isfinite(candidate.score) for candidate in candidates)
    usable = [i for i, candidate in enumerate(candidates) if candidate.usable]
    if len(usable) < 2 or not is_scored:
        dropped["truncated" if is_scored else "no score"] += 1
        return None
    complying = [i for i in usable if candidates[i].complies]
    if not complying:
        dropped["wrong layout"] += 1
        return None
    best = max(complying, key=lambda i: (candidates[i].score, -i))
    worst = min((i for i in usable if i != best), key=lambda i: (candidates[i].score, i))
    chosen = candidates[best]
    rejected = candidates[worst]
    if chosen.text == rejected.text:
        dropped["same text"] += 1
        return None
    if chosen.score - rejected.score < max(min_margin, 1e-9):
        dropped["tie"] += 1
        return None
    if threshold is not None and not rejected.score < threshold <= chosen.score:
        dropped["same side of the threshold"] += 1
        return None
    return best, worst


def confirmed_in_both_orders(
    judge: Comparer,
    extras: RowExtras,
    prompts: Sequence[Mapping[str, Any]],
    pairs: Sequence[Pair],
    style: Style,
    dropped: Counter[str],
) -> list[Pair]:
    """Keep the pairs whose chosen answer wins in both orders when the judge sees both answers."""
    references = {prompt["id"]: prompt["reference"] for prompt in prompts}
    compared = [
        Comparison(
            id=made["id"],
            question=made["question"],
            reference=references[made["id"]],
            first=take_apart(style, made["chosen"]).response,
            second=take_apart(style, made["rejected"]).response,
        )
        for made in pairs
    ]
    both = [order for each in compared for order in (each, each.swapped())]
    found = judge.prefers_first(extras, "pairs", both)
    kept = [
        made
        for made, pair in zip(pairs, compared, strict=True)
        if found.get(pair.id, 0) > 0.5 > found.get(pair.swapped().id, 1)
    ]
    dropped["orders disagree"] += len(pairs) - len(kept)
    return kept


def length_figures(
    pairs: Sequence[Pair], items: Sequence[Item], scores: Mapping[str, Score]
) -> dict[str, float | None]:
    """Return figures that reveal a preference for length: the mean characters of both sides, and
    the correlation of score and length."""
    lengths = [len(item.answer) for item in items]
    values = [scores[item.id].value for item in items]
    return {
        "mean_chosen_characters": _mean_characters(pairs, "chosen"),
        "mean_rejected_characters": _mean_characters(pairs, "rejected"),
        "length_score_correlation": correlation(lengths, values),
    }


def _mean_characters(pairs: Sequence[Pair], side: str) -> float | None:
    if not pairs:
        return None
    return sum(len(made[side]) for made in pairs) / len(pairs)
