"""The `transformers` engine: generates answers and scores next tokens, in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from medjob.data.render import encode
from medjob.errors import ConfigError, RetryError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are sampled. Temperature 0 is greedy decoding."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_return_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt. Its samples depend only on the ids of its batch and the seed."""

    id: str
    text: str


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
        end: str = "",
        continuous: bool | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            end: Text that the prompt layout puts after an answer. Its first token also ends a
                generation.
            continuous: Whether to use continuous batching. By default, only on a GPU.
        """
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._ends = self._end_tokens(end)
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
        lengths = [len(ids) for ids in encode(self._tokenizer, [prompt.text for prompt in prompts])]
        order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], prompts[i].id))
        ordered = [prompts[i] for i in order]
        return [
            ordered[start : start + self._batch_size]
            for start in range(0, len(ordered), self._batch_size)
        ]

    def generate(self, batch: Sequence[Prompt], sampling: Sampling) -> list[list[Generated]]:
        """Generate `num_return_sequences` answers to each prompt of one batch."""
        seed = _batch_seed([prompt.id for prompt in batch], self._seed)
        texts = [prompt.text for prompt in batch]
        if self._continuous:
            token_ids = self._generate_continuously(texts, sampling, seed)
        else:
            token_ids = self._generate_padded(texts, sampling, seed)
        answers = [self._to_answer(ids, sampling.max_new_tokens) for ids in token_ids]
        n = sampling.num_return_sequences
        return [answers[start : start + n] for start in range(0, len(batch) * n, n)]

    def _generate_padded(
        self, texts: Sequence[str], sampling: Sampling, seed: int
    ) -> list[list[int]]:
        import torch

        inputs = self._pad(texts)
        torch.manual_seed(seed)
        with torch.inference_mode():
            output = self._model.generate(**inputs, generation_config=self._config(sampling))
        width = inputs["input_ids"].shape[1]
        token_ids: list[list[int]] = output[:, width:].tolist()
        return token_ids

    def _generate_continuously(
        self, texts: Sequence[str], sampling: Sampling, seed: int
    ) -> list[list[int]]:
        """Return the tokens of every answer. The answers to one prompt are adjacent."""
        from transformers import ContinuousBatchingConfig

        outputs = self._model.generate_batch(
            inputs=encode(self._tokenizer, texts),
            generation_config=self._config(sampling),
            continuous_batching_config=ContinuousBatchingConfig(seed=seed, **self._cache_limits),
        )
        token_ids = [
            list(output.generated_tokens) for output in outputs.values() if output.error is None
        ]
        lost = len(texts) * sampling.num_return_sequences - len(token_ids)
        if lost:
            raise RetryError(f"continuous batching lost {lost} answers", "run the stage again")
        return token_ids

    def choice_probabilities(
        self, texts: Sequence[str], choices: Sequence[str]
    ) -> Iterator[list[float]]:
        """Return, for each text, the probabilities of `choices` as the next word. They sum to 1.

        This takes one forward pass per prompt and samples nothing, so it is reproducible.
        """
        import torch

        space, tokens = self._choice_tokens(choices)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found: dict[int, list[float]] = {}
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            inputs = self._pad([texts[i] + space for i in rows])
            with torch.inference_mode():
                logits = self._model(**inputs, logits_to_keep=1).logits[:, -1, tokens]
            probabilities = torch.softmax(logits.float(), dim=-1).tolist()
            found.update(zip(rows, probabilities, strict=True))
        return iter([found[i] for i in range(len(texts))])

    def negative_log_likelihoods(self, rows: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """Return, for each (prompt, completion), the sum of -log p over the completion's tokens in
        nats, and the number of these tokens."""
        prompts = encode(self._tokenizer, [prompt for prompt, _ in rows])
        completions = encode(self._tokenizer, [completion for _, completion in rows])
        order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]) - len(completions[i]))
        results: dict[int, tuple[float, int]] = {}
        # The logits of all positions are in memory, so batches are smaller than for generation.
        size = max(1, self._batch_size // 4)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            log_p = self._token_log_probabilities([prompts[i] + completions[i] for i in batch])
            for row, i in enumerate(batch):
                first = len(prompts[i]) - 1
                last = first + len(completions[i])
                results[i] = (-float(log_p[row, first:last].sum()), len(completions[i]))
        return [results[i] for i in range(len(rows))]

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

    def _pad(self, texts: Sequence[str]) -> dict[str, Any]:
        """Pad on the left, so that the last position of every row is its last token."""
        import torch

        rows = encode(self._tokenizer, texts)
        width = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + row for row in rows]
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

    def _end_tokens(self, end: str) -> list[int]:
        """Collect the tokens that end an answer: the tokenizer's end token, those of the model's
        configuration (Llama 3 has three), and the first token of `end`.

        The last is needed because a base model such as Qwen2.5 declares <|endoftext|> as its end
        token, while its chat template teaches it to write <|im_end|>.
        """
        configured = getattr(self._model.generation_config, "eos_token_id", None) or []
        if not isinstance(configured, list):
            configured = [configured]
        layout = encode(self._tokenizer, [end])[0][:1] if end else []
        return sorted({self._tokenizer.eos_token_id, *configured, *layout})

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
        text = self._tokenizer.decode(kept, skip_special_tokens=True).strip()
        truncated = length is None and len(ids) >= limit
        return Generated(text, len(kept), truncated)

    def _choice_tokens(self, choices: Sequence[str]) -> tuple[str, list[int]]:
        """Return the space that must follow a text, if any, and then the token of each choice.

        It follows how a model writes a choice: " A" is one token in most vocabularies, and " 3" is
        a space and a digit in some.

        Raises:
            ConfigError: a choice is not a single token.
        """
        spaced = [encode(self._tokenizer, [f" {choice}"])[0] for choice in choices]
        if all(len(ids) == 1 for ids in spaced):
            return "", [ids[0] for ids in spaced]
        if all(len(ids) == 2 and ids[0] == spaced[0][0] for ids in spaced):
            return " ", [ids[1] for ids in spaced]
        raise ConfigError(
            f"the model's tokenizer has no single tokens for {', '.join(choices)}",
            "use another judge, or run.judge.kind=overlap",
        )


def _batch_seed(ids: Sequence[str], seed: int) -> int:
    text = "\n".join((str(seed), *ids))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
