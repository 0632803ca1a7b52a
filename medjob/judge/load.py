"""The judges that a run names."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from medjob.config.base import ModelRef
from medjob.data.render import Renderer
from medjob.generate.endpoint import endpoint_engine
from medjob.generate.load import Model, lazy_engine
from medjob.generate.work import LazyEngine
from medjob.judge.questions import Prompts
from medjob.judge.scoring import (
    Comparer,
    Judge,
    ModelJudge,
    OverlapJudge,
    combined,
    plain_renderer,
)
from medjob.stage import RowContext
from medjob.train.model import ModelSpec, load_model, load_tokenizer


def model_judges(context: RowContext, stage: str) -> list[ModelJudge]:
    """Return a judge for each judge model of the run, in their order. The weights of each are
    loaded when it is first asked something that is not finished.

    Args:
        stage: The stage that asks, whose resources name the engine.
    """
    params = context.run.judge
    prompts = Prompts.of(params.prompts)
    judges = []
    for number, model in enumerate(params.models):
        reference = model or context.run.base_model
        engine, renderer = _engine(context, stage, reference, key_of(number))
        name, finished = str(reference), f"judge{number}"
        judges.append(ModelJudge(engine, renderer, name, finished, prompts, params.aspect_weights))
    return judges


def calibrated_judge(
    context: RowContext, stage: str, calibrations: Sequence[Mapping[str, Any]]
) -> Judge:
    """Return the judge that made a run's pairs: the models that were calibrated, or the overlap.

    Args:
        stage: As in `model_judges`.
        calibrations: Content of the `calibration.json` of the stage `judge`.
    """
    failed = {each["judge"] for each in calibrations if not each["passed"]}
    passed = {each["judge"] for each in calibrations} - failed
    judges: list[Comparer] = [
        judge for judge in model_judges(context, stage) if judge.name in passed
    ]
    return combined(judges) if judges else OverlapJudge()


def key_of(number: int) -> str:
    """The run file's key of a judge model."""
    return "run.judge.model" if number == 0 else f"run.judge.extra_models.{number - 1}"


def _engine(
    context: RowContext, stage: str, reference: ModelRef, key: str
) -> tuple[LazyEngine, Renderer | None]:
    """Return the engine of a judge model, and what renders its prompts; an endpoint does that
    itself."""
    run = context.run
    if reference.is_endpoint:
        return endpoint_engine(context, key, reference), None
    spec = ModelSpec(context.location(reference), run.judge.load_in_4bit, run.dtype)
    tokenizer = load_tokenizer(spec.location)
    renderer = plain_renderer(tokenizer, key)
    model = Model(spec, tokenizer, renderer, functools.partial(load_model, spec))
    return lazy_engine(context, stage, model), renderer
