"""The `transformers` engine: answers and next-token scores, in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from medjob.data.render import encode
from medjob.errors import ConfigError, RetryError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_return_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt. What is drawn for it depends on its batch's ids and the seed, never on restarts."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer. `truncated`: the token limit ended it, not the model."""

    text: str
    tokens: int
    truncated: bool


class TransformersEngine:
    """Continuous batching on a GPU, padded batches sorted by length elsewhere.

    On a CPU padding is the faster way: 90-160 against 59-76 tokens/s with a 135 M model on 2 cores. `end` is what the
    prompt layout puts after an answer: its first token ends a generation too.
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
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._ends = self._end_tokens(end)
        self._forget_generation_defaults()
        self._batch_size = batch_size
        self._seed = seed
        self._continuous = self._device.type == "cuda" if continuous is None else continuous
        # On a GPU the cache takes what memory is free; a CPU has to be told, or it takes 12 GB.
        self._blocks = (
            {}
            if self._device.type == "cuda"
            else {"num_blocks": 64, "page_size": 32, "max_batch_tokens": 256}
        )

    def batches(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """All prompts in batches of similar length, longest first; the same for the same prompts, whatever is finished already."""
        lengths = [len(ids) for ids in encode(self._tokenizer, [prompt.text for prompt in prompts])]
        order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], prompts[i].id))
        return [
            [prompts[i] for i in order[start : start + self._batch_size]]
            for start in range(0, len(order), self._batch_size)
        ]

    def generate(self, batch: Sequence[Prompt], sampling: Sampling) -> list[list[Generated]]:
        """Answers to each prompt of one batch, `num_return_sequences` each."""
        import torch

        seed = _seed_of([prompt.id for prompt in batch], self._seed)
        if self._continuous:
            drawn = self._draw_continuously([prompt.text for prompt in batch], sampling, seed)
        else:
            inputs = self._pad([prompt.text for prompt in batch])
            torch.manual_seed(seed)
            with torch.inference_mode():
                output = self._model.generate(**inputs, generation_config=self._config(sampling))
            drawn = output[:, inputs["input_ids"].shape[1] :].tolist()
        answers = [self._answer(ids, sampling.max_new_tokens) for ids in drawn]
        n = sampling.num_return_sequences
        return [answers[i * n : (i + 1) * n] for i in range(len(batch))]

    def _draw_continuously(
        self, texts: Sequence[str], sampling: Sampling, seed: int
    ) -> list[list[int]]:
        """Tokens of each answer, those of one prompt next to each other."""
        from transformers import ContinuousBatchingConfig

        outputs = self._model.generate_batch(
            inputs=encode(self._tokenizer, texts),
            generation_config=self._config(sampling),
            continuous_batching_config=ContinuousBatchingConfig(seed=seed, **self._blocks),
        )
        drawn = [
            list(output.generated_tokens) for output in outputs.values() if output.error is None
        ]
        if len(drawn) != len(texts) * sampling.num_return_sequences:
            raise RetryError(
                f"continuous batching lost {len(texts) * sampling.num_return_sequences - len(drawn)} answers",
                "run it again",
            )
        return drawn

    def choice_probabilities(
        self, texts: Sequence[str], choices: Sequence[str]
    ) -> Iterator[list[float]]:
        """For each text the probabilities of `choices` as its next word, normalised over them.

        One forward pass a prompt and nothing sampled, so the same text always gets the same figures.
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
            found |= dict(zip(rows, torch.softmax(logits.float(), dim=-1).tolist(), strict=True))
        return iter([found[i] for i in range(len(texts))])

    def negative_log_likelihoods(self, rows: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """For each (prompt, completion) the summed -log p of the completion's tokens, in nats, and their number."""
        import torch

        prompts = encode(self._tokenizer, [prompt for prompt, _ in rows])
        completions = encode(self._tokenizer, [completion for _, completion in rows])
        order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]) - len(completions[i]))
        results: dict[int, tuple[float, int]] = {}
        size = max(1, self._batch_size // 4)  # whole logits are held here, vocabulary wide
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            ids = [torch.tensor(prompts[i] + completions[i]) for i in batch]
            padded = torch.nn.utils.rnn.pad_sequence(
                ids, batch_first=True, padding_value=self._tokenizer.pad_token_id
            )
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in ids], batch_first=True
            )
            with torch.inference_mode():
                logits = (
                    self._model(
                        input_ids=padded.to(self._device), attention_mask=mask.to(self._device)
                    )
                    .logits[:, :-1]
                    .float()
                )
            log_p = -torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), padded[:, 1:].to(self._device), reduction="none"
            )
            for row, i in enumerate(batch):
                begin, end = len(prompts[i]) - 1, len(prompts[i]) + len(completions[i]) - 1
                results[i] = (-float(log_p[row, begin:end].sum()), len(completions[i]))
        return [results[i] for i in range(len(rows))]

    @property
    def _device(self) -> Any:
        return next(self._model.parameters()).device

    def _pad(self, texts: Sequence[str]) -> dict[str, Any]:
        """Left-padded batch: the last position of every row is its last token."""
        import torch

        ids = encode(self._tokenizer, texts)
        width = max(map(len, ids))
        pad = self._tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor(
                [[pad] * (width - len(row)) + row for row in ids], device=self._device
            ),
            "attention_mask": torch.tensor(
                [[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self._device
            ),
        }

    def _config(self, sampling: Sampling) -> Any:
        from transformers import GenerationConfig

        draw: dict[str, Any] = (
            {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
            }
            if sampling.temperature
            else {"do_sample": False}
        )
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.num_return_sequences,
            eos_token_id=self._ends,
            pad_token_id=self._tokenizer.pad_token_id,
            **draw,
        )

    def _end_tokens(self, end: str) -> list[int]:
        """The tokenizer's end token, those of the model's own configuration (Llama 3 has three), and the layout's.

        A base model such as Qwen2.5 names <|endoftext|> as its end, and learns from its chat template to write <|im_end|>.
        """
        own = getattr(self._model.generation_config, "eos_token_id", None) or []
        layout = encode(self._tokenizer, [end])[0][:1] if end else []
        return sorted(
            {self._tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *layout}
        )

    def _forget_generation_defaults(self) -> None:
        """Drop a model's own sampling defaults (Qwen2.5 has a repetition penalty), so that all models are asked alike."""
        from transformers import GenerationConfig

        plain = GenerationConfig(eos_token_id=self._ends, pad_token_id=self._tokenizer.pad_token_id)
        self._model.generation_config = plain
        if hasattr(self._model, "get_base_model"):
            self._model.get_base_model().generation_config = plain

    def _answer(self, ids: list[int], limit: int) -> Generated:
        ends = set(self._ends)
        length = next((i for i, token in enumerate(ids) if token in ends), None)
        kept = ids if length is None else ids[:length]
        return Generated(
            self._tokenizer.decode(kept, skip_special_tokens=True).strip(),
            len(kept),
            length is None and len(ids) >= limit,
        )

    def _choice_tokens(self, choices: Sequence[str]) -> tuple[str, list[int]]:
        """What has to follow a text that ends in a word, and the token of each choice after that.

        As a model would write it: " A" is one token in most vocabularies, " 3" a space and a digit in some.

        Raises:
            ConfigError: a choice is no single token.
        """
        spaced = [encode(self._tokenizer, [f" {choice}"])[0] for choice in choices]
        if all(len(ids) == 1 for ids in spaced):
            return "", [ids[0] for ids in spaced]
        if all(len(ids) == 2 and ids[0] == spaced[0][0] for ids in spaced):
            return " ", [ids[1] for ids in spaced]
        raise ConfigError(
            f"the model's tokenizer has no single tokens for {', '.join(choices)}",
            "use another judge, or judge.kind=overlap",
        )


def _seed_of(ids: Sequence[str], seed: int) -> int:
    return int.from_bytes(
        hashlib.blake2b("\n".join((str(seed), *ids)).encode(), digest_size=4).digest(), "big"
    )
