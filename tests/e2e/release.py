"""One release under test, driven and looked at as a user would."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.site import ROOT, Site, wait, write_values

STAGES = ("fetch", "prepare", "sft", "candidates", "judge", "dpo", "evaluate", "export")
_STAGE, _CREATED = "app.kubernetes.io/component", "creationTimestamp"


@dataclass(slots=True)
class Release:
    """A run on the cluster."""

    site: Site
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""

    def __post_init__(self) -> None:
        self.run = self.run or self.name

    def submit(
        self, *flags: str, check: bool = True, **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        """`medjob submit`, with more changes laid over the first ones."""
        values = write_values(self.site, self.run, {**self.changes, **changes.pop("sets", {})})
        return self.site.medjob(
            "submit", "-f", str(values), "--release", self.name, "--yes", *flags, check=check
        )

    def install(self) -> None:
        """`helm upgrade --install`, without what the client checks first."""
        values = write_values(self.site, self.run, self.changes)
        self.site.helm(
            "upgrade", "--install", self.name, str(ROOT / "charts" / "medjob"), "-f", str(values)
        )

    def cancel(self) -> None:
        """`medjob cancel`, and wait until nothing is left."""
        self.site.medjob("cancel", self.name, "-n", self.site.namespace)
        wait(f"nothing of {self.name} left", lambda: not self.leftovers(), 120)

    def leftovers(self) -> list[str]:
        """Every object of the release that is still there."""
        kinds = "jobs,pods,configmaps,services,roles,rolebindings,serviceaccounts,networkpolicies,secrets,leases"
        found = json.loads(self.site.kubectl("get", kinds, "-o", "json"))["items"]
        mine = (f"{item['kind']}/{item['metadata']['name']}" for item in found)
        return [
            name
            for name in mine
            if name.partition("/")[2].startswith(
                (f"{self.name}-", f"sh.helm.release.v1.{self.name}.")
            )
            or name.endswith(f"/{self.name}")
        ]

    def jobs(self, stage: str) -> list[dict[str, Any]]:
        """A stage's Jobs, oldest first."""
        found = self.site.get("jobs", f"app.kubernetes.io/instance={self.name},{_STAGE}={stage}")
        return sorted(found, key=lambda job: str(job["metadata"][_CREATED]))

    def pods(self, stage: str, running: bool = False) -> list[dict[str, Any]]:
        """A stage's pods, oldest first."""
        found = self.site.get("pods", f"app.kubernetes.io/instance={self.name},{_STAGE}={stage}")
        alive = [
            pod
            for pod in found
            if not running
            or (pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"])
        ]
        return sorted(alive, key=lambda pod: str(pod["metadata"][_CREATED]))

    def wait_for_pod(self, stage: str, seconds: float = 240) -> dict[str, Any]:
        """The stage's newest running pod."""
        return dict(
            wait(f"a running pod of {stage}", lambda: self.pods(stage, running=True), seconds)[-1]
        )

    def wait_for_checkpoint(
        self, stage: str = "sft", seconds: float = 300, at_least: int = 1
    ) -> list[str]:
        """Until the stage has stored this many checkpoints."""

        def stored() -> list[str]:
            return [
                key
                for key in self.site.objects(f"runs/{self.run}/{stage}/")
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
        """Until the run has ended well."""
        self.wait_for_state("done", seconds)

    def wait_for_state(self, state: str, seconds: float = 600) -> dict[str, Any]:
        """Until the orchestrator says so; what it says."""

        def look() -> dict[str, Any] | None:
            status = self.status()
            if status and status["state"] in ("done", "failed") and status["state"] != state:
                raise AssertionError(f"{self.name} is {status['state']}: {status['text']}")
            return status if status and status["state"] == state else None

        return dict(wait(f"{self.name} to be {state}", look, seconds, every=1.0))

    def status(self) -> dict[str, Any] | None:
        """What the orchestrator says now."""
        jobs = self.jobs("orchestrator")
        text = jobs[-1]["metadata"].get("annotations", {}).get("medjob/status") if jobs else None
        return dict(json.loads(text)) if text else None

    def digest(self, stage: str) -> str:
        """Digest of what the stage has published."""
        return str(self.marker(stage)["digest"])

    def marker(self, stage: str) -> dict[str, Any]:
        """Its marker."""
        keys = [
            key
            for key in self.site.objects(f"runs/{self.run}/{stage}/")
            if key.endswith("/_SUCCESS.json")
        ]
        assert len(keys) == 1, f"{stage}: {len(keys)} markers"
        return self.site.read(keys[0])

    def verdicts(self, stage: str) -> list[dict[str, Any]]:
        """What the orchestrator has recorded of attempts that failed, oldest first."""
        return [
            self.site.read(key)
            for key in self.site.objects(f"runs/{self.run}/orchestrator/{stage}/")
            if "begun" not in key
        ]
