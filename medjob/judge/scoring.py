"""Judges: language models, and the word overlap with the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from medjob.config.prepare import PromptParams
from medjob.data.criteria import Criterion, RubricScore, score_criteria
from medjob.data.render import Conversation, Renderer
from medjob.data.text import words
from medjob.generate.protocol import Prompt
from medjob.generate.work import LazyEngine, ask_choices
from medjob.judge.questions import BETTER, CRITERION, SCORE, Comparison, Form, Item, Prompts
from medjob.stage import RowExtras


@dataclass(frozen=True, slots=True)
class Score:
    """The score of an answer."""

    value: float
    """In [0, 1]. Higher is better."""
    aspects: Mapping[str, float] = field(default_factory=dict)
    """The scores that `value` is the weighted mean of. Empty with criteria, and for the overlap."""
    met: tuple[float, ...] = ()
    """For each criterion, the probability that the answer meets it."""
    rubric: RubricScore | None = None
    """What follows from `met`. `value` is then its expected score."""
    judges: Mapping[str, float] = field(default_factory=dict)
    """The value of each of several judges, by its name."""

    def figures(self) -> dict[str, float]:
        """Return all figures by name, for the metrics of an evaluation."""
        figures = {"score": self.value, **self.aspects}
        if self.rubric:
            figures["rubric"] = self.rubric.score
            if self.rubric.critical is not None:
                figures["critical"] = self.rubric.critical
        return figures


class Judge(Protocol):
    """Scores answers against a reference or criteria."""

    kind: str
    """As in `run.judge.kind`."""
    name: str
    """For reports."""

    def score(self, extras: RowExtras, kind: str, items: Sequence[Item]) -> dict[str, Score]:
        """Return the score of each item, by its id. In a shard, only those of its share.

        Args:
            extras: The stage's finished rows, in which the replies are kept.
            kind: Name of the replies among the finished rows.
        """
        ...


class Comparer(Judge, Protocol):
    """A judge that can also see two answers at once."""

    def prefers_first(
        self, extras: RowExtras, kind: str, pairs: Sequence[Comparison]
    ) -> dict[str, float]:
        """Return the probability that the first answer is better, by the pair's id. In a shard,
        only those of its share."""
        ...

    def close(self) -> None:
        """Free the memory of the model, which is loaded again when it is asked."""
        ...


class OverlapJudge:
    """Token F1 with the reference. It has no medical knowledge, and agrees with experts on 72-74 %
    of 1,310 pairs that they graded 4 and 1."""

    kind = "overlap"
    name = "overlap"

    def score(self, extras: RowExtras, kind: str, items: Sequence[Item]) -> dict[str, Score]:  # noqa: ARG002
        return {item.id: Score(token_f1(item.answer, _wanted_words(item))) for item in items}


def _wanted_words(item: Item) -> str:
    """The reference, or else the criteria that a good answer meets."""
    return item.reference or "\n".join(each.text for each in item.criteria if each.points > 0)


class ModelJudge:
    """A language model's expected digit for each aspect, as in G-Eval, or the probability that each
    criterion is met.

    It uses expected values because the most likely digit ties in 59-100 % of pairs.
    """

    kind = "model"

    def __init__(
        self,
        engine: LazyEngine,
        renderer: Renderer | None,
        name: str,
        finished: str,
        prompts: Prompts,
        weights: Mapping[str, float],
    ) -> None:
        """Wrap an engine.

        Args:
            renderer: Renders the prompts for an engine in this process; None for an endpoint.
            finished: Names the judge among the finished rows.
            weights: Weight of each aspect that is asked.
        """
        self._engine = engine
        self._renderer = renderer
        self._finished = finished
        self._prompts = prompts
        self._weights = weights
        self.name = name

    def score(self, extras: RowExtras, kind: str, items: Sequence[Item]) -> dict[str, Score]:
        replies = {
            form: self._ask(extras, kind, form, questions)
            for form, questions in questions_about(items, self._prompts, self._weights).items()
        }
        scores = {}
        for item in items:
            names = range(len(item.criteria)) if item.criteria else self._weights
            asked = replies[CRITERION if item.criteria else SCORE]
            own = [asked.get(f"{item.id}/{name}") for name in names]
            found = [each for each in own if each is not None]
            if len(found) == len(own):
                scores[item.id] = self._score(item, found)
        return scores

    def _score(self, item: Item, replies: Sequence[Sequence[float]]) -> Score:
        if item.criteria:
            return rubric_of(item.criteria, tuple(yes for yes, _ in replies))
        aspects = dict(zip(self._weights, map(expected_digit, replies), strict=True))
        total = sum(self._weights[name] * value for name, value in aspects.items())
        return Score(total / sum(self._weights.values()), aspects)

    def prefers_first(
        self, extras: RowExtras, kind: str, pairs: Sequence[Comparison]
    ) -> dict[str, float]:
        questions = {pair.id: self._prompts.better(pair) for pair in pairs}
        replies = self._ask(extras, kind, BETTER, questions)
        return {pair_id: first for pair_id, (first, _) in replies.items()}

    def close(self) -> None:
        self._engine.close()

    def _ask(
        self, extras: RowExtras, kind: str, form: Form, questions: Mapping[str, str]
    ) -> dict[str, list[float]]:
        """Return the probabilities of the form's choices, by the question's id."""
        if not questions:
            return {}
        conversations = [Conversation(question) for question in questions.values()]
        ids: Sequence[Sequence[int]] = [()] * len(conversations)
        if self._renderer is not None:
            ids = self._renderer.prompt_ids(conversations)
        prompts = [Prompt(*each) for each in zip(questions, ids, conversations, strict=True)]
        name = f"{kind}-{form.name}-{self._finished}"
        return ask_choices(extras, self._engine, name, prompts, form.start, form.choices)


def questions_about(
    items: Sequence[Item], prompts: Prompts, aspects: Iterable[str]
) -> dict[Form, dict[str, str]]:
    """Return all questions about the items, by form and id."""
    asked: dict[Form, dict[str, str]] = {SCORE: {}, CRITERION: {}}
    for item in items:
        for number, criterion in enumerate(item.criteria):
            asked[CRITERION][f"{item.id}/{number}"] = prompts.criterion(item, criterion)
        for aspect in () if item.criteria else aspects:
            asked[SCORE][f"{item.id}/{aspect}"] = prompts.score(item, aspect)
    return asked


class JudgePanel:
    """Several judges. A score is the mean over them."""

    kind = "model"

    def __init__(self, judges: Sequence[Comparer]) -> None:
        """Combine judges of different names."""
        self._judges = judges
        self.name = " + ".join(judge.name for judge in judges)

    def score(self, extras: RowExtras, kind: str, items: Sequence[Item]) -> dict[str, Score]:
        found = {}
        for judge in self._judges:
            found[judge.name] = judge.score(extras, kind, items)
            judge.close()  # before the next model is loaded
        return {
            item.id: _mean({name: scores[item.id] for name, scores in found.items()}, item)
            for item in items
            if all(item.id in scores for scores in found.values())
        }

    def prefers_first(
        self, extras: RowExtras, kind: str, pairs: Sequence[Comparison]
    ) -> dict[str, float]:
        found = []
        for judge in self._judges:
            found.append(judge.prefers_first(extras, kind, pairs))
            judge.close()
        ids = [pair.id for pair in pairs if all(pair.id in each for each in found)]
        return {id_: sum(each[id_] for each in found) / len(found) for id_ in ids}

    def close(self) -> None:
        for judge in self._judges:
            judge.close()


def combined(judges: Sequence[Comparer]) -> Comparer:
    """Return one judge for several, or the only one."""
    return judges[0] if len(judges) == 1 else JudgePanel(judges)


def _mean(scores: Mapping[str, Score], item: Item) -> Score:
    each = [*scores.values()]
    count = len(each)
    aspects = {name: sum(s.aspects[name] for s in each) / count for name in each[0].aspects}
    met = tuple(sum(values) / count for values in zip(*(s.met for s in each), strict=True))
    return Score(
        value=sum(s.value for s in each) / count,
        aspects=aspects,
        met=met,
        rubric=score_criteria(item.criteria, met) if item.criteria else None,
        judges={name: score.value for name, score in scores.items()},
    )


def rubric_of(criteria: Sequence[Criterion], met: tuple[float, ...]) -> Score:
    """Return the score of an answer whose criteria have these probabilities of being met."""
    rubric = score_criteria(criteria, met)
    return Score(rubric.expected, met=met, rubric=rubric)


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
