"""Build the rows that the other stages read from records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from medjob.config.prepare import PromptParams
from medjob.data.formats import Record
from medjob.data.render import Conversation, Renderer
from medjob.data.styles import format_answer

_TEXT = ("id", "source", "question", "prompt")
TRAIN_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_TEXT, "completion")]
    + [("prompt_tokens", pa.int32()), ("input_ids", pa.list_(pa.int32()))]
)
PREFERENCE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_TEXT, "reference", "chosen", "rejected", "label_type")]
    + [("prompt_ids", pa.list_(pa.int32()))]
)
PAIR_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_TEXT, "chosen", "rejected", "label_type")]
    + [("prompt_ids", pa.list_(pa.int32())), ("chosen_tokens", pa.int32())]
    + [("rejected_tokens", pa.int32())]
)
EVALUATION_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (
            *(*_TEXT, "message", "system", "history", "answer"),
            *("kind", "reference", "options", "answer_idx"),
        )
    ]
    + [("prompt_ids", pa.list_(pa.int32())), ("completion_ids", pa.list_(pa.int32()))]
)


def write_rows(writer: Any, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Append `rows` to an open Parquet file."""
    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema))


LETTER_START = "The answer is"
"""How an answer that is only a letter begins, to compare the letters' probabilities."""
_CHOICE_TASK = "Choose the one correct option. End with a line of the form: The answer is X."


def question_text(record: Record) -> str:
    """Return the text of the user's message: the passage and the question. Multiple choice includes
    the options and the task."""
    question = f"{record.context}\n\n{record.question}" if record.context else record.question
    if not record.options:
        return question
    options = "\n".join(f"{letter}. {text}" for letter, text in record.options.items())
    return f"{question}\n\n{options}\n\n{_CHOICE_TASK}"


def transcript(record: Record) -> str:
    """Return the question as a judge and a reader see it: with the exchanges before it."""
    message = question_text(record)
    if not record.history:
        return message
    turns = [f"User: {question}\n\nAssistant: {answer}" for question, answer in record.history]
    return "\n\n".join((*turns, f"User: {message}"))


class RowBuilder:
    """Renders and tokenises records in batches."""

    def __init__(self, tokenizer: Any, params: PromptParams) -> None:
        self._style = params.style
        self._renderer = Renderer(tokenizer, params)
        self.rows_with_control_tokens = 0
        """Rows whose texts spell out control tokens. These are encoded as ordinary text."""

    def train(self, batch: Sequence[tuple[Record, str]]) -> list[dict[str, Any]]:
        """Build rows of TRAIN_SCHEMA. The prompt's tokens are those that a model continues when it
        generates, and the completion's are those that follow them.

        Raises:
            ConfigError: the chat template changes questions or answers.
        """
        if not batch:
            return []
        first_record, _ = batch[0]
        self._renderer.check(conversation(first_record), self._answer(first_record))
        rows = [
            self._base(record, source)
            | {"completion": self._renderer.completion(self._answer(record))}
            for record, source in batch
        ]
        prompts = self._prompt_ids(batch)
        completions = self._completion_ids(batch)
        for row, prompt, completion in zip(rows, prompts, completions, strict=True):
            row |= {"prompt_tokens": len(prompt), "input_ids": prompt + completion}
        return rows

    def preferences(self, batch: Sequence[tuple[Record, str]]) -> list[dict[str, Any]]:
        """Build rows of PREFERENCE_SCHEMA."""
        return [
            self._base(record, source)
            | {
                "reference": record.reference or record.response or record.chosen,
                "chosen": record.chosen,
                "rejected": record.rejected,
                "label_type": record.label_type,
                "prompt_ids": ids,
            }
            for (record, source), ids in zip(batch, self._prompt_ids(batch), strict=True)
        ]

    def pairs(self, batch: Sequence[tuple[Record, str]]) -> list[dict[str, Any]]:
        """Build rows of PAIR_SCHEMA. Both answers have the run's layout, each with the reasoning
        that is inside it."""
        if not batch:
            return []
        sides = {
            "chosen": [self._laid_out(r.chosen_reasoning, r.chosen) for r, _ in batch],
            "rejected": [self._laid_out(r.rejected_reasoning, r.rejected) for r, _ in batch],
        }
        first, _ = batch[0]
        self._renderer.check(conversation(first), sides["chosen"][0])
        tokens = {name: self._renderer.completion_ids(texts) for name, texts in sides.items()}
        prompts = self._renderer.prompt_ids([conversation(record) for record, _ in batch])
        return [
            self._base(record, source)
            | {
                "chosen": sides["chosen"][number],
                "rejected": sides["rejected"][number],
                "label_type": record.label_type,
                "prompt_ids": ids,
                "chosen_tokens": len(tokens["chosen"][number]),
                "rejected_tokens": len(tokens["rejected"][number]),
            }
            for number, ((record, source), ids) in enumerate(zip(batch, prompts, strict=True))
        ]

    def evaluation(self, batch: Sequence[tuple[Record, str]]) -> list[dict[str, Any]]:
        """Build rows of EVALUATION_SCHEMA. Perplexity is computed over their completions."""
        rows = []
        ids = zip(batch, self._prompt_ids(batch), self._completion_ids(batch), strict=True)
        for (record, source), prompt, completion in ids:
            reference = record.response or record.reference
            if record.kind == "multiple_choice":
                reference = record.reference
            rows.append(
                self._base(record, source)
                | {
                    "message": question_text(record),
                    "system": record.system,
                    "history": json.dumps(record.history, ensure_ascii=False),
                    "answer": self._answer(record),
                    "kind": record.kind,
                    "reference": reference,
                    "options": json.dumps(record.options, ensure_ascii=False),
                    "answer_idx": record.answer_idx,
                    "prompt_ids": prompt,
                    "completion_ids": completion,
                }
            )
        return rows

    def check_letters(self, options: Sequence[str]) -> None:
        """Raise ConfigError if the model's tokenizer does not tell these option letters apart."""
        self._renderer.choice_tokens(LETTER_START, options)

    def _prompt_ids(self, batch: Sequence[tuple[Record, str]]) -> list[list[int]]:
        for record, _ in batch:
            texts = (*record.parts, self._answer(record), record.chosen)
            self.rows_with_control_tokens += any(map(self._renderer.has_control_token, texts))
        return self._renderer.prompt_ids([conversation(record) for record, _ in batch])

    def _completion_ids(self, batch: Sequence[tuple[Record, str]]) -> list[list[int]]:
        return self._renderer.completion_ids([self._answer(record) for record, _ in batch])

    def _base(self, record: Record, source: str) -> dict[str, Any]:
        return {
            "id": record.id,
            "source": source,
            "question": transcript(record),
            "prompt": self._renderer.prompt(conversation(record)),
        }

    def _answer(self, record: Record) -> str:
        return self._laid_out(record.reasoning, record.response)

    def _laid_out(self, reasoning: str, response: str) -> str:
        return format_answer(self._style, reasoning, response)


def conversation(record: Record) -> Conversation:
    """Return what a model is asked."""
    return Conversation(question_text(record), record.system, record.history)
