"""Helm, as the tests of the chart call it: each combination of values is rendered once."""

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
VERSIONS = (
    "1.31",
    kubernetes_validate.latest_version(),
)  # the oldest that Chart.yaml allows, and the newest there is
Object = dict[str, Any]

# It reads megabytes of schema for every object.
utils.schema_contents = functools.cache(utils.schema_contents)
utils.all_versions = functools.cache(utils.all_versions)


class UniqueKeys(yaml.CSafeLoader):
    """YAML as a strict server reads it: a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice: {sorted(keys)} {node.start_mark}"
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Rendered:
    """What Helm would send to the server."""

    text: str
    objects: tuple[Object, ...]

    def all(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str) -> Object:
        (found,) = self.all(kind)
        return found

    @property
    def job_yaml(self) -> Object:
        """The run, as the containers read it."""
        return dict(yaml.safe_load(self.one("ConfigMap")["data"]["job.yaml"]))

    @functools.cached_property
    def stages(self) -> dict[str, Object]:
        """Jobs of the stages: those that the orchestrator is to make, or the one of direct mode."""
        data = self.one("ConfigMap")["data"]
        direct = {
            job["metadata"]["labels"]["app.kubernetes.io/component"]: job for job in self.all("Job")
        }
        return {name: load(data[f"{name}.yaml"]) for name in NAMES if f"{name}.yaml" in data} | {
            n: j for n, j in direct.items() if n in NAMES
        }

    @property
    def everything(self) -> list[Object]:
        """Every object that will ever be on the cluster."""
        direct = [job["metadata"]["name"] for job in self.all("Job")]
        return [
            *self.objects,
            *(job for job in self.stages.values() if job["metadata"]["name"] not in direct),
        ]

    def core(self, component: str) -> Object:
        """A Job of the small image: orchestrator or preflight."""
        return next(
            job
            for job in self.all("Job")
            if job["metadata"]["labels"]["app.kubernetes.io/component"] == component
        )

    def pods(self) -> Iterator[tuple[str, Object]]:
        """Every pod template, by its stage or component."""
        for job in self.everything:
            if job["kind"] == "Job":
                yield (
                    job["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"],
                    job["spec"]["template"],
                )


def load(text: str) -> Object:
    """One document."""
    return dict(yaml.load(text, UniqueKeys))


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("helm"), *arguments], capture_output=True, text=True, check=False
    )


def template(
    *files: Path, sets: tuple[str, ...] = (), release: str = "demo", namespace: str = "research"
) -> subprocess.CompletedProcess[str]:
    """`helm template`. A set is `a.b=JSON`."""
    flags = [flag for file in files for flag in ("-f", str(file))] + [
        flag for text in sets for flag in ("--set-json", text)
    ]
    return helm("template", release, str(CHART), "-n", namespace, *flags)


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
    """What Helm says of values that it refuses."""
    done = template(*files, sets=sets, release=release, namespace=namespace)
    assert done.returncode != 0, f"{sets} should have been refused"
    return done.stderr


def validate(item: Object) -> None:
    """As the API server's strict field validation, in each version."""
    if item["apiVersion"].startswith(
        "monitoring.coreos.com/"
    ):  # the operator's own; tests/charts/test_values.py says what it must be
        return
    for version in VERSIONS:
        kubernetes_validate.validate(item, version, strict=True)


def container(template: Object) -> Object:
    """The one container of a pod template."""
    (found,) = template["spec"]["containers"]
    return dict(found)


def environment(template: Object) -> dict[str, Any]:
    return {
        entry["name"]: entry.get("value", entry.get("valueFrom"))
        for entry in container(template).get("env") or []
    }
