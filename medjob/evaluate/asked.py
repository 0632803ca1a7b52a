"""All ways in which the multiple-choice rows of an evaluation are asked, and what a model chose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medjob.artifacts.finished_rows import Row
from medjob.config.judge import EvaluateParams
from medjob.config.prepare import Style
from medjob.data.styles import take_apart
from medjob.evaluate.mcq import chosen_option
from medjob.evaluate.metrics import Choice
from medjob.evaluate.option_orders import Variant, reordered, with_abstention
from medjob.generate.protocol import Generated

Answers = Mapping[str, Generated]


@dataclass(frozen=True, slots=True)
class Asked:
    """The other ways in which rows are asked."""

    orders: Mapping[str, Sequence[Variant]]
    """By row id, the row with its options in other orders; nothing for a row whose options refer to
    letters or places. Empty if `run.evaluate.option_shuffles` is 0."""
    abstaining: Mapping[str, Variant]
    """By row id, the row with an option to abstain. Empty if `run.evaluate.abstain_option` is
    false."""

    @classmethod
    def of(cls, rows: Sequence[Row], params: EvaluateParams, seed: int) -> Asked:
        """Build the variants of the multiple-choice rows."""
        choices = [row for row in rows if row["kind"] == "multiple_choice"]
        orders: dict[str, Sequence[Variant]] = {}
        if params.option_shuffles:
            orders = {row["id"]: reordered(row, params.option_shuffles, seed) for row in choices}
        abstaining = {}
        if params.abstain_option:
            variants = ((row["id"], with_abstention(row)) for row in choices)
            abstaining = {row_id: variant for row_id, variant in variants if variant}
        return cls(orders, abstaining)

    def reordered_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with their options in other orders, as rows to answer and to score. They
        have no prompts yet."""
        return [_as_row(row, each) for row in rows for each in self.orders.get(row["id"], ())]

    def abstaining_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with an option to abstain, as rows to answer. They have no prompts
        yet."""
        variants = ((row, self.abstaining.get(row["id"])) for row in rows)
        return [_as_row(row, variant) for row, variant in variants if variant]

    def orders_of(
        self, row: Row, answers: Answers, letters: Mapping[str, str], style: Style
    ) -> list[Choice]:
        """Return what a model chose in each order of a row's options, the row's own order first.

        Nothing if no row is reordered. In a shard, some orders may be missing.

        Args:
            answers: One model's answers, by prompt id.
            letters: Its likeliest letters, by prompt id.
        """
        if row["id"] not in self.orders:
            return []
        options = json.loads(row["options"])
        own = Variant(row["id"], row["message"], options, {letter: letter for letter in options})
        variants = [own, *self.orders[row["id"]]]
        return [_choice(each, answers, letters, style) for each in variants if each.id in answers]

    def abstention_of(self, row: Row, answers: Answers, style: Style) -> Choice | None:
        """Return what a model chose with the option to abstain, if the row was asked with it."""
        variant = self.abstaining.get(row["id"])
        if variant is None or variant.id not in answers:
            return None
        return _choice(variant, answers, {}, style)


def _as_row(row: Row, variant: Variant) -> Row:
    return row | {
        "id": variant.id,
        "message": variant.message,
        "options": json.dumps(variant.options, ensure_ascii=False),
        "prompt_ids": None,
        "completion_ids": [],
    }


def _choice(variant: Variant, answers: Answers, letters: Mapping[str, str], style: Style) -> Choice:
    response = take_apart(style, answers[variant.id].text).response
    stated = chosen_option(response, variant.options)
    likeliest = letters.get(variant.id)
    return Choice(
        stated=None if stated is None else variant.original[stated],
        likeliest=None if likeliest is None else variant.original[likeliest],
    )
