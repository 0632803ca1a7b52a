"""sft: supervised fine-tuning on the prepared answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from datasets.table import InMemoryTable
from trl import SFTConfig, SFTTrainer

from medjob.config.train import SftParams
from medjob.data.labels import is_trained, with_labels
from medjob.errors import ConfigError, DataError
from medjob.stage import Metrics, TrainingContext
from medjob.train.adapter_files import initial_weights
from medjob.train.adapters import add_adapter, token_ids
from medjob.train.arguments import training_arguments
from medjob.train.labels import CHECKED_ROWS, check_labels
from medjob.train.model import load_model, load_tokenizer
from medjob.train.strategy import Strategy, base_spec, decide
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
    check_labels(tokenizer, _trained_parts(train_rows, params.max_length))
    train_rows, validation_rows = _for_trainer(train_rows), _for_trainer(validation_rows)
    model = _trainable_model(context, strategy, tokenizer)
    initial = initial_weights(model) if run.method != "full" else {}
    trainer = _SftTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation_rows if len(validation_rows) else None,
        processing_class=tokenizer,
    )
    metrics = train_and_save(trainer, train_rows, params, context, strategy, initial)
    return metrics | {"rows": len(train_rows), "overlong_rows_left_out": dropped}


def _trainable_model(context: TrainingContext, strategy: Strategy, tokenizer: Any) -> Any:
    run = context.run
    if run.method != "full":
        tokens = token_ids(tokenizer, run.lora.trainable_token_indices or ())
        return add_adapter(load_model(base_spec(context, strategy)), run.lora, run.seed, tokens)
    model = load_model(base_spec(context, strategy))
    if getattr(model, "is_quantized", False):
        raise ConfigError(
            f"run.method: full cannot train {run.base_model}, whose weights are quantised",
            "--set run.method=qlora",
        )
    return model


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
    """Load tokenised rows, with labels on the answer only. Also return the number of rows that were
    left out: overlong ones, or with `overlong: truncate` those without a token of the answer."""
    rows = Dataset(InMemoryTable(pq.read_table(path)))
    total = len(rows)
    limits = {"max_length": params.max_length, "overlong": params.overlong}
    rows = rows.filter(is_trained, fn_kwargs=limits, keep_in_memory=True)
    unused = [name for name in rows.column_names if name not in ("input_ids", "completion")]
    rows = rows.map(
        with_labels,
        fn_kwargs={"max_length": params.max_length},
        remove_columns=unused,
        keep_in_memory=True,
    )
    return rows, total - len(rows)


def _trained_parts(rows: Dataset, max_length: int) -> Iterator[tuple[list[int], str]]:
    """Yield the trained tokens and the completion of the first rows that are not truncated."""
    whole = (row for row in rows if len(row["input_ids"]) < max_length)
    for row in islice(whole, CHECKED_ROWS):
        yield [label for label in row["labels"] if label != -100], row["completion"]


def _for_trainer(rows: Dataset) -> Dataset:
    # Without rows, `map` has added no column.
    return rows.select_columns(["input_ids", "labels"]) if len(rows) else rows
