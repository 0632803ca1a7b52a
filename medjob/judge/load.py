"""Load the judge that a run names."""

from __future__ import annotations

import functools

from medjob.generate.endpoint import endpoint_engine
from medjob.generate.load import Model, lazy_engine
from medjob.judge.scoring import Judge, ModelJudge, OverlapJudge, plain_renderer
from medjob.stage import RowContext
from medjob.train.model import ModelSpec, load_model, load_tokenizer


def load_judge(context: RowContext, stage: str) -> Judge:
    """Return the judge: a model, whose weights are loaded when it is first asked, or the overlap.

    Args:
        stage: The stage that asks it, whose resources name the engine.
    """
    params = context.run.judge
    if params.kind == "overlap":
        return OverlapJudge()
    reference = params.model or context.run.base_model
    if reference.is_endpoint:
        engine = endpoint_engine(context, "run.judge.model", reference)
        return ModelJudge(engine, None, name=str(reference))
    spec = ModelSpec(context.location(reference), params.load_in_4bit, context.run.dtype)
    tokenizer = load_tokenizer(spec.location)
    renderer = plain_renderer(tokenizer, "run.judge.model")
    model = Model(spec, tokenizer, renderer, functools.partial(load_model, spec))
    return ModelJudge(lazy_engine(context, stage, model), renderer, name=str(reference))
