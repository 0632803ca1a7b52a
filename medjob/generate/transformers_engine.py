"""The `transformers` engine: generates answers and scores next tokens, in this process."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from medjob.data.render import Renderer
from medjob.errors import RetryError
from medjob.generate.protocol import (
    UNLIMITED,
    Batches,
    Generated,
    Prompt,
    Sampling,
    answer_of,
)
from medjob.plan.settings import position_limit
from medjob.train.device import free_memory

_log = logging.getLogger(__name__)
_CONTINUOUS_PROMPTS = 512
"""Prompts given to continuous batching at a time, enough to keep a GPU busy to the end of most."""


def transformers_batches(
    prompts: Sequence[Prompt], size: int, continuous: bool
) -> list[list[Prompt]]:
    """Group prompts into batches of similar length, longest first. Prompts about the same thing,
    such as `row/0/accuracy` and `row/0/completeness`, stay together: they share a prefix.

    Args:
        size: Prompts of a padded batch. Continuous batching gets hundreds at a time.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(_subject(prompt), []).append(prompt)
    for group in groups.values():
        group.sort(key=lambda prompt: (-len(prompt.ids), prompt.id))
    size = max(size, _CONTINUOUS_PROMPTS) if continuous else size
    batches: list[list[Prompt]] = []
    for subject in sorted(groups, key=lambda subject: (-len(groups[subject][0].ids), subject)):
        if not batches or len(batches[-1]) + len(groups[subject]) > size:
            batches.append([])
        batches[-1] += groups[subject]
    return batches


def _subject(prompt: Prompt) -> str:
    return prompt.id.rpartition("/")[0] or prompt.id


