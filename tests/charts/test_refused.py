"""Helm refuses invalid values before it creates anything, and the message names the key."""

from collections.abc import Iterator
from typing import Any

import pytest

from medjob.codegen.chart import schema
from tests.charts.rendering import KIND, RUNS, SPOT, refusal

UNKNOWN = [
    "runs",
    "run.sfft",
    "run.sft.learning_rat",
    "run.prepare.near_duplicat",
    "run.judge.modell",
    "resources.sftt",
    "resources.sft.gpu",
    "cluster.images",
    "cluster.image.tagg",
    "cluster.store.endpont",
    "cluster.profiles.cpu.spott",
    "cluster.networkPolicy.egres",
    "cluster.serviceAccount.annotation",
    "pipeline.retrys",
    "run.sft.learningRate",
    "resources.sft.micro_batch_size",
    "cluster.store.retry_seconds",
    "cluster.profiles.cpu.node_selector",
]


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_refused(key: str) -> None:
    parent, _, name = key.rpartition(".")
    assert f"- {parent or '(root)'}: Additional property {name} is not allowed" in refusal(
        KIND, sets=(f"{key}=1",)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.sft.learning_rate=-1", "run.sft.learning_rate: Must be greater than 0"),
        (
            'run.sft.learning_rate="fast"',
            "run.sft.learning_rate: Invalid type. Expected: number, given: string",
        ),
        (
            'resources.sft.gpus="one"',
            "resources.sft.gpus: Invalid type. Expected: integer, given: string",
        ),
        (
            "resources.candidates.gpus=8",
            "resources.candidates.gpus: resources.candidates.gpus must be one of the following: 0, 1",
        ),
        (
            "resources.prepare.nodes=4",
            "resources.prepare.nodes: resources.prepare.nodes does not match: 1",
        ),
        ("resources.sft.nodes=0", "resources.sft.nodes: Must be greater than or equal to 1"),
        ('run.method="qlorra"', "run.method: run.method must be one of the following"),
        ("run.base_model={}", "run.base_model: id is required"),
        ("cluster.store={}", "cluster.store"),
        ('cluster.store="ftp://x"', "cluster.store"),
        ("cluster.graceSeconds=1", "cluster.graceSeconds: Must be greater than 2"),
        (
            "cluster.profiles.cpu.cpu=2",
            "cluster.profiles.cpu.cpu: Invalid type. Expected: string, given: integer",
        ),
        (
            'cluster.profiles.cpu.memory="lots"',
            "cluster.profiles.cpu.memory: Does not match pattern",
        ),
        (
            'cluster.profiles={"Big_One": {}}',
            "cluster.profiles: Additional property Big_One is not allowed",
        ),
        ('cluster.image.fullDigest="latest"', "cluster.image.fullDigest"),
        ('pipeline.mode="both"', "pipeline.mode: pipeline.mode must be one of the following"),
        ("run.seed=4294967296", "run.seed: Must be less than 4.294967296e+09"),
        ("pipeline.retries=-1", "pipeline.retries: Must be greater than or equal to 0"),
        ("run=null", "run"),
        ("resources.sft=null", "resources: sft is required"),
        ("resources.sft.gpus=null", "resources.sft: gpus is required"),
        ("pipeline=null", "pipeline is required"),
        ("pipeline.retries=null", "pipeline: retries is required"),
        ("cluster.graceSeconds=null", "cluster: graceSeconds is required"),
        ("cluster.image=null", "cluster: image is required"),
    ],
)
def test_an_invalid_value_is_refused(change: str, message: str) -> None:
    assert message in refusal(KIND, sets=(change,))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (('cluster.store="file://runs"',), 'error: cluster.store: pods cannot share a folder, so it must be s3://BUCKET/PREFIX or gs://BUCKET/PREFIX (got "file://runs")'),
        (('cluster.store={"uri": "file:///mnt/runs"}',), 'cluster.store: pods cannot share a folder, so it must be s3://BUCKET/PREFIX or gs://BUCKET/PREFIX (got "file:///mnt/runs")'),
        (("cluster.store.singleWriter=true",), "error: cluster.store.singleWriter: must be false on a cluster, where several pods write"),
        (('resources.dpo.profile="a100"',), 'error: resources.dpo.profile: "a100" is not in cluster.profiles\nhint: add -f jobs/clusters/<cluster>.yaml'),
        (('pipeline.mode="direct"',), "error: pipeline.stage: is required with pipeline.mode: direct"),
        (("cluster.serviceAccount.create=false",), "error: cluster.serviceAccount.name: is required with create: false"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_on_a_cluster_are_refused(
    sets: tuple[str, ...], message: str
) -> None:
    assert message in refusal(KIND, sets=sets)


def test_a_run_without_a_cluster_is_refused() -> None:
    assert (
        'error: cluster.store: pods cannot share a folder, so it must be s3://BUCKET/PREFIX or gs://BUCKET/PREFIX (got "")'
        in refusal(RUNS[0])
    )


def test_the_namespace_default_is_refused() -> None:
    message = refusal(SPOT, namespace="default")
    expected = "error: namespace: must not be default\nhint: kubectl create namespace medjob"
    assert expected in message


def test_the_schema_is_strict_at_every_level() -> None:
    """Only maps that Kubernetes defines, or whose keys the user chooses, may have any key."""
    assert sorted(_open(schema(), "")) == [
        "Cluster.extraEnv.items",
        "Cluster.extraVolumeMounts.items",
        "Cluster.extraVolumes.items",
        "Cluster.podAnnotations",
        "Cluster.podLabels",
        "DataSource.where",
        "NetworkPolicy.egress.items",
        "Orchestrator.affinity",
        "Orchestrator.nodeSelector",
        "Orchestrator.tolerations.items",
        "PodMonitor.labels",
        "Profile.affinity",
        "Profile.nodeSelector",
        "Profile.tolerations.items",
        "Profile.topologySpreadConstraints.items",
        "ServiceAccount.annotations",
    ]


def _open(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _open(item, path)
    if isinstance(node, dict):
        if node.get("type") == "object" and node.get("additionalProperties") is not False:
            yield path.lstrip(".")
        for key, value in node.items():
            yield from _open(
                value,
                path
                if key in ("$defs", "properties", "anyOf", "if", "then", "else")
                else f"{path}.{key}",
            )
