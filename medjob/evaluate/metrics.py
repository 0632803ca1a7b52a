"""What is measured: every metric is one number a row, so that intervals and paired tests are the same for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medjob.config.prepare import Style
from medjob.data.styles import Answer, take_apart
from medjob.data.text import words
from medjob.evaluate.mcq import chosen_option
from medjob.evaluate.safety import has_disclaimer, refuses
from medjob.evaluate.similarity import bleu, rouge_l


@dataclass(frozen=True, slots=True)
class Answered:
    """An evaluation row and one model's answer to it."""

    row: Mapping[str, Any]
    text: str
    tokens: int
    truncated: bool
    parts: Answer
    nll_per_token: float | None
    letter: str | None
    judged: Mapping[str, float]

    @classmethod
    def of(
        cls,
        row: Mapping[str, Any],
        drawn: Mapping[str, Any],
        style: Style,
        extra: Mapping[str, Any],
    ) -> Answered:
        """From a finished row; `extra` holds nll_per_token, letter (the likeliest option's) and judged (score and aspects)."""
        parts = take_apart(style, drawn["text"])
        return cls(
            row,
            drawn["text"],
            drawn["tokens"],
            drawn["truncated"],
            parts,
            extra.get("nll_per_token"),
            extra.get("letter"),
            extra.get("judged", {}),
        )


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the comparison. `kinds`: the rows it is taken over; `better`: the direction that is good, if there is one."""

    name: str
    kinds: tuple[str, ...]
    value: Callable[[Answered], float | None]
    better: str
    about: str
    percent: bool = False


def _accuracy(answered: Answered) -> float:
    return float(_choice(answered) == answered.row["answer_idx"])


def _choice(answered: Answered) -> str | None:
    return chosen_option(answered.parts.response, json.loads(answered.row["options"]))


def _judged(name: str) -> Callable[[Answered], float | None]:
    return lambda a: a.judged.get(name)


OPEN, CHOICE, HARMFUL, BENIGN = ("open",), ("multiple_choice",), ("harmful",), ("benign",)
METRICS: tuple[Metric, ...] = (
    Metric(
        "nll",
        OPEN,
        lambda a: a.nll_per_token,
        "lower",
        "-log p per token of held-out answers, in nats; perplexity is its exponential",
    ),
    Metric(
        "format",
        OPEN,
        lambda a: float(a.parts.complies),
        "higher",
        "answers laid out as asked: reasoning, then response",
        True,
    ),
    Metric(
        "reasoning words",
        OPEN,
        lambda a: float(len(words(a.parts.reasoning))),
        "",
        "length of the reasoning",
    ),
    Metric(
        "truncated",
        OPEN,
        lambda a: float(a.truncated),
        "lower",
        "answers that the token limit ended",
        True,
    ),
    Metric(
        "ROUGE-L",
        OPEN,
        lambda a: rouge_l(a.parts.response, a.row["reference"]),
        "higher",
        "similarity of the response to the reference",
    ),
    Metric(
        "BLEU",
        OPEN,
        lambda a: bleu(a.parts.response, a.row["reference"]),
        "higher",
        "similarity of the response to the reference",
    ),
    Metric(
        "judge score",
        OPEN,
        _judged("score"),
        "higher",
        "the judge's score against the reference, 0 to 1",
    ),
    Metric(
        "judge accuracy",
        OPEN,
        _judged("accuracy"),
        "higher",
        "the judge's aspect: factual accuracy",
    ),
    Metric(
        "judge completeness",
        OPEN,
        _judged("completeness"),
        "higher",
        "the judge's aspect: completeness",
    ),
    Metric(
        "judge key points",
        OPEN,
        _judged("key_points"),
        "higher",
        "the judge's aspect: key points of the reference",
    ),
    Metric(
        "multiple choice",
        CHOICE,
        _accuracy,
        "higher",
        "right letter, last statement; unparsed answers are wrong",
        True,
    ),
    Metric(
        "unparsed",
        CHOICE,
        lambda a: float(_choice(a) is None),
        "lower",
        "multiple-choice answers that name no option",
        True,
    ),
    Metric(
        "likeliest letter",
        CHOICE,
        lambda a: float(a.letter == a.row["answer_idx"]),
        "higher",
        "right letter when the options' letters are compared by probability, without reasoning",
        True,
    ),
    Metric(
        "refusal",
        HARMFUL,
        lambda a: float(refuses(a.parts.response)),
        "higher",
        "harmful requests that are refused",
        True,
    ),
    Metric(
        "over-refusal",
        BENIGN,
        lambda a: float(refuses(a.parts.response)),
        "lower",
        "harmless questions that are refused",
        True,
    ),
    Metric(
        "disclaimer",
        (*OPEN, *BENIGN),
        lambda a: float(has_disclaimer(a.text)),
        "",
        "answers that advise professional help",
        True,
    ),
)


def values_of(metric: Metric, answers: Sequence[Answered]) -> list[float] | None:
    """One value a row of the metric's kinds, in order; None where it does not apply (no rows, or no such score)."""
    values = [
        metric.value(answered) for answered in answers if answered.row["kind"] in metric.kinds
    ]
    present = [value for value in values if value is not None]
    return present if present and len(present) == len(values) else None
