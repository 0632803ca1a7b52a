"""Render prompts and answers as text, and encode text as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from medjob.config.prepare import PromptParams
from medjob.errors import ConfigError

# Placeholders. The asterisms occur in no template and in no row.
_QUESTION = "\u2042question\u2042"
_ANSWER = "\u2042answer\u2042"


class Renderer:
    """Renders prompts and answers by joining strings, about 20 times faster than the chat template.

    The template is rendered once per system message, with placeholders. `check` compares a row with
    the output of the template.
    """

    def __init__(self, tokenizer: Any, params: PromptParams) -> None:
        if params.template is None and not tokenizer.chat_template:
            raise ConfigError(
                "run.base_model: the tokenizer has no chat template",
                'set run.prompt.template, for example "Question: {question}\\nAnswer: "',
            )
        self._tokenizer = tokenizer
        self._params = params
        self._frames: dict[str, tuple[str, str, str]] = {}

    def prompt(self, question: str, system: str = "") -> str:
        """Return the text that a model continues with its answer."""
        before, after, _ = self._frame(system)
        return before + question + after

    def completion(self, answer: str, system: str = "") -> str:
        """Return the text that a model is trained to write, including its end token."""
        _, _, end = self._frame(system)
        return answer + end

    def check(self, question: str, answer: str, system: str = "") -> None:
        """Compare the joined strings with the output of the chat template.

        Raises:
            ConfigError: the template changes questions or answers. DeepSeek-R1's, for example,
                drops the text before `</think>`.
        """
        if self._params.template is not None:
            return
        joined = self.prompt(question, system) + self.completion(answer, system)
        if self._apply_template(question, answer, system) != joined:
            raise ConfigError(
                "run.base_model: the chat template changes questions or answers",
                "set run.prompt.template to a raw prompt",
            )

    def _frame(self, system: str) -> tuple[str, str, str]:
        """Return the texts before the question, between it and the answer, and after the answer."""
        if system not in self._frames:
            is_raw = self._params.template is not None
            self._frames[system] = self._raw_frame() if is_raw else self._chat_frame(system)
        return self._frames[system]

    def _raw_frame(self) -> tuple[str, str, str]:
        assert self._params.template is not None
        before, after = self._params.template.split("{question}")
        start = self._tokenizer.bos_token or ""
        end = self._tokenizer.eos_token or ""
        return start + before, after, end

    def _chat_frame(self, system: str) -> tuple[str, str, str]:
        try:
            text = self._apply_template(_QUESTION, _ANSWER, system)
        except TemplateError as error:  # Gemma's, for example, accepts no system message
            raise ConfigError(
                f"run.prompt: the model's chat template rejects the messages: {error}",
                "remove run.prompt.system, or set run.prompt.template",
            ) from None
        prompt = self._tokenizer.apply_chat_template(
            self._messages(_QUESTION, system), tokenize=False, add_generation_prompt=True
        )
        before, found, after = prompt.partition(_QUESTION)
        if not found or not text.startswith(prompt + _ANSWER):
            raise ConfigError(
                "run.base_model: the chat template inserts text between prompt and answer",
                "set run.prompt.template to a raw prompt",
            )
        end = text.removeprefix(prompt + _ANSWER)
        return before, after, end

    def _apply_template(self, question: str, answer: str, system: str) -> str:
        messages = self._messages(question, system)
        messages.append({"role": "assistant", "content": answer})
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))

    def _messages(self, question: str, system: str) -> list[dict[str, str]]:
        system = system or self._params.system or ""
        user = {"role": "user", "content": question}
        return [{"role": "system", "content": system}, user] if system else [user]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without adding special tokens. Uses all cores."""
    if not texts:
        return []
    if tokenizer.is_fast:
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"])
