"""Find training rows that contain an evaluation row, by n-grams of question, options and answer.

An evaluation row has two views: its question, and all of its texts. A training row is a copy of it
if it contains enough of a view's n-grams (`threshold`), and these are evidence:

- N-grams that more than ten training rows or ten evaluation rows share do not count. They are
  boilerplate ("is brought to the physician because of ..."), an instruction or a common stem.
  A question of 15 words or more that is found word for word is a copy all the same.
- The words of the question, and of the options for the second view, have to be in the training row
  too, rare words above all. So an answer text that was written about another disease is no copy.
- Its numbers and signs have to be in the training row, unless the options are. "Type 1" is not
  "type 2", nor is "hepatitis B" "hepatitis C".
- If both rows have a passage or earlier turns, these have to match too.
- If the sentence or line that asks the question is not in the training row, the n-grams must be in
  no other training row, and the question must be a single line. So other questions about a
  passage that several rows share are no copies, but a case history with a reworded question is.

If too few n-grams are left, only the same question is a copy, and so it is for questions that are
shorter than an n-gram. Copies in other words or in another language are not found.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from medjob.config.prepare import Contamination
from medjob.data.compare import EXACT_WORD, asking_sentence
from medjob.data.formats import Record
from medjob.data.ngrams import Hashes, ngrams
from medjob.data.text import question_hash, words

_EXAMPLES = 10
_BATCH = 1000
# N-grams that more rows share are no evidence.
_COMMON = 10
# A view with fewer n-grams that are evidence is not searched for, if others were left out.
_FEWEST = 3
# Single letters that name a type. "Don't" and "patient's" end in the others, and "a" is an article.
_LETTERS = frozenset("bcdefghijklmnopqruvwxyz")
# Words from which a question that is found word for word is always a copy.
_VERBATIM = 15
# Share of a question's last sentence from which a training row asks the same.
_ASKING = 0.5


@dataclass(frozen=True, slots=True)
class Match:
    """An evaluation row that a training row contains."""

    evaluation_row: int
    """Position of the evaluation row."""
    ratio: float
    """Share of the n-grams that count as evidence, of those that the training row contains."""


@dataclass(frozen=True, slots=True)
class _View:
    """A text of an evaluation row, and what has to be in a copy of it."""

    row: int
    text: list[str]
    subject: frozenset[str]
    """Words of the question, or of the question and its options."""
    exact: frozenset[str]
    """Numbers, signs and single letters that have to be in a copy."""
    context: frozenset[str]
    """Words of the passage and of the earlier turns."""
    asking: tuple[list[str], ...]
    """The sentence that asks the question, and the last line."""
    is_one_line: bool


def _views(row: int, record: Record) -> Iterator[_View]:
    question = words(record.question)
    lines = [line for line in map(words, record.question.splitlines()) if line]
    subject = frozenset(question)
    exact = frozenset(filter(EXACT_WORD.search, question)) | (subject & _LETTERS)
    asking = (asking_sentence(record.question), lines[-1] if lines else [])
    context = _context(record)
    yield _View(row, question, subject, exact, context, asking, len(lines) < 2)
    text = full_text(record)
    # A reworded question still gives itself away by its options and answer.
    if text != record.question:
        exact = frozenset() if record.options else exact
        subject = subject.union(*map(words, record.options.values()))
        yield _View(row, words(text), subject, exact, context, asking, len(lines) < 2)


def _context(record: Record) -> frozenset[str]:
    return frozenset(words("\n".join((*record.earlier_turns, record.context))))


class Detector:
    """Holds the n-grams of the evaluation rows, and searches for them in training rows."""

    def __init__(
        self,
        evaluation: Sequence[Record],
        params: Contamination,
        training: Iterable[Record] = (),
    ) -> None:
        """Index the evaluation rows.

        Args:
            training: All training rows, to find out which n-grams many of them share. Read once.
        """
        self._params = params
        self._views = [v for row, record in enumerate(evaluation) for v in _views(row, record)]
        grams = ngrams([view.text for view in self._views], params.ngram)
        # One entry for each n-gram of each view, sorted by n-gram.
        hashes, self._views_of_gram = _unique_pairs(grams.hashes, grams.texts)
        self._grams, starts = np.unique(hashes, return_index=True)
        self._offsets = np.append(starts, len(hashes))
        by_row: dict[int, set[str]] = defaultdict(set)
        for view in self._views:
            by_row[view.row] |= view.subject | view.context
        self._word_rows = Counter(word for subject in by_row.values() for word in subject)
        self._training_rows = np.zeros(len(self._grams), np.int64)
        self._rows = len(evaluation) + self._count(training)
        self._choose_evidence()

    def _count(self, training: Iterable[Record]) -> int:
        """Count the training rows that have each n-gram and each word of the evaluation rows."""
        rows = 0
        iterator = iter(training)
        while batch := [words(_trained_text(record)) for record in islice(iterator, _BATCH)]:
            grams = ngrams(batch, self._params.ngram)
            found, known = self._find(grams.hashes)
            distinct, _ = _unique_pairs(found, grams.texts[known])
            self._training_rows += np.bincount(distinct, minlength=len(self._grams))
            for text in batch:
                self._word_rows.update(self._word_rows.keys() & set(text))
            rows += len(batch)
        return rows

    def _find(self, hashes: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return the index of each hash that is an n-gram of the evaluation rows, and which are."""
        if not len(self._grams):
            return np.zeros(0, np.int64), np.zeros(len(hashes), bool)
        index = np.minimum(np.searchsorted(self._grams, hashes), len(self._grams) - 1)
        known = self._grams[index] == hashes
        return index[known], known

    def _choose_evidence(self) -> None:
        """Choose the n-grams that few rows share, and count them in each view."""
        gram_of_entry = np.repeat(np.arange(len(self._grams)), np.diff(self._offsets))
        row_of_view = np.array([view.row for view in self._views], np.int64)
        distinct, _ = _unique_pairs(gram_of_entry, row_of_view[self._views_of_gram])
        rows = np.bincount(distinct, minlength=len(self._grams))
        is_rare = rows <= _COMMON
        self._is_evidence = is_rare & (self._training_rows <= _COMMON)
        evidence = self._is_evidence[gram_of_entry]
        total = np.bincount(self._views_of_gram, minlength=len(self._views))
        self._sizes = np.bincount(self._views_of_gram[evidence], minlength=len(self._views))
        self._sizes[self._sizes < np.minimum(total, _FEWEST)] = 0
        self._anchors = self._anchor(gram_of_entry, is_rare)

    def _anchor(
        self, gram_of_entry: npt.NDArray[np.int64], is_rare: npt.NDArray[np.bool_]
    ) -> dict[int, list[int]]:
        """Choose one n-gram of each long question, by which to find it word for word: the one that
        the fewest training rows have."""
        anchors: dict[int, list[int]] = defaultdict(list)
        by_view = np.argsort(self._views_of_gram, kind="stable")
        ends = np.cumsum(np.bincount(self._views_of_gram, minlength=len(self._views)))
        for number, grams in enumerate(np.split(gram_of_entry[by_view], ends[:-1])):
            rare = grams[is_rare[grams]]
            if len(rare) and len(self._views[number].text) >= _VERBATIM:
                anchors[int(rare[self._training_rows[rare].argmin()])].append(number)
        return anchors

    def find(self, record: Record) -> Match | None:
        """Return the evaluation row with the highest ratio, if the training row is a copy of it."""
        text = words(_trained_text(record))
        found, _ = self._find(np.unique(ngrams([text], self._params.ngram).hashes))
        if not len(found):
            return None
        row = _TrainingRow(text, record)
        matches = [
            Match(self._views[number].row, ratio)
            for number, ratio, is_unique in self._candidates(found)
            if self._is_about(self._views[number], row)
            and self._has_context(self._views[number], row)
            and (row.asks(self._views[number]) or (is_unique and self._views[number].is_one_line))
        ]
        anchored = (number for gram in found.tolist() for number in self._anchors.get(gram, ()))
        matches += [
            Match(self._views[number].row, 1.0)
            for number in anchored
            if row.contains(self._views[number].text)
            and self._has_context(self._views[number], row)
        ]
        return max(matches, key=lambda match: match.ratio, default=None)

    def _candidates(self, found: npt.NDArray[np.int64]) -> Iterator[tuple[int, float, bool]]:
        """Yield each view of which enough n-grams were found: its number, the share, and whether
        enough of them are in no other training row."""
        evidence = found[self._is_evidence[found]]
        views = [self._views_of_gram[self._offsets[g] : self._offsets[g + 1]] for g in evidence]
        if not views:
            return
        numbers, inverse = np.unique(np.concatenate(views), return_inverse=True)
        is_unique = np.repeat(self._training_rows[evidence] <= 1, [len(view) for view in views])
        shared = np.bincount(inverse)
        unique = np.bincount(inverse, weights=is_unique)
        for number, count, unique_count in zip(numbers, shared, unique, strict=True):
            needed = self._params.threshold * self._sizes[number]
            if needed and count >= needed:
                ratio = float(count / self._sizes[number])
                yield int(number), ratio, bool(unique_count >= needed)

    def _is_about(self, view: _View, row: _TrainingRow) -> bool:
        """Whether the training row has the words, numbers and signs of the view's question.

        The answer to another question can mention them, so they have to be in the row's question if
        that has the words.
        """
        if not self._has_words(view.subject, row.words):
            return False
        asked = row.asked if self._has_words(view.subject, row.asked) else row.words
        return len(view.exact & asked) >= self._params.threshold * len(view.exact)

    def _has_context(self, view: _View, row: _TrainingRow) -> bool:
        """Whether the training row has the same passage, if it has one."""
        context = row.context
        return not context or self._has_words(view.context, context)

    def _has_words(self, wanted: frozenset[str], present: frozenset[str]) -> bool:
        """Whether enough of the wanted words are present. Words that few rows have weigh most."""
        weights = {word: math.log((self._rows + 0.1) / self._word_rows[word]) for word in wanted}
        found = sum(weights[word] for word in wanted & present)
        return found >= self._params.threshold * sum(weights.values())


