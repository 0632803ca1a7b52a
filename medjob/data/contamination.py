"""Training rows that hold an evaluation row: n-gram overlap over question, options and answer.

A ratio over the evaluation row's own n-grams, since medical questions share long boilerplate ("is brought to the
physician because of ..."): a rule on single 64-character matches flags 19 of 198 rows that are no copies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medjob.config.prepare import Contamination
from medjob.data.formats import Record
from medjob.data.text import question_hash, words

_EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class Hit:
    """A training row that holds `ratio` of an evaluation row's n-grams."""

    evaluation_row: int
    ratio: float


class Detector:
    """Holds the n-grams of the evaluation rows; looks for them in training rows, one at a time."""

    def __init__(self, evaluation: list[Record], params: Contamination) -> None:
        self._params = params
        self._owners: dict[int, list[int]] = defaultdict(list)
        self._views: list[tuple[int, int]] = []  # (evaluation row, number of its n-grams)
        for row, record in enumerate(evaluation):
            # The question on its own, and with options and answer: a reworded question still gives away its options.
            for view in dict.fromkeys((record.question, whole_text(record))):
                grams = self._grams(words(view))
                for gram in grams:
                    self._owners[gram].append(len(self._views))
                self._views.append((row, len(grams)))

    def find(self, record: Record) -> Hit | None:
        """The evaluation row that `record` holds most of, if it is enough."""
        matches: Counter[int] = Counter()
        for gram in self._grams(words(whole_text(record))):
            matches.update(self._owners.get(gram, ()))
        best = max(
            ((count / self._views[view][1], view) for view, count in matches.items()),
            default=(0.0, -1),
        )
        if best[0] < self._params.threshold:
            return None
        return Hit(self._views[best[1]][0], best[0])

    def _grams(self, text: list[str]) -> set[int]:
        """Hashes of all n-grams; a shorter text is never a copy on its own (too many short questions are alike)."""
        n = self._params.ngram
        return {hash(tuple(text[i : i + n])) for i in range(len(text) - n + 1)}


def whole_text(record: Record) -> str:
    """Everything a row says, in one text."""
    return " ".join(
        filter(
            None,
            (
                record.question,
                *record.options.values(),
                record.reference,
                record.reasoning,
                record.response,
            ),
        )
    )


@dataclass(slots=True)
class Screen:
    """Lets training rows through, and keeps count and examples of those that copy an evaluation row."""

    evaluation: Sequence[Record]
    params: Contamination
    rows: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    _detector: Detector = field(init=False)
    _questions: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._detector = Detector(list(self.evaluation), self.params)
        self._questions = {question_hash(record.identity) for record in self.evaluation}

    def passes(self, record: Record) -> bool:
        """Whether `record` may be trained on. A question that is evaluated on never may, whatever `action` says."""
        hit = self._detector.find(record)
        same = question_hash(record.identity) in self._questions
        if hit is None and not same:
            return True
        self.rows += 1
        if hit and len(self.examples) < _EXAMPLES:
            copied = self.evaluation[hit.evaluation_row].question
            self.examples.append(
                {"ratio": round(hit.ratio, 3), "training": record.question, "evaluation": copied}
            )
        return self.params.action == "report" and not same
