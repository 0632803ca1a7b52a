"""The questions that a judge is asked, filled into the texts of `prompts/`.

Each has a few possible replies. The score is computed from the probabilities of these. Questions,
answers and criteria come from rows and models and are not trusted: an answer can contain a grade,
or instructions to its grader.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import count
from typing import NamedTuple

from medjob.config.judge_prompts import MATERIAL, JudgePrompts, check_template
from medjob.data.criteria import Criterion

_MARK_LENGTH = 8  # hexadecimal digits
_PLACE = re.compile(r"\{([a-z_]+)\}")


class Form(NamedTuple):
    """A form of question: how the reply begins, and its possible continuations."""

    name: str
    start: str
    choices: tuple[str, ...]


SCORE = Form("score", "Score:", ("1", "2", "3", "4", "5"))
BETTER = Form("better", "Better answer:", ("A", "B"))
CRITERION = Form("criterion", "Met:", ("Yes", "No"))
FORMS = (SCORE, BETTER, CRITERION)


@dataclass(frozen=True, slots=True)
class Item:
    """An answer to score: by its criteria, or else by aspects."""

    id: str
    question: str
    reference: str
    """Empty if the row has none."""
    answer: str
    criteria: tuple[Criterion, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to the same question."""

    id: str
    question: str
    reference: str
    first: str
    second: str

    def swapped(self) -> Comparison:
        """Return the same comparison in the other order."""
        return Comparison(
            f"{self.id}/swapped", self.question, self.reference, self.second, self.first
        )


@dataclass(frozen=True, slots=True)
class Prompts:
    """The texts of a run's judges."""

    texts: Mapping[str, str]
    """By their names in `run.judge.prompts`."""
    aspects: Mapping[str, str]
    """Question of each aspect."""

    @classmethod
    def of(cls, params: JudgePrompts) -> Prompts:
        """Take the texts of the run file, and the shipped ones of its version for the rest."""
        shipped = _shipped(params.version)
        given = {name: getattr(params, name) for name in MATERIAL}
        texts = {name: text or shipped.texts[name] for name, text in given.items()}
        return cls(texts, {**shipped.aspects, **params.aspects})

    def score(self, item: Item, aspect: str) -> str:
        """Ask for the digit of one aspect. The aspect comes last, so that the prompts for an answer
        share a prefix, and so that nothing in the answer comes after the question."""
        material = {"question": item.question, "reference": item.reference, "answer": item.answer}
        if item.reference:
            return self._filled("score", material, aspect=self.aspects[aspect])
        del material["reference"]
        return self._filled("score_without_reference", material, aspect=self.aspects[aspect])

    def criterion(self, item: Item, criterion: Criterion) -> str:
        """Ask whether an answer meets a criterion. The prompts for an answer share a prefix."""
        material = {"question": item.question, "answer": item.answer, "criterion": criterion.text}
        return self._filled("criterion", material)

    def better(self, pair: Comparison) -> str:
        """Ask which of two answers is better."""
        material = {
            "question": pair.question,
            "reference": pair.reference,
            "first": pair.first,
            "second": pair.second,
        }
        return self._filled("better", material)

    def _filled(self, name: str, material: Mapping[str, str], aspect: str = "") -> str:
        """Fill in all places in one pass, so that a text cannot contain a place."""
        # Criteria are left out of the digest, so that the prompts for one answer share a prefix.
        named = [text for place, text in material.items() if place != "criterion"]
        mark = _mark(named, material.values())
        values = {**material, "aspect": aspect, "mark": mark}
        return _PLACE.sub(lambda match: values[match[1]], self.texts[name])


def _mark(named: Iterable[str], texts: Iterable[str]) -> str:
    """Return a code that none of the texts contains.

    It is a digest, so it is the same whenever the same answer is scored, and the author of a text
    cannot write the tag that ends it: a text that contains its mark gets another one.

    Args:
        named: The texts that are digested.
        texts: All texts.
    """
    text, everything = "\0".join(named), "\0".join(texts)
    for number in count():
        digest = hashlib.sha256(f"{number}\0{text}".encode(errors="replace")).hexdigest()
        if digest[:_MARK_LENGTH] not in everything:
            return digest[:_MARK_LENGTH]
    raise AssertionError("unreachable")


@cache
def _shipped(version: str) -> Prompts:
    folder = resources.files("medjob.judge") / "prompts" / version
    texts = {
        name: check_template(name, (folder / f"{name}.txt").read_text(encoding="utf-8"))
        for name in MATERIAL
    }
    lines = (folder / "aspects.txt").read_text(encoding="utf-8").splitlines()
    return Prompts(texts, dict(line.split(": ", 1) for line in lines))
