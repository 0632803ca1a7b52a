"""`run.candidates`, `run.judge`, `run.evaluate` and `run.export`."""

from __future__ import annotations

import os
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from medjob.config.base import (
    ADDED_LATER,
    NOT_IN_KEY,
    Count,
    CountOrZero,
    Fraction,
    HubId,
    ModelRef,
    Strict,
    is_bucket_uri,
)
from medjob.config.judge_prompts import SHIPPED_ASPECTS, AspectName, JudgePrompts
from medjob.config.prepare import DataSource
from medjob.config.stages import TrainedModel

Probability = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1000)]


class CandidatesParams(Strict):
    """`run.candidates`: samples several answers to each preference prompt."""

    num_candidates: Annotated[int, Field(ge=2, le=1024)] = 2
    """Answers sampled per prompt."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 0.7
    """Sampling temperature. It cannot be 0, because all candidates would be identical."""
    top_p: Probability = 0.95
    """Nucleus sampling: sample from the smallest set of tokens whose total probability reaches
    this."""
    max_new_tokens: Count = 512
    """Maximum answer length in tokens. A truncated answer is sampled once more with twice this
    limit, and marked as truncated if it is still too long."""


class JudgeParams(Strict):
    """`run.judge`: scores each candidate in [0, 1] and builds preference pairs from the scores."""

    kind: Literal["model", "overlap"] = "model"
    """`model`: a language model that sees the reference answer. `overlap`: token F1 with the
    reference answer, without a model."""
    model: ModelRef | None = None
    """The judge model. Default: `run.base_model`."""
    extra_models: Annotated[list[ModelRef], ADDED_LATER] = Field(default_factory=list)
    """Further judge models. Each is calibrated by itself, and a score is the mean over the judges.
    They are loaded one after the other."""
    allow_hosted: Annotated[bool, NOT_IN_KEY] = False
    """Allow `judge` and `evaluate` to send questions, references and answers to the endpoints that
    `model` and `extra_models` name. Otherwise they need `--yes`. It is in no key."""
    load_in_4bit: bool = False
    """Load the judge models in 4-bit NF4. Requires bitsandbytes."""
    aspects: Annotated[dict[AspectName, Weight], ADDED_LATER] = Field(default_factory=dict)
    """Weights of the aspects whose weighted mean is the score of an answer, such as
    `{accuracy: 2, completeness: 1}`. An aspect without a weight, or with weight 0, is not asked.
    Default: accuracy, completeness and key_points, with weight 1 each. Rows with criteria are
    scored by these instead."""
    prompts: Annotated[JudgePrompts, ADDED_LATER] = JudgePrompts()
    """Texts with which the judge is asked. Default: those of medjob."""
    calibration: DataSource = DataSource(path="package:medjob/judge/graded.jsonl")
    """Graded rows with the columns question, reference, better and worse. The judge must rank them
    well enough before it may build pairs."""
    on_uncalibrated: Literal["stop", "overlap"] = "stop"
    """What to do if the judge does not beat the trivial baselines on the calibration rows, or
    prefers answers that grade themselves: `stop` with exit code 67, or fall back to `overlap`. Of
    several judges, `overlap` leaves out those that fail, and falls back only if all do. A judge
    that prefers the worse answers in three of four rows always stops the stage."""
    min_margin: Fraction = 0.05
    """Minimum score difference of a pair. Smaller differences are ties and make no pair."""
    threshold: Fraction | None = None
    """If set, the chosen answer must score at least this and the rejected answer less, so that a
    correct answer is paired with a wrong one, as in HuatuoGPT-o1. Default: no threshold."""
    pairwise_check: bool = False
    """Also ask the judge which of the two answers is better, in both orders, and drop the pair if
    the answers disagree."""
    agreement_rows: CountOrZero = 200
    """Maximum number of rows on which the judge is compared with existing preferences. Only rows
    that came with a chosen and a rejected answer count."""

    @property
    def models(self) -> list[ModelRef | None]:
        """The judge models in their order. None is `run.base_model`. Empty for the overlap."""
        return [self.model, *self.extra_models] if self.kind == "model" else []

    @property
    def aspect_weights(self) -> dict[str, float]:
        """Weight of each aspect that is asked. All are above 0."""
        return dict(self.aspects) or dict.fromkeys(SHIPPED_ASPECTS, 1.0)

    @field_validator("aspects")
    @classmethod
    def _some_aspect_counts(cls, aspects: dict[str, float]) -> dict[str, float]:
        """Write equal weights in one way, because they are part of the key."""
        asked = {name: weight for name, weight in aspects.items() if weight > 0}
        if aspects and not asked:
            raise ValueError("no aspect has a weight above 0; name those that count")
        return {} if asked == dict.fromkeys(SHIPPED_ASPECTS, 1.0) else asked

    @model_validator(mode="after")
    def _aspects_have_texts_and_weights(self) -> JudgeParams:
        known = (*SHIPPED_ASPECTS, *self.prompts.aspects)
        for name in self.aspects:
            if name not in known:
                raise ValueError(
                    f"aspects.{name}: unknown aspect; known: {', '.join(dict.fromkeys(known))}; "
                    f"write its question in prompts.aspects.{name}"
                )
        for name in self.prompts.aspects:
            if name not in self.aspect_weights:
                raise ValueError(
                    f"prompts.aspects.{name}: has no weight, so it would not be asked; list all "
                    f"weights in aspects, such as {{accuracy: 1, {name}: 1}}"
                )
        return self

    @model_validator(mode="after")
    def _judges_differ(self) -> JudgeParams:
        if self.kind == "overlap" and self.extra_models:
            raise ValueError("extra_models: kind is overlap, which uses no model; set kind: model")
        names: dict[str, str] = {}
        for path, model in [("model", self.model), *_numbered("extra_models", self.extra_models)]:
            name = "run.base_model" if model is None else _normalised(model)
            if name in names:
                raise ValueError(f"{path}: is the same judge as {names[name]} (got {model})")
            names[name] = path
        return self

    @model_validator(mode="after")
    def _endpoint_loads_nothing(self) -> JudgeParams:
        endpoints = [model for model in self.models if model is not None and model.is_endpoint]
        if self.load_in_4bit and endpoints:
            raise ValueError(
                f"load_in_4bit: {endpoints[0]} is an endpoint, whose model is not loaded here; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _calibration_has_its_own_columns(self) -> JudgeParams:
        for name in ("columns", "weight"):
            if getattr(self.calibration, name):
                raise ValueError(
                    f"calibration.{name}: cannot be set; the graded rows need the columns "
                    "question, reference, better and worse"
                )
        return self


ComparedModel = Literal["base", "sft", "dpo"]
GradeScale = Literal["1-5", "0-1"]


def _all_models() -> list[ComparedModel]:
    return ["base", "sft", "dpo"]


class EvaluateParams(Strict):
    """`run.evaluate`: compares models on the same rows."""

    models: list[ComparedModel] = Field(default_factory=_all_models, min_length=1)
    """Models of this run to compare. The first is the baseline of the significance tests. Default:
    `base` and each model that the run trains."""
    extra_models: list[ModelRef] = Field(default_factory=list)
    """Additional models to compare on the same rows. `medjob evaluate --model` appends to this
    list."""
    allow_hosted: Annotated[bool, NOT_IN_KEY] = False
    """Allow `evaluate` to send questions to the endpoints that `extra_models` names. Otherwise it
    needs `--yes`. It is in no key."""
    max_new_tokens: Count = 512
    """Maximum answer length in tokens. Longer answers count as truncated."""
    multiple_choice_max_new_tokens: Count = 512
    """Maximum length of an answer to a multiple-choice question, in tokens."""
    max_multiple_choice: Count | None = None
    """Maximum number of multiple-choice rows, selected by hash. Default: all."""
    bootstrap_samples: Annotated[int, Field(ge=100, le=10**6)] = 1000
    """Bootstrap resamples per 95 % confidence interval."""
    side_by_side: CountOrZero = 8
    """Number of questions for which the report shows the models' answers side by side."""
    option_shuffles: Annotated[int, Field(ge=0, le=23), ADDED_LATER] = 0
    """Ask each multiple-choice question also with its options in this many other orders. The report
    then has the accuracy over all orders, and how often a model chooses the same option in all of
    them. Each order costs as much as the question itself. 3 show a preference for a letter; four
    options have 23 other orders."""
    abstain_option: Annotated[bool, ADDED_LATER] = False
    """Ask each multiple-choice question once more with the additional option "I don't know". The
    report then has the share of abstentions, the accuracy of the other answers, and a score in
    which a wrong answer costs as much as guessing gains: 1/(options - 1) points."""
    human_grades: Annotated[DataSource | None, ADDED_LATER] = None
    """Human grades of some answers, with the columns id or question, model, and grade. They turn
    the judge's mean scores into unbiased estimates with intervals. The evaluation writes
    grading.csv, a file with these columns to fill in."""
    grade_scale: Annotated[GradeScale, ADDED_LATER] = "1-5"
    """Scale of `human_grades`. 5 or 1 is the best grade."""
    pairwise: Annotated[bool, ADDED_LATER] = False
    """Also show the judge two models' answers to each open question, in both orders, and count
    which wins in both: each model against the first one, and dpo against sft. Requires the model
    judge of a run with a judge stage."""

    @model_validator(mode="after")
    def _grades_have_their_own_columns(self) -> EvaluateParams:
        for name in ("columns", "weight"):
            if self.human_grades and getattr(self.human_grades, name):
                raise ValueError(
                    f"human_grades.{name}: cannot be set; the graded rows need the columns id or "
                    "question, model and grade"
                )
        return self

    @model_validator(mode="after")
    def _no_model_twice(self) -> EvaluateParams:
        if len(set(self.models)) != len(self.models):
            raise ValueError(f"each model may be listed only once (got {self.models})")
        return self

    @model_validator(mode="after")
    def _extra_models_have_other_names(self) -> EvaluateParams:
        """Each model is one column of the comparison, under its name."""
        names: dict[str, str] = {}
        for number, reference in enumerate(self.extra_models):
            name = str(reference)
            if name in get_args(ComparedModel):
                raise ValueError(
                    f"extra_models.{number}: the name {name} is taken by a model of this run; "
                    f"write ./{name} for the directory, or list {name} in run.evaluate.models"
                )
            path = _normalised(reference)
            if path in names:
                raise ValueError(
                    f"extra_models.{number}: each model may be listed only once "
                    f"(got {names[path]!r} and {name!r})"
                )
            names[path] = name
        return self


def _numbered(name: str, models: list[ModelRef]) -> list[tuple[str, ModelRef]]:
    return [(f"{name}.{number}", model) for number, model in enumerate(models)]


def _normalised(reference: ModelRef) -> str:
    """Write a reference in one way, so that `./x`, `x` and `x/` are the same model."""
    name = reference.id
    if is_bucket_uri(name):
        name = name.rstrip("/")
    elif not reference.is_endpoint and not name.startswith("package:"):
        name = os.path.abspath(os.path.expanduser(name))  # noqa: PTH100, PTH111  no file is read
    return f"{name}@{reference.revision}" if reference.revision else name


class ExportParams(Strict):
    """`run.export`: merges the adapter into the base model, for use by a serving engine."""

    source: TrainedModel = "dpo"
    """Trained model to export. Default: the last one that the run trains."""
    hub_model_id: HubId | None = None
    """Hub id (`org/name`) to upload the merged model to. Default: no upload."""
    private: bool = True
    """Upload to a private repository only. `false` creates a public one, and also uploads to a
    repository that is public already."""
