"""Row-wise work: nothing is asked twice, nothing is lost, and shards divide the rows."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts.shard import Shard
from medjob.generate import work
from medjob.generate.protocol import Batches, Generated, Prompt, Sampling
from medjob.generate.work import LazyEngine, ask_choices, sample, sample_longer
from tests.support.row_work import row_extras

PROMPTS = [Prompt(f"row{n}", [0] * (n + 1)) for n in range(20)]


class CountingEngine:
    """Answers with the prompt's name, and dies after `dies_after` prompts."""

    name = "transformers"

    def __init__(self, dies_after: int | None = None, truncated: bool = False) -> None:
        self.asked: list[str] = []
        self.dies_after = dies_after
        self.truncated = truncated

    def batches(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        return [[prompt] for prompt in sorted(prompts, key=lambda each: each.id)]

    def generate(
        self, batches: Batches, sampling: Sampling
    ) -> Iterator[tuple[str, list[Generated]]]:
        for batch in batches:
            for prompt in batch:
                self._ask(prompt.id)
                limit = sampling.max_new_tokens
                text = f"{prompt.id} in {limit}"
                yield (
                    prompt.id,
                    [Generated(text, limit, self.truncated)] * sampling.num_return_sequences,
                )

    def choice_probabilities(
        self, batches: Batches, start: str, choices: Sequence[str]
    ) -> Iterator[tuple[str, list[float]]]:
        for batch in batches:
            for prompt in batch:
                self._ask(prompt.id)
                yield prompt.id, [1 / len(choices)] * len(choices)

    def negative_log_likelihoods(
        self, batches: Batches, completions: Mapping[str, Sequence[int]]
    ) -> Iterator[tuple[str, tuple[float, int]]]:
        raise AssertionError("not asked here")

    def close(self) -> None:
        pass

    def lazy(self) -> LazyEngine:
        return LazyEngine(self.name, self.batches, lambda: self)

    def _ask(self, name: str) -> None:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise RuntimeError("the engine died")
        self.asked.append(name)


def test_rows_before_an_error_are_kept_and_not_asked_again(tmp_path: Path) -> None:
    first = CountingEngine(dies_after=7)
    with pytest.raises(RuntimeError, match="died"):
        sample(row_extras(tmp_path), first.lazy(), "answers", PROMPTS, Sampling(5))
    assert len(first.asked) == 7
    second = CountingEngine()
    found = sample(row_extras(tmp_path), second.lazy(), "answers", PROMPTS, Sampling(5))
    assert sorted([*first.asked, *second.asked]) == sorted(prompt.id for prompt in PROMPTS)
    assert {name: answer.text for name, (answer,) in found.items()} == {
        prompt.id: f"{prompt.id} in 5" for prompt in PROMPTS
    }


def test_finished_task_loads_no_engine(tmp_path: Path) -> None:
    ask_choices(row_extras(tmp_path), CountingEngine().lazy(), "scores", PROMPTS, "Score:", "12")
    loaded = []
    lazy = LazyEngine("x", CountingEngine().batches, lambda: loaded.append(1))  # type: ignore[arg-type, func-returns-value]
    found = ask_choices(row_extras(tmp_path), lazy, "scores", PROMPTS, "Score:", "12")
    assert len(found) == len(PROMPTS)
    assert not loaded


@pytest.mark.parametrize("count", [2, 5])
def test_shards_divide_the_rows_and_the_whole_asks_nothing(tmp_path: Path, count: int) -> None:
    asked = []
    for index in range(count):
        shard, engine = Shard(index, count), CountingEngine()
        extras = row_extras(tmp_path, shard)
        found = sample(extras, engine.lazy(), "answers", PROMPTS, Sampling(5))
        assert sorted(found) == sorted(engine.asked)
        assert all(shard.owns(name) for name in found)
        asked += engine.asked
    assert sorted(asked) == sorted(prompt.id for prompt in PROMPTS)
    engine = CountingEngine()
    whole = sample(row_extras(tmp_path), engine.lazy(), "answers", PROMPTS, Sampling(5))
    assert not engine.asked
    assert len(whole) == len(PROMPTS)


def test_another_number_of_shards_uses_the_rows_that_are_finished(tmp_path: Path) -> None:
    first, rest = CountingEngine(), []
    sample(row_extras(tmp_path, Shard(0, 2)), first.lazy(), "answers", PROMPTS, Sampling(5))
    for index in range(3):
        engine = CountingEngine()
        extras = row_extras(tmp_path, Shard(index, 3))
        sample(extras, engine.lazy(), "answers", PROMPTS, Sampling(5))
        rest += engine.asked
    assert first.asked
    assert sorted([*first.asked, *rest]) == sorted(prompt.id for prompt in PROMPTS)


def test_truncated_answers_are_sampled_again_with_twice_the_tokens(tmp_path: Path) -> None:
    engine = CountingEngine(truncated=True)
    sampling = Sampling(5, 0.7, num_return_sequences=2)
    found = sample_longer(row_extras(tmp_path), engine.lazy(), "answers", PROMPTS[:2], sampling)
    assert [answer.text for answer in found["row1"]] == [
        "row1/0/longer in 10",
        "row1/1/longer in 10",
    ]
    again = CountingEngine(truncated=True)
    assert found == sample_longer(
        row_extras(tmp_path), again.lazy(), "answers", PROMPTS[:2], sampling
    )
    assert not again.asked


def test_part_of_another_artifact_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extras = row_extras(tmp_path, Shard(0, 2))
    sample(extras, CountingEngine().lazy(), "answers", PROMPTS, Sampling(5))
    (part,) = (tmp_path / "run/candidates/0123456789ab/shards/0-of-2/parts/answers").iterdir()
    copy = part.parents[3] / "1-of-2/parts/answers" / part.name
    copy.parent.mkdir(parents=True)
    part.rename(copy)
    engine = CountingEngine()
    with caplog.at_level(logging.WARNING):
        sample(row_extras(tmp_path), engine.lazy(), "answers", PROMPTS, Sampling(5))
    assert "was not written there" in caplog.text
    assert len(engine.asked) == len(PROMPTS)


def test_part_whose_upload_was_interrupted_is_stored_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal interrupts the main thread, and the callback before the exit stores what is left."""
    extras, calls = row_extras(tmp_path), []
    add = type(extras.finished).add

    def interrupted_once(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(work, "_ROWS_PER_PART", 4)
    monkeypatch.setattr(type(extras.finished), "add", interrupted_once)
    first = CountingEngine()
    with pytest.raises(KeyboardInterrupt):
        sample(extras, first.lazy(), "answers", PROMPTS, Sampling(5))
    assert len(first.asked) == 4
    second = CountingEngine()
    sample(row_extras(tmp_path), second.lazy(), "answers", PROMPTS, Sampling(5))
    assert sorted([*first.asked, *second.asked]) == sorted(prompt.id for prompt in PROMPTS)
