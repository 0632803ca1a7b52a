"""`run.prompt` and `run.prepare`: which rows to read, and how to render prompts and answers."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from string import ascii_lowercase
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StringConstraints, field_validator, model_validator

from medjob.config.base import (
    ADDED_LATER,
    Count,
    CountOrZero,
    Fraction,
    ReferenceName,
    Strict,
    is_hub_id,
)
from medjob.config.data_suffixes import data_suffix

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
RowField = Literal[
    "question",
    "instruction",
    "input",
    "context",
    "system",
    "history",
    "messages",
    "reasoning",
    "response",
    "reference",
    "options",
    "option_a",
    "option_b",
    "option_c",
    "option_d",
    "option_e",
    "option_f",
    "option_g",
    "option_h",
    "answer",
    "chosen",
    "rejected",
    "label_type",
    "kind",
    "rubric",
]
"""What a column of a row can be: the keys of `columns`."""
ColumnName = Annotated[str, StringConstraints(min_length=1)]
Style = Literal["thinking", "tags", "plain"]


class PromptParams(Strict):
    """Layout of prompts and answers. Training, sampling and evaluation use the same one."""

    style: Style = "thinking"
    """Layout of the answer. `thinking`: "## Thinking" and "## Final Response" headings. `tags`:
    `<think>` and `<response>` tags. `plain`: only the final answer."""
    system: str | None = None
    """System message before every question. Default: none, although some chat templates add one."""
    template: str | None = None
    """Raw text prompt for models without a chat template. It must contain `{question}` exactly
    once. `{system}` is where the system message goes; without it, system messages of rows precede
    the question. The tokenizer's begin token is added if the tokenizer itself adds one. Default:
    the tokenizer's chat template."""

    @model_validator(mode="after")
    def _template_has_a_place(self) -> PromptParams:
        if self.template is None:
            return self
        if self.template.count("{question}") != 1:
            raise ValueError("template must contain {question} exactly once")
        if self.template.count("{system}") > 1:
            raise ValueError("template may contain {system} only once")
        if self.system is not None and "{system}" not in self.template:
            raise ValueError(
                "system needs a {system} in template, or put the system message into the template"
            )
        return self


