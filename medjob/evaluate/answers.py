"""One model's answers to the evaluation rows, batch by batch, so that a kill loses one batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from medjob.artifacts.finished_rows import FinishedRows, Row
from medjob.artifacts.progress import Progress
from medjob.generate.engine import Prompt, Sampling, TransformersEngine

_LETTER_START = "The answer is"


def answer_rows(
    engine: TransformersEngine,
    rows: Sequence[Row],
    limits: dict[str, int],
    finished: FinishedRows,
    progress: Progress,
    model: str,
) -> dict[str, Row]:
    """Greedy answers by row id; `limits` holds the most new tokens by kind of row."""
    done = finished.read(f"answers-{model}")
    with progress.task(f"{model}: answer", total=len(rows), done=len(done)) as task:
        for limit in sorted(set(limits.values())):
            group = [row for row in rows if limits[row["kind"]] == limit]
            for batch in engine.batches([Prompt(row["id"], row["prompt"]) for row in group]):
                todo = [prompt for prompt in batch if prompt.id not in done]
                if todo:
                    drawn = [answers[0] for answers in engine.generate(todo, Sampling(limit))]
                    made = [
                        {"id": p.id, "text": a.text, "tokens": a.tokens, "truncated": a.truncated}
                        for p, a in zip(todo, drawn, strict=True)
                    ]
                    finished.add(f"answers-{model}", made)
                    done |= {str(row["id"]): row for row in made}
                    task.advance(len(todo))
    return done


def likelihoods(
    engine: TransformersEngine,
    rows: Sequence[Row],
    finished: FinishedRows,
    progress: Progress,
    model: str,
) -> dict[str, Row]:
    """What needs no sampling: `nll_per_token` of open rows' answers, and the likeliest `letter` of multiple-choice rows."""
    kind = f"likelihoods-{model}"
    done = finished.read(kind)
    if done:
        return done
    opened = [row for row in rows if row["kind"] == "open" and row["completion"]]
    choices = [row for row in rows if row["kind"] == "multiple_choice"]
    with progress.task(f"{model}: likelihood", total=len(opened) + len(choices)) as task:
        scored = engine.negative_log_likelihoods(
            [(row["prompt"], row["completion"]) for row in opened]
        )
        made: list[Row] = [
            {"id": row["id"], "nll_per_token": total / count, "tokens": count}
            for row, (total, count) in zip(opened, scored, strict=True)
        ]
        task.advance(len(opened))
        made += [
            {"id": row["id"], "letter": letter}
            for row, letter in zip(choices, _letters(engine, choices), strict=True)
        ]
        task.advance(len(choices))
    finished.add(kind, made)
    return {row["id"]: row for row in made}


def _letters(engine: TransformersEngine, rows: Sequence[Row]) -> list[str]:
    """The likeliest option letter of each row. Rows with the same letters are scored together."""
    found: dict[str, str] = {}
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(json.loads(row["options"])), []).append(row)
    for letters, group in groups.items():
        scored = engine.choice_probabilities(
            [row["prompt"] + _LETTER_START for row in group], letters
        )
        found |= {
            row["id"]: letters[max(range(len(letters)), key=p.__getitem__)]
            for row, p in zip(group, scored, strict=True)
        }
    return [found[row["id"]] for row in rows]
