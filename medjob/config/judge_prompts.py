"""`run.judge.prompts`: the texts with which a judge is asked."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator

from medjob.config.base import Strict

SHIPPED_ASPECTS = ("accuracy", "completeness", "key_points")
AspectName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=20_000)]
_PLACE = re.compile(r"\{([a-z_]+)\}")
MARK = "{mark}"
# What each text asks about. These come from rows and models, so they are not trusted.
MATERIAL: dict[str, tuple[str, ...]] = {
    "score": ("question", "reference", "answer"),
    "score_without_reference": ("question", "answer"),
    "better": ("question", "reference", "first", "second"),
    "criterion": ("question", "answer", "criterion"),
}
_OTHER_PLACES = {"score": ("aspect",), "score_without_reference": ("aspect",)}


class JudgePrompts(Strict):
    """`run.judge.prompts`: the texts with which a judge is asked. Each replaces a file of
    `medjob/judge/prompts`, where the texts of each version can be read.

    Places in braces, such as `{answer}`, are filled in. Each text from a row or a model is alone on
    its line, between two lines with `{mark}`: a code that these texts cannot contain, so that they
    cannot end their part of the prompt."""

    version: Literal["v1"] = "v1"
    """Version of the texts that are not given here."""
    score: Text | None = None
    """Asks for one digit from 1 to 5. Places: `{question}`, `{reference}`, `{answer}`, `{aspect}`.
    The reply begins with "Score:"."""
    score_without_reference: Text | None = None
    """The same for rows without a reference answer. Places: `{question}`, `{answer}`,
    `{aspect}`."""
    better: Text | None = None
    """Asks which of two answers is better, A or B. Places: `{question}`, `{reference}`, `{first}`,
    `{second}`. The reply begins with "Better answer:"."""
    criterion: Text | None = None
    """Asks whether an answer meets a criterion, Yes or No. Places: `{question}`, `{answer}`,
    `{criterion}`. The reply begins with "Met:"."""
    aspects: dict[AspectName, Text] = Field(default_factory=dict)
    """The text of `{aspect}`, by the aspect's name: a question that a digit from 1 (worst) to 5
    (best) answers. A new aspect also needs a weight in `run.judge.aspects`."""

    @field_validator(*MATERIAL)
    @classmethod
    def _has_its_places(cls, text: str | None, info: ValidationInfo) -> str | None:
        return text if text is None else check_template(str(info.field_name), text)


def check_template(name: str, text: str) -> str:
    """Return a text of a prompt without the line break at its end.

    Raises:
        ValueError: it lacks a place, has an unknown one, or does not set off what is not trusted.
    """
    text = text.rstrip("\n")
    wanted = (*MATERIAL[name], *_OTHER_PLACES.get(name, ()))
    found = _PLACE.findall(text)
    for place in dict.fromkeys(found):
        if place not in (*wanted, "mark"):
            known = ", ".join(f"{{{each}}}" for each in (*wanted, "mark"))
            raise ValueError(f"unknown place {{{place}}}; known: {known}")
    for place in wanted:
        if found.count(place) != 1:
            raise ValueError(f"must contain {{{place}}} exactly once (found {found.count(place)})")
    _check_set_off(name, text)
    return text


def _check_set_off(name: str, text: str) -> None:
    lines = text.split("\n")
    last = 0
    for place in MATERIAL[name]:
        line = f"{{{place}}}"
        number = lines.index(line) if line in lines else 0
        around = (lines[number - 1], lines[min(number + 1, len(lines) - 1)])
        if not number or not all(MARK in each for each in around):
            raise ValueError(
                f"{line} must be alone on its line, between two lines with {MARK}, so that it "
                "cannot pass for a part of the prompt"
            )
        last = max(last, number)
    if not any(each.strip() for each in lines[last + 2 :]):
        raise ValueError("must end with the question to the judge, after all material")
