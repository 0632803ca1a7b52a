"""A release as its user sees it: by name, in a namespace, found again by what Helm has made of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import yaml

from medjob.errors import ConfigError, InputError
from medjob.k8s.api import Api

_STEM = 34


def fullname(release: str) -> str:
    """Stem of the release's object names: charts/medjob/templates/_names.tpl does the same."""
    if len(release) <= _STEM:
        return release
    return f"{release[:27].removesuffix('-').removesuffix('.')}-{hashlib.sha256(release.encode()).hexdigest()[:6]}"


@dataclass(frozen=True, slots=True)
class Installed:
    """A release that is there."""

    name: str
    api: Api

    @property
    def config_map(self) -> str:
        """The ConfigMap that holds the run and owns its Jobs."""
        return f"{fullname(self.name)}-pipeline"

    def values(self) -> dict[str, Any]:
        """The run, as the cluster has it: perhaps of another version than this client, so it is not validated.

        Raises:
            InputError: there is no such release.
        """
        found = self.api.config_map(self.config_map)
        labels = found["metadata"].get("labels", {}) if found else {}
        if found is None or (
            labels.get("app.kubernetes.io/name"),
            labels.get("app.kubernetes.io/instance"),
        ) != ("medjob", self.name):
            raise InputError(
                f"{self.name}: no such release in namespace {self.api.namespace}",
                "helm list -n NAMESPACE lists those there are",
            )
        return dict(yaml.safe_load(found["data"]["job.yaml"]))

    def annotate(self, annotations: dict[str, str | None]) -> None:
        """Tell its orchestrator something.

        Raises:
            ConfigError: it has none.
        """
        if self.values()["pipeline"]["mode"] == "direct":
            raise ConfigError(
                f"{self.name}: pipeline.mode is direct: there is no orchestrator to tell",
                "kubectl patches or deletes its Job",
            )
        self.api.annotate_config_map(self.config_map, annotations)

    def orchestrator_jobs(self) -> list[dict[str, Any]]:
        """Jobs of its orchestrators, the newest last."""
        found = self.api.jobs(
            f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component=orchestrator"
        )
        return sorted(found, key=lambda job: str(job["metadata"]["creationTimestamp"]))
