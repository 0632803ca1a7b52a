"""dpo: direct preference optimization of the SFT model, or of the base, on preference pairs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from medjob.config.train import DpoParams
from medjob.data.render import Renderer
from medjob.data.text import question_hash
from medjob.errors import DataError
from medjob.stage import Metrics, TrainingContext
from medjob.train.arguments import training_arguments
from medjob.train.fit import usable_length
from medjob.train.labels import CHECKED_ROWS, check_labels
from medjob.train.model import load_tokenizer
from medjob.train.start import trainable_model
from medjob.train.strategy import base_spec, decide
from medjob.train.trainer import TrainerMixin, check_validation, train_and_save

_log = logging.getLogger(__name__)


class _DpoTrainer(TrainerMixin, DPOTrainer):
    """Takes tokenised rows. TRL would add a second begin-of-text token to rendered text."""

    def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
        return dataset


def run(context: TrainingContext) -> Metrics:
    """Train on the pairs, and write the adapter, or the model if `method` is `full`."""
    params = context.run.dpo
    base = context.location(context.run.base_model)
    tokenizer = load_tokenizer(base)
    rows = _pairs(context)
    renderer = Renderer(tokenizer, context.run.prompt)
    tokenised = _tokenise(rows, renderer)
    check_labels(tokenizer, _trained_parts(rows[:CHECKED_ROWS], tokenised, renderer))
    limit = usable_length(base, params.max_length)
    fitting = _drop_overlong(context, tokenised, limit)
    train_rows, validation_rows = _split(fitting, params, context.run.seed)
    check_validation(context, params, len(validation_rows))
    strategy = decide(context, params, "dpo")
    arguments = DPOConfig(
        **training_arguments(
            context, params, strategy, name="dpo", validates=bool(validation_rows)
        ),
        beta=params.beta,
        label_smoothing=params.label_smoothing,
        **_losses(params),
    )
    # The adapter is loaded as trainable and no peft_config is given: TRL then copies it as the
    # reference. With a peft_config the reference would be the raw base, and the first loss not
    # ln 2. A new adapter changes nothing yet, so its copy is the base.
    spec, trained = base_spec(context, strategy), context.inputs.get("sft")
    model, initial = trainable_model(context, spec, tokenizer, trained)
    trainer = _DpoTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(validation_rows) if validation_rows else None,
        processing_class=tokenizer,
    )
    metrics = train_and_save(trainer, trainer.train_dataset, params, context, strategy, initial)
    return metrics | {
        "pairs": len(train_rows),
        "validation_pairs": len(validation_rows),
        "overlong_pairs_left_out": len(rows) - len(fitting),
    }


_FROM_JUDGE = (
    "raise run.prepare.preference_rows, lower run.judge.min_margin, or see the judge's report for "
    "the reasons of dropped pairs"
)
_FROM_DATA = (
    "pairs are the rows of run.prepare.preference_sources with a chosen and a rejected answer; the "
    "report of prepare counts them"
)
_MORE_PAIRS = {"judge": _FROM_JUDGE, "data": _FROM_DATA, "both": f"{_FROM_JUDGE}; {_FROM_DATA}"}
_COLUMNS = ["id", "question", "prompt_ids", "chosen", "rejected"]


def _pairs(context: TrainingContext) -> list[dict[str, Any]]:
    """Read the pairs of the judge, and those of the data."""
    names = {"judge": ["judge"], "data": ["prepare"], "both": ["judge", "prepare"]}
    files = [context.inputs[name] / "pairs.parquet" for name in names[context.run.dpo.pairs]]
    return [row for file in files for row in pq.read_table(file, columns=_COLUMNS).to_pylist()]


def _losses(params: DpoParams) -> dict[str, list[Any]]:
    if params.rpo_alpha is None:
        return {"loss_type": [params.loss_type]}
    return {"loss_type": [params.loss_type, "sft"], "loss_weights": [1.0, params.rpo_alpha]}


def _tokenise(rows: list[dict[str, Any]], renderer: Renderer) -> list[dict[str, Any]]:
    chosen = renderer.completion_ids([row["chosen"] for row in rows])
    rejected = renderer.completion_ids([row["rejected"] for row in rows])
    return [
        {
            "id": row["id"],
            "question": row["question"],
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": chosen[i],
            "rejected_ids": rejected[i],
        }
        for i, row in enumerate(rows)
    ]


def _trained_parts(
    rows: list[dict[str, Any]], tokenised: list[dict[str, Any]], renderer: Renderer
) -> Iterator[tuple[list[int], str]]:
    """Yield the trained tokens and the completion of both sides of each pair."""
    for row, ids in zip(rows, tokenised, strict=False):
        for side in ("chosen", "rejected"):
            yield ids[f"{side}_ids"], renderer.completion(row[side])


def _drop_overlong(
    context: TrainingContext, rows: list[dict[str, Any]], limit: int
) -> list[dict[str, Any]]:
    """Return the pairs whose longer answer fits into `limit` tokens with the prompt, and list the
    others in overlong_pairs.jsonl."""
    params = context.run.dpo
    fitting = [row for row in rows if _length(row) <= limit]
    overlong = [row for row in rows if _length(row) > limit]
    if overlong and context.extras.link.world.is_main:
        _log.warning("dpo: left out %d pairs over %d tokens", len(overlong), limit)
        lines = [json.dumps({"id": row["id"], "tokens": _length(row)}) for row in overlong]
        (context.output / "overlong_pairs.jsonl").write_text("\n".join(lines) + "\n")
    if len(fitting) < params.min_pairs:
        raise DataError(
            f"{len(fitting)} preference pairs are too few to train on: run.dpo.min_pairs is "
            f"{params.min_pairs} ({len(overlong)} more have over {limit} tokens)",
            "raise run.dpo.max_length" if overlong and not fitting else _MORE_PAIRS[params.pairs],
        )
    return fitting


def _length(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _split(
    rows: list[dict[str, Any]], params: DpoParams, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split into training and validation pairs, by a hash of the question."""
    ordered = sorted(rows, key=lambda row: question_hash(row["question"], seed))
    for row in ordered:
        del row["question"], row["id"]
    validation_count = min(round(len(ordered) * params.validation_fraction), len(ordered) - 1)
    return ordered[validation_count:], ordered[:validation_count]
