"""evaluate: compare base, sft, dpo and other models on the same rows."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from medjob.artifacts.finished_rows import Row
from medjob.config.base import ModelRef
from medjob.data.criteria import from_json
from medjob.data.read import read
from medjob.data.render import Renderer
from medjob.data.sensitive import may_be_shown
from medjob.data.styles import take_apart
from medjob.errors import DataError
from medjob.evaluate.answers import (
    answer_rows,
    completion_likelihoods,
    conversation_of,
    likeliest_letters,
)
from medjob.evaluate.asked import Asked
from medjob.evaluate.compare import Answers, as_text, compare, format_estimate, without_infinities
from medjob.evaluate.graded import (
    compared_pairs,
    corrected_section,
    corrected_text,
    difference_sentence,
    judge_scores,
)
from medjob.evaluate.human_grades import (
    SHEET,
    GradedLine,
    gradable,
    match_grades,
    read_grades,
    write_sheet,
)
from medjob.evaluate.metrics import EvaluatedAnswer
from medjob.evaluate.pairwise import (
    Preference,
    answer_pairs,
    compare_pairs,
    pairwise_table,
    pairwise_text,
    win_rate,
)
from medjob.evaluate.subjects import baseline_text, multiple_choice_section
from medjob.generate.endpoint import endpoint_engine, spending
from medjob.generate.load import Model, largest_rank, lazy_engine, scoring_engine
from medjob.generate.protocol import Generated
from medjob.generate.work import LazyEngine
from medjob.judge.load import calibrated_judge
from medjob.judge.questions import Item
from medjob.judge.scoring import Judge, JudgePanel, ModelJudge, OverlapJudge
from medjob.report.charts import intervals
from medjob.report.page import write_page
from medjob.runtime.files import fingerprint
from medjob.sources import references
from medjob.stage import Metrics, RowContext
from medjob.train.model import ModelSpec, load_model, load_policy, load_tokenizer
from medjob.train.start import load_start, starting_adapter

_log = logging.getLogger(__name__)
_OWN_MODELS = ("base", "sft", "dpo")
_LABEL_LENGTH = 40  # characters of a model's name in the paths of its finished rows
_KINDS = ("open", "multiple_choice", "harmful", "benign")
_NO_KNOWLEDGE = "It is the word overlap with the reference and has no medical knowledge."
_BIASED = "The same judge made the pairs that dpo was trained on, so its scores of dpo are biased."


@dataclass(frozen=True, slots=True)
class _ModelAnswers:
    """One model's answers and likelihoods, by row id."""

    answers: Mapping[str, Generated]
    nll_per_token: Mapping[str, float | None]
    letters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """The answers of all models in this shard, with the judge's scores."""

    judge: Judge
    judge_note: str
    answers: Answers
    preferences: Mapping[tuple[str, str], Mapping[str, Preference]]
    """The judge's comparisons of two models' answers, by the models and then by row id."""
    grades: Sequence[GradedLine]


def run(context: RowContext) -> Metrics:
    """Write comparison.json, answers.jsonl, grading.csv and a report."""
    evaluated = compute(context)
    answers = evaluated.answers
    result = _result(context, evaluated)
    text = json.dumps(without_infinities(result), indent=1, ensure_ascii=False)
    (context.output / "comparison.json").write_text(text, encoding="utf-8")
    _write_answers(context, answers)
    write_sheet(context.output / SHEET, gradable(answers))
    _write_report(context, result, answers)
    summary = _summary(result, list(answers))
    return {**without_infinities(result), "summary": summary, **spending(context.extras)}


def compute(context: RowContext) -> _Evaluated:
    """Let every model answer, and the judge score the answers. In a shard, those of its share."""
    params = context.run.evaluate
    rows = _rows(context)
    grades = _human_grades(context)
    judge, judge_note = _judge(context)
    asked = Asked.of(rows, params, context.run.seed)
    models = {name: _Evaluation.of(context, name, rows, asked) for name in _model_names(context)}
    for each in models.values():
        # vLLM leaves no room for another engine on a GPU, so that one comes first.
        if each.scoring is not each.engine:
            each.likelihoods(context)
            each.scoring.close()
    answered = {name: each.answer(context) for name, each in models.items()}
    answers = {
        name: _judge_answers(context, name, rows, found, judge, asked)
        for name, found in answered.items()
    }
    preferences = _preferences(context, answers, judge)
    return _Evaluated(judge, judge_note, answers, preferences, grades)


