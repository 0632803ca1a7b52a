"""Find training rows that contain an evaluation row, by n-grams of question, options and answer.

The score is a share of the evaluation row's n-grams, because medical questions share long
boilerplate ("is brought to the physician because of ..."). A rule on single 64-character matches
flags 19 of 198 rows that are not copies.
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
class Match:
    """An evaluation row that a training row contains."""

    evaluation_row: int
    """Position of the evaluation row."""
    ratio: float
    """Share of its n-grams that the training row contains."""


class Detector:
    """Holds the n-grams of the evaluation rows, and searches for them in training rows."""

    def __init__(self, evaluation: list[Record], params: Contamination) -> None:
        self._params = params
        # A view is a text of an evaluation row: its row's position, and its number of n-grams.
        self._views: list[tuple[int, int]] = []
        self._views_of_gram: dict[int, list[int]] = defaultdict(list)
        for row, record in enumerate(evaluation):
            self._add_view(row, record.question)
            # A reworded question still gives itself away by its options and answer.
            text = full_text(record)
            if text != record.question:
                self._add_view(row, text)

    def find(self, record: Record) -> Match | None:
        """Return the evaluation row with the highest ratio, if it reaches the threshold."""
        shared_grams: Counter[int] = Counter()
        for gram in self._grams(words(full_text(record))):
            shared_grams.update(self._views_of_gram.get(gram, ()))
        best = max(
            ((count / self._views[view][1], view) for view, count in shared_grams.items()),
            default=None,
        )
        if best is None or best[0] < self._params.threshold:
            return None
        ratio, view = best
        return Match(self._views[view][0], ratio)

    def _add_view(self, row: int, text: str) -> None:
        grams = self._grams(words(text))
        for gram in grams:
            self._views_of_gram[gram].append(len(self._views))
        self._views.append((row, len(grams)))

    def _grams(self, text: list[str]) -> set[int]:
        """Hash all n-grams. A text shorter than n words has none and is never a copy, because many
        short questions are alike."""
        n = self._params.ngram
        return {hash(tuple(text[i : i + n])) for i in range(len(text) - n + 1)}


def full_text(record: Record) -> str:
    """Join all texts of a row."""
    texts = (
        record.question,
        *record.options.values(),
        record.reference,
        record.reasoning,
        record.response,
    )
    return " ".join(text for text in texts if text)


@dataclass(slots=True)
class ContaminationFilter:
    """Passes training rows that copy no evaluation row. It counts the others and keeps examples."""

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
        """Whether to train on `record`. With `action: report`, only rows whose question is also an
        evaluation question are left out."""
        match = self._detector.find(record)
        same_question = question_hash(record.identity) in self._questions
        if match is None and not same_question:
            return True
        self.rows += 1
        if match and len(self.examples) < _EXAMPLES:
            copied = self.evaluation[match.evaluation_row].question
            self.examples.append(
                {
                    "ratio": round(match.ratio, 3),
                    "training": record.question,
                    "evaluation": copied,
                }
            )
        return self.params.action == "report" and not same_question
