"""The judge that a run names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medjob.config.run_file import Run
from medjob.generate.engine import TransformersEngine
from medjob.judge.scoring import Judge, ModelJudge, OverlapJudge, plain_renderer
from medjob.train.model import ModelSpec, load_model, load_tokenizer


def load_judge(run: Run, pins: Mapping[str, str], cache: Path, batch_size: int) -> Judge:
    """A model judge on this machine's device, or the overlap."""
    params = run.judge
    if params.kind == "overlap":
        return OverlapJudge()
    ref = params.model or run.base_model
    tokenizer = load_tokenizer(ref, pins, cache)
    model = load_model(ModelSpec(ref, pins, cache, params.load_in_4bit, run.dtype))
    return ModelJudge(
        TransformersEngine(model, tokenizer, batch_size, run.seed),
        plain_renderer(tokenizer),
        name=str(ref),
    )
