"""The methods of medjob.k8s.api.Api on a simulated cluster.

Each method can fail before its effect, or lose its answer after it.
"""

import json
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

from medjob.errors import ConfigError
from medjob.k8s.api import AlreadyExists, Api
from tests.fakes.cluster import Cluster
from tests.fakes.objects import NAMESPACE, Object

T = TypeVar("T")
MUTATIONS = {
    "create_job",
    "delete_job",
    "patch_job",
    "create_event",
    "annotate_config_map",
    "create_lease",
    "replace_lease",
}


class Hook(Protocol):
    """Called before and after every API call. The caller sees the exceptions that it raises."""

    def __call__(self, moment: Literal["before", "after"], name: str, mutates: bool) -> None: ...


class ModelApi(Api):
    """The API client of one process, which has its own hook."""

    def __init__(self, cluster: Cluster, hook: Hook) -> None:
        super().__init__(None, NAMESPACE)
        self._cluster, self._hook = cluster, hook
        self.created: Callable[[Object], None] = lambda _: None
        self.refusals: dict[str, Exception] = {}
        """Exceptions that dry runs raise, by method."""

    def _send(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("ModelApi does not implement this method of Api")

    def _call(self, name: str, effect: Callable[[], T]) -> T:
        self._hook("before", name, name in MUTATIONS)
        answer: T = json.loads(json.dumps(effect()))
        self._hook("after", name, name in MUTATIONS)
        return answer

    def jobs(self, selector: str) -> list[Object]:
        return self._call(
            "jobs", lambda: [job for job in self._cluster.jobs.values() if _matches(job, selector)]
        )

    def pods(self, selector: str) -> list[Object]:
        return self._call(
            "pods", lambda: [pod for pod in self._cluster.pods.values() if _matches(pod, selector)]
        )

    def job(self, name: str) -> Object | None:
        return self._call("job", lambda: self._cluster.jobs.get(name))

    def create_job(self, manifest: Object, dry_run: bool = False) -> Object:
        def create() -> Object:
            if manifest["metadata"]["name"] in self._cluster.jobs:
                raise AlreadyExists(manifest["metadata"]["name"])
            made = self._cluster.added(self._cluster.jobs, manifest)
            self.created(made)
            return made

        if dry_run:
            return self._dry_run("create_job", manifest)
        return self._call("create_job", create)

    def check_pod(self, manifest: Object) -> None:
        self._dry_run("check_pod", manifest)

    def _dry_run(self, name: str, manifest: Object) -> Object:
        if name in self.refusals:
            raise self.refusals[name]
        return manifest

    def delete_job(self, name: str) -> None:
        self._call("delete_job", lambda: self._cluster.jobs.pop(name, None))

    def patch_job(self, name: str, patch: Object) -> None:
        def change() -> None:
            if name not in self._cluster.jobs:
                raise ConfigError(f"the API server rejects PATCH {name}: not found")
            merge(self._cluster.jobs[name], patch)

        self._call("patch_job", change)

    def events(self, kind: str, name: str) -> list[Object]:
        about = {"kind": kind, "name": name}
        return self._call(
            "events",
            lambda: [
                event
                for event in self._cluster.events
                if about.items() <= event["involvedObject"].items()
            ],
        )

    def create_event(self, event: Object) -> None:
        self._call("create_event", lambda: self._cluster.events.append(event))

    def config_map(self, name: str) -> Object | None:
        return self._call("config_map", lambda: self._cluster.config_maps.get(name))

    def annotate_config_map(self, name: str, annotations: dict[str, str | None]) -> None:
        patch = {"metadata": {"annotations": annotations}}
        self._call("annotate_config_map", lambda: merge(self._cluster.config_maps[name], patch))

    def lease(self, name: str) -> Object | None:
        return self._call("lease", lambda: self._cluster.leases.get(name))

    def create_lease(self, lease: Object) -> Object:
        def create() -> Object:
            if lease["metadata"]["name"] in self._cluster.leases:
                raise AlreadyExists(lease["metadata"]["name"])
            return self._cluster.added(self._cluster.leases, lease)

        return self._call("create_lease", create)

    def replace_lease(self, lease: Object) -> Object:
        def replace() -> Object:
            name = lease["metadata"]["name"]
            if (
                self._cluster.leases[name]["metadata"]["resourceVersion"]
                != lease["metadata"]["resourceVersion"]
            ):
                raise AlreadyExists("the object has been modified")
            made: Object = json.loads(json.dumps(lease))
            made["metadata"]["resourceVersion"] = self._cluster.version()
            self._cluster.leases[name] = made
            return made

        return self._call("replace_lease", replace)


def merge(target: Object, patch: Object) -> None:
    """Apply a JSON merge patch."""
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict):
            merge(target.setdefault(name, {}), value)
        else:
            target[name] = value


def _matches(found: Object, selector: str) -> bool:
    labels = found["metadata"].get("labels", {})
    return all(
        labels.get(name) == value
        for name, _, value in (part.partition("=") for part in selector.split(","))
    )
