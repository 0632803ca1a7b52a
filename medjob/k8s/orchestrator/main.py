"""The orchestrator's main loop: reconcile until the run ends, and report its status."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from medjob.config import RunFile
from medjob.errors import ConfigError, MedjobError, RetryError, error_of
from medjob.k8s import observe, preflight
from medjob.k8s.api import Api
from medjob.k8s.orchestrator.environment import environment
from medjob.k8s.orchestrator.lease import Lease
from medjob.k8s.orchestrator.metrics import Gauges
from medjob.k8s.orchestrator.reconcile import Orchestrator, Release
from medjob.k8s.orchestrator.status_reporter import (
    StatusReporter,
    show_failure,
    show_state,
    shown_status,
)
from medjob.k8s.orchestrator.step import StepResult
from medjob.pipeline.runner import Pipeline
from medjob.runtime import signals
from medjob.stage import stages_of

POLL_S = 1.5
_OTHER_ACTIVE = "another orchestrator of this release is active"
_log = logging.getLogger(__name__)


def orchestrate(run_file: RunFile, folder: Path) -> str:
    """Run the pipeline on the cluster until it ends, and return the closing message.

    Args:
        folder: contains the Job of each stage, as Helm rendered it.

    Raises:
        MedjobError: the run has failed; its exit code shows the cause.
    """
    api = Api.connect()
    submission = environment("JOB_UID")[:8]
    release = Release(environment("MEDJOB_RELEASE"), environment("MEDJOB_INSTANCE"), submission)
    holder = f"{environment('POD_NAME')}:{uuid.uuid4().hex[:8]}"
    lease = Lease(api, f"{release.name}-orchestrator", holder, owner=release.config_map)
    with signals.before_exit(lease.release):
        try:
            orchestrator = wait_until_ready(
                run_file, api, release, read_manifests(run_file, folder), lease
            )
            gauges = Gauges(run_file.run.name)
            gauges.serve()
            return run_until_end(orchestrator, gauges)
        except MedjobError as error:
            show_failure(api, error)
            raise
        finally:
            lease.release()


def read_manifests(run_file: RunFile, folder: Path) -> dict[str, dict[str, Any]]:
    """Read the Job of each of the run's stages, as Helm rendered it.

    Raises:
        ConfigError: one of them is missing.
    """
    files = {stage.name: folder / f"{stage.name}.yaml" for stage in stages_of(run_file.run)}
    for path in files.values():
        if not path.is_file():
            raise ConfigError(
                f"{path} does not exist",
                "the orchestrator runs in a pod of the chart; see charts/medjob",
            )
    return {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in files.items()}


def wait_until_ready(
    run_file: RunFile,
    api: Api,
    release: Release,
    manifests: Mapping[str, dict[str, Any]],
    lease: Lease,
) -> Orchestrator:
    """Wait for the lease, then run the preflight checks, so that a broken run starts no pod.

    Raises:
        MedjobError: a check failed, or the store stays unavailable for longer than
            pipeline.startDeadlineSeconds.
    """
    waiting_since = time.monotonic()
    shown = ""
    while True:
        try:
            if lease.acquire():
                return _prepare(run_file, api, release, manifests, lease)
            text = _OTHER_ACTIVE
            waiting_since = time.monotonic()  # the deadline covers only the store and the API
        except RetryError as error:
            waited = time.monotonic() - waiting_since
            too_long = waited > run_file.pipeline.start_deadline_seconds
            if too_long and not _is_under_way(api, release):
                raise
            text = error.message
        if text != shown:
            shown = text
            _log.info("%s", text)
            if lease.held:  # otherwise the other orchestrator shows the state of the run
                show_state(api, "waiting", text)
        time.sleep(POLL_S)


def _prepare(
    run_file: RunFile,
    api: Api,
    release: Release,
    manifests: Mapping[str, dict[str, Any]],
    lease: Lease,
) -> Orchestrator:
    pipeline = Pipeline.open(run_file)
    saved = _saved_steps(api, release)
    orchestrator = Orchestrator(run_file, pipeline, api, release, manifests, lease, saved=saved)
    preflight.check(pipeline, api, manifests, [stage.name for stage in orchestrator.stages])
    return orchestrator


def _is_under_way(api: Api, release: Release) -> bool:
    """Whether this submission has already created a Job. An outage must not end such a run."""
    try:
        return bool(api.jobs(f"{release.selector},{observe.SUBMISSION}={release.submission}"))
    except RetryError:
        return True


def _saved_steps(api: Api, release: Release) -> dict[str, tuple[int, float]]:
    """Return each stage's newest stored step and when it was first seen.

    Earlier orchestrators of the release show both on their Jobs. Among several, the highest step
    and the earliest time count.
    """
    jobs = api.jobs(f"{release.selector},{observe.STAGE}={observe.ORCHESTRATOR}")
    found: dict[str, tuple[int, float]] = {}
    for job in jobs:
        for row in shown_status(job).get("stages", []):
            if not row.get("saved_at"):
                continue
            step = row["saved"]
            at = row["saved_at"]
            known_step, known_at = found.get(row["stage"], (-1, 0.0))
            if step > known_step or (step == known_step and at < known_at):
                found[row["stage"]] = (step, at)
    return found


def run_until_end(orchestrator: Orchestrator, gauges: Gauges) -> str:
    """Reconcile and report until the run ends, and return the closing message.

    Raises:
        MedjobError: the run has failed.
    """
    reporter = StatusReporter(orchestrator, gauges)
    while True:
        result = _step(orchestrator)
        reporter.report(result)
        if result.state == "done":
            reporter.report_end(result)
            return result.text
        if result.state == "failed":
            hint = "a new submission continues from the published artifacts"
            raise error_of(result.code)(result.text, hint)
        time.sleep(POLL_S)


def _step(orchestrator: Orchestrator) -> StepResult:
    """Take one step if this process holds the lease. An unavailable service is not an error."""
    try:
        if not orchestrator.lease.acquire():
            return StepResult("waiting", _OTHER_ACTIVE)
        return orchestrator.step()
    except RetryError as error:
        return StepResult("waiting", error.message)
