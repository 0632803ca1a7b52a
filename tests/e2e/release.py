"""A release under test, with the commands of a user."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.environment import ROOT, ClusterEnvironment, wait, write_values

STAGES = ("fetch", "prepare", "sft", "candidates", "judge", "dpo", "evaluate", "export")
_STAGE, _CREATED = "app.kubernetes.io/component", "creationTimestamp"


@dataclass(slots=True)
class Release:
    """A run on the cluster."""

    cluster: ClusterEnvironment
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""

    def __post_init__(self) -> None:
        self.run = self.run or self.name

    def submit(
        self, *flags: str, check: bool = True, **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `medjob submit`. `sets` overrides values of `changes`."""
        values = write_values(self.cluster, self.run, {**self.changes, **changes.pop("sets", {})})
        return self.cluster.medjob(
            "submit", "-f", str(values), "--release", self.name, "--yes", *flags, check=check
        )

    def install(self) -> None:
        """Run `helm upgrade --install`, without the checks of `medjob submit`."""
        values = write_values(self.cluster, self.run, self.changes)
        self.cluster.helm(
            "upgrade", "--install", self.name, str(ROOT / "charts" / "medjob"), "-f", str(values)
        )

    def cancel(self) -> None:
        """Run `medjob cancel`, and wait until no object is left."""
        self.cluster.medjob("cancel", self.name, "-n", self.cluster.namespace)
        wait(f"all objects of {self.name} deleted", lambda: not self.leftovers(), 120)

    def leftovers(self) -> list[str]:
        """List the release's objects that still exist."""
        kinds = (
            "jobs,pods,configmaps,services,roles,rolebindings,serviceaccounts,networkpolicies,"
            "secrets,leases"
        )
        found = json.loads(self.cluster.kubectl("get", kinds, "-o", "json"))["items"]
        names = (f"{item['kind']}/{item['metadata']['name']}" for item in found)
        return [
            name
            for name in names
            if name.partition("/")[2].startswith(
                (f"{self.name}-", f"sh.helm.release.v1.{self.name}.")
            )
            or name.endswith(f"/{self.name}")
        ]

    def jobs(self, stage: str) -> list[dict[str, Any]]:
        """List a stage's Jobs, oldest first."""
        found = self.cluster.get("jobs", f"app.kubernetes.io/instance={self.name},{_STAGE}={stage}")
        return sorted(found, key=lambda job: str(job["metadata"][_CREATED]))

    def pods(self, stage: str, running: bool = False) -> list[dict[str, Any]]:
        """List a stage's pods, oldest first."""
        found = self.cluster.get("pods", f"app.kubernetes.io/instance={self.name},{_STAGE}={stage}")
        alive = [
            pod
            for pod in found
            if not running
            or (pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"])
        ]
        return sorted(alive, key=lambda pod: str(pod["metadata"][_CREATED]))

    def wait_for_pod(self, stage: str, seconds: float = 240) -> dict[str, Any]:
        """Wait for a running pod of the stage and return the newest."""
        return dict(
            wait(f"a running pod of {stage}", lambda: self.pods(stage, running=True), seconds)[-1]
        )

    def wait_for_checkpoint(
        self, stage: str = "sft", seconds: float = 300, at_least: int = 1
    ) -> list[str]:
        """Wait until the stage has stored `at_least` checkpoints, and return their keys."""

        def stored() -> list[str]:
            return [
                key
                for key in self.cluster.objects(f"runs/{self.run}/{stage}/")
                if "/checkpoints/" in key and key.endswith("/MANIFEST.json")
            ]

        return list(
            wait(
                f"{at_least} checkpoints of {stage}",
                lambda: stored() if len(stored()) >= at_least else None,
                seconds,
            )
        )

    def wait_until_done(self, seconds: float = 1200) -> None:
        """Wait until the run has succeeded."""
        self.wait_for_state("done", seconds)

    def wait_for_state(self, state: str, seconds: float = 600) -> dict[str, Any]:
        """Wait until the orchestrator reports `state`, and return its status."""

        def status_if_reached() -> dict[str, Any] | None:
            status = self.status()
            if status and status["state"] in ("done", "failed") and status["state"] != state:
                raise AssertionError(f"{self.name} is {status['state']}: {status['text']}")
            return status if status and status["state"] == state else None

        return dict(wait(f"{self.name} to be {state}", status_if_reached, seconds, every=1.0))

    def status(self) -> dict[str, Any] | None:
        """Return the status that the orchestrator last reported."""
        jobs = self.jobs("orchestrator")
        text = jobs[-1]["metadata"].get("annotations", {}).get("medjob/status") if jobs else None
        return dict(json.loads(text)) if text else None

    def digest(self, stage: str) -> str:
        """Return the digest of the stage's artifact."""
        return str(self.marker(stage)["digest"])

    def marker(self, stage: str) -> dict[str, Any]:
        """Read the marker of the stage's artifact."""
        keys = [
            key
            for key in self.cluster.objects(f"runs/{self.run}/{stage}/")
            if re.fullmatch("[0-9a-f]+/_SUCCESS.json", key.partition(f"/{stage}/")[2])
        ]
        assert len(keys) == 1, f"{stage}: {len(keys)} markers"
        return self.cluster.read(keys[0])

    def outcomes(self, stage: str) -> list[dict[str, Any]]:
        """Read the recorded outcomes of failed attempts, oldest first."""
        return [
            self.cluster.read(key)
            for key in self.cluster.objects(f"runs/{self.run}/orchestrator/{stage}/")
            if "begun" not in key
        ]