class DataSource(Strict):
    """One data source: a file, directory, glob, bucket object or hub data set."""

    path: ReferenceName
    """Where the rows are: a local file, directory or glob, `s3://BUCKET/KEY` or `gs://BUCKET/KEY`,
    `package:NAME/FILE` for a file in an installed package, or a hub id `org/name`. A bucket key
    with a suffix is one object; a key without a suffix or ending in `/` selects all data files
    below it. Files end in .jsonl, .json, .csv, .tsv, .parquet or .arrow; text may be compressed
    (.gz, .bz2, .xz, .zst)."""
    name: str | None = None
    """Configuration of a hub data set, such as `en`, `zh`, `en_mix` or `zh_mix` of medical-o1."""
    split: str | None = None
    """Split of a hub data set, where slices such as `train[:500]` are allowed, or of a directory
    that `save_to_disk` of datasets wrote. Default: `train` on a hub, or the only split of a
    directory."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set. `fetch` pins it to a commit. Default: the main
    branch."""
    format: Format | None = None
    """Format of the rows. Rows that do not fit it are rejected. Default: detected for each row,
    from the columns that have a value."""
    limit: Count | None = None
    """Maximum number of rows, counted from the start and after `where` is applied. Default: all."""
    where: dict[str, list[str]] = Field(default_factory=dict)
    """Keep only rows in which each of these columns starts with one of its prefixes, such as
    `{type: [Literature]}` or `{id: [MedQA, MedMCQA]}`. The names are those in the file."""
    columns: Annotated[dict[RowField, ColumnName], ADDED_LATER] = Field(default_factory=dict)
    """Which column of the source holds what, such as `{question: Frage, response: Antwort}`. The
    keys are question, instruction, input, context, system, history, messages, reasoning, response,
    reference (short ground truth), options (all in one column) or option_a to option_h (one column
    per option), answer (the right option, or a short answer), chosen, rejected, label_type, kind
    and rubric (a list of criteria). The values are names as in the file; `output.text` is the key
    `text` of the column `output`. A column that is named here is read in place of those that medjob
    would recognise for the same key. Default: columns are recognised by their names."""
    weight: Annotated[float | None, Field(gt=0, le=1e6), ADDED_LATER] = None
    """Share of this source among the training rows of `run.prepare.sources`, relative to the
    weights of the others: with weights 3 and 1, three of four rows come from the first. Rows are
    left out, by hash, until the shares hold; none is repeated. Either all of these sources have a
    weight or none. Sources of other lists cannot have one. Default: all rows are used."""

    @field_validator("columns", mode="before")
    @classmethod
    def _columns_are_keyed_by_fields(cls, value: Any) -> Any:
        for name, column in value.items() if isinstance(value, dict) else ():
            if name not in get_args(RowField):
                raise ValueError(_unknown_field(name, column))
        return value

    @field_validator("columns")
    @classmethod
    def _options_are_complete(cls, columns: dict[RowField, str]) -> dict[RowField, str]:
        letters = "".join(sorted(name[-1] for name in columns if name.startswith("option_")))
        if letters and "options" in columns:
            raise ValueError("options and option_a cannot both be set")
        if len(letters) == 1 or letters != ascii_lowercase[: len(letters)]:
            given = ", ".join(f"option_{letter}" for letter in letters)
            raise ValueError(
                f"options must be at least option_a and option_b, without gaps (got {given})"
            )
        return columns

    @property
    def key(self) -> str:
        """The data set's key in pins.json."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @model_validator(mode="after")
    def _hub_only_fields(self) -> DataSource:
        fields = ["name", "revision"]
        if ":" in self.path or data_suffix(self.path):  # only a directory has splits
            fields.append("split")
        given = [field for field in fields if getattr(self, field)]
        if given and not is_hub_id(self.path):
            raise ValueError(
                f"{' and '.join(given)} can only be set for a hub data set "
                f"(path is {self.path!r}); "
                "for files, use limit and where"
            )
        return self


def _unknown_field(name: Any, column: Any) -> str:
    """Describe a key of `columns` that is none. Many people write the map the other way round."""
    known = get_args(RowField)
    text = f"unknown field {name!r}"
    if column in known:
        return f"{text}; a key is the field, and its value the column: write {column}: {name}"
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    return f"{text}; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}")


class SafetyMix(Strict):
    """Refusals and careful answers that are mixed into the training rows."""

    sources: Annotated[list[DataSource], Field(min_length=1)]
    """Safety rows with the columns `prompt`, `response` and, optionally, `kind` (`harmful` or
    `benign`)."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Target share of safety rows among the training rows. Rows are never repeated to reach it."""
    evaluation_rows: CountOrZero = 0
    """Safety rows held out of training, to measure refusal and over-refusal in the evaluation."""


class Contamination(Strict):
    """Detection of training rows that copy an evaluation row, by n-gram overlap as in Meditron."""

    ngram: Count = 8
    """Length of an n-gram in words, or in characters for Chinese text. Meditron uses 8. N-grams
    that many rows share do not count."""
    threshold: Fraction = 0.8
    """A training row is a copy if it contains at least this share of an evaluation row's n-grams.
    Meditron uses 0.8. It is a share because a single long match is mostly boilerplate."""
    action: Literal["remove", "report"] = "remove"
    """`remove`: leave copies out of training. `report`: keep and count them."""


