"""Build the rows that the other stages read from records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

from medjob.config.prepare import PromptParams
from medjob.data.dialogues import Exchange
from medjob.data.formats import Record
from medjob.data.render import Conversation, Renderer
from medjob.data.styles import format_answer
from medjob.data.turns import Answer, TrainingRow, training_rows

_TEXT = ("id", "source", "question", "prompt")
TRAIN_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_TEXT, "completion")]
    + [("prompt_tokens", pa.int32()), ("input_ids", pa.list_(pa.int32()))]
    + [("completion_mask", pa.list_(pa.int8())), ("is_last", pa.bool_())]
)
"""A training row is a conversation. `prompt` and `prompt_tokens` are what precedes its last answer,
and `completion` is that answer. `completion_mask`, as in TRL, has a 1 for each token of `input_ids`
that belongs to a trained answer or is its end token. `is_last` is false for rows of earlier answers
of a dialogue; all rows of a dialogue have the same `id`."""
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
            *("kind", "reference", "options", "answer_idx", "subject"),
        )
    ]
    + [("prompt_ids", pa.list_(pa.int32())), ("completion_ids", pa.list_(pa.int32()))]
)


RUBRIC = pa.field("rubric", pa.string())
"""Column of preference and evaluation rows: the criteria of a good answer, as `criteria.as_json`
writes them. A file without criteria lacks it."""


def write_rows(writer: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Append `rows` to an open Parquet file, without what its schema lacks."""
    if rows:
        writer.write_table(pa.Table.from_pylist(rows, writer.schema))


LETTER_START = "The answer is"
"""How an answer that is only a letter begins, to compare the letters' probabilities."""
_CHOICE_TASK = "Choose the one correct option. End with a line of the form: The answer is X."


def question_text(record: Record) -> str:
    """Return the text of the user's message: the passage and the question. Multiple choice includes
    the options and the task."""
    question = f"{record.context}\n\n{record.question}" if record.context else record.question
    return question + _choice_task(record.options) if record.options else question


def _choice_task(options: Mapping[str, str]) -> str:
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return f"\n\n{listed}\n\n{_CHOICE_TASK}"


def without_options(message: str, options: Mapping[str, str]) -> str:
    """Return the passage and question of a multiple-choice message.

    Raises:
        ValueError: it does not end with its options, so `question_text` did not make it.
    """
    end = _choice_task(options)
    if not message.endswith(end):
        raise ValueError("the message does not end with its options")
    return message.removesuffix(end)


def with_options(message: str, options: Mapping[str, str], others: Mapping[str, str]) -> str:
    """Return a multiple-choice message with `others` in the place of its `options`."""
    return without_options(message, options) + _choice_task(others)


def transcript(record: Record) -> str:
    """Return the question as a judge and a reader see it: with the exchanges before it."""
    return _transcript(record.history, question_text(record))


def _transcript(history: Sequence[Exchange], message: str) -> str:
    if not history:
        return message
    turns = [f"User: {each.question}\n\nAssistant: {each.answer}" for each in history]
    return "\n\n".join((*turns, f"User: {message}"))


