"""`medjob status` and `medjob logs`.

Both read only from the cluster, so they work without access to the store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from medjob.errors import InputError, RetryError
from medjob.k8s import observe, report
from medjob.k8s.client.release import Installed


def table(installed: Installed) -> list[str]:
    """Format the state of the run, and list pods that do not start."""
    return format_status(installed, read(installed))


def format_status(installed: Installed, status: Mapping[str, Any] | None) -> list[str]:
    """Format a status that `read` returned, as `table` does."""
    if status is None:
        return ["the orchestrator has not reported a status yet", *pending_pods(installed)]
    values = installed.values()
    lines = list(report.lines(status, values["run"]["name"], values["cluster"]["currency"]))
    if status["state"] not in ("done", "failed"):
        lines += pending_pods(installed)
    return lines


def read(installed: Installed) -> dict[str, Any] | None:
    """Read the status that the newest orchestrator reported; None if it has not reported one.

    Raises:
        InputError: there is no such release.
        RetryError: it has no orchestrator.
    """
    installed.values()
    jobs = installed.orchestrator_jobs()
    if not jobs:
        raise RetryError(
            f"release {installed.name} has no orchestrator: pipeline.mode is direct, its Job was "
            "deleted, or it ended more than pipeline.ttlSecondsAfterFinished ago",
            "medjob ls lists published artifacts; medjob submit continues the run",
        )
    text = (jobs[-1]["metadata"].get("annotations") or {}).get(report.ANNOTATION)
    return dict(json.loads(text)) if text else None


def pending_pods(installed: Installed) -> Iterator[str]:
    """Report an orchestrator without a pod, and pods that have not started, with the reasons."""
    for job in installed.orchestrator_jobs()[-1:]:
        yield from _without_pod(installed, job)
    for raw in installed.api.pods(installed.selector):
        pod = observe.pod_of(raw)
        if pod.waiting:
            yield _not_started(installed, pod)
        elif pod.stage == observe.ORCHESTRATOR and pod.finished and not pod.ended:
            others = ", ".join(observe.other_containers(raw)) or "another container"
            yield (
                f"{pod.name} has ended with exit code {pod.exit_code}, but {others} keeps it "
                f"alive: kubectl delete pod {pod.name} -n {installed.api.namespace} lets a new "
                "orchestrator start"
            )


def _without_pod(installed: Installed, job: Mapping[str, Any]) -> Iterator[str]:
    """Report why the newest orchestrator's Job has no pod: a queue holds it, or a quota forbids it.

    A condition can be present and false, as Suspended is after a Job was resumed.
    """
    name = job["metadata"]["name"]
    conditions = observe.true_conditions(dict(job))
    suspended = job.get("spec", {}).get("suspend") or "Suspended" in conditions
    if not suspended and (job.get("status", {}).get("active") or conditions):
        return
    reason = observe.latest_event_text(installed.api.events("Job", name))
    reason = reason or "no Event gives a reason"
    if not suspended:
        yield f"{name} has no pod: {reason}"
        return
    queue = (job["metadata"].get("labels") or {}).get(observe.QUEUE)
    hint = "if Kueue suspends every Job without a queue, set cluster.orchestrator.queue"
    if queue:
        hint = f"the queue {queue} admits it"
    yield f"{name} is suspended: {reason} ({hint})"


def _not_started(installed: Installed, pod: observe.Pod) -> str:
    reason = observe.latest_event_text(installed.api.events("Pod", pod.name))
    reason = reason or f"{pod.reason} {pod.message}".strip()
    return f"{pod.name} has not started{': ' + reason if reason else ''}"


def log(installed: Installed, stage: str, follow: bool, shard: int | None = None) -> Iterator[str]:
    """Read the log of a stage's newest attempt line by line; on several nodes, the first node's.

    Args:
        shard: Index of the shard. Default: the one whose pod is the newest.

    Raises:
        InputError: the stage has no pod.
        RetryError: its pod has not started yet, or the connection was lost.
    """
    installed.values()
    pods = installed.api.pods(f"{installed.selector},{observe.STAGE}={stage}")
    if shard is not None:
        pods = [pod for pod in pods if observe.pod_of(pod).shard.startswith(f"{shard}-")]
    if not pods:
        name = stage if shard is None else f"shard {shard} of {stage}"
        raise InputError(
            f"{name} has no pod now",
            f"medjob status {installed.name} -n {installed.api.namespace} shows the stages' states",
        )
    pod = observe.pod_of(_newest_of_first_node(pods))
    if pod.waiting:
        raise RetryError(
            _not_started(installed, pod), "run the same command again after the pod has started"
        )
    rest = b""
    for chunk in installed.api.log(pod.name, follow):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")


def _newest_of_first_node(pods: list[dict[str, Any]]) -> dict[str, Any]:
    index_label = "batch.kubernetes.io/job-completion-index"
    of_first_node = [pod for pod in pods if pod["metadata"]["labels"].get(index_label, "0") == "0"]
    return max(of_first_node or pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
