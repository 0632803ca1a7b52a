"""Build the training rows of dialogues: the tokens, and which of them are trained.

A row trains an answer inside a conversation only if the model sees there what it sees when it
generates: the tokens up to the end of the answer have to be those of the prompt and the answer.
Templates that change earlier turns break this. Most drop the thoughts of earlier answers, Qwen3's
also the empty ones, and Mistral's moves the system message to the last question. Such answers are
trained in a separate row, which ends with them. So each answer is trained exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from medjob.data.render import Conversation, Renderer


@dataclass(frozen=True, slots=True)
class Answer:
    """A question of a dialogue with what precedes it, and its answer."""

    conversation: Conversation
    text: str
    is_trained: bool = True


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A conversation that ends with a trained answer."""

    answer: int
    """Position of that answer in the dialogue."""
    prompt_ids: list[int]
    completion_ids: list[int]
    """The last answer, its end token, and what the template writes after it."""
    turns: list[tuple[int, int]]
    """The trained tokens of each trained answer with its end token: first, and last plus 1."""
    is_last: bool
    """Whether it ends with the last trained answer of the dialogue."""


def training_rows(
    renderer: Renderer, dialogues: Sequence[Sequence[Answer]]
) -> list[list[TrainingRow]]:
    """Build the rows of each dialogue, in the order of the answers that end them.

    Args:
        dialogues: All answers of each dialogue, of which at least one is trained.
    """
    trained = [
        [(n, answer) for n, answer in enumerate(answers) if answer.is_trained]
        for answers in dialogues
    ]
    prompts = renderer.prompt_ids([a.conversation for each in trained for _, a in each])
    earlier = [(a.conversation, a.text) for each in trained for _, a in each[:-1]]
    answered = iter(renderer.answered_ids(earlier))
    ends = accumulate((len(each) for each in trained), initial=0)
    plans = [
        _plan([n for n, _ in each], prompts[start:end], [next(answered) for _ in each[:-1]])
        for each, (start, end) in zip(trained, pairwise(ends), strict=True)
    ]
    return _complete(renderer, dialogues, plans)


@dataclass(frozen=True, slots=True)
class _Plan:
    answer: int
    prompt_ids: list[int]
    earlier: list[tuple[int, int]]
    is_last: bool


def _plan(
    numbers: Sequence[int], prompts: Sequence[list[int]], answered: Sequence[list[int]]
) -> list[_Plan]:
    """Decide which answers end a row: the last one, and each that no later row can hold.

    Args:
        numbers: Positions of the trained answers in the dialogue.
        prompts: Token ids of their prompts.
        answered: Token ids of the prompts with their answers, without the last.
    """
    left = list(range(len(numbers)))
    plans: list[_Plan] = []
    while left:
        end = left.pop()
        inside = [n for n in left if _holds(prompts[end], prompts[n], answered[n])]
        left = [n for n in left if n not in inside]
        earlier = [(len(prompts[n]), len(answered[n])) for n in inside]
        plans.append(_Plan(numbers[end], prompts[end], earlier, not plans))
    return plans[::-1]


def _holds(row: list[int], prompt: list[int], answered: list[int]) -> bool:
    """Whether a row shows an answer as the model writes it after its prompt."""
    return row[: len(answered)] == answered and answered[: len(prompt)] == prompt


def _complete(
    renderer: Renderer, dialogues: Sequence[Sequence[Answer]], plans: Sequence[Sequence[_Plan]]
) -> list[list[TrainingRow]]:
    """Add the completions, which are encoded in one call for all rows."""
    texts = [
        answers[plan.answer].text
        for answers, rows in zip(dialogues, plans, strict=True)
        for plan in rows
    ]
    completions = iter(renderer.completion_ids(texts))
    return [[_row(renderer, plan, next(completions)) for plan in rows] for rows in plans]


def _row(renderer: Renderer, plan: _Plan, completion: list[int]) -> TrainingRow:
    start = len(plan.prompt_ids)
    turn = (start, start + renderer.turn_length(completion))
    return TrainingRow(
        plan.answer, plan.prompt_ids, completion, [*plan.earlier, turn], plan.is_last
    )
