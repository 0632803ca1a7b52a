"""candidates: sample several answers to each preference prompt, from the SFT model or the base."""

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
from medjob.train.start import load_start

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
    prompts = _prompts(context)
    engine = _engine(context)
    params = context.run.candidates
    sampling = Sampling(
        params.max_new_tokens, params.temperature, params.top_p, params.num_candidates
    )
    answers = _sample_all(context, engine, prompts, sampling)
    rows: list[dict[str, Any]] = [
        {"id": prompt.id, "candidate": number} | answer
        for prompt in prompts
        for number, answer in enumerate(answers[prompt.id])
    ]
    pq.write_table(
        pa.Table.from_pylist(rows, _SCHEMA),
        context.output / "candidates.parquet",
        compression="zstd",
    )
    return {
        "prompts": len(prompts),
        "candidates": len(rows),
        "truncated": sum(row["truncated"] for row in rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
    }


def _prompts(context: RowContext) -> list[Prompt]:
    path = context.inputs["prepare"] / "preferences.parquet"
    rows = pq.read_table(path, columns=["id", "prompt_ids"]).to_pylist()
    if not rows:
        raise DataError(
            "there are no preference prompts",
            "set run.prepare.preference_rows or run.prepare.preference_sources",
        )
    return [Prompt(row["id"], row["prompt_ids"]) for row in rows]


def _engine(context: RowContext) -> TransformersEngine:
    run = context.run
    base = context.location(run.base_model)
    tokenizer = load_tokenizer(base)
    spec = ModelSpec.base_of(run, base)
    trained = context.inputs.get("sft")
    model = load_policy(spec, trained) if trained else load_start(context, spec)
    renderer = Renderer(tokenizer, run.prompt)
    return TransformersEngine(model, tokenizer, context.resources.batch_size, run.seed, renderer)


def _sample_all(
    context: RowContext,
    engine: TransformersEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
) -> dict[str, list[dict[str, Any]]]:
    """Return the answers to each prompt, by its id. Finished ones are not sampled again."""
    finished = context.extras.finished
    done = {str(row["id"]): row["answers"] for row in finished.read("answers").values()}
    with context.extras.progress.task("sample", total=len(prompts), done=len(done)) as task:
        for batch in engine.batches(prompts):
            todo = [prompt for prompt in batch if prompt.id not in done]
            if todo:
                made = _sample(engine, todo, sampling)
                rows = [{"id": prompt_id, "answers": texts} for prompt_id, texts in made.items()]
                finished.add("answers", rows)
                done |= made
                task.advance(len(todo))
    return done


def _sample(
    engine: TransformersEngine, batch: Sequence[Prompt], sampling: Sampling
) -> dict[str, list[dict[str, Any]]]:
    answers = _generate(engine, batch, sampling)
    return {
        prompt.id: [
            {"text": answer.text, "tokens": answer.tokens, "truncated": answer.truncated}
            for answer in prompt_answers
        ]
        for prompt, prompt_answers in zip(batch, answers, strict=True)
    }


def _generate(
    engine: TransformersEngine, batch: Sequence[Prompt], sampling: Sampling
) -> list[list[Generated]]:
    """Generate answers to a batch. Truncated answers are generated again with twice the tokens."""
    answers = engine.generate(batch, sampling)
    truncated = [
        (row, column)
        for row, prompt_answers in enumerate(answers)
        for column, answer in enumerate(prompt_answers)
        if answer.truncated
    ]
    if not truncated:
        return answers
    prompts = [
        Prompt(f"{batch[row].id}/{column}/longer", batch[row].ids) for row, column in truncated
    ]
    longer = replace(sampling, max_new_tokens=2 * sampling.max_new_tokens, num_return_sequences=1)
    for (row, column), (answer,) in zip(truncated, engine.generate(prompts, longer), strict=True):
        answers[row][column] = answer
    return answers
