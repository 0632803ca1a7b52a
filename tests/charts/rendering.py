"""Run Helm for the chart's tests. Each combination of values is rendered once."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubernetes_validate import utils

from medjob.stage import STAGES
from tests.support.store_servers import program

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "medjob"
CI = tuple(sorted((CHART / "ci").glob("*-values.yaml")))
KIND, SPOT, EFA, SINGLE, KUEUE = (
    CHART / "ci" / f"{name}-values.yaml"
    for name in ("kind-cpu", "gke-spot", "eks-efa", "single-gpu", "kueue")
)
RUNS = tuple(sorted((ROOT / "jobs").glob("*.yaml")))
CLUSTERS = tuple(ROOT / "jobs" / "clusters" / f"{name}.yaml" for name in ("gke", "eks", "kind"))
NAMES = tuple(stage.name for stage in STAGES)
# The oldest version that Chart.yaml allows, and the newest one that the validator knows.
VERSIONS = ("1.31", kubernetes_validate.latest_version())
Object = dict[str, Any]

# kubernetes_validate would read megabytes of schema for every object.
utils.schema_contents = functools.cache(utils.schema_contents)
utils.all_versions = functools.cache(utils.all_versions)


class UniqueKeys(yaml.CSafeLoader):
    """A YAML loader that refuses duplicate keys, as a strict API server does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"duplicate key: {sorted(keys)} {node.start_mark}"
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Rendered:
    """The output of `helm template`."""

    text: str
    objects: tuple[Object, ...]

    def all(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str) -> Object:
        (found,) = self.all(kind)
        return found

    @property
    def job_yaml(self) -> Object:
        """The run file that is mounted into the containers."""
        return dict(yaml.safe_load(self.one("ConfigMap")["data"]["job.yaml"]))

    @functools.cached_property
    def stages(self) -> dict[str, Object]:
        """Jobs of the stages: those that the orchestrator creates, or the one of direct mode."""
        data = self.one("ConfigMap")["data"]
        jobs = {name: load(data[f"{name}.yaml"]) for name in NAMES if f"{name}.yaml" in data}
        for job in self.all("Job"):
            component = job["metadata"]["labels"]["app.kubernetes.io/component"]
            if component in NAMES:
                jobs[component] = job
        return jobs

    @property
    def everything(self) -> list[Object]:
        """Every object of the release, including the Jobs that the orchestrator creates later."""
        direct = [job["metadata"]["name"] for job in self.all("Job")]
        return [
            *self.objects,
            *(job for job in self.stages.values() if job["metadata"]["name"] not in direct),
        ]

    def core(self, component: str) -> Object:
        """A Job that uses the image medjob-core: orchestrator or preflight."""
        return next(
            job
            for job in self.all("Job")
            if job["metadata"]["labels"]["app.kubernetes.io/component"] == component
        )

    def pods(self) -> Iterator[tuple[str, Object]]:
        """Every pod template with its stage or component."""
        for job in self.everything:
            if job["kind"] == "Job":
                yield (
                    job["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"],
                    job["spec"]["template"],
                )


def load(text: str) -> Object:
    """Parse a YAML document."""
    return dict(yaml.load(text, UniqueKeys))


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("helm"), *arguments], capture_output=True, text=True, check=False
    )


def template(
    *files: Path,
    sets: tuple[str, ...] = (),
    release: str = "demo",
    namespace: str = "research",
    flags: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run `helm template`. Each set has the form `a.b=JSON`."""
    values = [flag for file in files for flag in ("-f", str(file))] + [
        flag for text in sets for flag in ("--set-json", text)
    ]
    return helm("template", release, str(CHART), "-n", namespace, *values, *flags)


@functools.cache
def render(
    *files: Path, sets: tuple[str, ...] = (), release: str = "demo", namespace: str = "research"
) -> Rendered:
    done = template(*files, sets=sets, release=release, namespace=namespace)
    assert done.returncode == 0, done.stderr
    return Rendered(
        done.stdout, tuple(dict(item) for item in yaml.load_all(done.stdout, UniqueKeys) if item)
    )


def refusal(
    *files: Path, sets: tuple[str, ...] = (), release: str = "demo", namespace: str = "research"
) -> str:
    """Return Helm's error message for values that it refuses."""
    done = template(*files, sets=sets, release=release, namespace=namespace)
    assert done.returncode != 0, f"{sets} should have been refused"
    return done.stderr


def validate(item: Object) -> None:
    """Validate an object as the API server's strict field validation does, for each version."""
    # There is no schema for the PodMonitor; tests/charts/test_values.py checks it.
    if item["apiVersion"].startswith("monitoring.coreos.com/"):
        return
    for version in VERSIONS:
        kubernetes_validate.validate(item, version, strict=True)


def container(template: Object) -> Object:
    """The only container of a pod template."""
    (found,) = template["spec"]["containers"]
    return dict(found)


def environment(template: Object) -> dict[str, Any]:
    return {
        entry["name"]: entry.get("value", entry.get("valueFrom"))
        for entry in container(template).get("env") or []
    }
