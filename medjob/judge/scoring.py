"""Judges: a language model, and the word overlap with the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from medjob.config.prepare import PromptParams
from medjob.data.render import Conversation, Renderer
from medjob.data.text import words
from medjob.generate.engine import TransformersEngine
from medjob.judge.rubric import (
    ASPECTS,
    BETTER_START,
    DIGITS,
    LETTERS,
    SCORE_START,
    Item,
    better_question,
    score_question,
)


@dataclass(frozen=True, slots=True)
class Score:
    """The score of an answer."""

    value: float
    """In [0, 1]. Higher is better."""
    aspects: dict[str, float]
    """The scores that `value` is the mean of. Empty for the overlap."""


class Judge(Protocol):
    """Scores answers against a reference."""

    kind: str
    """As in `run.judge.kind`."""
    name: str
    """For reports."""

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Return one score per item, in order. The same item always gets the same score."""
        ...


class OverlapJudge:
    """Token F1 with the reference. It has no medical knowledge, and agrees with experts on 72-74 %
    of 1,310 pairs that they graded 4 and 1."""

    kind = "overlap"
    name = "overlap"

    def score(self, items: Sequence[Item]) -> list[Score]:
        return [Score(token_f1(item.answer, item.reference), {}) for item in items]


class ModelJudge:
    """A language model's expected digit for each of three aspects, as in G-Eval.

    It uses expected values because the most likely digit ties in 59-100 % of pairs.
    """

    kind = "model"

    def __init__(self, engine: TransformersEngine, renderer: Renderer, name: str) -> None:
        self._engine = engine
        self._renderer = renderer
        self.name = name

    def score(self, items: Sequence[Item]) -> list[Score]:
        questions = [score_question(item, aspect) for item in items for aspect in ASPECTS]
        values = map(expected_digit, self._probabilities(questions, SCORE_START, DIGITS))
        scores = []
        for _ in items:
            aspects = {aspect: next(values) for aspect in ASPECTS}
            scores.append(Score(sum(aspects.values()) / len(aspects), aspects))
        return scores

    def prefers_first(self, pairs: Sequence[tuple[str, str, str, str]]) -> list[float]:
        """Return, for each (question, reference, first, second), the probability that the first
        answer is better."""
        questions = [better_question(*pair) for pair in pairs]
        return [first for first, _ in self._probabilities(questions, BETTER_START, LETTERS)]

    def _probabilities(
        self, questions: Sequence[str], start: str, choices: Sequence[str]
    ) -> list[list[float]]:
        prompts = self._renderer.prompt_ids([Conversation(question) for question in questions])
        return self._engine.choice_probabilities(prompts, start, choices)


def plain_renderer(tokenizer: object, key: str) -> Renderer:
    """Return a renderer for a judge's prompts, with its chat template if it has one.

    Args:
        key: The run file's key of the judge, for messages.
    """
    template = None if getattr(tokenizer, "chat_template", None) else "{question}\n\n"
    params = PromptParams(style="plain", template=template)
    return Renderer(tokenizer, params, key)


def expected_digit(probabilities: Sequence[float]) -> float:
    """Return the expected value of digits 1..n, scaled to [0, 1]."""
    expected = sum(i * probability for i, probability in enumerate(probabilities))
    return expected / (len(probabilities) - 1)


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words, with repeats, as in SQuAD."""
    answer_words = Counter(words(answer))
    reference_words = Counter(words(reference))
    common = (answer_words & reference_words).total()
    if not common:
        return 0.0
    return 2 * common / (answer_words.total() + reference_words.total())
