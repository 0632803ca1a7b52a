"""candidates: sample several answers to each preference prompt, from the SFT model or the base."""

from __future__ import annotations

import functools
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medjob.data.render import Renderer
from medjob.errors import DataError
from medjob.generate.load import Model, largest_rank, lazy_engine
from medjob.generate.protocol import Generated, Prompt, Sampling
from medjob.generate.work import LazyEngine, sample_longer
from medjob.stage import Metrics, RowContext
from medjob.train.model import ModelSpec, load_policy, load_tokenizer
from medjob.train.start import load_start, starting_adapter

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("candidate", pa.int32()),
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
    ]
)


def run(context: RowContext) -> Metrics:
    """Write candidates.parquet: `num_candidates` rows per prompt, in the order of the prompts."""
    answers = compute(context)
    rows: list[dict[str, Any]] = [
        {
            "id": prompt.id,
            "candidate": number,
            "text": answer.text,
            "tokens": answer.tokens,
            "truncated": answer.truncated,
        }
        for prompt in _prompts(context)
        for number, answer in enumerate(answers[prompt.id])
    ]
    pq.write_table(
        pa.Table.from_pylist(rows, _SCHEMA),
        context.output / "candidates.parquet",
        compression="zstd",
    )
    return {
        "prompts": len(answers),
        "candidates": len(rows),
        "truncated": sum(row["truncated"] for row in rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
    }


def compute(context: RowContext) -> dict[str, list[Generated]]:
    """Return the answers to each prompt of this shard, by its id."""
    params = context.run.candidates
    sampling = Sampling(
        params.max_new_tokens, params.temperature, params.top_p, params.num_candidates
    )
    prompts = _prompts(context)
    return sample_longer(context.extras, _engine(context), "answers", prompts, sampling)


def _prompts(context: RowContext) -> list[Prompt]:
    path = context.inputs["prepare"] / "preferences.parquet"
    rows = pq.read_table(path, columns=["id", "prompt_ids"]).to_pylist()
    if not rows:
        raise DataError(
            "there are no preference prompts",
            "set run.prepare.preference_rows or run.prepare.preference_sources",
        )
    return [Prompt(row["id"], row["prompt_ids"]) for row in rows]


def _engine(context: RowContext) -> LazyEngine:
    run = context.run
    spec = ModelSpec.base_of(run, context.location(run.base_model))
    tokenizer = load_tokenizer(spec.location)
    trained = context.inputs.get("sft")
    load = (
        functools.partial(load_policy, spec, trained)
        if trained
        else functools.partial(load_start, context, spec)
    )
    trained = trained or starting_adapter(context)
    renderer = Renderer(tokenizer, run.prompt)
    model = Model(spec, tokenizer, renderer, load, trained, largest_rank(trained))
    return lazy_engine(context, "candidates", model)
