"""`medjob judge --calibrate`: compare the judges of a run with a user's own grades.

No stage runs, and nothing is published. Replies are kept in `cluster.workDir`, so a calibration
that was killed continues.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.progress import Progress
from medjob.config import RunFile
from medjob.config.base import ModelRef
from medjob.config.prepare import DataSource
from medjob.config.store import StoreRef
from medjob.errors import ConfigError, GateError, InputError
from medjob.pipeline.consent import check_calibration
from medjob.pipeline.context import place_each, resources_of
from medjob.pipeline.runner import Pipeline
from medjob.runtime.files import fingerprint
from medjob.sources import references
from medjob.sources.locations import Location
from medjob.stage import RowContext, RowExtras, StageContext, get_stage, select
from medjob.store import open_store

if TYPE_CHECKING:
    from medjob.judge.graded import Grades
    from medjob.judge.scoring import Judge


@dataclass(frozen=True, slots=True)
class Asked:
    """What a calibration would ask."""

    rows: int
    judges: list[str]
    questions: int
    """For each judge."""


def count_questions(run_file: RunFile, file: str) -> Asked:
    """Count the questions without asking any.

    Raises:
        DataError: the grades cannot be used.
        InputError: the file or a judge model on this disk is missing.
    """
    from medjob.judge import calibration_report

    grades = _read(file)
    params = run_file.run.judge
    models = _models(run_file)
    for model in models:
        if not model.is_endpoint and not references.is_remote(model):
            references.model_location(model.id)
    rows = len(grades.pairs) or len(grades.labelled)
    return Asked(rows, [*map(str, models)], calibration_report.count_questions(grades, params))


def calibrate_judges(run_file: RunFile, file: str, output: Path, consent: bool) -> list[str]:
    """Write calibration.json and report.html to `output`, and return one line for each judge.

    Args:
        consent: Whether the user agrees to send the grades to endpoints.

    Raises:
        ConfigError: the user has not agreed.
        DataError: the grades cannot be used.
        GateError: a judge is not calibrated. The files are written before.
        InputError: the file or a judge model is missing.
    """
    from medjob.judge import calibration_report

    grades = _read(file)
    questions = calibration_report.count_questions(grades, run_file.run.judge)
    check_calibration(run_file, consent, questions)
    _make_folder(output)
    context = _context(run_file, file)
    report = calibration_report.calibrate_all(
        _judges(context), grades, context.extras, Path(file).name
    )
    report.write(output, shows_rows=not run_file.run.prepare.sensitive)
    if report.failed:
        raise GateError(
            "\n".join(report.failed),
            f"{output / 'report.html'} shows where it differs from the grades; name a stronger "
            "run.judge.model",
        )
    return report.sentences


def _read(file: str) -> Grades:
    from medjob.data.read import read
    from medjob.judge.graded import parse_grades

    if not Path(file).exists():
        raise InputError(f"--calibrate: {file} does not exist", "name a file of graded answers")
    source = DataSource(path=file)
    return parse_grades(file, read(source, Location(source.key, file)))


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output: {folder} is a file", "name a directory")
    folder.mkdir(parents=True, exist_ok=True)


def _judges(context: RowContext) -> list[Judge]:
    from medjob.judge.load import model_judges
    from medjob.judge.scoring import OverlapJudge

    if context.run.judge.kind == "overlap":
        return [OverlapJudge()]
    return [*model_judges(context, "judge")]


def _models(run_file: RunFile) -> list[ModelRef]:
    return [model or run_file.run.base_model for model in run_file.run.judge.models]


def _context(run_file: RunFile, file: str) -> RowContext:
    """Return the context that the stage `judge` would have, without its inputs."""
    stage = get_stage("judge")
    run, work = run_file.run, Path(run_file.cluster.work_dir).absolute()
    models = _models(run_file)
    local = [model for model in models if not model.is_endpoint]
    snapshot = Pipeline.open(run_file).snapshot()
    pins = snapshot.earlier_pins() if any(map(references.is_remote, local)) else {}
    folder = work / "calibrations"
    key = _key(run_file, models, pins, file)
    artifact = Artifact(open_store(StoreRef(uri=f"file://{folder}")), run.name, "judge", key)
    attempt = Attempt.begin(artifact, owner=f"{platform.node()}:{os.getpid()}")
    return StageContext(
        run=select(run, stage.fields(run)),
        resources=resources_of(run_file, stage),
        locations=place_each(snapshot, local, pins, work / "models", weights=True),
        inputs={},
        output=folder,
        work=folder,
        report_to=(),
        tensorboard=work / "tensorboard",
        extras=RowExtras(
            FinishedRows(attempt),
            Progress("calibrate"),
            endpoints=run_file.cluster.endpoints,
            currency=run_file.cluster.currency,
        ),
    )


def _key(run_file: RunFile, models: list[ModelRef], pins: Mapping[str, str], file: str) -> str:
    """Digest what the replies depend on."""
    run = run_file.run
    return fingerprint(
        {
            "models": [_pin(model, pins) for model in models],
            "judge": run.judge.model_dump(
                mode="json", include={"load_in_4bit", "prompts", "aspects"}
            ),
            "dtype": run.dtype,
            "grades": references.local_pin(DataSource(path=file)),
        }
    )


def _pin(model: ModelRef, pins: Mapping[str, str]) -> str:
    if model.is_endpoint:
        return model.served_name
    is_remote = references.is_remote(model)
    return pins.get(model.key, model.key) if is_remote else references.local_pin(model)
