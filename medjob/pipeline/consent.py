"""What a run would send to endpoints, and the user's consent to it.

Rows of patients leave the machine only after `--yes` or `allow_hosted: true`. An endpoint on this
machine needs it as well, because it may pass on what it gets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medjob.config import RunFile
from medjob.config.base import ModelRef
from medjob.config.endpoints import Endpoint
from medjob.config.run_file import named_endpoints
from medjob.errors import ConfigError, InputError, RetryError
from medjob.stage import Stage, get_stage

if TYPE_CHECKING:
    from medjob.pipeline.runner import Pipeline

_JUDGE = "run.judge."  # begins the keys of judge models
_TOKENS_PER_ROW = 400  # before `prepare` has counted them
_INSTRUCTIONS = 200  # tokens of the judge's own text
_JUDGED_TOKENS = 8  # of the judge's answer


@dataclass(frozen=True, slots=True)
class Sending:
    """What one stage sends to one endpoint. Numbers are None if they are not known yet."""

    stage: str
    key: str
    """The run file's key that names the endpoint."""
    model: ModelRef
    endpoint: Endpoint
    currency: str
    allowed: bool
    """Whether the run file allows it."""
    texts: int | None
    """Answers to judge, or questions to answer."""
    requests_per_text: int
    input_tokens: float
    """Per request."""
    output_tokens: float

    @property
    def permission(self) -> str:
        """The run file's key that allows it."""
        return f"run.{'judge' if self.judges else 'evaluate'}.allow_hosted"

    @property
    def judges(self) -> bool:
        """Whether the model is a judge."""
        return self.key.startswith(_JUDGE)

    def sentence(self) -> str:
        """Describe it in one line."""
        noun = "answers with questions and references" if self.judges else "questions"
        count = "an unknown number of" if self.texts is None else f"up to {self.texts:,}"
        plain = ", unencrypted" if self.endpoint.url.startswith("http://") else ""
        return (
            f"{self.stage} sends {count} {noun} to {self.endpoint.host}{plain} "
            f"({self.key}: {self.model}){self._size()}; {self._price()}"
        )

    def _size(self) -> str:
        if self.texts is None:
            return ""
        requests = self.texts * self.requests_per_text
        tokens = requests * (self.input_tokens + self.output_tokens)
        return f": {requests:,} requests, about {tokens:,.0f} tokens"

    def _price(self) -> str:
        parts = []
        if self.endpoint.price_per_million_input_tokens is None:
            parts.append("the price is not known")
        elif self.texts is not None:
            requests = self.texts * self.requests_per_text
            cost = requests * self.endpoint.cost(self.input_tokens, self.output_tokens)
            parts.append(f"about {cost:.2f} {self.currency}")
        if self.endpoint.max_cost is not None:
            limit = f"{self.endpoint.max_cost:g} {self.currency}"
            parts.append(f"at most {limit} ({self.model.endpoint}.maxCost)")
        return ", ".join(parts) or "the price depends on their number"


def sendings(pipeline: Pipeline, stages: Sequence[Stage]) -> Iterator[Sending]:
    """Yield what `stages` would send, without those that are published.

    Numbers are not known while the store cannot be reached.
    """
    if not any(named_endpoints(pipeline.run_file.run)):
        return
    senders = [stage for stage in stages if stage.name in ("judge", "evaluate")]
    prepared: dict[str, Any] = {}
    with contextlib.suppress(RetryError):
        senders = [stage for stage in senders if not _is_published(pipeline, stage)]
        prepared = _prepared(pipeline)
    for stage in senders:
        yield from _sendings_of(pipeline, stage, prepared)


def check_consent(pipeline: Pipeline, stages: Sequence[Stage]) -> None:
    """Check that the user has agreed to everything that `stages` would send.

    Raises:
        ConfigError: neither `--yes` nor the run file allows it.
    """
    if pipeline.consent:
        return
    missing = [sending for sending in sendings(pipeline, stages) if not sending.allowed]
    if missing:
        what = "; ".join(sending.sentence() for sending in missing)
        keys = " and ".join(dict.fromkeys(f"{each.permission}=true" for each in missing))
        raise ConfigError(
            f"nothing was sent yet, and this needs your consent: {what}",
            f"pass --yes to run, judge, evaluate or submit, or set {keys} "
            "(docs/guides/endpoints.md says what is sent)",
        )


