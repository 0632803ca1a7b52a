"""Scoring many answers so that a kill loses one batch."""

from __future__ import annotations

from collections.abc import Sequence

from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.progress import Progress
from medjob.judge.rubric import Item
from medjob.judge.scoring import Judge, Score


def score_all(
    judge: Judge,
    items: Sequence[Item],
    finished: FinishedRows,
    progress: Progress,
    kind: str,
    batch: int,
) -> dict[str, Score]:
    """Scores by item id; those that an earlier attempt finished under `kind` are not made again."""
    done = {row["id"]: Score(row["value"], row["aspects"]) for row in finished.read(kind).values()}
    todo = [item for item in items if item.id not in done]
    with progress.task(kind, total=len(items), done=len(items) - len(todo)) as task:
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            scores = judge.score(part)
            finished.add(
                kind,
                [
                    {"id": i.id, "value": s.value, "aspects": s.aspects}
                    for i, s in zip(part, scores, strict=True)
                ],
            )
            done |= {item.id: score for item, score in zip(part, scores, strict=True)}
            task.advance(len(part))
    return done
