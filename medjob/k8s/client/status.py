"""`medjob status` and `medjob logs`: what the cluster itself knows of a run; no bucket has to be in reach."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from medjob.errors import InputError, RetryError
from medjob.k8s import observe, report
from medjob.k8s.client.release import Installed


def table(installed: Installed) -> list[str]:
    """Lines that say how the run stands, and what hangs."""
    return lines_of(installed, read(installed))


def lines_of(installed: Installed, status: Mapping[str, Any] | None) -> list[str]:
    """The same of a status that was read before."""
    if status is None:
        return ["the orchestrator has not said anything yet", *hanging(installed)]
    values = installed.values()
    told = report.lines(status, values["run"]["name"], values["cluster"]["currency"])
    return [*told, *(hanging(installed) if status["state"] != "done" else ())]


def read(installed: Installed) -> dict[str, Any] | None:
    """What the newest orchestrator last said; None before its first word.

    Raises:
        InputError: there is no such release.
        RetryError: it has no orchestrator.
    """
    installed.values()
    jobs = installed.orchestrator_jobs()
    if not jobs:
        raise RetryError(
            f"{installed.name}: has no orchestrator: it ended some time ago (pipeline.ttlSecondsAfterFinished), was deleted, or pipeline.mode is direct",
            "medjob ls lists what is published; medjob submit goes on from there",
        )
    text = jobs[-1]["metadata"].get("annotations", {}).get(report.ANNOTATION)
    return dict(json.loads(text)) if text else None


def hanging(installed: Installed) -> Iterator[str]:
    """What the cluster has to say of an orchestrator that gets no pod, and of pods that do not start."""
    for job in installed.orchestrator_jobs()[-1:]:
        name, state = job["metadata"]["name"], job.get("status", {})
        if not (state.get("active") or state.get("conditions")):
            yield f"{name}: has no pod: {observe.newest_word(installed.api.events('Job', name)) or 'nothing says why'}"
    for raw in installed.api.pods(f"app.kubernetes.io/instance={installed.name}"):
        pod = observe.pod_of(raw)
        if pod.waiting:
            yield _not_started(installed, pod)


def _not_started(installed: Installed, pod: observe.Pod) -> str:
    text = (
        observe.newest_word(installed.api.events("Pod", pod.name))
        or f"{pod.reason} {pod.message}".strip()
    )
    return f"{pod.name}: not started{': ' + text if text else ''}"


def log(installed: Installed, stage: str, follow: bool) -> Iterator[str]:
    """Lines of a stage's newest attempt, of its first node where it has several.

    Raises:
        InputError: it has no pod, or none any more.
        RetryError: its pod has not started yet, or the log broke off.
    """
    installed.values()
    pods = installed.api.pods(
        f"app.kubernetes.io/instance={installed.name},app.kubernetes.io/component={stage}"
    )
    if not pods:
        raise InputError(
            f"{stage}: has no pod now",
            f"medjob status {installed.name} -n {installed.api.namespace} shows what has run",
        )
    first = [
        pod
        for pod in pods
        if pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", "0") == "0"
    ]
    pod = observe.pod_of(
        max(first or pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    )
    if pod.waiting:
        raise RetryError(_not_started(installed, pod), "the same command shows its log once it has")
    rest = b""
    for piece in installed.api.log(pod.name, follow):
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")
