"""The orchestrator's process: step after step until the run has ended, and word of it to whoever looks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from medjob.config import RunFile
from medjob.errors import ConfigError, MedjobError, RetryError, error_of
from medjob.k8s import observe, preflight, report
from medjob.k8s.api import AlreadyExists, Api
from medjob.k8s.orchestrator import metrics
from medjob.k8s.orchestrator.lease import Lease
from medjob.k8s.orchestrator.reconcile import Orchestrator, Release, StepResult
from medjob.pipeline.runner import Pipeline
from medjob.runtime import signals
from medjob.stage import STAGES

POLL_S = 1.5
STATUS_S = 5.0
_LAST_TRIES = 40
_log = logging.getLogger(__name__)


def orchestrate(run_file: RunFile, folder: Path) -> str:
    """Walk the run whose rendered Jobs lie in `folder`, as the release that the environment names; what there is to say at the end.

    Raises:
        MedjobError: the run has failed for good; its exit code says how.
    """
    api = Api.connect()
    release = Release(
        _environment("MEDJOB_RELEASE"), _environment("MEDJOB_INSTANCE"), _environment("JOB_UID")[:8]
    )
    holder = f"{_environment('POD_NAME')}:{uuid.uuid4().hex[:8]}"
    lease = Lease(api, f"{release.name}-orchestrator", holder, owner=release.config_map)
    with signals.before_exit(lease.release):
        try:
            orchestrator = _wait_until_ready(run_file, api, release, read_manifests(folder), lease)
            gauges = metrics.Gauges(run_file.run.name)
            gauges.serve()
            return _run_until_end(orchestrator, gauges)
        except MedjobError as error:
            _show_failure(api, error)
            raise
        finally:
            lease.release()


def _wait_until_ready(
    run_file: RunFile,
    api: Api,
    release: Release,
    manifests: dict[str, dict[str, Any]],
    lease: Lease,
) -> Orchestrator:
    """Wait for the lease, and find out what can be found out before anything is spent.

    Raises:
        MedjobError: what would never work; or the store is still away when the time for a start is over.
    """
    began, said = time.monotonic(), ""
    while True:
        try:
            if lease.keep():
                orchestrator = Orchestrator(
                    run_file,
                    Pipeline.open(run_file),
                    api,
                    release,
                    manifests,
                    lease,
                    saved=_saved_steps(api, release),
                )
                preflight.check(
                    orchestrator.pipeline,
                    api,
                    manifests,
                    [stage.name for stage in orchestrator.stages],
                )
                return orchestrator
            text, began = "another orchestrator of this release is at work", time.monotonic()
        except RetryError as error:
            if (
                time.monotonic() - began > run_file.pipeline.start_deadline_seconds
                and not _run_is_under_way(api, release)
            ):
                raise
            text = error.message
        if text != said:
            _log.info("%s", text)
            said = text
            if lease.held:  # else it is the other one's to say how the run stands
                _show_state(api, "waiting", text)
        time.sleep(POLL_S)


def _run_is_under_way(api: Api, release: Release) -> bool:
    """Whether this submission's orchestrator was here before: then a run is under way, which an outage must not end."""
    try:
        return bool(api.jobs(f"{release.selector},{observe.SUBMISSION}={release.submission}"))
    except RetryError:
        return True


def _saved_steps(api: Api, release: Release) -> dict[str, tuple[int, float]]:
    """The newest stored steps, and since when, as the orchestrators before this one have shown them."""
    jobs = api.jobs(
        f"app.kubernetes.io/instance={release.instance},app.kubernetes.io/component=orchestrator"
    )
    shown = (
        json.loads(job["metadata"].get("annotations", {}).get(report.ANNOTATION, "{}"))
        for job in jobs
    )
    rows = [row for status in shown for row in status.get("stages", []) if row.get("saved_at")]
    return {
        row["stage"]: (row["saved"], row["saved_at"])
        for row in sorted(rows, key=lambda row: (row["saved"], -row["saved_at"]))
    }


def read_manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """Each stage's Job as Helm has rendered it."""
    found = {stage.name: folder / f"{stage.name}.yaml" for stage in STAGES}
    missing = [str(path) for path in found.values() if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{missing[0]}: is not there",
            "the orchestrator runs in a pod that the chart makes; see charts/medjob",
        )
    return {name: yaml.safe_load(path.read_text()) for name, path in found.items()}


