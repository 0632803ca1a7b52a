"""What one Job computes: a stage, one shard of it, or the join of its shards.

Each shard has Jobs, attempts and retry budgets of its own, so that one shard can be replaced while
the others run. The pod that completes the set joins the shards. If it ends before that, another Job
runs any shard again, which finds all of them published and joins them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medjob.artifacts.artifact import Artifact
from medjob.artifacts.shard import Shard, shard_of
from medjob.k8s import observe
from medjob.k8s.observe import Job
from medjob.k8s.orchestrator.lease import owner_reference
from medjob.pipeline.shards import VARIABLE
from medjob.runtime.files import fingerprint
from medjob.stage import Stage

_JOIN = "join"
_SEPARATOR = "-of-"


@dataclass(frozen=True, slots=True)
class Work:
    """What one Job computes, and all later Jobs that replace it."""

    stage: Stage
    key: str
    """Key of the stage."""
    artifact: Artifact | None
    """Where its attempts are: the stage's artifact or the shard's. None while the key of `fetch` is
    unknown."""
    shard: str = ""
    """`0-of-3`, or `join-of-3`; empty for a stage without shards."""

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{self.stage.name} {self.shard}" if self.shard else self.stage.name

    @property
    def is_join(self) -> bool:
        """Whether it joins published shards."""
        return self.shard.startswith(_JOIN)

    def owns(self, job: Job) -> bool:
        """Whether the Job is an attempt at this."""
        wanted = (self.stage.name, self.key[:12], self.shard)
        return (job.stage, job.key, job.shard) == wanted

    def job(
        self,
        rendered: Mapping[str, Any],
        attempt: int,
        submission: str,
        namespace: str,
        owner: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the Job of an attempt.

        Args:
            rendered: The stage's Job as Helm rendered it.
            namespace: A post-renderer may have moved the release to it.
            owner: The ConfigMap, with which Kubernetes deletes the Job.
        """
        manifest: dict[str, Any] = copy.deepcopy(dict(rendered))
        meta = manifest["metadata"]
        meta["name"] = f"{meta['name']}-{self._suffix}-a{attempt}"
        meta["namespace"] = namespace
        meta["labels"] |= {
            observe.KEY: self.key[:12],
            observe.ATTEMPT: str(attempt),
            observe.SUBMISSION: submission,
        }
        meta["ownerReferences"] = [owner_reference(owner)]
        if self.shard:
            self._set_shard(manifest)
        return manifest

    @property
    def _suffix(self) -> str:
        """Part of a Job's name. With shards it depends on their number, because that can change
        while the key stays, and it is as short, because names are limited to 63 characters."""
        if not self.shard:
            return self.key[:8]
        index, _, count = self.shard.partition(_SEPARATOR)
        digits = fingerprint({"key": self.key, "shards": count})[:6]
        return f"{digits}-{index if index == _JOIN else f's{index}'}"

    def _set_shard(self, manifest: dict[str, Any]) -> None:
        """Tell the container which shard it is. Any of them joins the published ones."""
        index = self.shard.partition(_SEPARATOR)[0]
        template = manifest["spec"]["template"]
        for meta in (manifest["metadata"], template["metadata"]):
            meta["labels"][observe.SHARD] = self.shard
        for container in template["spec"]["containers"]:
            if container["name"] == "medjob":
                value = "0" if index == _JOIN else index
                variables = container.get("env") or []
                container["env"] = [{"name": VARIABLE, "value": value}, *variables]


def shard_works(stage: Stage, key: str, artifact: Artifact, count: int) -> list[Work]:
    """Return the shards of a stage."""
    shards = [Shard(index, count) for index in range(count)]
    return [Work(stage, key, shard_of(artifact, shard), str(shard)) for shard in shards]


def join_work(stage: Stage, key: str, artifact: Artifact, count: int) -> Work:
    """Return the join of a stage's shards."""
    return Work(stage, key, artifact, f"{_JOIN}{_SEPARATOR}{count}")


def count_of(shard: str) -> int:
    """Return the number of shards: 3 for `0-of-3`, and 1 without shards."""
    return int(shard.partition(_SEPARATOR)[2] or 1)


def attempted_artifact(artifact: Artifact, shard: str) -> Artifact:
    """Return where the attempts at a shard of a stage's artifact are."""
    index, _, count = shard.partition(_SEPARATOR)
    return shard_of(artifact, Shard(int(index), int(count))) if index.isdigit() else artifact