_First = TypeVar("_First", np.uint64, np.int64)


def _unique_pairs(
    first: npt.NDArray[_First], second: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[_First], npt.NDArray[np.int64]]:
    """Sort the pairs (first[i], second[i]) and drop repeats."""
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return first[is_new], second[is_new]


class _TrainingRow:
    """The words of a training row."""

    def __init__(self, text: list[str], record: Record) -> None:
        self.words = frozenset(text)
        self._record = record
        self._text = f" {' '.join(text)} "

    @property
    def asked(self) -> frozenset[str]:
        """The words of its question."""
        return frozenset(words(self._record.identity))

    @property
    def context(self) -> frozenset[str]:
        """The words of its passage and of the earlier turns."""
        return _context(self._record)

    def contains(self, text: list[str]) -> bool:
        """Whether `text` is in the row, word for word."""
        return f" {' '.join(text)} " in self._text

    def asks(self, view: _View) -> bool:
        """Whether the row has most of the sentence, and of the line, that ask the question."""
        return all(self._share(text) >= _ASKING for text in view.asking)

    def _share(self, text: list[str]) -> float:
        """Return the share of the word trigrams of `text` that the row has."""
        n = min(3, len(text))
        found = [self.contains(text[i : i + n]) for i in range(len(text) - n + 1)]
        return sum(found) / len(found)


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


