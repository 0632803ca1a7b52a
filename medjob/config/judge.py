"""`run.candidates`, `run.judge`, `run.evaluate` and `run.export`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medjob.config.base import Count, Fraction, ModelRef, Strict
from medjob.config.prepare import DataSource

Probability = Annotated[float, Field(gt=0, le=1)]


class CandidatesParams(Strict):
    """`run.candidates`: several sampled answers to each preference prompt."""

    num_candidates: Annotated[int, Field(ge=2)] = 2
    """Answers per question."""
    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Sampling temperature; 0 would make all candidates equal."""
    top_p: Probability = 0.95
    """Nucleus sampling: keep the smallest set of tokens with this probability."""
    max_new_tokens: Count = 512
    """Longest answer in tokens; a cut answer is drawn once more with twice as many, and marked if it is still cut."""


class JudgeParams(Strict):
    """`run.judge`: scores in [0, 1] for the candidates, and the preference pairs made of them."""

    kind: Literal["model", "overlap"] = "model"
    """`model`: a language model with the reference at hand; `overlap`: token F1 with the reference, no model."""
    model: ModelRef | None = None
    """The judging model. Default: `run.base_model`."""
    load_in_4bit: bool = False
    """Load the judge in NF4 (needs bitsandbytes)."""
    calibration: DataSource = DataSource(path="package:medjob/judge/graded.jsonl")
    """Graded rows (question, reference, better, worse) that the judge must order before it may make pairs."""
    on_uncalibrated: Literal["stop", "overlap"] = "stop"
    """When the judge does not beat the trivial baselines: stop with exit code 67, or fall back to `overlap`."""
    min_margin: Fraction = 0.05
    """Smallest difference of scores that makes a pair; smaller ones are ties."""
    threshold: Fraction | None = None
    """When set, a pair needs one answer at or above and one below it: correct against wrong, as in HuatuoGPT-o1."""
    pairwise_check: bool = False
    """Also ask which of two answers is better, in both orders, and drop pairs that the two disagree on."""
    agreement_rows: Annotated[int, Field(ge=0)] = 200
    """Rows with preferences of their own on which the judge's agreement with them is reported."""


ComparedModel = Literal["base", "sft", "dpo"]


def _all_models() -> list[ComparedModel]:
    return ["base", "sft", "dpo"]


class EvaluateParams(Strict):
    """`run.evaluate`: base, sft and dpo on the same rows."""

    models: list[ComparedModel] = Field(default_factory=_all_models, min_length=1)
    """Models of this run to compare; the first is what the others are tested against."""
    extra_models: list[ModelRef] = Field(default_factory=list)
    """Other models to compare on the same rows (`medjob evaluate --model`)."""
    max_new_tokens: Count = 512
    """Longest answer in tokens; answers that hit it count as truncated."""
    multiple_choice_max_new_tokens: Count = 512
    """Longest answer to a multiple-choice question, in tokens."""
    max_multiple_choice: Count | None = None
    """Evaluate at most this many multiple-choice rows, taken by hash. Default: all."""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 1000
    """Resamples behind each 95 % interval."""
    side_by_side: Annotated[int, Field(ge=0)] = 8
    """Questions whose answers are printed next to each other in the report."""

    @model_validator(mode="after")
    def _no_model_twice(self) -> EvaluateParams:
        if len(set(self.models)) != len(self.models):
            raise ValueError(f"a model is named twice (got {self.models})")
        return self


class ExportParams(Strict):
    """`run.export`: the merged model that a serving engine needs."""

    source: Literal["sft", "dpo"] = "dpo"
    """Which trained model to export."""
    hub_model_id: str | None = None
    """Push the merged model to this hub id (`org/name`). Default: nothing leaves the store."""
