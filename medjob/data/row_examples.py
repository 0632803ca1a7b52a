"""What the training rows look like: examples, openings of answers and scripts, for the report."""

from __future__ import annotations

import functools
import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medjob.data.formats import Record
from medjob.data.labels import Span, answers_in, spans, trained_tokens, with_labels

Row = dict[str, Any]
_PER_SOURCE = 3
_SOURCES = 20
_EXTREMES = 3
_OPENINGS = 15
_OPENING_LENGTH = 60  # characters
_HELD_OPENINGS = 50_000
_LONGEST = 6000  # characters of one text; the middle of longer ones is left out
_CHARACTER = "\u3040-\u30ff\u3400-\u9fff"  # Chinese and Japanese, which have no spaces
_OPENING = re.compile(rf"\s*(?:(?:[{_CHARACTER}]|[^\s{_CHARACTER}]+)\s*){{1,4}}")


@dataclass(slots=True)
class RowExamples:
    """Collects from batches of training rows what a reader should see. Memory does not grow with
    the number of rows."""

    _first: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    _longest: list[Row] = field(default_factory=list)
    _shortest: list[Row] = field(default_factory=list)
    _openings: Counter[str] = field(default_factory=Counter)
    _scripts: Counter[str] = field(default_factory=Counter)

    def add(self, batch: Sequence[tuple[Record, str]], rows: Sequence[Row]) -> None:
        """Add records, and the rows of TRAIN_SCHEMA that were built from them."""
        for row in rows:
            if row["source"] in self._first or len(self._first) < _SOURCES:
                first = self._first[row["source"]]
                first.extend([row] if len(first) < _PER_SOURCE else ())
        # Both keep the earlier of equally long rows.
        self._longest = heapq.nlargest(_EXTREMES, [*self._longest, *rows], key=_length)
        self._shortest = heapq.nsmallest(_EXTREMES, [*self._shortest, *rows], key=_length)
        self._openings.update(opening(record.response) for record, _ in batch)
        if len(self._openings) > _HELD_OPENINGS:  # the commonest ones have occurred again by now
            self._openings = Counter({text: n for text, n in self._openings.items() if n > 1})
        self._scripts.update(script(f"{record.question} {record.response}") for record, _ in batch)

    def openings(self) -> dict[str, int]:
        """Return the first words that several answers share, with the number of answers."""
        return {text: n for text, n in self._openings.most_common(_OPENINGS) if n > 1}

    def scripts(self) -> dict[str, int]:
        """Return the number of rows by their main script, the commonest first."""
        return dict(self._scripts.most_common())

    def shown(self, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
        """Return groups of rows, each with a title, in which the trained tokens are marked."""
        groups = {f"First rows of {source}": rows for source, rows in self._first.items()}
        groups |= {"Longest rows": self._longest, "Shortest rows": self._shortest}
        return [
            {"title": title, "rows": [_shown(tokenizer, row, max_length) for row in rows]}
            for title, rows in groups.items()
        ]


def _length(row: Row) -> int:
    return len(row["input_ids"])


def _shown(tokenizer: Any, row: Row, max_length: int) -> dict[str, Any]:
    ids = row["input_ids"]
    labels = with_labels(row, len(ids))["labels"]
    trained = trained_tokens(row)
    return {
        "source": row["source"],
        "context_tokens": len(ids) - trained,
        "answers": len(answers_in(row)),
        "answer_tokens": trained,
        "is_overlong": len(ids) > max_length,
        "spans": [Span(shortened(s.text), s.trained) for s in spans(tokenizer, ids, labels)],
    }


def shortened(text: str) -> str:
    """Leave out the middle of a very long text."""
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def opening(answer: str) -> str:
    """Return the first four words of an answer, or characters of Chinese and Japanese."""
    found = _OPENING.match(answer[: 4 * _OPENING_LENGTH])
    return " ".join(found[0].split())[:_OPENING_LENGTH] if found else ""


def script(text: str) -> str:
    """Return the script that most letters of a text have, such as Latin."""
    if text.isascii():
        return "Latin"
    counts: Counter[str] = Counter()
    for char, number in Counter(text).items():
        if char.isalpha():
            counts[_script_of(char)] += number
    return max(sorted(counts), key=lambda name: counts[name], default="none")


@functools.lru_cache(maxsize=1 << 16)
def _script_of(letter: str) -> str:
    """Python has no table of scripts, but the names of letters begin with that of their script."""
    name = unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "other")
    first = name.split()[0]
    return "Han" if first == "CJK" else first.capitalize()