def _result(context: RowContext, evaluated: _Evaluated) -> dict[str, Any]:
    """Compute all figures."""
    answers, samples = evaluated.answers, context.run.evaluate.bootstrap_samples
    first, rows = next(iter(answers.items()))
    corrected = None
    if evaluated.grades:
        grades = match_grades(evaluated.grades, gradable(answers))
        corrected = corrected_section(judge_scores(answers), grades)
    pairwise = [
        {
            "model": model,
            "against": against,
            **win_rate(answer_pairs(answers, model, against), found, samples, context.run.seed),
        }
        for (model, against), found in evaluated.preferences.items()
    ]
    table = compare(answers, samples, context.run.seed)
    shows_rows = may_be_shown(context.inputs["prepare"])
    return {
        "rows": {kind: sum(each.row["kind"] == kind for each in rows) for kind in _KINDS},
        "judge": evaluated.judge.name,
        "judge_note": evaluated.judge_note,
        "metrics": table + pairwise_table(pairwise, first),
        "multiple_choice": multiple_choice_section(answers, shows_rows),
        "corrected": corrected,
        "pairwise": pairwise,
    }


def _summary(result: Mapping[str, Any], models: Sequence[str]) -> str:
    """Format the result for a terminal."""
    parts = [as_text(result["metrics"], models)]
    if result["multiple_choice"]:
        parts.append(baseline_text(result["multiple_choice"]))
    if result["pairwise"]:
        parts.append(pairwise_text(result["pairwise"]))
    if result["corrected"]:
        parts.append(corrected_text(result["corrected"]))
    return "\n".join((*parts, f"judge: {result['judge']}. {result['judge_note']}"))


def _human_grades(context: RowContext) -> list[GradedLine]:
    """Read the human grades, before anything is generated."""
    params = context.run.evaluate
    source = params.human_grades
    if source is None:
        return []
    lines = read(source, context.location(source))
    return read_grades(lines, params.grade_scale, _model_names(context))


def _preferences(
    context: RowContext, answers: Answers, judge: Judge
) -> dict[tuple[str, str], dict[str, Preference]]:
    """Compare pairs of models in both orders. Empty if the run does not ask for it, or if its judge
    fell back to the overlap."""
    if not context.run.evaluate.pairwise:
        return {}
    if not isinstance(judge, ModelJudge | JudgePanel):
        _log.warning("evaluate: no pairwise comparison, because the judge is %s", judge.name)
        return {}
    preferences = {}
    for model, against in compared_pairs(list(answers)):
        kind = f"pairwise-{_label(context, model)}-{_label(context, against)}"
        pairs = answer_pairs(answers, model, against)
        if pairs:
            preferences[model, against] = compare_pairs(judge, context.extras, kind, pairs)
    return preferences


def _rows(context: RowContext) -> list[Row]:
    rows: list[Row] = pq.read_table(context.inputs["prepare"] / "evaluation.parquet").to_pylist()
    if not rows:
        raise DataError(
            "there are no evaluation rows",
            "set run.prepare.evaluation_rows or run.prepare.evaluation_sources",
        )
    limit = context.run.evaluate.max_multiple_choice
    if limit is None:
        return rows
    choice_ids = sorted(row["id"] for row in rows if row["kind"] == "multiple_choice")
    kept = set(choice_ids[:limit])  # ids are hashes, so this is a random sample
    return [row for row in rows if row["kind"] != "multiple_choice" or row["id"] in kept]


def _model_names(context: RowContext) -> list[str]:
    params = context.run.evaluate
    return [*params.models, *(str(reference) for reference in params.extra_models)]


