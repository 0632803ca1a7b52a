"""The models of a comparison: how each is loaded, and which rows it answers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medjob.artifacts.finished_rows import Row
from medjob.config.base import ModelRef
from medjob.data.render import Renderer
from medjob.evaluate.answers import (
    answer_rows,
    completion_likelihoods,
    conversation_of,
    likeliest_letters,
)
from medjob.evaluate.asked import Asked
from medjob.generate.endpoint import endpoint_engine
from medjob.generate.load import Model, largest_rank, lazy_engine, scoring_engine
from medjob.generate.protocol import Generated
from medjob.generate.work import LazyEngine
from medjob.runtime.files import fingerprint
from medjob.sources import references
from medjob.stage import RowContext
from medjob.train.model import ModelSpec, load_model, load_policy, load_tokenizer
from medjob.train.start import load_start, starting_adapter

_OWN_MODELS = ("base", "sft", "dpo")
_LABEL_LENGTH = 40  # characters of a model's name in the paths of its finished rows


@dataclass(frozen=True, slots=True)
class ModelAnswers:
    """One model's answers and likelihoods, by row id."""

    answers: Mapping[str, Generated]
    nll_per_token: Mapping[str, float | None]
    letters: Mapping[str, str]


def model_names(context: RowContext) -> list[str]:
    """Names of the models to compare, in their order."""
    params = context.run.evaluate
    return [*params.models, *(str(reference) for reference in params.extra_models)]


@dataclass(frozen=True, slots=True)
class ComparedModel:
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
    def of(cls, context: RowContext, name: str, rows: Sequence[Row], asked: Asked) -> ComparedModel:
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
        return cls(label_of(context, name), rows[:count], rows[count:], engine, scoring)

    def likelihoods(self, context: RowContext) -> Mapping[str, float | None]:
        """Score the data's own answers."""
        return completion_likelihoods(context.extras, self.scoring, self.rows, self.label)

    def answer(self, context: RowContext) -> ModelAnswers:
        """Return the model's answers and likelihoods. It is loaded only if some are missing."""
        params, extras = context.run.evaluate, context.extras
        limits = dict.fromkeys(("open", "harmful", "benign"), params.max_new_tokens)
        limits["multiple_choice"] = params.multiple_choice_max_new_tokens
        nll = self.likelihoods(context)
        letters = likeliest_letters(extras, self.engine, self.rows, self.label)
        asked = [*self.rows, *self.abstaining]
        answers = answer_rows(extras, self.engine, asked, limits, self.label)
        self.engine.close()
        return ModelAnswers(answers, nll, letters)


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


def label_of(context: RowContext, name: str) -> str:
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
