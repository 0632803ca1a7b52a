"""Judges: a language model, and the word overlap with the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from medjob.config.prepare import PromptParams
from medjob.data.render import Conversation, Renderer
from medjob.data.text import words
from medjob.generate.protocol import Prompt
from medjob.generate.work import LazyEngine, ask_choices
from medjob.judge.rubric import (
    ASPECTS,
    BETTER_START,
    DIGITS,
    LETTERS,
    SCORE_START,
    Comparison,
    Item,
    better_question,
    score_question,
)
from medjob.stage import RowExtras


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

    def score(self, extras: RowExtras, kind: str, items: Sequence[Item]) -> dict[str, Score]:
        """Return the score of each item, by item id. In a shard, only those of its share.

        Args:
            extras: The stage's finished rows, in which scores are kept.
            kind: Name of these scores among the finished rows.
        """
        ...


class OverlapJudge:
    """Token F1 with the reference. It has no medical knowledge, and agrees with experts on 72-74 %
    of 1,310 pairs that they graded 4 and 1."""

    kind = "overlap"
    name = "overlap"

    def score(self, extras: RowExtras, kind: str, items: Sequence[Item]) -> dict[str, Score]:  # noqa: ARG002
        return {item.id: Score(token_f1(item.answer, item.reference), {}) for item in items}


class ModelJudge:
    """A language model's expected digit for each of three aspects, as in G-Eval.

    It uses expected values because the most likely digit ties in 59-100 % of pairs.
    """

    kind = "model"

    def __init__(self, engine: LazyEngine, renderer: Renderer | None, name: str) -> None:
        """Wrap an engine.

        Args:
            renderer: Renders the prompts for an engine in this process; None for an endpoint.
        """
        self.engine = engine
        self._renderer = renderer
        self.name = name

    def score(self, extras: RowExtras, kind: str, items: Sequence[Item]) -> dict[str, Score]:
        questions = {
            f"{item.id}/{aspect}": score_question(item, aspect)
            for item in items
            for aspect in ASPECTS
        }
        found = self._probabilities(extras, kind, questions, SCORE_START, DIGITS)
        digits = {name: expected_digit(probabilities) for name, probabilities in found.items()}
        scores = {}
        for item in items:
            names = {aspect: f"{item.id}/{aspect}" for aspect in ASPECTS}
            if all(name in digits for name in names.values()):
                aspects = {aspect: digits[name] for aspect, name in names.items()}
                scores[item.id] = Score(sum(aspects.values()) / len(aspects), aspects)
        return scores

    def prefers_first(
        self, extras: RowExtras, kind: str, comparisons: Sequence[Comparison]
    ) -> dict[str, float]:
        """Return the probability that the first answer is better, by the id of the comparison."""
        questions = {each.id: better_question(each) for each in comparisons}
        found = self._probabilities(extras, kind, questions, BETTER_START, LETTERS)
        return {name: first for name, (first, _) in found.items()}

    def _probabilities(
        self,
        extras: RowExtras,
        kind: str,
        questions: Mapping[str, str],
        start: str,
        choices: Sequence[str],
    ) -> dict[str, list[float]]:
        conversations = [Conversation(question) for question in questions.values()]
        ids: Sequence[Sequence[int]] = [()] * len(conversations)
        if self._renderer is not None:
            ids = self._renderer.prompt_ids(conversations)
        prompts = [Prompt(*each) for each in zip(questions, ids, conversations, strict=True)]
        return ask_choices(extras, self.engine, kind, prompts, start, choices)


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