def _judge(context: RowContext) -> tuple[Judge, str]:
    """Return the judge that made the pairs, or else the overlap, and a note on its limits."""
    if "judge" not in context.inputs:
        return OverlapJudge(), _NO_KNOWLEDGE
    calibrations = json.loads((context.inputs["judge"] / "calibration.json").read_text())
    judge = calibrated_judge(context, "evaluate", calibrations)
    return judge, f"{_NO_KNOWLEDGE} {_BIASED}" if judge.kind == "overlap" else _BIASED


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """A model to evaluate, without its weights until they are needed."""

    label: str
    """Its name among the finished rows."""
    rows: Sequence[Row]
    """The rows with its prompts, also in other orders of their options. A model of another family
    has another chat template."""
    abstaining: Sequence[Row]
    """The rows with an option to abstain, which are only answered."""
    engine: LazyEngine
    scoring: LazyEngine
    """The engine that scores the data's own answers, usually the same."""

    @classmethod
    def of(cls, context: RowContext, name: str, rows: Sequence[Row], asked: Asked) -> _Evaluation:
        """Load the tokenizer, and render the rows for it. An endpoint renders them itself."""
        abstaining = asked.abstaining_rows(rows)
        rows = [*rows, *asked.reordered_rows(rows), *abstaining]
        if name not in _OWN_MODELS and (other := _extra_reference(context, name)).is_endpoint:
            key = "run.evaluate.extra_models"
            engine = endpoint_engine(context, key, other, context.run.prompt.system)
            # An endpoint does not score the data's own answers.
            rows = [{**row, "prompt_ids": (), "completion_ids": []} for row in rows]
            scoring = engine
        else:
            model, rows = _model(context, name, rows)
            engine = lazy_engine(context, "evaluate", model)
            scoring = scoring_engine(context, model, engine)
        count = len(rows) - len(abstaining)
        return cls(_label(context, name), rows[:count], rows[count:], engine, scoring)

    def likelihoods(self, context: RowContext) -> Mapping[str, float | None]:
        """Score the data's own answers."""
        return completion_likelihoods(context.extras, self.scoring, self.rows, self.label)

    def answer(self, context: RowContext) -> _ModelAnswers:
        """Return the model's answers and likelihoods. It is loaded only if some are missing."""
        params, extras = context.run.evaluate, context.extras
        limits = dict.fromkeys(("open", "harmful", "benign"), params.max_new_tokens)
        limits["multiple_choice"] = params.multiple_choice_max_new_tokens
        nll = self.likelihoods(context)
        letters = likeliest_letters(extras, self.engine, self.rows, self.label)
        asked = [*self.rows, *self.abstaining]
        answers = answer_rows(extras, self.engine, asked, limits, self.label)
        self.engine.close()
        return _ModelAnswers(answers, nll, letters)


def _model(context: RowContext, name: str, rows: Sequence[Row]) -> tuple[Model, list[Row]]:
    """Return a model that runs here, and the rows with its prompts."""
    spec, load, trained = _weights(context, name)
    base = context.location(context.run.base_model)
    tokenizer = load_tokenizer(spec.location)
    key = "run.base_model" if spec.location == base else "run.evaluate.extra_models"
    renderer = Renderer(tokenizer, context.run.prompt, key)
    if spec.location != base:
        model = Model(spec, tokenizer, renderer, load, trained)
        return model, _prompted_for(renderer, tokenizer, context, rows)
    rank = largest_rank(trained, *(context.inputs.get(each) for each in ("sft", "dpo")))
    model = Model(spec, tokenizer, renderer, load, trained, rank)
    return model, _with_prompts(renderer, rows)


def _weights(context: RowContext, name: str) -> tuple[ModelSpec, Callable[[], Any], Path | None]:
    """Return how to load a model, and the directory of its trained weights if it has any."""
    spec = ModelSpec.base_of(context.run, context.location(context.run.base_model))
    if name in ("sft", "dpo"):
        trained = context.inputs[name]
        return spec, functools.partial(load_policy, spec, trained), trained
    if name == "base":
        return spec, functools.partial(load_start, context, spec), starting_adapter(context)
    spec = replace(spec, location=context.location(_extra_reference(context, name)))
    return spec, functools.partial(load_model, spec), None


def _label(context: RowContext, name: str) -> str:
    """Name a model's finished rows: a path segment that no other model has.

    Paths may be stored without their case, and characters that are not allowed in them are
    replaced, so a digest of the model's contents and name is appended. A local directory can be
    replaced by another one before an unfinished stage is resumed.
    """
    if name in _OWN_MODELS:
        return name
    reference = _extra_reference(context, name)
    pin = None if reference.is_endpoint else context.location(reference).revision
    if not reference.is_endpoint and not references.is_remote(reference):
        pin = references.local_pin(reference)
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[-_LABEL_LENGTH:]
    return f"{readable}-{fingerprint([name, pin])[:12]}"


def _extra_reference(context: RowContext, name: str) -> ModelRef:
    return next(each for each in context.run.evaluate.extra_models if str(each) == name)


