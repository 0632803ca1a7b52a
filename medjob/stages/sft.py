"""sft: supervised fine-tuning on the prepared answers."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from datasets.table import InMemoryTable
from trl import SFTConfig, SFTTrainer

from medjob.config.train import SftParams
from medjob.data.labels import is_trained, trained_turns, with_labels
from medjob.errors import DataError
from medjob.stage import Metrics, TrainingContext
from medjob.train.arguments import training_arguments
from medjob.train.labels import CHECKED_ROWS, check_earlier_labels, check_labels
from medjob.train.model import load_tokenizer
from medjob.train.start import trainable_model
from medjob.train.strategy import base_spec, decide
from medjob.train.trainer import TrainerMixin, check_validation, train_and_save

_log = logging.getLogger(__name__)


class _SftTrainer(TrainerMixin, SFTTrainer):
    """TRL's trainer, with medjob's adapter checkpoints and speed measurement."""


def run(context: TrainingContext) -> Metrics:
    """Train, and write the adapter, or the model if `method` is `full`."""
    run = context.run
    params = run.sft
    data = context.inputs["prepare"]
    train_rows, dropped = load_rows(data / "train.parquet", params)
    validation_rows, unvalidated = load_rows(data / "validation.parquet", params)
    if not len(train_rows):
        raise _nothing_fits(params)
    if dropped and context.extras.link.world.is_main:
        _log.warning("sft: left out %d rows over %d tokens", dropped, params.max_length)
    check_validation(context, params, len(validation_rows), left_out=unvalidated)
    strategy = decide(context, params, "sft")
    arguments = SFTConfig(
        **training_arguments(
            context, params, strategy, name="sft", validates=len(validation_rows) > 0
        ),
        packing=strategy.packing,
        eval_packing=False,
    )
    tokenizer = load_tokenizer(context.location(run.base_model))
    _check_labels(tokenizer, data / "train.parquet", params)
    model, initial = trainable_model(context, base_spec(context, strategy), tokenizer)
    trainer = _SftTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation_rows if len(validation_rows) else None,
        processing_class=tokenizer,
    )
    metrics = train_and_save(trainer, train_rows, params, context, strategy, initial)
    return metrics | {"rows": len(train_rows), "overlong_rows_left_out": dropped}


def _nothing_fits(params: SftParams) -> DataError:
    if params.overlong == "truncate":
        return DataError(
            f"no answer token is left within run.sft.max_length ({params.max_length} tokens): the "
            "prompts alone are longer",
            "raise run.sft.max_length",
        )
    return DataError(
        f"no training row is within run.sft.max_length ({params.max_length} tokens)",
        "raise it, or set run.sft.overlong=truncate",
    )


def load_rows(path: Path, params: SftParams) -> tuple[Dataset, int]:
    """Load tokenised rows, with labels on the answers only. Also return the number of rows that
    were left out: overlong ones, or with `overlong: truncate` those without a token of an answer.
    With `assistant_turns: last`, rows of earlier answers are not counted as left out."""
    table = pq.read_table(path)
    turns = params.assistant_turns
    total = len(table) if turns == "all" else table["is_last"].to_pylist().count(True)
    limits = {"max_length": params.max_length, "overlong": params.overlong}
    rows = Dataset(InMemoryTable(table)).filter(
        is_trained, fn_kwargs={**limits, "assistant_turns": turns}, keep_in_memory=True
    )
    rows = rows.map(
        with_labels,
        fn_kwargs={"max_length": params.max_length, "assistant_turns": turns},
        remove_columns=[name for name in rows.column_names if name != "input_ids"],
        keep_in_memory=True,
    )
    return rows, total - len(rows)


def _check_labels(tokenizer: Any, path: Path, params: SftParams) -> None:
    """Check the labels of the first rows that are trained without a cut."""
    batches = pq.ParquetFile(path).iter_batches(batch_size=CHECKED_ROWS)
    rows = (row for batch in batches for row in batch.to_pylist())
    wanted = params.assistant_turns
    uncut = (row for row in rows if is_trained(row, params.max_length, "drop", wanted))
    whole = [*islice(uncut, CHECKED_ROWS)]
    turns = [
        [row["input_ids"][start:end] for start, end in trained_turns(row, wanted)] for row in whole
    ]
    completions = [row["completion"] for row in whole]
    check_labels(tokenizer, zip((each[-1] for each in turns), completions, strict=True))
    prompts = [row["prompt"] for row in whole]
    check_earlier_labels(tokenizer, zip((each[:-1] for each in turns), prompts, strict=True))
