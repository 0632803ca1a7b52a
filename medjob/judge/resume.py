"""Score many answers in batches, so that a kill loses at most one batch."""

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
    """Return the score of each item, by item id.

    Args:
        kind: Name of these scores among the finished rows. Scores that an earlier attempt finished
            are reused.
        batch: Number of items scored at a time.
    """
    done = {row["id"]: Score(row["value"], row["aspects"]) for row in finished.read(kind).values()}
    todo = [item for item in items if item.id not in done]
    with progress.task(kind, total=len(items), done=len(items) - len(todo)) as task:
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            rows = []
            for item, score in zip(part, judge.score(part), strict=True):
                rows.append({"id": item.id, "value": score.value, "aspects": score.aspects})
                done[item.id] = score
            finished.add(kind, rows)
            task.advance(len(part))
    return done