def _prompted_for(
    renderer: Renderer, tokenizer: Any, context: RowContext, rows: Sequence[Row]
) -> list[Row]:
    """Render the rows with another model's chat template.

    A model with another vocabulary gets no completions to score, because likelihoods per token of
    different tokens cannot be compared.
    """
    base_tokenizer = load_tokenizer(context.location(context.run.base_model))
    same_vocabulary = base_tokenizer.get_vocab() == tokenizer.get_vocab()
    prompts = renderer.prompt_ids([conversation_of(row) for row in rows])
    completions: list[list[int]] = [[] for _ in rows]
    if same_vocabulary:
        answers = ["" if row["prompt_ids"] is None else row["answer"] for row in rows]
        completions = renderer.completion_ids(answers)
    return [
        {**row, "prompt_ids": prompt, "completion_ids": completion}
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
    ]


def _with_prompts(renderer: Renderer, rows: Sequence[Row]) -> list[Row]:
    """Render the rows that `prepare` has not rendered."""
    missing = [row for row in rows if row["prompt_ids"] is None]
    made = iter(renderer.prompt_ids([conversation_of(row) for row in missing]))
    return [row | {"prompt_ids": next(made)} if row["prompt_ids"] is None else row for row in rows]


def _judge_answers(
    context: RowContext,
    name: str,
    rows: Sequence[Row],
    found: _ModelAnswers,
    judge: Judge,
    asked: Asked,
) -> list[EvaluatedAnswer]:
    """Score the answers to open questions, and combine all figures of each row."""
    style = context.run.prompt.style
    rows = [row for row in rows if row["id"] in found.answers]
    items = []
    for row in rows:
        if row["kind"] == "open":
            response = take_apart(style, found.answers[row["id"]].text).response
            criteria = from_json(row.get("rubric"))
            items.append(Item(row["id"], row["question"], row["reference"], response, criteria))
    judged = judge.score(context.extras, f"judged-{_label(context, name)}", items)
    answers = []
    for row in rows:
        row_id = row["id"]
        score = judged.get(row_id)
        answers.append(
            EvaluatedAnswer.of(
                row,
                found.answers[row_id],
                style,
                nll_per_token=found.nll_per_token.get(row_id),
                letter=found.letters.get(row_id),
                judged=score.figures() if score else {},
                orders=asked.orders_of(row, found.answers, found.letters, style),
                with_abstention=asked.abstention_of(row, found.answers, style),
            )
        )
    return answers


def _write_answers(context: RowContext, answers: Answers) -> None:
    with (context.output / "answers.jsonl").open("w", encoding="utf-8") as file:
        for row in _answer_table(answers):
            file.write(json.dumps(without_infinities(row), ensure_ascii=False) + "\n")


def _answer_table(answers: Answers) -> Iterator[dict[str, Any]]:
    """Yield each evaluation row with the answers of all models."""
    for row_answers in zip(*answers.values(), strict=True):
        row = row_answers[0].row
        texts = {
            name: {"text": answer.text, "truncated": answer.truncated, **answer.judged}
            for name, answer in zip(answers, row_answers, strict=True)
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
    shows_rows = may_be_shown(context.inputs["prepare"])
    table = [
        {**row, "cells": [format_estimate(row, model) for model in models]}
        for row in result["metrics"]
    ]
    corrected = result["corrected"] or {"differences": []}
    differences = [*map(difference_sentence, corrected["differences"])]
    chart = intervals(_chart_points(result["metrics"]), "0 to 1, with 95 % intervals")
    write_page(
        context.output / "report.html",
        "evaluate.html",
        {"intervals": chart},
        r=result,
        models=models,
        table=table,
        differences=differences,
        answers=_side_by_side(answers, context.run.evaluate.side_by_side if shows_rows else 0),
        shows_rows=shows_rows,
    )


def _chart_points(
    table: Sequence[dict[str, Any]],
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return value, low and high of the metrics between 0 and 1, by metric and model.

    A value without an interval is drawn without one.
    """
    points = {}
    for row in table:
        if row["percent"] or row["metric"].startswith(("judge", "ROUGE", "BLEU")):
            points[row["metric"]] = {
                model: (
                    figures["value"],
                    *(
                        figures["value"] if figures[end] is None else figures[end]
                        for end in ("low", "high")
                    ),
                )
                for model, figures in row["models"].items()
                if math.isfinite(figures["value"])
            }
    return points


def _side_by_side(answers: Answers, wanted: int) -> list[dict[str, Any]]:
    """Select rows to show with all answers. Each kind gets up to half of them, open ones first."""
    rows = list(_answer_table(answers))
    selected: list[dict[str, Any]] = []
    for kind in ("open", "harmful", "benign"):
        of_kind = [row for row in rows if row["kind"] == kind]
        selected += of_kind[: max(1, wanted // 2)]
    return selected[:wanted]
