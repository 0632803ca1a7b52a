"""`medjob status` and `medjob logs`: what the cluster itself knows of a run; no bucket has to be in reach."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from medjob.errors import EXIT_CODES, InputError, RetryError, error_of
from medjob.k8s import observe, report
from medjob.k8s.release import Installed

_POLL_S = 3.0


def table(installed: Installed) -> str:
    """How the run stands, with the newest warning where something hangs."""
    status = _status(installed)
    if status is None:
        return "\n".join(["the orchestrator has not said anything yet", *_warnings(installed)])
    return "\n".join([*report.lines(status, installed.config()), *(_warnings(installed) if status["state"] != "done" else ())])


def follow(installed: Installed) -> None:
    """Print the table whenever it has changed, until the run has ended.

    Raises:
        MedjobError: the run has failed; with its exit code.
    """
    last = ""
    while True:
        status, text = _status(installed), table(installed)
        if text.partition("\n")[2] != last:
            print(text, end="\n\n", flush=True)
            last = text.partition("\n")[2]
        if status and status["state"] == "done":
            return
        if status and status["state"] == "failed":
            code = int(status["code"])
            raise (error_of(code) if code in EXIT_CODES and code else RetryError)(status["text"])
        time.sleep(_POLL_S)


def _status(installed: Installed) -> dict[str, Any] | None:
    installed.read()
    jobs = installed.orchestrator_jobs()
    text = jobs[-1]["metadata"].get("annotations", {}).get(report.ANNOTATION) if jobs else None
    return dict(json.loads(text)) if text else None


def _warnings(installed: Installed) -> Iterator[str]:
    """What the cluster has to say of pods that do not start."""
    for raw in installed.api.pods(f"app.kubernetes.io/instance={installed.name}"):
        pod = observe.pod_of(raw)
        if not (pod.running or pod.ended):
            events = [event for event in installed.api.events("Pod", pod.name) if event.get("type") == "Warning"]
            text = f"{events[-1].get('reason')}: {events[-1].get('message')}" if events else f"{pod.reason} {pod.message}".strip()
            yield f"{pod.name}: not started{': ' + ' '.join(text.split()) if text else ''}"


def log(installed: Installed, stage: str, follow: bool) -> Iterator[str]:
    """Lines of the newest pod of a stage.

    Raises:
        InputError: it has no pod, or none any more.
    """
    installed.read()
    pods = installed.api.pods(f"app.kubernetes.io/instance={installed.name},app.kubernetes.io/component={stage}")
    if not pods:
        raise InputError(f"{stage}: has no pod now", f"medjob status {installed.name} -n {installed.api.namespace} shows what has run")
    newest = max(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    response = installed.api.log(newest["metadata"]["name"], follow=follow)
    rest = b""
    for chunk in response.stream(65536):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")