def _trained_text(record: Record) -> str:
    """Join all texts of a training row, with those of the other trained exchanges."""
    others = (text for exchange in record.other_trained for text in exchange[:3] if text)
    return " ".join((full_text(record), *others))


@dataclass(slots=True)
class ContaminationFilter:
    """Passes training rows that copy no evaluation row. It counts the others and keeps examples."""

    evaluation: Sequence[Record]
    params: Contamination
    training: Iterable[Record] = ()
    """All training rows, to find out which n-grams many of them share. Read once."""
    rows: int = 0
    """Copies that were found."""
    removed: int = 0
    """Copies that do not pass."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    _detector: Detector = field(init=False)
    _questions: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._detector = Detector(self.evaluation, self.params, self.training)
        self._questions = {key for record in self.evaluation for key in _question_hashes(record)}

    def passes(self, record: Record) -> bool:
        """Whether to train on `record`. With `action: report`, only rows whose question is also an
        evaluation question are left out."""
        match = self._detector.find(record)
        asked = [question_hash(exchange.question) for exchange in record.other_trained]
        same_question = any(key in self._questions for key in _question_hashes(record) + asked)
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
        passes = self.params.action == "report" and not same_question
        self.removed += not passes
        return passes


def _question_hashes(record: Record) -> list[int]:
    """Hash the whole question, and also without its system message if there is only that."""
    hashes = [question_hash(record.prompt_identity)]
    if record.system and not (record.options or record.context or record.history):
        hashes.append(question_hash(record.question))
    return hashes
