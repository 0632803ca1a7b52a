"""Pods with a second container, and the limits of the orchestrator's rights."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.e2e.environment import ROOT, ClusterEnvironment, wait, write_values
from tests.e2e.release import Release

_CHART = str(ROOT / "charts" / "medjob")
# A webhook would do this. The container ignores SIGTERM, as a badly behaved sidecar does.
_ADD_SIDECAR = f"""#!{sys.executable}
import copy, json, sys
import yaml

def with_sidecar(job):
    containers = job["spec"]["template"]["spec"]["containers"]
    own = containers[0]
    proxy = {{key: copy.deepcopy(own[key]) for key in ("image", "imagePullPolicy", "securityContext")}}
    small = {{"cpu": "50m", "memory": "64Mi", "ephemeral-storage": "10Mi"}}
    proxy |= {{"name": "proxy", "command": ["sleep", "infinity"]}}
    proxy |= {{"resources": {{"requests": small, "limits": small}}}}
    containers.append(proxy)
    return job

objects = [each for each in yaml.safe_load_all(sys.stdin) if each]
for each in objects:
    if each["kind"] == "Job":
        with_sidecar(each)
    if each["kind"] == "ConfigMap":
        for name in each["data"]:
            if name != "job.yaml":
                each["data"][name] = json.dumps(with_sidecar(json.loads(each["data"][name])))
yaml.safe_dump_all(objects, sys.stdout)
"""


def sidecar_after_success(cluster: ClusterEnvironment) -> str:
    """Stages and orchestrator end although another container of their pods never does."""
    release = _install(cluster, "mesh", {"pipeline.until": "prepare"})
    began = time.monotonic()
    release.wait_until_done(600)
    took = time.monotonic() - began
    wait("no pod of the release is left", lambda: not _pods(release), 120)
    (job,) = release.jobs("orchestrator")
    assert job["spec"]["suspend"] is True, job["spec"]
    shown = cluster.medjob("status", "mesh", "-n", cluster.namespace).stdout
    assert "mesh: done" in shown, shown
    assert "suspended" not in shown, shown
    release.cancel()
    return f"done after {took:.0f} s, and no pod is left"


def sidecar_after_failure(cluster: ClusterEnvironment) -> str:
    """The exit code of `medjob` ends the run, although another container keeps the pod Running."""
    changes = {"pipeline.until": "sft", "run.lora.target_modules": ["no_such_module"]}
    release = _install(cluster, "meshbad", changes)
    status = release.wait_for_state("failed", 900)
    assert status["code"] == 64, status
    assert "no_such_module" in status["text"], status
    wait("no pod of the release is left", lambda: not _pods(release), 120)

    def has_failed() -> bool:
        (job,) = release.jobs("orchestrator")
        conditions = job["status"].get("conditions", [])
        return any(each["type"] == "Failed" and each["status"] == "True" for each in conditions)

    wait("the orchestrator's Job to be Failed", has_failed, 60)
    release.cancel()
    return "exit code 64, the Job is Failed, and no pod is left"


def admission_policy(cluster: ClusterEnvironment) -> str:
    """The run works, and the orchestrator's account can create nothing else."""
    changes = {"pipeline.until": "prepare", "cluster.admissionPolicy": {"enabled": True}}
    release = Release(cluster, "limited", changes)
    release.submit()
    release.wait_until_done(600)
    user = f"--as=system:serviceaccount:{cluster.namespace}:limited"
    job = _harmless_job(release)
    job["spec"]["template"]["spec"]["hostNetwork"] = True
    assert "namespaces of the node" in _denied(cluster, user, job)
    job = _harmless_job(release)
    job["spec"]["template"]["spec"]["containers"][0]["image"] = "medjob-core:dev"
    assert "image and the command" in _denied(cluster, user, job)
    job = _harmless_job(release)
    del job["metadata"]["labels"]["medjob/release"]
    assert "does not belong to this release" in _denied(cluster, user, job)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "limited-pod"}}
    pod |= {"spec": _harmless_job(release)["spec"]["template"]["spec"]}
    assert "only in dry runs" in _denied(cluster, user, pod)
    release.cancel()
    return "Jobs with another image, label or the host's network, and pods, are denied"


def _install(cluster: ClusterEnvironment, name: str, changes: dict[str, Any]) -> Release:
    """Install a release whose pods have a second container."""
    program = Path(cluster.folder) / "add-sidecar"
    program.write_text(_ADD_SIDECAR)
    program.chmod(0o755)
    values = write_values(cluster, name, changes)
    flags = ("-f", str(values), "--post-renderer", str(program))
    cluster.helm("upgrade", "--install", name, _CHART, *flags)
    return Release(cluster, name, changes)


def _pods(release: Release) -> list[dict[str, Any]]:
    pods = release.cluster.get("pods", f"medjob/release={release.name}")
    return [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]


def _harmless_job(release: Release) -> dict[str, Any]:
    """The Job of a stage as Helm rendered it, under a separate name."""
    (found,) = (
        item
        for item in release.cluster.get("configmaps", f"medjob/release={release.name}")
        if item["metadata"]["name"].endswith("-pipeline")
    )
    job: dict[str, Any] = json.loads(found["data"]["prepare.yaml"])
    job["metadata"]["name"] = f"{release.name}-try"
    return job


def _denied(cluster: ClusterEnvironment, user: str, manifest: dict[str, Any]) -> str:
    """Try to create an object as the orchestrator's account, and return the refusal."""
    command = ["kubectl", "--kubeconfig", cluster.kubeconfig, "-n", cluster.namespace]
    done = subprocess.run(
        [*command, "create", user, "-f", "-"],
        input=json.dumps(manifest),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0, f"created: {done.stdout}"
    return done.stderr
