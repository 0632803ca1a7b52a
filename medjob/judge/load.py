"""The judge that a run names."""

from __future__ import annotations

from medjob.generate.engine import TransformersEngine
from medjob.judge.scoring import Judge, ModelJudge, OverlapJudge, plain_renderer
from medjob.stage import RowContext
from medjob.train.model import ModelSpec, load_model, load_tokenizer


def load_judge(context: RowContext) -> Judge:
    """A model judge on this machine's device, or the overlap."""
    run, params = context.run, context.run.judge
    if params.kind == "overlap":
        return OverlapJudge()
    ref = params.model or run.base_model
    location = context.location(ref)
    tokenizer = load_tokenizer(location)
    model = load_model(ModelSpec(location, params.load_in_4bit, run.dtype))
    return ModelJudge(
        TransformersEngine(model, tokenizer, context.resources.batch_size, run.seed),
        plain_renderer(tokenizer),
        name=str(ref),
    )
