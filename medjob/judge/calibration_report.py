"""How well judges agree with a user's own grades, as figures and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medjob.config.judge import JudgeParams
from medjob.judge.calibration import (
    Calibration,
    calibrate,
    comparisons,
    graded_items,
    overlap_is_better,
)
from medjob.judge.criteria_calibration import (
    CriteriaCalibration,
    calibrate_criteria,
    labelled_items,
)
from medjob.judge.graded import GradedRow, Grades
from medjob.judge.questions import Prompts
from medjob.judge.scoring import Judge, ModelJudge, questions_about
from medjob.judge.statistics import effective_rows, wilson
from medjob.report.page import write_page
from medjob.stage import RowExtras


class Rule(NamedTuple):
    """A trivial rule that a judge has to beat."""

    name: str
    agreement: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """The results of all judges on one file of grades."""

    file: str
    calibrations: tuple[Calibration, ...]
    criteria: tuple[CriteriaCalibration, ...]
    rules: tuple[Rule, ...]

    @property
    def failed(self) -> list[str]:
        """One line for each judge that is not calibrated."""
        return [each.sentence() for each in self._results if not each.passed]

    @property
    def sentences(self) -> list[str]:
        """One line for each judge."""
        return [each.sentence() for each in self._results]

    @property
    def _results(self) -> tuple[Calibration | CriteriaCalibration, ...]:
        return (*self.calibrations, *self.criteria)

    def write(self, folder: Path, shows_rows: bool = True) -> None:
        """Write calibration.json and report.html to an existing folder.

        Args:
            shows_rows: Whether the files may hold texts of rows, as examples.
        """
        content = {
            "file": self.file,
            "passed": not self.failed,
            "judges": [_figures(each, shows_rows) for each in self.calibrations],
            "criteria": [_figures(each, shows_rows) for each in self.criteria],
            "rules": [rule._asdict() for rule in self.rules],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / "calibration.json").write_text(text + "\n", encoding="utf-8")
        write_page(
            folder / "report.html",
            "calibration.html",
            {},
            file=self.file,
            passed=not self.failed,
            calibrations=self.calibrations,
            criteria=self.criteria,
            rules=self.rules,
            shows_rows=shows_rows,
        )


def _figures(result: Calibration | CriteriaCalibration, shows_rows: bool) -> dict[str, Any]:
    examples = [asdict(each) for each in result.examples]
    return {**result.as_dict(), **({"examples": examples} if shows_rows else {})}


def calibrate_all(
    judges: Sequence[Judge], grades: Grades, extras: RowExtras, file: str
) -> CalibrationReport:
    """Compare each judge with the grades of a file."""
    calibrations, criteria = [], []
    for judge in judges:
        if grades.pairs:
            calibrations.append(calibrate(judge, grades.pairs, extras))
        if grades.labelled:
            criteria.append(calibrate_criteria(judge, grades.labelled, extras))
        if isinstance(judge, ModelJudge):
            judge.close()  # before the next model is loaded
    rules = _rules(grades.pairs) if grades.pairs else ()
    return CalibrationReport(file, tuple(calibrations), tuple(criteria), rules)


def _rules(pairs: Sequence[GradedRow]) -> tuple[Rule, ...]:
    groups = [row.group or row.id for row in pairs]
    right = {
        "the longer answer": [float(len(row.better) > len(row.worse)) for row in pairs],
        "more words of the reference": [float(overlap_is_better(row)) for row in pairs],
    }
    rules = []
    for name, each in right.items():
        share = sum(each) / len(each)
        rules.append(Rule(name, share, *wilson(share, effective_rows(each, groups))))
    return tuple(rules)


def count_questions(grades: Grades, params: JudgeParams) -> int:
    """Return how many questions each judge model is asked to compare it with the grades."""
    items = [*graded_items(grades.pairs), *labelled_items(grades.labelled)]
    asked = questions_about(items, Prompts.of(params.prompts), params.aspect_weights)
    return sum(map(len, asked.values())) + len(comparisons(grades.pairs))
