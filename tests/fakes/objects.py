"""Raw Kubernetes objects: what a pod or a Job says of itself."""

from datetime import datetime
from typing import Any

from medjob.config import RunFile

Object = dict[str, Any]
NAMESPACE = "medjob"
JOB_NAME, INDEX = "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"


def seconds(stamp: str) -> float:
    """A time of the API as POSIX seconds."""
    return datetime.fromisoformat(stamp).timestamp()


def matching_rule(job: Object, pod: Object) -> tuple[str, str]:
    """Reason and message of the rule of podFailurePolicy that an ended pod matches first."""
    code = exit_code(pod)
    name = f"{NAMESPACE}/{pod['metadata']['name']}"
    for number, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
        if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
            return (
                "PodFailurePolicy",
                f"Container medjob for pod {name} failed with exit code {code} matching FailJob rule at index {number}",
            )
        if "onPodConditions" in rule and condition(pod, "DisruptionTarget"):
            return (
                "PodFailurePolicy",
                f"Pod {name} has condition DisruptionTarget matching FailJob rule at index {number}",
            )
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def exit_code(pod: Object) -> int | None:
    """What its container ended with."""
    for container in pod["status"].get("containerStatuses", []):
        if "terminated" in container["state"]:
            return int(container["state"]["terminated"]["exitCode"])
    return None


def ended(pod: Object) -> bool:
    """Whether it has."""
    return pod["status"]["phase"] in ("Succeeded", "Failed")


def finished(job: Object) -> bool:
    """Whether it is Complete or Failed."""
    return bool(condition(job, "Complete") or condition(job, "Failed"))


def condition(found: Object, kind: str, status: str = "True") -> Object | None:
    """A condition that an object has."""
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
    """Have a condition."""
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
    """A stage's Job as the chart renders it, as far as the model reads it."""
    labels = {"app.kubernetes.io/instance": "r", "app.kubernetes.io/component": stage}
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
        "spec": {"terminationGracePeriodSeconds": 30},
    }
    meta = {
        "name": f"r-{stage}",
        "namespace": NAMESPACE,
        "labels": {**labels, "app.kubernetes.io/managed-by": "medjob"},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec}
