"""The `transformers` engine: generates answers and scores next tokens, in this process."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medjob.data.render import Renderer
from medjob.errors import RetryError
from medjob.plan.settings import position_limit

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are sampled. Temperature 0 is greedy decoding."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_return_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """An encoded prompt. Its samples depend only on the names of its batch and the seed."""

    id: str
    """Name of the row."""
    ids: Sequence[int]
    """Token ids."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer."""

    text: str
    tokens: int
    truncated: bool
    """Whether the token limit ended the answer, and not the model."""


class TransformersEngine:
    """Continuous batching on a GPU, and padded batches of similar length on other devices.

    On a CPU, padding is faster: 90-160 tokens/s, against 59-76 with continuous batching (a model of
    135 M parameters on 2 cores).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        seed: int,
        renderer: Renderer,
        continuous: bool | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            renderer: Renders the model's prompts. The special token that its template puts after an
                answer also ends a generation.
            continuous: Whether to use continuous batching. By default, only on a GPU.
        """
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._ends = end_tokens(model, tokenizer, renderer)
        self._positions = position_limit(model.config) or sys.maxsize
        self._drop_generation_defaults()
        self._batch_size = batch_size
        self._seed = seed
        on_gpu = self._device.type == "cuda"
        self._continuous = on_gpu if continuous is None else continuous
        # On a GPU the cache takes the free memory. Without limits it takes 12 GB on a CPU.
        cpu_limits = {"num_blocks": 64, "page_size": 32, "max_batch_tokens": 256}
        self._cache_limits = {} if on_gpu else cpu_limits

    def batches(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """Group prompts into batches of similar length, longest first.

        Pass all prompts, also finished ones, so that the batches are the same after a restart.
        """
        ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.id))
        return [
            ordered[start : start + self._batch_size]
            for start in range(0, len(ordered), self._batch_size)
        ]

    def generate(self, batch: Sequence[Prompt], sampling: Sampling) -> list[list[Generated]]:
        """Generate `num_return_sequences` answers to each prompt of one batch.

        An answer ends at the model's last position. A prompt that leaves no room for one gets empty
        answers, marked as truncated.
        """
        longest = max(len(prompt.ids) for prompt in batch)
        room = min(sampling.max_new_tokens, self._positions - longest)
        if room < 1:
            return self._generate_without_longest(batch, sampling)
        sampling = replace(sampling, max_new_tokens=room)
        seed = _batch_seed([prompt.id for prompt in batch], self._seed)
        prompts = [list(prompt.ids) for prompt in batch]
        if self._continuous:
            token_ids = self._generate_continuously(prompts, sampling, seed)
        else:
            token_ids = self._generate_padded(prompts, sampling, seed)
        answers = [self._to_answer(ids, sampling.max_new_tokens) for ids in token_ids]
        n = sampling.num_return_sequences
        return [answers[start : start + n] for start in range(0, len(batch) * n, n)]

    def _generate_without_longest(
        self, batch: Sequence[Prompt], sampling: Sampling
    ) -> list[list[Generated]]:
        """Generate answers to the prompts that leave room for one."""
        fitting = [prompt for prompt in batch if len(prompt.ids) < self._positions]
        _log.warning(
            "%d prompts fill all %d positions of the model, so they get no answer",
            len(batch) - len(fitting),
            self._positions,
        )
        made = iter(self.generate(fitting, sampling) if fitting else [])
        empty = [Generated("", 0, truncated=True)] * sampling.num_return_sequences
        return [next(made) if len(each.ids) < self._positions else list(empty) for each in batch]

    def _generate_padded(
        self, prompts: Sequence[list[int]], sampling: Sampling, seed: int
    ) -> list[list[int]]:
        import torch

        inputs = self._pad(prompts)
        torch.manual_seed(seed)
        with torch.inference_mode():
            output = self._model.generate(**inputs, generation_config=self._config(sampling))
        width = inputs["input_ids"].shape[1]
        token_ids: list[list[int]] = output[:, width:].tolist()
        return token_ids

    def _generate_continuously(
        self, prompts: Sequence[list[int]], sampling: Sampling, seed: int
    ) -> list[list[int]]:
        """Return the tokens of every answer. The answers to one prompt are adjacent."""
        from transformers import ContinuousBatchingConfig

        outputs = self._model.generate_batch(
            inputs=prompts,
            generation_config=self._config(sampling),
            continuous_batching_config=ContinuousBatchingConfig(seed=seed, **self._cache_limits),
        )
        token_ids = [
            list(output.generated_tokens) for output in outputs.values() if output.error is None
        ]
        lost = len(prompts) * sampling.num_return_sequences - len(token_ids)
        if lost:
            raise RetryError(f"continuous batching lost {lost} answers", "run the stage again")
        return token_ids

    def choice_probabilities(
        self, prompts: Sequence[Sequence[int]], start: str, choices: Sequence[str]
    ) -> list[list[float]]:
        """Return, for each prompt, the probabilities of `choices` as the word after `start`. They
        sum to 1.

        This takes one forward pass per prompt and samples nothing, so it is reproducible. A prompt
        that is longer than the model's positions gets equal probabilities.

        Raises:
            ConfigError: the tokenizer does not tell the choices apart.
        """
        import torch

        shared, tokens = self._renderer.choice_tokens(start, choices)
        rows = [[*prompt, *shared] for prompt in prompts]
        found = [[1 / len(choices)] * len(choices) for _ in rows]
        fitting = [i for i in range(len(rows)) if len(rows[i]) <= self._positions]
        if len(fitting) < len(rows):
            count = len(rows) - len(fitting)
            _log.warning("%d prompts exceed the model's %d positions", count, self._positions)
        for batch in self._longest_first(fitting, rows, self._batch_size):
            inputs = self._pad([rows[i] for i in batch])
            with torch.inference_mode():
                logits = self._model(**inputs, logits_to_keep=1).logits[:, -1, tokens]
            probabilities = torch.softmax(logits.float(), dim=-1).tolist()
            for i, values in zip(batch, probabilities, strict=True):
                found[i] = values
        return found

    def negative_log_likelihoods(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, int]]:
        """Return, for each (prompt, completion), the sum of -log p over the completion's tokens in
        nats, and the number of these tokens. Tokens after the model's last position do not
        count."""
        room = [max(0, self._positions - len(prompt)) for prompt, _ in rows]
        completions = [list(rows[i][1])[: room[i]] for i in range(len(rows))]
        joined = [[*prompt, *completions[i]] for i, (prompt, _) in enumerate(rows)]
        results = [(0.0, 0)] * len(rows)
        scored = [i for i in range(len(rows)) if completions[i]]
        # The logits of all positions are in memory, so batches are smaller than for generation.
        for batch in self._longest_first(scored, joined, max(1, self._batch_size // 4)):
            log_p = self._token_log_probabilities([joined[i] for i in batch])
            for row, i in enumerate(batch):
                first = len(rows[i][0]) - 1
                last = first + len(completions[i])
                results[i] = (-float(log_p[row, first:last].sum()), len(completions[i]))
        return results

    def _longest_first(
        self, chosen: Sequence[int], rows: Sequence[Sequence[int]], size: int
    ) -> Iterator[list[int]]:
        """Group rows of similar length, by their indices."""
        order = sorted(chosen, key=lambda i: -len(rows[i]))
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _token_log_probabilities(self, token_ids: Sequence[list[int]]) -> Any:
        """Return log p of every token but the first, of shape (rows, longest row - 1)."""
        import torch

        rows = [torch.tensor(ids) for ids in token_ids]
        padded = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self._tokenizer.pad_token_id
        ).to(self._device)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True
        ).to(self._device)
        with torch.inference_mode():
            logits = self._model(input_ids=padded, attention_mask=mask).logits[:, :-1].float()
        return -torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), padded[:, 1:], reduction="none"
        )

    @property
    def _device(self) -> Any:
        return next(self._model.parameters()).device

    def _pad(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Pad on the left, so that the last position of every row is its last token."""
        import torch

        width = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=self._device),
            "attention_mask": torch.tensor(mask, device=self._device),
        }

    def _config(self, sampling: Sampling) -> Any:
        from transformers import GenerationConfig

        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            options = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
            }
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.num_return_sequences,
            eos_token_id=self._ends,
            pad_token_id=self._tokenizer.pad_token_id,
            **options,
        )

    def _drop_generation_defaults(self) -> None:
        """Drop the model's sampling defaults, such as Qwen2.5's repetition penalty, so that all
        models are sampled alike."""
        from transformers import GenerationConfig

        plain = GenerationConfig(eos_token_id=self._ends, pad_token_id=self._tokenizer.pad_token_id)
        self._model.generation_config = plain
        if hasattr(self._model, "get_base_model"):
            self._model.get_base_model().generation_config = plain

    def _to_answer(self, ids: list[int], limit: int) -> Generated:
        ends = set(self._ends)
        length = next((i for i, token in enumerate(ids) if token in ends), None)
        kept = ids if length is None else ids[:length]
        text = self._renderer.answer(self._tokenizer.decode(kept, skip_special_tokens=True))
        truncated = length is None and len(ids) >= limit
        return Generated(text, len(kept), truncated)


def end_tokens(model: Any, tokenizer: Any, renderer: Renderer) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's end token, those of the model's
    configuration (Llama 3 has three), and the special token that the template writes.

    The last is needed because a base model such as Qwen2.5 declares <|endoftext|> as its end token,
    while its chat template teaches it to write <|im_end|>.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    if not isinstance(configured, list):
        configured = [configured]
    ends = {tokenizer.eos_token_id, *configured, *renderer.end_token_ids} - {None}
    return sorted(ends)


def _batch_seed(ids: Sequence[str], seed: int) -> int:
    text = "\n".join((str(seed), *ids))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
