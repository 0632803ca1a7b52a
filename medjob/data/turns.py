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
    turns = _turns(renderer, dialogues)
    plans = [plan for number, each in enumerate(turns) for plan in _plans(number, each)]
    rows: list[list[TrainingRow]] = [[] for _ in dialogues]
    while plans:
        separate: list[_Plan] = []
        prompts = renderer.encode([plan.end.prompt for plan in plans])
        for plan, ids in zip(plans, prompts, strict=True):
            places = {turn.answer: _place(renderer, ids, turn) for turn in plan.inside}
            found = [place for place in places.values() if place]
            separate += [
                _Plan(plan.dialogue, turn) for turn in plan.inside if not places[turn.answer]
            ]
            is_last = plan.end is turns[plan.dialogue][-1]
            rows[plan.dialogue].append(_row(plan.end, ids, found, is_last))
        plans = separate
    return [sorted(each, key=lambda row: row.answer) for each in rows]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A trained answer."""

    answer: int
    prompt: str
    """Sealed text before the answer."""
    text: str
    """Sealed text of the answer with its end token."""
    completion_ids: list[int]
    length: int
    """Number of tokens of the answer with its end token."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """A row that is to be encoded."""

    dialogue: int
    end: _Turn
    inside: Sequence[_Turn] = ()
    """Earlier answers that the row shows as the model writes them."""


def _turns(renderer: Renderer, dialogues: Sequence[Sequence[Answer]]) -> list[list[_Turn]]:
    texts = [answer.text for answers in dialogues for answer in answers if answer.is_trained]
    completions = iter(renderer.completion_ids(texts))
    return [
        [
            _turn(renderer, number, answer, next(completions))
            for number, answer in enumerate(answers)
            if answer.is_trained
        ]
        for answers in dialogues
    ]


def _turn(renderer: Renderer, number: int, answer: Answer, completion: list[int]) -> _Turn:
    return _Turn(
        number,
        renderer.sealed_prompt(answer.conversation),
        renderer.sealed_turn(answer.text),
        completion,
        renderer.turn_length(completion),
    )


def _plans(dialogue: int, turns: Sequence[_Turn]) -> list[_Plan]:
    """Choose the answers that end a row: the last one, and each that no later row shows as the
    model writes it."""
    left = list(turns)
    plans = []
    while left:
        end = left.pop()
        inside = [turn for turn in left if _shows(end.prompt, turn)]
        left = [turn for turn in left if turn not in inside]
        plans.append(_Plan(dialogue, end, inside))
    return plans


def _shows(text: str, turn: _Turn) -> bool:
    return text.startswith(turn.prompt) and text.startswith(turn.text, len(turn.prompt))


def _place(renderer: Renderer, ids: list[int], turn: _Turn) -> tuple[int, int] | None:
    """Find the tokens of an earlier answer: they end at the same end token as in the text, because
    no row can spell out that token. Return None if they are not those of its completion, because
    the tokenizer joins words across the boundary."""
    stop = renderer.end_token_ids[0]
    number = renderer.stops_in(turn.prompt) + renderer.stops_in(turn.text)
    stops = [position for position, token in enumerate(ids) if token == stop]
    if len(stops) < number:
        return None
    end = stops[number - 1] + 1
    start = end - turn.length
    return (start, end) if ids[start:end] == turn.completion_ids[: turn.length] else None


def _row(
    end: _Turn, prompt_ids: list[int], earlier: list[tuple[int, int]], is_last: bool
) -> TrainingRow:
    start = len(prompt_ids)
    turns = [*earlier, (start, start + end.length)]
    return TrainingRow(end.answer, prompt_ids, end.completion_ids, turns, is_last)
