"""Build the rows that the other stages read from records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from medjob.config.prepare import PromptParams
from medjob.data.formats import Record
from medjob.data.render import Renderer, encode
from medjob.data.styles import format_answer

_TEXT = ("id", "source", "question", "prompt")
TRAIN_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_TEXT, "completion")]
    + [("prompt_tokens", pa.int32()), ("input_ids", pa.list_(pa.int32()))]
)
PREFERENCE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_TEXT, "reference", "chosen", "rejected", "label_type")]
)
EVALUATION_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (*_TEXT, "system", "kind", "reference", "completion", "options", "answer_idx")
    ]
)


def write_rows(writer: Any, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Append `rows` to an open Parquet file."""
    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema))


_CHOICE_TASK = "Choose the one correct option. End with a line of the form: The answer is X."


def question_text(record: Record) -> str:
    """Return the text of the user's message: the passage and the question. Multiple choice includes
    the options and the task."""
    question = f"{record.context}\n\n{record.question}" if record.context else record.question
    if not record.options:
        return question
    options = "\n".join(f"{letter}. {text}" for letter, text in record.options.items())
    return f"{question}\n\n{options}\n\n{_CHOICE_TASK}"


class RowBuilder:
    """Renders and tokenises records in batches."""

    def __init__(self, tokenizer: Any, params: PromptParams) -> None:
        self._tokenizer = tokenizer
        self._style = params.style
        self._renderer = Renderer(tokenizer, params)

    def train(self, batch: Sequence[tuple[Record, str]]) -> list[dict[str, Any]]:
        """Build rows of TRAIN_SCHEMA. Prompt and completion are tokenised separately, as they are
        when a model generates."""
        if not batch:
            return []
        first_record, _ = batch[0]
        self._check(first_record)
        rows = [
            self._base(record, source) | {"completion": self._completion(record)}
            for record, source in batch
        ]
        prompts = encode(self._tokenizer, [row["prompt"] for row in rows])
        completions = encode(self._tokenizer, [row["completion"] for row in rows])
        for row, prompt, completion in zip(rows, prompts, completions, strict=True):
            row |= {"prompt_tokens": len(prompt), "input_ids": prompt + completion}
        return rows

    def preference(self, record: Record, source: str) -> dict[str, Any]:
        """Build a row of PREFERENCE_SCHEMA."""
        return self._base(record, source) | {
            "reference": record.reference or record.response or record.chosen,
            "chosen": record.chosen,
            "rejected": record.rejected,
            "label_type": record.label_type,
        }

    def evaluation(self, record: Record, source: str) -> dict[str, Any]:
        """Build a row of EVALUATION_SCHEMA. Perplexity is computed over its completion."""
        if record.kind == "multiple_choice":
            reference = record.reference
        else:
            reference = record.response or record.reference
        return self._base(record, source) | {
            "completion": self._completion(record),
            "system": record.system,
            "kind": record.kind,
            "reference": reference,
            "options": json.dumps(record.options, ensure_ascii=False),
            "answer_idx": record.answer_idx,
        }

    def _base(self, record: Record, source: str) -> dict[str, Any]:
        question = question_text(record)
        return {
            "id": record.id,
            "source": source,
            "question": question,
            "prompt": self._renderer.prompt(question, record.system),
        }

    def _completion(self, record: Record) -> str:
        return self._renderer.completion(self._answer(record), record.system)

    def _answer(self, record: Record) -> str:
        return format_answer(self._style, record.reasoning, record.response)

    def _check(self, record: Record) -> None:
        self._renderer.check(question_text(record), self._answer(record), record.system)
