"""Find an installed release by its name and namespace."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import yaml

from medjob.errors import ConfigError, InputError
from medjob.k8s import observe
from medjob.k8s.api import Api

_MAX_LENGTH = 34
_CUT_LENGTH = 27


def fullname(release: str) -> str:
    """Return the prefix of the release's object names.

    `charts/medjob/templates/_names.tpl` computes the same name.
    """
    if len(release) <= _MAX_LENGTH:
        return release
    start = release[:_CUT_LENGTH].removesuffix("-").removesuffix(".")
    return f"{start}-{hashlib.sha256(release.encode()).hexdigest()[:6]}"


@dataclass(frozen=True, slots=True)
class Installed:
    """An installed release."""

    name: str
    api: Api

    @property
    def config_map(self) -> str:
        """Name of the ConfigMap that holds the run and owns its Jobs."""
        return f"{fullname(self.name)}-pipeline"

    def values(self) -> dict[str, Any]:
        """Read the run file from the cluster.

        It is not validated, because another version of medjob may have written it.

        Raises:
            InputError: there is no such release.
        """
        found = self.api.config_map(self.config_map)
        if found is None or not self._owns(found):
            raise InputError(
                f"no release {self.name!r} in namespace {self.api.namespace}",
                "helm list -n NAMESPACE lists the releases of a namespace",
            )
        return dict(yaml.safe_load(found["data"]["job.yaml"]))

    def _owns(self, config_map: dict[str, Any]) -> bool:
        """Whether the ConfigMap belongs to this release. Two long names may be shortened alike."""
        labels: dict[str, str] = config_map["metadata"].get("labels") or {}
        return labels.get(observe.RELEASE) == self.name

    @property
    def selector(self) -> str:
        """Label selector of all objects of the release."""
        return f"{observe.RELEASE}={self.name}"

    def annotate(self, annotations: dict[str, str | None]) -> None:
        """Set annotations that the release's orchestrator reads.

        Raises:
            ConfigError: the release has no orchestrator.
        """
        if self.values()["pipeline"]["mode"] == "direct":
            raise ConfigError(
                f"release {self.name} has no orchestrator, because its pipeline.mode is direct",
                "suspend or delete its Job with kubectl",
            )
        self.api.annotate_config_map(self.config_map, annotations)

    def orchestrator_jobs(self) -> list[dict[str, Any]]:
        """List the Jobs of the release's orchestrators, the newest last."""
        found = self.api.jobs(f"{self.selector},{observe.STAGE}={observe.ORCHESTRATOR}")
        return sorted(found, key=lambda job: str(job["metadata"]["creationTimestamp"]))
