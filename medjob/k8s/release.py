"""A release as its user sees it: by name, in a namespace, found again by what Helm has made of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import yaml

from medjob.config import Job as Config
from medjob.config.load import validate
from medjob.errors import InputError
from medjob.k8s.api import Api

_STEM = 34


def fullname(release: str) -> str:
    """Stem of the release's object names: charts/medjob/templates/_names.tpl does the same."""
    if len(release) <= _STEM:
        return release
    return f"{release[:27].rstrip('-').rstrip('.')}-{hashlib.sha256(release.encode()).hexdigest()[:6]}"


@dataclass(frozen=True, slots=True)
class Installed:
    """A release that is there."""

    name: str
    api: Api

    @property
    def config_map(self) -> str:
        """The ConfigMap that holds the run and owns its Jobs."""
        return f"{fullname(self.name)}-pipeline"

    def config(self) -> Config:
        """The run, as the cluster has it.

        Raises:
            InputError: there is no such release.
        """
        return validate(dict(yaml.safe_load(self.read()["data"]["job.yaml"])))

    def read(self) -> dict[str, Any]:
        """Its ConfigMap."""
        found = self.api.config_map(self.config_map)
        if found is None:
            raise InputError(
                f"{self.name}: no such release in namespace {self.api.namespace}", "helm list -n NAMESPACE lists those there are"
            )
        return found

    def orchestrator_jobs(self) -> list[dict[str, Any]]:
        """Jobs of its orchestrators, the newest last."""
        found = self.api.jobs(f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component=orchestrator")
        return sorted(found, key=lambda job: str(job["metadata"]["creationTimestamp"]))
