"""Row-wise work of a stage: finished rows are kept, and a shard does its share.

The rows of a task are asked in the batches that the engine makes of all of them. A batch belongs to
the shard that owns its first row, so the batches are the same for any number of shards. vLLM needs
no batches, so its shards divide the rows themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from medjob.artifacts.finished_rows import FinishedRows, Row
from medjob.artifacts.progress import Task
from medjob.artifacts.shard import WHOLE
from medjob.generate.protocol import Batches, Engine, Generated, Prompt, Sampling
from medjob.runtime import signals
from medjob.stage import RowExtras

_ROWS_PER_PART = 256
_MAX_AGE_S = 5.0  # of a finished row that is not stored yet


class LazyEngine:
    """An engine that is loaded when the first unfinished row needs it."""

    def __init__(
        self,
        name: str,
        batches: Callable[[Sequence[Prompt]], list[list[Prompt]]],
        load: Callable[[], Engine],
    ) -> None:
        """Wrap an engine that is not loaded.

        Args:
            name: As in `resources.<stage>.engine`.
            batches: Makes batches without the model.
        """
        self.name = name
        self.batches = batches
        self._load = load
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine, loaded now if it was not."""
        if self._engine is None:
            self._engine = self._load()
        return self._engine

    def close(self) -> None:
        """Free the engine's memory, if it was loaded."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def sample(
    extras: RowExtras,
    engine: LazyEngine,
    kind: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
) -> dict[str, list[Generated]]:
    """Return the answers to each prompt, by its id.

    Args:
        kind: Name of the answers among the finished rows.
    """
    batches = engine.batches(prompts)
    return _answers(_sample(extras, engine, kind, batches, sampling))


def sample_longer(
    extras: RowExtras,
    engine: LazyEngine,
    kind: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
) -> dict[str, list[Generated]]:
    """Return the answers to each prompt. Truncated ones are sampled again with twice the tokens."""
    batches = _share(extras, engine.batches(prompts))
    extras = replace(extras, shard=WHOLE)
    answers = _answers(_sample(extras, engine, kind, batches, sampling))
    again = [
        [
            replace(prompt, id=f"{prompt.id}/{column}/longer")
            for prompt in batch
            for column, answer in enumerate(answers[prompt.id])
            if answer.truncated
        ]
        for batch in batches
    ]
    twice = replace(sampling, max_new_tokens=2 * sampling.max_new_tokens, num_return_sequences=1)
    longer = _answers(_sample(extras, engine, f"{kind}-longer", again, twice))
    for name, (answer,) in longer.items():
        prompt_id, column, _ = name.rsplit("/", 2)
        answers[prompt_id][int(column)] = answer
    return answers


def _sample(
    extras: RowExtras, engine: LazyEngine, kind: str, batches: Batches, sampling: Sampling
) -> dict[str, Row]:
    def ask(loaded: Engine, todo: Batches) -> Iterator[Row]:
        for prompt_id, answers in loaded.generate(todo, sampling):
            yield {"id": prompt_id, "answers": [asdict(answer) for answer in answers]}

    return finish(extras, engine, kind, batches, ask)


def _answers(rows: Mapping[str, Row]) -> dict[str, list[Generated]]:
    return {
        prompt_id: [Generated(**answer) for answer in row["answers"]]
        for prompt_id, row in rows.items()
    }


def ask_choices(
    extras: RowExtras,
    engine: LazyEngine,
    kind: str,
    prompts: Sequence[Prompt],
    start: str,
    choices: Sequence[str],
) -> dict[str, list[float]]:
    """Return the probabilities of `choices` after each prompt and `start`, by prompt id."""

    def ask(loaded: Engine, todo: Batches) -> Iterator[Row]:
        for prompt_id, probabilities in loaded.choice_probabilities(todo, start, choices):
            yield {"id": prompt_id, "probabilities": probabilities}

    rows = finish(extras, engine, kind, engine.batches(prompts), ask)
    return {prompt_id: row["probabilities"] for prompt_id, row in rows.items()}


def score_completions(
    extras: RowExtras,
    engine: LazyEngine,
    kind: str,
    prompts: Sequence[Prompt],
    completions: Mapping[str, Sequence[int]],
) -> dict[str, tuple[float, int]]:
    """Return the sum of -log p in nats and the number of tokens of each prompt's completion."""

    def ask(loaded: Engine, todo: Batches) -> Iterator[Row]:
        for prompt_id, (total, count) in loaded.negative_log_likelihoods(todo, completions):
            yield {"id": prompt_id, "nats": total, "tokens": count}

    rows = finish(extras, engine, kind, engine.batches(prompts), ask)
    return {prompt_id: (row["nats"], row["tokens"]) for prompt_id, row in rows.items()}


def finish(
    extras: RowExtras,
    engine: LazyEngine,
    kind: str,
    batches: Batches,
    ask: Callable[[Engine, Batches], Iterable[Row]],
) -> dict[str, Row]:
    """Return the rows of the prompts in this shard's share of `batches`, by prompt id.

    Those that are missing are asked and stored. The engine is loaded only if there are any.
    """
    batches = _share(extras, batches)
    wanted = {prompt.id for batch in batches for prompt in batch}
    known = extras.finished.read(kind)
    found = {prompt_id: known[prompt_id] for prompt_id in wanted & known.keys()}
    todo = [[prompt for prompt in batch if prompt.id not in found] for batch in batches]
    todo = [batch for batch in todo if batch]
    if todo:
        loaded = engine.engine
        with extras.progress.task(kind, total=len(wanted), done=len(found)) as task:
            for row in _stored(extras.finished, kind, ask(loaded, todo), task):
                found[row["id"]] = row
    return found


def _share(extras: RowExtras, batches: Batches) -> Batches:
    """Return the batches of this shard."""
    owns = extras.shard.owns
    return [batch for batch in batches if batch and owns(batch[0].id.partition("/")[0])]


def _stored(
    finished: FinishedRows, kind: str, rows: Iterable[Row], task: Task
) -> Iterator[dict[str, Any]]:
    """Pass rows on, and store them in parts: when there are many, when one gets old, and in any
    case before an error or a signal ends the work."""
    part: list[Row] = []
    began = time.monotonic()

    def store() -> None:
        nonlocal began
        held = part[:]
        if held:
            finished.add(kind, held)
        del part[: len(held)]  # only now: a signal may have ended the process before
        began = time.monotonic()

    with signals.before_exit(store):
        try:
            for row in rows:
                part.append(row)
                task.advance(tokens=_tokens_of(row))
                yield row
                if len(part) >= _ROWS_PER_PART or time.monotonic() - began > _MAX_AGE_S:
                    store()
        finally:
            store()


def _tokens_of(row: Row) -> int:
    """Number of tokens that were generated or scored for a row."""
    answers: Sequence[Row] = row.get("answers", ())
    return sum(int(each["tokens"]) for each in answers) + int(row.get("tokens", 0))
