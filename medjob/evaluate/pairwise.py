"""Pairwise comparison: the judge sees two models' answers to a question, in both orders.

Judges prefer the answer in one place: a small one chose the first in 98-100 % of pairs. So an
answer wins only if it wins in both places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medjob.evaluate.metrics import EvaluatedAnswer
from medjob.evaluate.statistics import estimate
from medjob.judge.questions import Comparison
from medjob.judge.scoring import Comparer
from medjob.stage import RowExtras


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Two answers to one question."""

    id: str
    question: str
    reference: str
    answer: str
    other: str


def answer_pairs(
    answers: Mapping[str, Sequence[EvaluatedAnswer]], model: str, against: str
) -> list[AnswerPair]:
    """Pair the answers of two models to the same open question."""
    others = {answer.row["id"]: answer for answer in answers[against]}
    return [
        AnswerPair(
            id=answer.row["id"],
            question=answer.row["question"],
            reference=answer.row["reference"],
            answer=answer.parts.response,
            other=others[answer.row["id"]].parts.response,
        )
        for answer in answers[model]
        if answer.row["kind"] == "open" and answer.row["id"] in others
    ]


@dataclass(frozen=True, slots=True)
class Preference:
    """The probability that `answer` is better, by the judge."""

    as_first: float
    as_second: float

    @property
    def outcome(self) -> float:
        """1 if the answer wins in both places, 0 if it loses in both, else one half."""
        if math.isnan(self.as_first) or math.isnan(self.as_second):
            return math.nan
        wins = [self.as_first > 0.5, self.as_second > 0.5]
        return float(all(wins)) if wins[0] == wins[1] else 0.5


def compare_pairs(
    judge: Comparer, extras: RowExtras, kind: str, pairs: Sequence[AnswerPair]
) -> dict[str, Preference]:
    """Ask the judge about each pair in both orders, and return its preferences by the pair's id.
    Equal answers are not shown to it.

    Args:
        kind: Name of these comparisons among the finished rows.
    """
    shown = [pair for pair in pairs if pair.answer != pair.other]
    comparisons = []
    for pair in shown:
        texts = (pair.question, pair.reference)
        comparisons.append(Comparison(f"{pair.id}/first", *texts, pair.answer, pair.other))
        comparisons.append(Comparison(f"{pair.id}/second", *texts, pair.other, pair.answer))
    found = judge.prefers_first(extras, kind, comparisons)
    return {
        pair.id: Preference(found[f"{pair.id}/first"], 1 - found[f"{pair.id}/second"])
        for pair in shown
        if f"{pair.id}/first" in found and f"{pair.id}/second" in found
    }


def win_rate(
    pairs: Sequence[AnswerPair], asked: Mapping[str, Preference], samples: int, seed: int
) -> dict[str, Any]:
    """Return wins, losses and ties, the win rate with its interval and its test against one half,
    and how often the two orders disagree.

    A tie is half a win. It is a tie if the orders disagree, or if the answers are equal.
    """
    outcomes = [asked[pair.id].outcome if pair.id in asked else 0.5 for pair in pairs]
    made = estimate(outcomes, [0.5] * len(outcomes), samples, seed)
    shown = sum(pair.id in asked for pair in pairs)
    ties = outcomes.count(0.5)
    return {
        "rows": len(pairs),
        "wins": outcomes.count(1.0),
        "losses": outcomes.count(0.0),
        "ties": ties,
        "equal_answers": len(pairs) - shown,
        "order_disagreement": (ties - len(pairs) + shown) / shown if shown else None,
        "win_rate": asdict(made),
    }


def pairwise_table(section: Sequence[Mapping[str, Any]], first: str) -> list[dict[str, Any]]:
    """Return the win rates as rows of the comparison.

    Args:
        section: One `win_rate` per pair of models, each with `model` and `against`.
        first: The first model, whose row comes first.
    """
    table: dict[str, dict[str, Any]] = {}
    for each in sorted(section, key=lambda each: each["against"] != first):
        about = (
            f"answers that the judge prefers to {each['against']}'s in both orders; a tie is half "
            "a win; * differs from 50 %"
        )
        row = {
            "metric": f"pairwise win rate over {each['against']}",
            "about": about,
            "better": "higher",
            "percent": True,
            "models": {},
        }
        table.setdefault(each["against"], row)["models"][each["model"]] = each["win_rate"]
    return [*table.values()]


def pairwise_text(section: Sequence[Mapping[str, Any]]) -> str:
    """Say for a terminal how often the orders disagree, which shows whether the judge can
    compare."""
    lines = []
    for each in section:
        disagree = each["order_disagreement"]
        lines.append(
            f"pairwise, {each['model']} against {each['against']}: {each['wins']} wins, "
            f"{each['ties']} ties, {each['losses']} losses"
            + ("" if disagree is None else f"; the two orders disagree in {disagree:.0%}")
        )
    return "\n".join(lines)
