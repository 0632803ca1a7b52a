"""evaluate: base, sft, dpo and any other model on the same rows."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq

from medjob.artifacts.finished_rows import Row
from medjob.data.render import Renderer
from medjob.data.styles import take_apart
from medjob.errors import DataError
from medjob.evaluate.answers import answer_rows, likelihoods
from medjob.evaluate.compare import Answers, as_text, cell, compare
from medjob.evaluate.metrics import Answered
from medjob.generate.engine import TransformersEngine
from medjob.judge.finish import score_all
from medjob.judge.load import load_judge
from medjob.judge.rubric import Item
from medjob.judge.scoring import Judge, OverlapJudge
from medjob.report.charts import intervals
from medjob.report.page import write_page
from medjob.stage import Metrics, RowContext
from medjob.train.model import ModelSpec, load_model, load_policy, load_tokenizer


def run(context: RowContext) -> Metrics:
    """Write comparison.json, answers.jsonl and a report."""
    rows = _rows(context)
    judge, judge_note = _judge(context)
    drawn = {name: _answers(context, name, rows) for name in _names(context)}
    answers = _judged(context, rows, drawn, judge)
    params = context.run.evaluate
    table = compare(answers, params.bootstrap_samples, context.run.seed)
    kinds = {
        kind: sum(row["kind"] == kind for row in rows)
        for kind in ("open", "multiple_choice", "harmful", "benign")
    }
    result = {"rows": kinds, "judge": judge.name, "judge_note": judge_note, "metrics": table}
    (context.output / "comparison.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    _write_answers(context, answers)
    _write_report(context, result, answers)
    return result | {
        "summary": f"{as_text(table, list(answers))}\njudge: {judge.name}. {judge_note}"
    }


def _rows(context: RowContext) -> list[Row]:
    rows: list[Row] = pq.read_table(context.inputs["prepare"] / "evaluation.parquet").to_pylist()
    if not rows:
        raise DataError(
            "there are no evaluation rows", "set run.prepare.evaluation_rows or evaluation_sources"
        )
    limit = context.run.evaluate.max_multiple_choice
    if limit is not None:
        choices = sorted(row["id"] for row in rows if row["kind"] == "multiple_choice")[
            :limit
        ]  # ids are hashes: a random sample
        rows = [
            row for row in rows if row["kind"] != "multiple_choice" or row["id"] in set(choices)
        ]
    return rows


def _names(context: RowContext) -> list[str]:
    return [*context.run.evaluate.models, *(str(ref) for ref in context.run.evaluate.extra_models)]


def _judge(context: RowContext) -> tuple[Judge, str]:
    """The judge that made the pairs, if there are any, and what has to be said about it."""
    if "judge" not in context.inputs:
        return OverlapJudge(), "It is the word overlap with the reference and knows no medicine."
    calibrations = json.loads((context.inputs["judge"] / "calibration.json").read_text())
    note = "The same judge made the pairs that dpo was trained on, so its opinion of dpo is biased."
    if calibrations[-1]["judge"] == "overlap":
        return (
            OverlapJudge(),
            f"It is the word overlap with the reference and knows no medicine. {note}",
        )
    return load_judge(context), note


def _answers(context: RowContext, name: str, rows: Sequence[Row]) -> dict[str, tuple[Row, Row]]:
    """By row id: the drawn answer, and the likelihood figures."""
    params = context.run.evaluate
    limits = dict.fromkeys(("open", "harmful", "benign"), params.max_new_tokens)
    limits["multiple_choice"] = params.multiple_choice_max_new_tokens
    wanted = {row["id"] for row in rows}
    label = _label(name)
    drawn, scored = (
        context.extras.finished.read(f"answers-{label}"),
        context.extras.finished.read(f"likelihoods-{label}"),
    )
    if not wanted <= drawn.keys() or not scored:
        engine, rows = _engine(context, name, rows)
        scored = likelihoods(engine, rows, context.extras.finished, context.extras.progress, label)
        drawn = answer_rows(
            engine, rows, limits, context.extras.finished, context.extras.progress, label
        )
        del engine
        gc.collect()
    return {row["id"]: (drawn[row["id"]], scored.get(row["id"], {})) for row in rows}


def _label(name: str) -> str:
    """A model's name as a path segment."""
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name)


