"""Scores to preference pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medjob.config.prepare import Style
from medjob.data.styles import take_apart
from medjob.judge.calibration import correlation
from medjob.judge.rubric import Item
from medjob.judge.scoring import ModelJudge, Score

Pair = dict[str, Any]
"""id, question, prompt, chosen, rejected, chosen_score, rejected_score."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored answer. `usable`: it was not cut; `complies`: it has the wanted layout, so it may be the chosen one."""

    text: str
    score: float
    usable: bool
    complies: bool


def pair(
    candidates: Sequence[Candidate],
    min_margin: float,
    threshold: float | None,
    dropped: Counter[str],
) -> tuple[int, int] | None:
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


def confirmed_in_both_orders(
    judge: ModelJudge,
    prompts: Sequence[Mapping[str, Any]],
    pairs: Sequence[Pair],
    style: Style,
    dropped: Counter[str],
) -> list[Pair]:
    """Pairs that the judge orders the same way when it sees both answers, whichever is shown first."""
    references = {prompt["id"]: prompt["reference"] for prompt in prompts}
    shown = [
        (
            p["question"],
            references[p["id"]],
            take_apart(style, p["chosen"]).response,
            take_apart(style, p["rejected"]).response,
        )
        for p in pairs
    ]
    forwards = judge.prefers_first(shown)
    backwards = judge.prefers_first(
        [(question, reference, second, first) for question, reference, first, second in shown]
    )
    kept = [p for p, a, b in zip(pairs, forwards, backwards, strict=True) if a > 0.5 > b]
    dropped["orders disagree"] += len(pairs) - len(kept)
    return kept


def length_figures(
    pairs: Sequence[Pair], items: Sequence[Item], scores: Mapping[str, Score]
) -> dict[str, float | None]:
    """Whether the judge simply likes length: mean characters of both sides, and the correlation of score and length."""
    mean = {
        side: sum(len(p[side]) for p in pairs) / len(pairs) if pairs else None
        for side in ("chosen", "rejected")
    }
    return {
        "mean_chosen_characters": mean["chosen"],
        "mean_rejected_characters": mean["rejected"],
        "length_score_correlation": correlation(
            [len(i.answer) for i in items], [scores[i.id].value for i in items]
        ),
    }
