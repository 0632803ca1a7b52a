"""Reports the status of the run: in the log, as Events, as metrics, and on the orchestrator's Job.

The Job's annotation is what `medjob status` reads, so that users need no access to the bucket.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from medjob.errors import ConfigError, MedjobError, RetryError
from medjob.k8s import observe, report
from medjob.k8s.api import AlreadyExists, Api
from medjob.k8s.orchestrator.environment import environment
from medjob.k8s.orchestrator.metrics import Gauges
from medjob.k8s.orchestrator.reconcile import Orchestrator
from medjob.k8s.orchestrator.step import StepResult

STATUS_S = 5.0
_END_TRIES = 40
_RETRY_S = 1.5
_log = logging.getLogger(__name__)


class StatusReporter:
    """Reports each change at once, and the status of all stages every few seconds.

    A report that fails is dropped, so that reporting never delays the run.
    """

    def __init__(self, orchestrator: Orchestrator, gauges: Gauges) -> None:
        self._orchestrator = orchestrator
        self._gauges = gauges
        self._last_change = ""
        self._shown_at = 0.0

    def report(self, result: StepResult) -> None:
        """Report the result of a step."""
        # The countdown to the next attempt is not a change.
        change = re.sub(r"in \d+ s", "", f"{result.state} {result.text}")
        if change != self._last_change:
            self._last_change = change
            level = logging.ERROR if result.state == "failed" else logging.INFO
            _log.log(level, "%s", result.text)
            with contextlib.suppress(MedjobError, AlreadyExists):
                self._orchestrator.api.create_event(self._event(result))
        elif result.state not in ("done", "failed") and self._is_recent():
            return
        self._shown_at = time.monotonic()
        with contextlib.suppress(MedjobError, AlreadyExists):
            self._show(result)

    def report_end(self, result: StepResult) -> None:
        """Report that the run is done, and retry while the API server is unavailable.

        No later process would report it, and `medjob status --watch` waits for it.
        """
        for _ in range(_END_TRIES):
            try:
                self._show(result)
                release_own_pod(self._orchestrator.api)
            except RetryError:
                time.sleep(_RETRY_S)
            except (ConfigError, AlreadyExists):  # the Job is gone, so nobody reads its status
                return
            else:
                return

    def _is_recent(self) -> bool:
        return time.monotonic() - self._shown_at < STATUS_S

    def _show(self, result: StepResult) -> None:
        status = {
            "state": result.state,
            "stage": result.stage,
            "text": result.text,
            "code": result.code,
            "at": time.time(),
            "stages": self._orchestrator.stage_rows(),
        }
        self._gauges.update(status)
        self._orchestrator.api.patch_job(environment("JOB_NAME"), _annotation(status))

    def _event(self, result: StepResult) -> dict[str, Any]:
        namespace = self._orchestrator.api.namespace
        release = self._orchestrator.release
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{release.name}-", "namespace": namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "name": release.config_map,
                "namespace": namespace,
            },
            "reason": result.state.capitalize(),
            "message": result.text[:1000],
            "type": "Warning" if result.state == "failed" else "Normal",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": "medjob"},
        }


def show_failure(api: Api, error: MedjobError) -> None:
    """Report that the run has failed, and keep Kubernetes from starting this pod again.

    The failure is final, and only a new submission changes that. A podFailurePolicy could also stop
    the restarts, but it excludes `podReplacementPolicy: TerminatingOrFailed`. Without that policy
    no new orchestrator starts for 20 minutes when a node is lost.
    """
    _log.error("the run has failed (exit code %d): %s", error.exit_code, error.message)
    no_restart = {"spec": {"backoffLimit": 0}}
    show_state(api, "failed", error.message, error.exit_code, no_restart)
    with contextlib.suppress(MedjobError, AlreadyExists):
        release_own_pod(api, failed=True)


def release_own_pod(api: Api, failed: bool = False) -> None:
    """Have Kubernetes delete this pod, if another container would keep it alive after the run.

    A Job that is suspended keeps its status and has no pod. Kueue would resume its own Jobs, so for
    those, and for a failed run, the Job is ended by a deadline.

    Raises:
        RetryError: the API server is unavailable.
    """
    job = api.job(environment("JOB_NAME"))
    labels = job["metadata"].get("labels") or {} if job else {}
    if observe.RELEASE not in labels:
        return
    selector = f"{observe.RELEASE}={labels[observe.RELEASE]},{observe.STAGE}={observe.ORCHESTRATOR}"
    own = (pod for pod in api.pods(selector) if pod["metadata"]["name"] == environment("POD_NAME"))
    others = [name for pod in own for name in observe.other_containers(pod)]
    if not others:
        return
    _log.info("Kubernetes deletes this pod, because it contains %s", ", ".join(others))
    suspend = not failed and observe.QUEUE not in labels
    end = {"suspend": True} if suspend else {"activeDeadlineSeconds": 1}
    api.patch_job(environment("JOB_NAME"), {"spec": end})


def show_state(
    api: Api, state: str, text: str, code: int = 0, patch: Mapping[str, Any] | None = None
) -> None:
    """Show the state of the run without reading the store. The rows of the stages stay as shown."""
    name = environment("JOB_NAME")
    with contextlib.suppress(MedjobError, AlreadyExists):
        job = api.job(name) or {"metadata": {}}
        state_now = {"state": state, "text": text, "code": code, "at": time.time()}
        api.patch_job(name, {**_annotation({**shown_status(job), **state_now}), **(patch or {})})


def shown_status(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the status that an orchestrator's Job shows; empty if it shows none."""
    annotations = job["metadata"].get("annotations") or {}
    return dict(json.loads(annotations.get(report.ANNOTATION, "{}")))


def _annotation(status: Mapping[str, Any]) -> dict[str, Any]:
    return {"metadata": {"annotations": {report.ANNOTATION: json.dumps(status)}}}
