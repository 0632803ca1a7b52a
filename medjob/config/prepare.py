"""`run.prompt` and `run.prepare`: which rows are read, and how they become prompts and answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medjob.config.base import Count, Fraction, ReferenceName, Strict, is_hub_id

Format = Literal[
    "medical_o1",
    "verifiable",
    "instruction",
    "conversations",
    "preference",
    "multiple_choice",
    "messages",
    "safety",
]
Style = Literal["thinking", "tags", "plain"]


class PromptParams(Strict):
    """How a question is put to the model and how its answer is laid out; the same in training, sampling and evaluation."""

    style: Style = "thinking"
    """`thinking`: "## Thinking" and "## Final Response" headings; `tags`: `<think>` and `<response>`; `plain`: the answer alone."""
    system: str | None = None
    """System message put before every question. Default: none of our own (a chat template may add its own)."""
    template: str | None = None
    """Raw text prompt with `{question}` in it, for models trained without a chat template. Default: the tokenizer's chat template."""

    @model_validator(mode="after")
    def _template_has_a_place(self) -> PromptParams:
        if self.template is not None and self.template.count("{question}") != 1:
            raise ValueError("template must hold {question} exactly once")
        if self.template is not None and self.system is not None:
            raise ValueError("a raw template takes no system message: write it into the template")
        return self


class DataSource(Strict):
    """One file, folder, glob, bucket object or hub data set."""

    path: ReferenceName
    """Local path or glob (.jsonl, .json, .csv, .parquet), `s3://BUCKET/KEY` or `gs://BUCKET/KEY` (an object; or, ending in `/` or
    without a suffix, all data files below it), `package:NAME/FILE` inside an installed package, or hub id `org/name`."""
    name: str | None = None
    """Configuration of a hub data set, such as medical-o1's `en`, `zh`, `en_mix`, `zh_mix`."""
    split: str | None = None
    """Split of a hub data set; slices such as `train[:500]` are taken. Default: `train`."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; `fetch` pins it to a commit."""
    format: Format | None = None
    """What the rows mean. Default: found by their columns."""
    limit: Count | None = None
    """Read at most this many rows, from the start."""
    where: dict[str, list[str]] = Field(default_factory=dict)
    """Keep rows whose column starts with one of these texts, such as `{type: [Literature]}` or `{id: [MedQA, MedMCQA]}`."""

    @property
    def key(self) -> str:
        """How pins.json names the data set."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @model_validator(mode="after")
    def _hub_only_fields(self) -> DataSource:
        given = [field for field in ("name", "revision", "split") if getattr(self, field)]
        if given and not is_hub_id(self.path):
            raise ValueError(
                f"{' and '.join(given)} belong to a hub data set (path is {self.path!r}); limit and where work for files too"
            )
        return self


class SafetyMix(Strict):
    """Refusals and careful answers mixed into the training rows."""

    sources: Annotated[list[DataSource], Field(min_length=1)]
    """Rows with `prompt`, `response` and, where known, `kind` (`harmful` or `benign`)."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the training rows that are safety rows; never repeats a row to reach it."""
    evaluation_rows: Annotated[int, Field(ge=0)] = 0
    """Safety rows held out of training, for the evaluation's refusal and over-refusal figures."""


class Contamination(Strict):
    """When a training row counts as a copy of an evaluation row (n-gram overlap, as in Meditron's 8-gram, 80 % rule)."""

    ngram: Count = 8
    """Length of an n-gram, in words (characters for Chinese text)."""
    threshold: Fraction = 0.8
    """Share of an evaluation row's n-grams that must occur in one training row. A ratio, since single long matches are mostly boilerplate."""
    action: Literal["remove", "report"] = "remove"
    """`remove` leaves contaminated training rows out; `report` keeps and counts them."""


class PrepareParams(Strict):
    """`run.prepare`: raw rows in; train, validation, preference prompts and evaluation out."""

    sources: Annotated[list[DataSource], Field(min_length=1)]
    """Rows to fine-tune on."""
    preference_sources: list[DataSource] = Field(default_factory=list)
    """Questions to sample candidates for. Default: `preference_rows` of `sources`, kept out of training."""
    evaluation_sources: list[DataSource] = Field(default_factory=list)
    """Multiple-choice or open questions to evaluate on, beside the held-out rows of `sources`."""
    safety: SafetyMix | None = None
    """Safety rows to mix in. Default: none."""
    validation_rows: Annotated[int, Field(ge=0)] = 100
    """Rows of `sources` for the validation loss."""
    evaluation_rows: Annotated[int, Field(ge=0)] = 100
    """Rows of `sources` held out for the final comparison."""
    preference_rows: Annotated[int, Field(ge=0)] = 0
    """Rows of `sources` set apart as questions to sample candidates for; with `preference_sources`, at most this many of them (0: all)."""
    max_rejected_fraction: Fraction = 0.01
    """More unusable rows than this stop the stage with exit code 65."""
    near_duplicate_threshold: Fraction | None = 0.85
    """Estimated Jaccard similarity of 5-word shingles from which two questions are one; null turns the search off."""
    contamination: Contamination = Contamination()
    """Copies of evaluation rows among the training rows."""
