"""Generate and score one model's answers in batches, so that a kill loses at most one batch."""

from __future__ import annotations

import json
from collections.abc import Sequence

from medjob.artifacts.finished_rows import FinishedRows, Row
from medjob.artifacts.progress import Progress
from medjob.data.prompts import LETTER_START
from medjob.generate.engine import Prompt, Sampling, TransformersEngine


def answer_rows(
    engine: TransformersEngine,
    rows: Sequence[Row],
    limits: dict[str, int],
    finished: FinishedRows,
    progress: Progress,
    model: str,
) -> dict[str, Row]:
    """Return the greedy answer to each row, by row id.

    Args:
        limits: Maximum number of new tokens for each kind of row.
        model: Name of the model among the finished rows. Answers that an earlier attempt finished
            are reused.
    """
    kind = f"answers-{model}"
    done = finished.read(kind)
    with progress.task(f"{model}: answer", total=len(rows), done=len(done)) as task:
        for limit in sorted(set(limits.values())):
            group = [row for row in rows if limits[row["kind"]] == limit]
            for batch in engine.batches([Prompt(row["id"], row["prompt_ids"]) for row in group]):
                todo = [prompt for prompt in batch if prompt.id not in done]
                if todo:
                    made = _answer(engine, todo, limit)
                    finished.add(kind, made)
                    done |= {str(row["id"]): row for row in made}
                    task.advance(len(todo))
    return done


def _answer(engine: TransformersEngine, prompts: Sequence[Prompt], limit: int) -> list[Row]:
    rows = []
    for prompt, answers in zip(prompts, engine.generate(prompts, Sampling(limit)), strict=True):
        answer = answers[0]
        rows.append(
            {
                "id": prompt.id,
                "text": answer.text,
                "tokens": answer.tokens,
                "truncated": answer.truncated,
            }
        )
    return rows


def score_likelihoods(
    engine: TransformersEngine,
    rows: Sequence[Row],
    finished: FinishedRows,
    progress: Progress,
    model: str,
) -> dict[str, Row]:
    """Return the figures that need no sampling, by row id: `nll_per_token` of the answers to open
    questions, and the most likely `letter` of multiple-choice rows."""
    kind = f"likelihoods-{model}"
    done = finished.read(kind)
    if done:
        return done
    open_rows = [row for row in rows if row["kind"] == "open" and len(row["completion_ids"])]
    choices = [row for row in rows if row["kind"] == "multiple_choice"]
    with progress.task(f"{model}: likelihood", total=len(open_rows) + len(choices)) as task:
        made = _completion_likelihoods(engine, open_rows)
        task.advance(len(open_rows))
        letters = _likeliest_letters(engine, choices)
        made += [{"id": row["id"], "letter": letters[row["id"]]} for row in choices]
        task.advance(len(choices))
    finished.add(kind, made)
    return {row["id"]: row for row in made}


def _completion_likelihoods(engine: TransformersEngine, rows: Sequence[Row]) -> list[Row]:
    scored = engine.negative_log_likelihoods(
        [(row["prompt_ids"], row["completion_ids"]) for row in rows]
    )
    return [
        {"id": row["id"], "nll_per_token": total / count if count else None, "tokens": count}
        for row, (total, count) in zip(rows, scored, strict=True)
    ]


def _likeliest_letters(engine: TransformersEngine, rows: Sequence[Row]) -> dict[str, str]:
    """Return the most likely option of each row, by row id. Rows with the same letters are scored
    together."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        letters = tuple(json.loads(row["options"]))
        groups.setdefault(letters, []).append(row)
    found: dict[str, str] = {}
    for letters, group in groups.items():
        prompts = [row["prompt_ids"] for row in group]
        probabilities = engine.choice_probabilities(prompts, LETTER_START, letters)
        for row, scores in zip(group, probabilities, strict=True):
            found[row["id"]] = letters[scores.index(max(scores))]
    return found
