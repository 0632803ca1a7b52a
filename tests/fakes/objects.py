"""Raw Kubernetes objects, and functions that read and change them."""

from datetime import datetime
from typing import Any

from medjob.config import RunFile

Object = dict[str, Any]
NAMESPACE = "medjob"
JOB_NAME, INDEX = "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"


def seconds(stamp: str) -> float:
    """Convert a time of the API to POSIX seconds."""
    return datetime.fromisoformat(stamp).timestamp()


def matching_rule(job: Object, pod: Object) -> tuple[str, str]:
    """Return reason and message of the first podFailurePolicy rule that an ended pod matches."""
    code = exit_code(pod)
    name = f"{NAMESPACE}/{pod['metadata']['name']}"
    for number, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
        if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
            match = f"failed with exit code {code} matching FailJob rule at index {number}"
            return "PodFailurePolicy", f"Container medjob for pod {name} {match}"
        if "onPodConditions" in rule and condition(pod, "DisruptionTarget"):
            match = f"matching FailJob rule at index {number}"
            return "PodFailurePolicy", f"Pod {name} has condition DisruptionTarget {match}"
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def exit_code(pod: Object) -> int | None:
    """Return the exit code of the pod's container `medjob`, or None."""
    for container in pod["status"].get("containerStatuses", []):
        if container["name"] == "medjob" and "terminated" in container["state"]:
            return int(container["state"]["terminated"]["exitCode"])
    return None


def ended(pod: Object) -> bool:
    """Whether the pod has ended."""
    return pod["status"]["phase"] in ("Succeeded", "Failed")


def finished(job: Object) -> bool:
    """Whether the Job is Complete or Failed."""
    return bool(condition(job, "Complete") or condition(job, "Failed"))


def condition(found: Object, kind: str, status: str = "True") -> Object | None:
    """Return the condition of this type and status, or None."""
    return next(
        (
            c
            for c in found.get("status", {}).get("conditions", [])
            if c["type"] == kind and c["status"] == status
        ),
        None,
    )


def set_condition(
    found: Object, kind: str, reason: str, message: str, status: str = "True", at: str = ""
) -> None:
    """Set a condition of an object."""
    conditions = found.setdefault("status", {}).setdefault("conditions", [])
    conditions[:] = [c for c in conditions if c["type"] != kind]
    conditions.append(
        {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message,
            "lastTransitionTime": at,
        }
    )


def stage_job(stage: str, nodes: int, queue: bool, run_file: RunFile) -> Object:
    """Return a stage's Job with the fields of the chart's Job that the simulated cluster reads."""
    labels = {"medjob/release": "r", "medjob/component": stage}
    rules = [
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": "medjob",
                "operator": "In",
                "values": [64, 65, 66, 67, 76],
            },
        },
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "medjob", "operator": "In", "values": [143]},
        },
    ]
    spec: Object = {
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
    }
    spec |= {"ttlSecondsAfterFinished": run_file.pipeline.ttl_seconds_after_finished}
    spec |= {"completionMode": "Indexed"} if nodes > 1 else {}
    spec |= {"suspend": True} if queue else {}
    deadline = getattr(run_file.resources, stage).active_deadline_seconds
    spec |= {"activeDeadlineSeconds": deadline} if deadline else {}
    spec["template"] = {
        "metadata": {"labels": dict(labels)},
        "spec": {"terminationGracePeriodSeconds": 30, "containers": [{"name": "medjob"}]},
    }
    meta = {
        "name": f"r-{stage}",
        "namespace": NAMESPACE,
        "labels": dict(labels),
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec}
