"""Helm refuses invalid values before it creates anything, and the message names the key."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from medjob.codegen.chart import schema
from medjob.config.cluster import RESERVED_PATHS, RESERVED_VARIABLES, RESERVED_VOLUMES
from medjob.config.load import merge, validate
from medjob.errors import ConfigError
from tests.charts.rendering import CI, KIND, RUNS, SPOT, container, refusal, render

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
            "resources.candidates.shards=0",
            "resources.candidates.shards: Must be greater than or equal to 1",
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
        (
            'run.prepare.sources=[{"path": "x.csv", "columns": {"respons": "A"}}]',
            'run.prepare.sources.0.columns: Property name of "respons" does not match',
        ),
        (
            'run.prepare.sources=[{"path": "x.csv", "weight": 0}]',
            "run.prepare.sources.0.weight: Must be greater than 0",
        ),
        ("run.seed=4294967296", "run.seed: Must be less than 4.294967296e+09"),
        ("pipeline.retries=-1", "pipeline.retries: Must be greater than or equal to 0"),
        ("run=null", "run"),
        ("resources.sft=null", "resources: sft is required"),
        ("resources.sft.gpus=null", "resources.sft: gpus is required"),
        ("pipeline=null", "pipeline is required"),
        ("pipeline.retries=null", "pipeline: retries is required"),
        ("cluster.graceSeconds=null", "cluster: graceSeconds is required"),
        ("cluster.image=null", "cluster: image is required"),
        ('cluster.extraEnv=[{"name": "A", "value": 1}]', "cluster.extraEnv.0.value"),
        ('cluster.extraEnv=[{"name": "a b"}]', "cluster.extraEnv.0.name: Does not match pattern"),
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
        (('resources.sft.launcher="external"',), "error: resources.sft.launcher: must be medjob, because the chart's Jobs start no other launcher\nhint: start the stage as a TrainJob"),
        (('resources.dpo.profile="a100"',), 'error: resources.dpo.profile: "a100" is not in cluster.profiles\nhint: add -f jobs/clusters/<cluster>.yaml'),
        (('pipeline.mode="direct"',), "error: pipeline.stage: is required with pipeline.mode: direct"),
        (("cluster.serviceAccount.create=false",), "error: cluster.serviceAccount.name: is required with create: false"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_on_a_cluster_are_refused(
    sets: tuple[str, ...], message: str
) -> None:
    assert message in refusal(KIND, sets=sets)


BREAK = "x\n      hostNetwork: true #"
# Keys whose values become parts of objects, each with a value that would otherwise do harm.
TEXTS = [
    *(("cluster.image.tag", text) for text in (BREAK, "a b", "a/b", "a:b", "-a", "${x}", "a" * 129)),
    *(("cluster.image.registry", text) for text in (BREAK, "https://r.io/x", "r.io/x y", "r.io/$(x)", "/r.io", "r.io//x", "r.io:x")),
    ("cluster.image.coreDigest", f"sha256:{'1' * 64}\n"),
    ("cluster.image.pullSecrets", [BREAK]),
    ("cluster.serviceAccount.name", BREAK),
    ("cluster.serviceAccount.name", "system:admin"),
    ("cluster.existingSecret", BREAK),
    ("cluster.queue", BREAK),
    ("cluster.orchestrator.queue", BREAK),
    ("cluster.orchestrator.priorityClassName", BREAK),
    ("cluster.profiles.cpu.priorityClassName", BREAK),
    ("cluster.profiles.cpu.runtimeClassName", BREAK),
    ("cluster.profiles.cpu.gpuResource", BREAK),
    ("cluster.profiles.cpu.gpuResource", "gpu"),
    ("cluster.profiles.cpu.memory", "1Gi\n"),
    ("cluster.podMonitor.fromNamespace", BREAK),
    ("cluster.namespace", BREAK),
    ("run.name", "a\nb"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), TEXTS, ids=lambda value: repr(value)[:40])
def test_texts_that_are_no_names_are_refused(key: str, value: Any) -> None:
    assert key in refusal(KIND, sets=(f"{key}={json.dumps(value)}",))
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    with pytest.raises(ConfigError, match=re.escape(key)):
        validate(merge(yaml.safe_load(KIND.read_text()), tree))


RESERVED = ["JOB_NAME", "JOB_UID", "POD_NAME", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "MEDJOB_RELEASE", "MEDJOB_X", "KUBERNETES_SERVICE_HOST"]  # fmt: skip


@pytest.mark.parametrize("name", RESERVED)
def test_variables_of_the_chart_cannot_be_replaced(name: str) -> None:
    variables = json.dumps([{"name": "X", "value": "1"}, {"name": name, "value": "x"}])
    message = f"cluster.extraEnv: {name} is set by the chart, so it cannot be replaced"
    assert message in refusal(KIND, sets=(f"cluster.extraEnv={variables}",))
    tree = {"cluster": {"extraEnv": [{"name": name}]}}
    with pytest.raises(ConfigError, match=f"{name} is set by the chart"):
        validate(merge(yaml.safe_load(KIND.read_text()), tree))


@pytest.mark.parametrize("section", ["cluster", "cluster.orchestrator"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("extraVolumes", {"name": "work", "emptyDir": {}}, "work is a volume of the chart"),
        ("extraVolumes", {"name": "api", "emptyDir": {}}, "api is a volume of the chart"),
        (
            "extraVolumeMounts",
            {"name": "x", "mountPath": "/work/"},
            "/work/ is mounted by the chart",
        ),
        ("extraVolumeMounts", {"name": "x", "mountPath": "/etc/medjob"}, "is mounted by the chart"),
    ],
)
def test_volumes_of_the_chart_cannot_be_replaced(
    section: str, key: str, value: dict[str, Any], message: str
) -> None:
    assert f"{section}.{key}: " in refusal(KIND, sets=(f"{section}.{key}=[{json.dumps(value)}]",))
    tree: Any = {key: [value]}
    for part in reversed(section.split(".")):
        tree = {part: tree}
    with pytest.raises(ConfigError, match=message):
        validate(merge(yaml.safe_load(KIND.read_text()), tree))


def test_names_of_volumes_are_reserved() -> None:
    """Every volume and mount of the chart."""
    for values in CI:
        for _, pod in render(values).pods():
            names = {volume["name"] for volume in pod["spec"]["volumes"]}
            paths = {mount["mountPath"] for mount in container(pod)["volumeMounts"]}
            assert names - {"nccl"} <= set(RESERVED_VOLUMES)
            # Without a Secret, credentials may be mounted there in another way.
            assert paths - {"/opt/nccl", "/run/secrets/medjob"} <= set(RESERVED_PATHS)


def test_variables_are_listed_once() -> None:
    variables = '[{"name": "X", "value": "1"}, {"name": "X", "value": "2"}]'
    sets = (f"cluster.extraEnv={variables}",)
    assert "cluster.extraEnv: lists X twice" in refusal(KIND, sets=sets)
    tree = {"cluster": {"extraEnv": json.loads(variables)}}
    with pytest.raises(ConfigError, match="lists X twice"):
        validate(merge(yaml.safe_load(KIND.read_text()), tree))


def test_names_of_the_chart_are_reserved() -> None:
    """Every variable that the chart sets is reserved, or the user's value replaces it."""
    for values in CI:
        for name, pod in render(values).pods():
            names = {entry["name"] for entry in container(pod).get("env") or []}
            free = {"HF_HUB_OFFLINE", "FI_PROVIDER", "FI_EFA_USE_HUGE_PAGE", "NCCL_DEBUG"}
            reserved = {each for each in names - free if not each.startswith("MEDJOB_")}
            assert reserved <= set(RESERVED_VARIABLES), name
    sets = ('cluster.extraEnv=[{"name": "HF_HUB_OFFLINE", "value": "0"}]',)
    pod = render(KIND, sets=sets).stages["sft"]["spec"]["template"]
    assert [entry for entry in container(pod)["env"] if entry["name"] == "HF_HUB_OFFLINE"] == [
        {"name": "HF_HUB_OFFLINE", "value": "0"}
    ]


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
        "Cluster.extraVolumeMounts.items",
        "Cluster.extraVolumes.items",
        "Cluster.podAnnotations",
        "Cluster.podLabels",
        "DataSource.columns",
        "DataSource.where",
        "EnvironmentVariable.valueFrom",
        "LoraParams.alpha_pattern",
        "LoraParams.rank_pattern",
        "NetworkPolicy.egress.items",
        "Orchestrator.affinity",
        "Orchestrator.extraVolumeMounts.items",
        "Orchestrator.extraVolumes.items",
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
