"""The engine protocol: what generates and scores text. Prompts go in, results come out as they
finish."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from medjob.data.render import Conversation, Renderer


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are sampled. Temperature 0 is greedy decoding."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_return_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model continues. Its samples depend only on its batch and the engine's seed."""

    id: str
    """Unique name. Finished rows are kept under it, and its seed is derived from it."""
    ids: Sequence[int] = ()
    """Token ids, for an engine that runs in this process."""
    conversation: Conversation | None = None
    """The same prompt for an endpoint, which renders it itself."""


Batches = Sequence[Sequence[Prompt]]
UNLIMITED = sys.maxsize
"""Positions of a model without a limit."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer."""

    text: str
    tokens: int
    truncated: bool
    """Whether the token limit ended the answer, and not the model."""


class Engine(Protocol):
    """Generates and scores text.

    Every method takes prompts in the batches that `batches` made, and yields (prompt id, result) as
    results finish, in any order. What is done before an error is yielded before it is raised.
    """

    name: str
    """As in `resources.<stage>.engine`."""

    def batches(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """Group prompts whose results may depend on one another.

        Pass all prompts of a task, also finished ones and those of other shards, so that the
        batches are the same after a restart and for any number of shards.
        """
        ...

    def generate(
        self, batches: Batches, sampling: Sampling
    ) -> Iterator[tuple[str, list[Generated]]]:
        """Yield `num_return_sequences` answers to each prompt.

        An answer ends at the model's last position. A prompt that leaves no room for one gets empty
        answers, marked as truncated.
        """
        ...

    def choice_probabilities(
        self, batches: Batches, start: str, choices: Sequence[str]
    ) -> Iterator[tuple[str, list[float]]]:
        """Yield, for each prompt, the probabilities of `choices` as the word after `start`. They
        sum to 1.

        Nothing is sampled, so the result is reproducible. A prompt that is longer than the model's
        positions gets equal probabilities.

        Raises:
            ConfigError: the tokenizer does not tell the choices apart.
        """
        ...

    def negative_log_likelihoods(
        self, batches: Batches, completions: Mapping[str, Sequence[int]]
    ) -> Iterator[tuple[str, tuple[float, int]]]:
        """Yield, for each prompt, the sum of -log p over the tokens of its completion in nats, and
        the number of these tokens. Tokens after the model's last position do not count.

        Args:
            completions: Token ids that follow each prompt, by prompt id.
        """
        ...

    def close(self) -> None:
        """Free the memory of the model. The engine cannot be used after that."""
        ...


def answer_of(
    ids: Sequence[int], limit: int, ends: Sequence[int], tokenizer: Any, renderer: Renderer
) -> Generated:
    """Decode the tokens of one answer, up to its end token.

    Args:
        limit: The largest number of tokens that it could have had.
        ends: Tokens that end an answer.
    """
    length = next((i for i, token in enumerate(ids) if token in ends), None)
    kept = ids if length is None else ids[:length]
    text = renderer.answer(tokenizer.decode(list(kept), skip_special_tokens=True))
    return Generated(text, len(kept), truncated=length is None and len(ids) >= limit)