def _run_until_end(orchestrator: Orchestrator, gauges: metrics.Gauges) -> str:
    reporter = StatusReporter(orchestrator, gauges)
    while True:
        try:
            result = (
                orchestrator.step()
                if orchestrator.lease.keep()
                else StepResult("waiting", "another orchestrator of this release is at work")
            )
        except RetryError as error:
            result = StepResult("waiting", error.message)
        reporter.report(result)
        if result.state == "done":
            reporter.report_end(result)
            return result.text
        if result.state == "failed":
            raise error_of(result.code)(
                result.text, "submitting again starts anew from what is published"
            )
        time.sleep(POLL_S)


class StatusReporter:
    """Says what is new: in the log and as an Event; and every few seconds how all stages stand. None of it may hold up the run."""

    def __init__(self, orchestrator: Orchestrator, gauges: metrics.Gauges) -> None:
        self._walker, self._gauges = orchestrator, gauges
        self._last = ""
        self._shown = 0.0

    def report(self, result: StepResult) -> None:
        """Tell about a turn."""
        ended = result.state in ("done", "failed")
        said = re.sub(r"in \d+ s", "", f"{result.state} {result.text}")
        if said != self._last:
            self._last = said
            (_log.error if result.state == "failed" else _log.info)("%s", result.text)
            with contextlib.suppress(MedjobError, AlreadyExists):
                self._walker.api.create_event(self._event(result))
        elif time.monotonic() - self._shown < STATUS_S and not ended:
            return
        self._shown = time.monotonic()
        with contextlib.suppress(MedjobError, AlreadyExists):
            self._show(result)

    def report_end(self, result: StepResult) -> None:
        """Show the end: nobody comes after this process to do so, and `medjob status --watch` waits for it."""
        for _ in range(_LAST_TRIES):
            with contextlib.suppress(
                ConfigError, AlreadyExists
            ):  # its Job is gone: nobody waits for it
                try:
                    self._show(result)
                except RetryError:
                    time.sleep(POLL_S)
                    continue
            return

    def _show(self, result: StepResult) -> None:
        status = {
            "state": result.state,
            "stage": result.stage,
            "text": result.text,
            "code": result.code,
            "at": time.time(),
            "stages": self._walker.rows(),
        }
        self._gauges.show(status)
        patch = {"metadata": {"annotations": {report.ANNOTATION: json.dumps(status)}}}
        self._walker.api.patch_job(_environment("JOB_NAME"), patch)

    def _event(self, result: StepResult) -> dict[str, Any]:
        api, release = self._walker.api, self._walker.release
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{release.name}-", "namespace": api.namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "name": release.config_map,
                "namespace": api.namespace,
            },
            "reason": result.state.capitalize(),
            "message": result.text[:1000],
            "type": "Warning" if result.state == "failed" else "Normal",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": "medjob"},
        }


def _show_failure(api: Api, error: MedjobError) -> None:
    """See to it that this pod is not started again: the run has failed for good, and only a new submission changes that.

    A podFailurePolicy could say so too, but it excludes podReplacementPolicy TerminatingOrFailed, without which no new
    orchestrator comes for 20 minutes when a node is lost.
    """
    _log.error("the run has failed (exit code %d): %s", error.exit_code, error.message)
    _show_state(api, "failed", error.message, error.exit_code, {"spec": {"backoffLimit": 0}})


def _show_state(
    api: Api, state: str, text: str, code: int = 0, patch: Mapping[str, Any] | None = None
) -> None:
    """Show how the run stands where no store is needed for it, over what was shown of the stages before."""
    name = _environment("JOB_NAME")
    with contextlib.suppress(MedjobError, AlreadyExists):
        found = api.job(name) or {}
        shown = json.loads(
            found.get("metadata", {}).get("annotations", {}).get(report.ANNOTATION, "{}")
        )
        status = {**shown, "state": state, "text": text, "code": code, "at": time.time()}
        api.patch_job(
            name,
            {"metadata": {"annotations": {report.ANNOTATION: json.dumps(status)}}, **(patch or {})},
        )


def _environment(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise ConfigError(
            f"{name} is not set",
            "the orchestrator runs in a pod that the chart makes; on one machine: medjob run",
        ) from None
