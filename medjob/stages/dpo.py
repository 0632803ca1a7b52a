"""dpo: direct preference optimization on the judge's pairs, from the SFT model."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from medjob.data.render import Renderer, encode
from medjob.data.text import question_hash
from medjob.errors import DataError
from medjob.stage import Metrics, TrainingContext
from medjob.train.arguments import training_arguments
from medjob.train.model import load_policy, load_tokenizer
from medjob.train.strategy import base_spec, decide
from medjob.train.trainer import TrainerMixin, train_and_save


class _DpoTrainer(TrainerMixin, DPOTrainer):
    """Takes rows that are tokenised already: TRL would tokenise rendered text with a second begin-of-text token."""

    def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
        return dataset


def run(context: TrainingContext) -> Metrics:
    """Train on the pairs, and write the adapter (or, for `full`, the model)."""
    run, params = context.run, context.run.dpo
    tokenizer = load_tokenizer(context.location(run.base_model))
    rows = pq.read_table(context.inputs["judge"] / "pairs.parquet").to_pylist()
    train_rows, validation_rows, dropped = _split(
        _tokenise(rows, Renderer(tokenizer, run.prompt), tokenizer), context
    )
    strategy = decide(context, params, "dpo")
    arguments = DPOConfig(
        **training_arguments(
            context, params, strategy, name="dpo", validates=bool(validation_rows)
        ),
        beta=params.beta,
        loss_type=[params.loss_type],
    )
    # The adapter is loaded as trainable and no peft_config is given: TRL then copies it as the reference. With a
    # peft_config the reference would be the raw base, and the first loss not ln 2.
    model = load_policy(base_spec(context, strategy), context.inputs["sft"], trainable=True)
    trainer = _DpoTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(validation_rows) if validation_rows else None,
        processing_class=tokenizer,
    )
    return train_and_save(trainer, trainer.train_dataset, params, context, strategy) | {
        "pairs": len(train_rows),
        "overlong_pairs_left_out": dropped,
    }


def _tokenise(
    rows: list[dict[str, Any]], renderer: Renderer, tokenizer: Any
) -> list[dict[str, Any]]:
    prompts = encode(tokenizer, [row["prompt"] for row in rows])
    chosen = encode(tokenizer, [renderer.completion(row["chosen"]) for row in rows])
    rejected = encode(tokenizer, [renderer.completion(row["rejected"]) for row in rows])
    return [
        {"question": row["question"], "prompt_ids": p, "chosen_ids": c, "rejected_ids": r}
        for row, p, c, r in zip(rows, prompts, chosen, rejected, strict=True)
    ]


def _split(
    rows: list[dict[str, Any]], context: TrainingContext
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Training and validation pairs, by a hash of the question, and the number of overlong pairs left out."""
    params = context.run.dpo
    fitting = [
        row
        for row in rows
        if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        <= params.max_length
    ]
    if len(fitting) < params.min_pairs:
        raise DataError(
            f"{len(fitting)} preference pairs are too few to train on (run.dpo.min_pairs is {params.min_pairs}; "
            f"{len(rows) - len(fitting)} more are over {params.max_length} tokens)",
            "raise run.prepare.preference_rows, lower run.judge.min_margin, or see the judge's report for what was dropped",
        )
    fitting.sort(key=lambda row: question_hash(row["question"], context.run.seed))
    held = round(len(fitting) * params.validation_fraction)
    for row in fitting:
        del row["question"]
    return fitting[held:], fitting[:held], len(rows) - len(fitting)