def check_calibration(run_file: RunFile, consent: bool, questions: int) -> None:
    """Check that the user has agreed to send a file of graded answers to endpoints that judge.

    Args:
        questions: Number of questions for each judge.

    Raises:
        ConfigError: neither `--yes` nor the run file allows it.
    """
    run, endpoints = run_file.run, run_file.cluster.endpoints
    judges = [(key, model) for key, model in named_endpoints(run) if key.startswith(_JUDGE)]
    if judges and not (consent or run.judge.allow_hosted):
        what = "; ".join(
            f"{questions:,} questions with graded answers would go to "
            f"{endpoints[model.endpoint].host} ({key}: {model})"
            for key, model in judges
        )
        raise ConfigError(
            f"nothing was sent yet, and this needs your consent: {what}",
            "pass --yes, or set run.judge.allow_hosted=true "
            "(docs/guides/endpoints.md says what is sent)",
        )


def lines(pipeline: Pipeline, stages: Sequence[Stage]) -> Iterator[str]:
    """Describe what `stages` would send, line by line."""
    for sending in sendings(pipeline, stages):
        consent = "allowed by" if sending.allowed else "needs --yes or"
        yield f"{sending.sentence()}; {consent} {sending.permission}"


def with_consent(run_file: RunFile) -> RunFile:
    """Return a copy that allows what it sends, for a cluster, where nobody can be asked."""
    run = run_file.run
    changes: dict[str, Any] = {}
    for key, _ in named_endpoints(run):
        section = "judge" if key.startswith(_JUDGE) else "evaluate"
        changes[section] = getattr(run, section).model_copy(update={"allow_hosted": True})
    return run_file.model_copy(update={"run": run.model_copy(update=changes)})


def _sendings_of(pipeline: Pipeline, stage: Stage, prepared: dict[str, Any]) -> Iterator[Sending]:
    run_file = pipeline.run_file
    run = run_file.run
    row_tokens = _tokens_per_row(prepared)
    for key, model in named_endpoints(run):
        endpoint, currency = run_file.cluster.endpoints[model.endpoint], run_file.cluster.currency
        judges = key.startswith(_JUDGE)
        if judges and (stage.name == "judge" or "judge" in stage.inputs(run)):
            allowed, texts = run.judge.allow_hosted, _judged_answers(pipeline, stage, prepared)
            size = (len(run.judge.aspect_weights), _INSTRUCTIONS + 2 * row_tokens, _JUDGED_TOKENS)
        elif not judges and stage.name == "evaluate":
            allowed, texts = run.evaluate.allow_hosted, prepared.get("evaluation")
            size = (1, row_tokens, run.evaluate.max_new_tokens)
        else:
            continue
        yield Sending(stage.name, key, model, endpoint, currency, allowed, texts, *size)


def _judged_answers(pipeline: Pipeline, stage: Stage, prepared: dict[str, Any]) -> int | None:
    """Answers that a judge scores, without those of the calibration."""
    run = pipeline.run_file.run
    if stage.name == "judge":
        prompts = prepared.get("preferences", run.prepare.preference_rows) or None
        return prompts and prompts * run.candidates.num_candidates
    rows: int | None = prepared.get("evaluation")
    return rows and rows * (len(run.evaluate.models) + len(run.evaluate.extra_models))


def _tokens_per_row(prepared: dict[str, Any]) -> float:
    rows = prepared.get("train", 0) + prepared.get("further_rows", 0)
    return prepared["tokens"] / rows if rows else _TOKENS_PER_ROW


def _prepared(pipeline: Pipeline) -> dict[str, Any]:
    """The counts of `prepare`, if it is published."""
    with contextlib.suppress(InputError):
        manifest = pipeline.artifact(get_stage("prepare")).manifest()
        return manifest.metrics if manifest else {}
    return {}


def _is_published(pipeline: Pipeline, stage: Stage) -> bool:
    with contextlib.suppress(InputError):  # an input is not published yet
        return pipeline.artifact(stage).manifest() is not None
    return False
