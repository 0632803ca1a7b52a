"""Load the judge that a run names."""

from __future__ import annotations

from medjob.generate.engine import TransformersEngine
from medjob.judge.scoring import Judge, ModelJudge, OverlapJudge, plain_renderer
from medjob.stage import RowContext
from medjob.train.model import ModelSpec, load_model, load_tokenizer


def load_judge(context: RowContext) -> Judge:
    """Load the judge's model on this machine's device, or return the overlap judge."""
    run = context.run
    params = run.judge
    if params.kind == "overlap":
        return OverlapJudge()
    reference = params.model or run.base_model
    location = context.location(reference)
    tokenizer = load_tokenizer(location)
    model = load_model(ModelSpec(location, params.load_in_4bit, run.dtype))
    renderer = plain_renderer(tokenizer, "run.judge.model")
    engine = TransformersEngine(model, tokenizer, context.resources.batch_size, run.seed, renderer)
    return ModelJudge(engine, renderer, name=str(reference))