def _engine(
    context: RowContext, name: str, rows: Sequence[Row]
) -> tuple[TransformersEngine, Sequence[Row]]:
    """The model's engine, and the rows as this model is prompted: a model of another family has another chat template."""
    spec = ModelSpec.base_of(context.run, context.location(context.run.base_model))
    if name in ("sft", "dpo"):
        model = load_policy(spec, context.inputs[name])
    elif name == "base":
        model = load_model(spec)
    else:
        ref = next(ref for ref in context.run.evaluate.extra_models if str(ref) == name)
        spec = replace(spec, location=context.location(ref))
        model = load_model(spec)
    tokenizer = load_tokenizer(spec.location)
    if spec.location != context.location(context.run.base_model):
        rows = _prompted_for(Renderer(tokenizer, context.run.prompt), tokenizer, context, rows)
    end = Renderer(tokenizer, context.run.prompt).completion("")
    return TransformersEngine(
        model, tokenizer, context.resources.batch_size, context.run.seed, end=end
    ), rows


def _prompted_for(
    renderer: Renderer, tokenizer: Any, context: RowContext, rows: Sequence[Row]
) -> list[Row]:
    """Rows in the words of another model's chat template.

    A model with another vocabulary gets no completion to score: per-token likelihoods of different tokens do not compare.
    """
    base = load_tokenizer(context.location(context.run.base_model))
    end, same = (
        Renderer(base, context.run.prompt).completion(""),
        base.get_vocab() == tokenizer.get_vocab(),
    )
    return [
        {
            **row,
            "prompt": renderer.prompt(row["question"], row["system"]),
            "completion": renderer.completion(row["completion"].removesuffix(end)) if same else "",
        }
        for row in rows
    ]


def _judged(
    context: RowContext,
    rows: Sequence[Row],
    drawn: dict[str, dict[str, tuple[Row, Row]]],
    judge: Judge,
) -> Answers:
    """All answers with the judge's scores of the open ones."""
    style = context.run.prompt.style
    answers = {}
    for name, by_id in drawn.items():
        opened = [row for row in rows if row["kind"] == "open"]
        items = [
            Item(
                row["id"],
                row["question"],
                row["reference"],
                take_apart(style, by_id[row["id"]][0]["text"]).response,
            )
            for row in opened
        ]
        scores = score_all(
            judge,
            items,
            context.extras.finished,
            context.extras.progress,
            f"judged-{_label(name)}",
            2 * context.resources.batch_size,
        )
        extras = {row["id"]: dict(by_id[row["id"]][1]) for row in rows}
        for row_id, score in scores.items():
            extras[row_id]["judged"] = {"score": score.value, **score.aspects}
        answers[name] = [
            Answered.of(row, by_id[row["id"]][0], style, extras[row["id"]]) for row in rows
        ]
    return answers


def _write_answers(context: RowContext, answers: Answers) -> None:
    with (context.output / "answers.jsonl").open("w", encoding="utf-8") as file:
        for line in _lines(answers):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _lines(answers: Answers) -> Iterator[dict[str, Any]]:
    for rows in zip(*answers.values(), strict=True):
        row = rows[0].row
        texts = {
            name: {"text": a.text, "truncated": a.truncated, **a.judged}
            for name, a in zip(answers, rows, strict=True)
        }
        yield {
            "id": row["id"],
            "kind": row["kind"],
            "question": row["question"],
            "reference": row["reference"],
            "answers": texts,
        }


def _write_report(context: RowContext, result: dict[str, Any], answers: Answers) -> None:
    models = list(answers)
    shares = {
        line["metric"]: line
        for line in result["metrics"]
        if line["percent"] or line["metric"].startswith(("judge", "ROUGE", "BLEU"))
    }
    points = {
        name: {model: (f["value"], f["low"], f["high"]) for model, f in line["models"].items()}
        for name, line in shares.items()
    }
    cells = [
        {"line": line, "cells": [cell(line, model) for model in models]}
        for line in result["metrics"]
    ]
    opened = [line for line in _lines(answers) if line["kind"] in ("open", "harmful", "benign")]
    wanted = context.run.evaluate.side_by_side
    picked = [
        line
        for kind in ("open", "harmful", "benign")
        for line in [o for o in opened if o["kind"] == kind][: max(1, wanted // 2)]
    ]
    write_page(
        context.output / "report.html",
        "evaluate.html",
        {"intervals": intervals(points, "0 to 1, with 95 % intervals")},
        r=result,
        models=models,
        cells=cells,
        answers=picked[:wanted] if wanted else [],
    )
