"""Decide whether two rows ask the same question.

Rows often share most of their text: an instruction, a reading passage, a case history. The few
words that differ decide. So two rows ask the same question only if all of these hold:

1. Their numbers and signs are the same, in the same order. "Rh+" is not "Rh-", nor "8 mg" "5 mg".
2. Each part (system message, earlier turns, passage, question) is the same on its own, and so are
   its lines, and the sentence that asks the question. The options are the same, in any order.
3. Correct options or reference answers, if there are any, are the same.

Two texts are the same if they differ in no more than

- typos: a letter is missing, added, or swapped with the next one, after the first letter of a word
  of five letters or more. "Afferent" and "efferent" are different words.
- a few words added at the start or end, such as a greeting, if the n-gram similarity is high
- other words, if the n-gram similarity is high and both rows have the same answer. A row with
  another drug and another answer is another question. An answer says nothing if it is a single
  word, or if many rows have it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from itertools import chain

from medjob.data.formats import Record
from medjob.data.text import hash_text, words

SHINGLE = 5
"""Words per n-gram ("shingle") of the similarity."""
_SENTENCE_END = re.compile(r"(?<=[!?。！？؟।])|(?<=\.)(?!\d)|\n")
_QUESTION_MARK = re.compile("[?？؟]")
EXACT_WORD = re.compile(r"\S*\d\S*|(?<!\S)[^\w\s]")
_GREETING = 10
_SHORT = 3
_LONGEST_DIFF = 2000  # words; difflib takes quadratic time


@dataclass(frozen=True)
class Question:
    """The parts of a row that decide whether it asks the same question as another."""

    text: str
    parts: list[list[list[str]]]
    """Words of each line of the system message, the earlier turns, the passage, the question and
    the later turns."""
    options: list[list[str]]
    """Words of the options, sorted."""

    @classmethod
    def of(cls, record: Record) -> Question:
        """Split the parts of `record` into words."""
        before = (record.system, *record.earlier_turns, record.context)
        texts = (*before, record.question, *record.later_turns)
        options = sorted(map(words, record.options.values()))
        parts = [[words(line) for line in text.splitlines()] for text in texts]
        lines = [[line for line in part if line] for part in parts]
        return cls(record.question, lines, options)

    @cached_property
    def asking(self) -> list[str]:
        """Words of the sentence that asks the question."""
        return asking_sentence(self.text)

    @property
    def words(self) -> list[str]:
        """All words, with the options in sorted order."""
        return list(chain(*chain(*self.parts), *self.options))

    @property
    def exact_words(self) -> str:
        """The numbers and signs, in order."""
        return " ".join(EXACT_WORD.findall(" ".join(self.words)))

    def is_same(self, other: Question, threshold: float, reworded: bool) -> bool:
        """Apply rule 2 of the module's docstring.

        Args:
            threshold: Jaccard similarity of n-grams from which the similarity is high.
            reworded: Whether words other than typos and greetings may differ, because the rows have
                the same answer.
        """
        if self.options != other.options or len(self.parts) != len(other.parts):
            return False
        pairs = [(self.asking, other.asking)]
        for part, other_part in zip(self.parts, other.parts, strict=True):
            if len(part) == len(other_part):
                pairs += zip(part, other_part, strict=True)
            else:
                pairs.append((list(chain(*part)), list(chain(*other_part))))
        return all(_is_same(first, second, threshold, reworded) for first, second in pairs)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a row's answer says about whether it asks the same question as another."""

    hash: int
    """Hash of the correct option, the reference or the response, ignoring case and spacing."""
    is_checked: bool
    """Whether it is a correct option or a reference, so that another one answers another
    question."""
    has_words: bool
    """Whether it has more than one word."""

    @classmethod
    def of(cls, record: Record) -> Answer:
        """Take the answer of `record`."""
        checked = record.options.get(record.answer_idx) or record.reference
        text = checked or record.final_answer or record.chosen
        normal = " ".join(text.casefold().split())
        return cls(hash_text(normal), bool(checked), len(words(text[:100])) > 1)


def asking_sentence(question: str) -> list[str]:
    """Return the words of the last sentence with a question mark, or of the last sentence."""
    sentences = _SENTENCE_END.split(question)[::-1]
    asking = (sentence for sentence in sentences if _QUESTION_MARK.search(sentence))
    return next(filter(None, map(words, chain(asking, sentences))), [])


def _is_same(first: list[str], second: list[str], threshold: float, reworded: bool) -> bool:
    if first == second:
        return True
    if min(len(first), len(second)) > _SHORT and _word_overlap(first, second) < 0.5:
        return False  # saves time
    changes = _changes(first, second)
    if all(_is_typo(old, new) for old, new, _ in changes):
        return True
    minor = all(
        _is_typo(old, new) or (edge and _is_greeting(old, new)) for old, new, edge in changes
    )
    return (minor or reworded) and _jaccard(first, second) >= threshold


def _word_overlap(first: list[str], second: list[str]) -> float:
    sets = set(first), set(second)
    return len(sets[0] & sets[1]) / max(map(len, sets))


def _changes(first: list[str], second: list[str]) -> list[tuple[list[str], list[str], bool]]:
    """Return the words that were replaced, their replacement, and whether they are at the start or
    the end of the text."""
    limit = min(len(first), len(second))
    start = next((i for i in range(limit) if first[i] != second[i]), limit)
    limit -= start
    end = next((i for i in range(limit) if first[-1 - i] != second[-1 - i]), limit)
    old, new = first[start : len(first) - end], second[start : len(second) - end]
    if max(len(old), len(new)) > _LONGEST_DIFF:
        return [(old, new, False)]
    return [
        (
            old[i1:i2],
            new[j1:j2],
            (start == 0 and i1 == 0) or (end == 0 and i2 == len(old)),
        )
        for tag, i1, i2, j1, j2 in SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if tag != "equal"
    ]


def _jaccard(first: list[str], second: list[str]) -> float:
    shingles = [
        {tuple(text[i : i + SHINGLE]) for i in range(max(1, len(text) - SHINGLE + 1))}
        for text in (first, second)
    ]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


def _is_greeting(old: list[str], new: list[str]) -> bool:
    """Whether only words were added, or only removed, and few."""
    return min(len(old), len(new)) == 0 and max(len(old), len(new)) <= _GREETING


def _is_typo(old: list[str], new: list[str]) -> bool:
    return len(old) == len(new) and all(map(_is_misspelt, old, new))


def _is_misspelt(first: str, second: str) -> bool:
    """Whether one letter was added, left out or swapped with the next, after the first letter."""
    short, long = sorted((first, second), key=len)
    if first == second:
        return True
    if len(short) < 5 or first[0] != second[0] or not first.isalpha() or not second.isalpha():
        return False
    if len(long) == len(short) + 1:
        return any(long[:i] + long[i + 1 :] == short for i in range(1, len(long)))
    return len(long) == len(short) and any(
        long[:i] + long[i + 1] + long[i] + long[i + 2 :] == short for i in range(1, len(long) - 1)
    )