class RowBuilder:
    """Renders and tokenises records in batches."""

    def __init__(self, tokenizer: Any, params: PromptParams) -> None:
        self._style = params.style
        self._renderer = Renderer(tokenizer, params)
        self.rows_with_control_tokens = 0
        """Rows whose texts spell out control tokens. These are encoded as ordinary text."""

    def train(self, batch: Sequence[tuple[Record, str]]) -> list[dict[str, Any]]:
        """Build rows of TRAIN_SCHEMA, as `train_each`."""
        return [*chain(*self.train_each(batch))]

    def train_each(self, batch: Sequence[tuple[Record, str]]) -> list[list[dict[str, Any]]]:
        """Build the rows of TRAIN_SCHEMA of each record. The prompt's tokens are those that a model
        continues when it generates, and the completion's are those that follow them.

        Raises:
            ConfigError: the chat template changes questions or answers.
        """
        dialogues = [self._answers(record) for record, _ in batch]
        # The first row, and the one with the most turns.
        for answers in [dialogues[0], max(dialogues, key=len)] if batch else ():
            self._renderer.check(answers[-1].conversation, answers[-1].text)
        for (record, _), answers in zip(batch, dialogues, strict=True):
            texts = (*record.parts, *(answer.text for answer in answers))
            self._count_control_tokens(texts)
        built = training_rows(self._renderer, dialogues)
        return [
            [self._train_row(record, source, answers[row.answer], row) for row in rows]
            for (record, source), answers, rows in zip(batch, dialogues, built, strict=True)
        ]

    def _train_row(
        self, record: Record, source: str, answer: Answer, row: TrainingRow
    ) -> dict[str, Any]:
        conversation = answer.conversation
        history = _exchanges(record)[: len(conversation.history)]
        return {
            "id": record.id,
            "source": source,
            "question": _transcript(history, conversation.question),
            "prompt": self._renderer.prompt(conversation),
            "completion": self._renderer.completion(answer.text),
            "prompt_tokens": len(row.prompt_ids),
            "input_ids": row.prompt_ids + row.completion_ids,
            "completion_mask": _mask(row),
            "is_last": row.is_last,
        }

    def preferences(self, batch: Sequence[tuple[Record, str]]) -> list[dict[str, Any]]:
        """Build rows of PREFERENCE_SCHEMA and RUBRIC."""
        return [
            self._base(record, source)
            | {
                "reference": record.reference or record.response or record.chosen,
                "chosen": record.chosen,
                "rejected": record.rejected,
                "label_type": record.label_type,
                "rubric": record.rubric,
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
        self._renderer.check(self._conversation(first), sides["chosen"][0])
        tokens = {name: self._renderer.completion_ids(texts) for name, texts in sides.items()}
        prompts = self._renderer.prompt_ids([self._conversation(record) for record, _ in batch])
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
        """Build rows of EVALUATION_SCHEMA and RUBRIC. Perplexity is computed over their
        completions. A row with criteria and without an answer has none."""
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
                    "history": json.dumps(self._pairs(record.history), ensure_ascii=False),
                    "answer": self._answer(record),
                    "kind": record.kind,
                    "reference": reference,
                    "options": json.dumps(record.options, ensure_ascii=False),
                    "answer_idx": record.answer_idx,
                    "subject": record.subject,
                    "rubric": record.rubric,
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
            self._count_control_tokens(texts)
        return self._renderer.prompt_ids([self._conversation(record) for record, _ in batch])

    def _count_control_tokens(self, texts: Sequence[str]) -> None:
        self.rows_with_control_tokens += any(map(self._renderer.has_control_token, texts))

    def _completion_ids(self, batch: Sequence[tuple[Record, str]]) -> list[list[int]]:
        ids = self._renderer.completion_ids([self._answer(record) for record, _ in batch])
        without = [bool(r.rubric) and not (r.response or r.reference) for r, _ in batch]
        return [[] if empty else each for each, empty in zip(ids, without, strict=True)]

    def _base(self, record: Record, source: str) -> dict[str, Any]:
        return {
            "id": record.id,
            "source": source,
            "question": transcript(record),
            "prompt": self._renderer.prompt(self._conversation(record)),
        }

    def _answer(self, record: Record) -> str:
        return self._laid_out(record.reasoning, record.response)

    def _laid_out(self, reasoning: str, response: str) -> str:
        return format_answer(self._style, reasoning, response)

    def _conversation(self, record: Record) -> Conversation:
        """Return what a model is asked."""
        return Conversation(question_text(record), record.system, self._pairs(record.history))

    def _pairs(self, exchanges: Sequence[Exchange]) -> list[tuple[str, str]]:
        return [(e.question, format_answer(self._style, e.reasoning, e.answer)) for e in exchanges]

    def _answers(self, record: Record) -> list[Answer]:
        """Return every answer of a dialogue, with what precedes it."""
        exchanges = _exchanges(record)
        pairs = self._pairs(exchanges)
        return [
            Answer(Conversation(question, record.system, pairs[:n]), answer, exchange.is_trained)
            for n, ((question, answer), exchange) in enumerate(zip(pairs, exchanges, strict=True))
        ]


def _mask(row: TrainingRow) -> list[int]:
    """Mark the tokens of a row that belong to an answer, as TRL does."""
    mask = [0] * (len(row.prompt_ids) + len(row.completion_ids))
    for start, end in row.turns:
        mask[start:end] = [1] * (end - start)
    return mask


def _exchanges(record: Record) -> list[Exchange]:
    """Return the whole dialogue of a record."""
    own = Exchange(question_text(record), record.response, record.reasoning)
    return [*record.history, own, *record.later]
