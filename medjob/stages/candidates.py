"""candidates: several sampled answers to each preference prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medjob.data.render import Renderer
from medjob.errors import DataError
from medjob.generate.engine import Generated, Prompt, Sampling, TransformersEngine
from medjob.stage import Metrics, RowContext
from medjob.train.model import ModelSpec, load_policy, load_tokenizer

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
    """Write candidates.parquet: `num_candidates` rows for each prompt, in the order of the prompts."""
    run, params = context.run, context.run.candidates
    rows = pq.read_table(
        context.inputs["prepare"] / "preferences.parquet", columns=["id", "prompt"]
    ).to_pylist()
    if not rows:
        raise DataError(
            "there are no preference prompts",
            "set run.prepare.preference_rows or preference_sources",
        )
    prompts = [Prompt(row["id"], row["prompt"]) for row in rows]
    tokenizer = load_tokenizer(context.location(run.base_model))
    model = load_policy(
        ModelSpec.base_of(run, context.location(run.base_model)), context.inputs["sft"]
    )
    end = Renderer(tokenizer, run.prompt).completion("")
    engine = TransformersEngine(model, tokenizer, context.resources.batch_size, run.seed, end=end)
    sampling = Sampling(
        params.max_new_tokens, params.temperature, params.top_p, params.num_candidates
    )

    done = context.extras.finished.read("answers")
    with context.extras.progress.task("sample", total=len(prompts), done=len(done)) as task:
        for batch in engine.batches(prompts):
            todo = [prompt for prompt in batch if prompt.id not in done]
            if todo:
                drawn = [
                    _as_row(p, answers)
                    for p, answers in zip(todo, _draw(engine, todo, sampling), strict=True)
                ]
                context.extras.finished.add("answers", drawn)
                done |= {row["id"]: row for row in drawn}
                task.advance(len(todo))
    flat = [
        {"id": p.id, "candidate": i} | answer
        for p in prompts
        for i, answer in enumerate(done[p.id]["answers"])
    ]
    pq.write_table(
        pa.Table.from_pylist(flat, _SCHEMA),
        context.output / "candidates.parquet",
        compression="zstd",
    )
    return {
        "prompts": len(prompts),
        "candidates": len(flat),
        "truncated": sum(row["truncated"] for row in flat),
        "mean_tokens": sum(row["tokens"] for row in flat) / len(flat),
    }


def _draw(
    engine: TransformersEngine, batch: Sequence[Prompt], sampling: Sampling
) -> list[list[Generated]]:
    """Answers to a batch; those that the limit cut are drawn once more with twice the room."""
    answers = engine.generate(batch, sampling)
    cut = [
        (row, column)
        for row, drawn in enumerate(answers)
        for column, answer in enumerate(drawn)
        if answer.truncated
    ]
    if cut:
        again = [Prompt(f"{batch[row].id}/{column}/longer", batch[row].text) for row, column in cut]
        longer = replace(
            sampling, max_new_tokens=2 * sampling.max_new_tokens, num_return_sequences=1
        )
        for (row, column), drawn in zip(cut, engine.generate(again, longer), strict=True):
            answers[row][column] = drawn[0]
    return answers


def _as_row(prompt: Prompt, answers: list[Generated]) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "answers": [
            {"text": a.text, "tokens": a.tokens, "truncated": a.truncated} for a in answers
        ],
    }
