"""Generate and score one model's answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from medjob.artifacts.finished_rows import Row
from medjob.data.prompts import LETTER_START
from medjob.data.render import Conversation
from medjob.generate.protocol import Generated, Prompt, Sampling
from medjob.generate.work import LazyEngine, ask_choices, sample, score_completions
from medjob.stage import RowExtras


def answer_rows(
    extras: RowExtras,
    engine: LazyEngine,
    rows: Sequence[Row],
    limits: Mapping[str, int],
    model: str,
) -> dict[str, Generated]:
    """Return the greedy answer to each row of this shard, by row id.

    Args:
        limits: Maximum number of new tokens for each kind of row.
        model: Name of the model among the finished rows.
    """
    answers: dict[str, Generated] = {}
    for limit in sorted(set(limits.values())):
        prompts = [_prompt(row) for row in rows if limits[row["kind"]] == limit]
        found = sample(extras, engine, f"answers-{model}-{limit}", prompts, Sampling(limit))
        answers |= {row_id: answer for row_id, (answer,) in found.items()}
    return answers


def completion_likelihoods(
    extras: RowExtras, engine: LazyEngine, rows: Sequence[Row], model: str
) -> dict[str, float | None]:
    """Return the mean -log p per token of the data's own answers to open questions, in nats, by row
    id."""
    scored = [row for row in rows if row["kind"] == "open" and len(row["completion_ids"])]
    found = score_completions(
        extras,
        engine,
        f"completions-{model}",
        [_prompt(row) for row in scored],
        {row["id"]: row["completion_ids"] for row in scored},
    )
    return {row_id: total / count if count else None for row_id, (total, count) in found.items()}


def likeliest_letters(
    extras: RowExtras, engine: LazyEngine, rows: Sequence[Row], model: str
) -> dict[str, str]:
    """Return the most likely option of each multiple-choice row, by row id. Rows with the same
    letters are scored together."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == "multiple_choice":
            groups.setdefault(tuple(json.loads(row["options"])), []).append(row)
    letters: dict[str, str] = {}
    if engine.name == "openai":  # the questions do not ask for a letter, and it continues no answer
        return letters
    for choices, group in groups.items():
        kind = f"letters-{model}-{''.join(choices)}"
        prompts = [_prompt(row) for row in group]
        found = ask_choices(extras, engine, kind, prompts, LETTER_START, choices)
        letters |= {row_id: choices[scores.index(max(scores))] for row_id, scores in found.items()}
    return letters


def conversation_of(row: Row) -> Conversation:
    """What an evaluation row asks."""
    history = [(question, answer) for question, answer in json.loads(row["history"])]
    return Conversation(row["message"], row["system"], history)


def _prompt(row: Row) -> Prompt:
    return Prompt(row["id"], row["prompt_ids"], conversation_of(row))