class PrepareParams(Strict):
    """`run.prepare`: turns raw rows into training, validation, preference and evaluation rows."""

    sources: list[DataSource] = Field(default_factory=list)
    """Data sources to fine-tune on. Required if the run has the stage `sft`."""
    preference_sources: list[DataSource] = Field(default_factory=list)
    """Data sources of the preference prompts, for which candidates are sampled, or of the pairs of
    `run.dpo.pairs: data`. Default: `preference_rows` rows of `sources`, which are kept out of
    training."""
    evaluation_sources: list[DataSource] = Field(default_factory=list)
    """Data sources of multiple-choice or open questions to evaluate on, in addition to the held-out
    rows of `sources`."""
    safety: SafetyMix | None = None
    """Safety rows to mix into the training rows. Default: none."""
    validation_rows: CountOrZero = 100
    """Rows of `sources` held out for the validation loss."""
    evaluation_rows: CountOrZero = 100
    """Rows held out for the evaluation: of `sources`, or of `preference_sources` if there are no
    `sources`."""
    preference_rows: CountOrZero = 0
    """Rows of `sources` held out as preference prompts. With `preference_sources`: maximum number
    of their rows to use; 0 means all."""
    max_rejected_fraction: Fraction = 0.01
    """Maximum share of unusable rows. If more are unusable, the stage stops with exit code 65."""
    near_duplicate_threshold: Fraction | None = 0.85
    """Jaccard similarity of 5-word shingles from which reworded questions can be duplicates. Their
    numbers, signs and final question also have to be the same, and their answers, unless they
    differ only in typos or a greeting. null disables the search."""
    contamination: Contamination = Contamination()
    """Detection of training rows that copy an evaluation row."""
    sensitive: Annotated[bool, ADDED_LATER] = False
    """Whether the rows must not leave the places that the run file names for them. `true` refuses
    endpoints, even with `--yes`; uploads of the model; and outside trackers. Reports, logs and
    messages then show no text of a row. The artifacts of the data stages still contain the rows."""

    @property
    def has_preference_prompts(self) -> bool:
        """Whether there are prompts for `candidates`, or pairs for `dpo`."""
        return bool(self.preference_rows or self.preference_sources)

    @property
    def has_evaluation_rows(self) -> bool:
        """Whether there are rows for `evaluate`."""
        held_out = self.evaluation_rows and (self.sources or self.preference_sources)
        safety = self.safety is not None and self.safety.evaluation_rows
        return bool(self.evaluation_sources or held_out or safety)

    @model_validator(mode="after")
    def _has_rows(self) -> PrepareParams:
        if not (self.sources or self.preference_sources or self.evaluation_sources):
            raise ValueError(
                "sources: there are no rows at all; name at least one of sources, "
                "preference_sources and evaluation_sources"
            )
        if self.preference_rows and not (self.sources or self.preference_sources):
            raise ValueError(
                "sources: there are none to take preference_rows from; name a source here or in "
                "preference_sources, or leave out preference_rows"
            )
        return self

    @property
    def is_weighted(self) -> bool:
        """Whether `sources` are mixed by their weights."""
        return bool(self.sources) and self.sources[0].weight is not None

    @model_validator(mode="after")
    def _all_sources_have_weights_or_none(self) -> PrepareParams:
        without = [number for number, each in enumerate(self.sources) if each.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(
                f"sources.{without[0]}.weight: is missing; set a weight for all sources, or for "
                "none"
            )
        return self

    @model_validator(mode="after")
    def _only_sources_have_weights(self) -> PrepareParams:
        for key, source in self._other_sources():
            if source.weight is not None:
                raise ValueError(
                    f"{key}.weight: can only be set in run.prepare.sources, whose rows are mixed "
                    f"for the training (got {source.weight:g}); use limit for the number of rows"
                )
        return self

    def _other_sources(self) -> Iterator[tuple[str, DataSource]]:
        others = {
            "preference_sources": self.preference_sources,
            "evaluation_sources": self.evaluation_sources,
            "safety.sources": self.safety.sources if self.safety else [],
        }
        for key, sources in others.items():
            for number, source in enumerate(sources):
                yield f"{key}.{number}", source