class TransformersEngine:
    """Continuous batching on a GPU, and padded batches of similar length on other devices.

    On a CPU, padding is faster: 90-160 tokens/s, against 59-76 with continuous batching (a model of
    135 M parameters on 2 cores).
    """

    name = "transformers"

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
        self._ends = end_tokens(model.generation_config, tokenizer, renderer)
        self._positions = position_limit(model.config) or UNLIMITED
        self._drop_generation_defaults()
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._takes_positions = "position_ids" in inspect.signature(bare.forward).parameters
        # Sliding windows and states of Mamba forget what a prefix was padded with.
        config = model.config.get_text_config()
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        plain = layers == {"full_attention"} and not getattr(config, "sliding_window", None)
        self._keeps_prefixes = self._takes_positions and plain
        self._batch_size = batch_size
        self._seed = seed
        on_gpu = self._device.type == "cuda"
        self._continuous = on_gpu if continuous is None else continuous
        # On a GPU the cache takes the free memory. Without limits it takes 12 GB on a CPU.
        cpu_limits = {"num_blocks": 64, "page_size": 32, "max_batch_tokens": 256}
        self._cache_limits = {} if on_gpu else cpu_limits

    def batches(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """Group prompts into batches of similar length, longest first."""
        return transformers_batches(prompts, self._batch_size, self._continuous)

    def generate(
        self, batches: Batches, sampling: Sampling
    ) -> Iterator[tuple[str, list[Generated]]]:
        """Sample the answers to one batch after the other."""
        for batch in batches:
            answers = self._generate(batch, sampling)
            yield from zip([prompt.id for prompt in batch], answers, strict=True)

    def _generate(self, batch: Sequence[Prompt], sampling: Sampling) -> list[list[Generated]]:
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
        answers = [
            answer_of(ids, room, self._ends, self._tokenizer, self._renderer) for ids in token_ids
        ]
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
        made = iter(self._generate(fitting, sampling) if fitting else [])
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
        self, batches: Batches, start: str, choices: Sequence[str]
    ) -> Iterator[tuple[str, list[float]]]:
        """Yield the softmax over the choices' logits, after one forward pass per prompt."""
        import torch

        shared, tokens = self._renderer.choice_tokens(start, choices)
        equal = [1 / len(choices)] * len(choices)
        for batch in batches:
            fitting = [each for each in batch if len(each.ids) + len(shared) <= self._positions]
            if len(fitting) < len(batch):
                count = len(batch) - len(fitting)
                _log.warning("%d prompts exceed the model's %d positions", count, self._positions)
                yield from ((each.id, equal) for each in batch if each not in fitting)
            for part in self._parts(fitting):
                subjects = [_subject(each) for each in part]
                logits = self._last_logits([[*each.ids, *shared] for each in part], subjects)
                found = torch.softmax(logits[:, tokens].float(), dim=-1).tolist()
                yield from zip([each.id for each in part], found, strict=True)

    def _parts(self, batch: Sequence[Prompt], size: int | None = None) -> Iterator[list[Prompt]]:
        """Divide a batch into parts of at most `size` prompts, by default the batch size."""
        size = size or self._batch_size
        for start in range(0, len(batch), size):
            yield list(batch[start : start + size])

    def _last_logits(self, rows: list[list[int]], subjects: Sequence[str]) -> Any:
        """Return the logits after each row, of shape (rows, vocabulary).

        What rows of the same subject begin with is computed once, if the model's cache allows it.
        """
        import torch

        prefixes = _shared_prefixes(rows, subjects)
        saved = sum(map(len, rows)) - sum(map(len, prefixes.values()))
        with torch.inference_mode():
            if not self._keeps_prefixes or len(prefixes) == len(rows) or not saved:
                return self._forward(self._pad(rows)).logits[:, -1]
            order = list(prefixes)
            inputs = self._pad([prefixes[subject] for subject in order])
            cache = self._forward(inputs, use_cache=True).past_key_values
            chosen = torch.tensor([order.index(each) for each in subjects], device=self._device)
            cache.batch_select_indices(chosen)
            rest = self._pad(
                [row[len(prefixes[each]) :] for row, each in zip(rows, subjects, strict=True)]
            )
            mask = torch.cat([inputs["attention_mask"][chosen], rest["attention_mask"]], dim=1)
            positions = _positions(mask)[:, -rest["input_ids"].shape[1] :]
            rest |= {"attention_mask": mask, "position_ids": positions}
            return self._forward(rest, past_key_values=cache).logits[:, -1]

    def _forward(self, inputs: dict[str, Any], **options: Any) -> Any:
        """Call the model for the logits of the last position. Padding on the left takes no
        positions, which matters to models that learn an embedding of each."""
        if self._takes_positions and "position_ids" not in inputs:
            inputs = {**inputs, "position_ids": _positions(inputs["attention_mask"])}
        return self._model(**inputs, **options, logits_to_keep=1)

    def negative_log_likelihoods(
        self, batches: Batches, completions: Mapping[str, Sequence[int]]
    ) -> Iterator[tuple[str, tuple[float, int]]]:
        """Yield the figures of one batch after the other."""
        # The logits of all positions are in memory, so batches are smaller than for generation.
        size = max(1, self._batch_size // 4)
        for part in (part for batch in batches for part in self._parts(batch, size)):
            kept = {
                each.id: list(completions[each.id])[: max(0, self._positions - len(each.ids))]
                for each in part
            }
            yield from ((each.id, (0.0, 0)) for each in part if not kept[each.id])
            scored = [each for each in part if kept[each.id]]
            if scored:
                log_p = self._token_log_probabilities(
                    [[*each.ids, *kept[each.id]] for each in scored]
                )
                for row, each in enumerate(scored):
                    first, count = len(each.ids) - 1, len(kept[each.id])
                    total = -float(log_p[row, first : first + count].sum())
                    yield each.id, (total, count)

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None
        free_memory()

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


def _shared_prefixes(rows: list[list[int]], subjects: Sequence[str]) -> dict[str, list[int]]:
    """Return what all rows of each subject begin with. At least one token of every row follows."""
    prefixes: dict[str, list[int]] = {}
    for row, subject in zip(rows, subjects, strict=True):
        common = prefixes.get(subject, row[:-1])
        pairs = enumerate(zip(common, row[:-1], strict=False))
        end = next((i for i, (a, b) in pairs if a != b), min(len(common), len(row) - 1))
        prefixes[subject] = common[:end]
    return prefixes


def _positions(mask: Any) -> Any:
    """Number the tokens of each row from 0, without its padding."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def end_tokens(config: Any, tokenizer: Any, renderer: Renderer) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's end token, those of the model's
    generation configuration (Llama 3 has three), and the special token that the template writes.

    The last is needed because a base model such as Qwen2.5 declares <|endoftext|> as its end token,
    while its chat template teaches it to write <|im_end|>.
    """
    configured = getattr(config, "eos_token_id", None)
    if not isinstance(configured, list):
        configured = [configured]
    ends = {tokenizer.eos_token_id, *configured, *renderer.end_token_ids} - {None}
    return sorted(ends)


def _batch_seed(ids: Sequence[str], seed: int) -> int:
    text = "\n".join((str(seed), *ids))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
