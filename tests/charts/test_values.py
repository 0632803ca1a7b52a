"""Values for nodes, network and pods appear in the rendered objects."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.k8s.orchestrator import metrics
from tests.charts.rendering import (
    CI,
    EFA,
    KIND,
    KUEUE,
    NAMES,
    SINGLE,
    SPOT,
    container,
    environment,
    render,
)

QUEUE = "kueue.x-k8s.io/queue-name"
AMD64 = {"kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux"}


def values(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def spec(path: Path, stage: str, *sets: str) -> Any:
    return render(path, sets=sets).stages[stage]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("path", "mount", "mounted"),
    [
        ("/data/rows.jsonl", "/data", True),
        ("/data/rows.jsonl", "/data/", True),
        ("/data", "/data", True),
        ("/database/rows.jsonl", "/data", False),
        ("s3://bucket/data/rows.jsonl", "/data", False),
    ],
)
def test_the_orchestrator_mounts_volumes_that_hold_inputs(
    path: str, mount: str, mounted: bool
) -> None:
    """It computes the digests of the files that the run names."""
    rendered = render(
        KIND,
        sets=(
            f'run.prepare.sources=[{{"path": "{path}"}}]',
            'cluster.extraVolumes=[{"name": "d", "persistentVolumeClaim": {"claimName": "d"}}]',
            f'cluster.extraVolumeMounts=[{{"name": "d", "mountPath": "{mount}"}}]',
        ),
    )
    pod = rendered.core("orchestrator")["spec"]["template"]
    assert any(volume["name"] == "d" for volume in pod["spec"]["volumes"]) is mounted
    assert any(each["name"] == "d" for each in container(pod)["volumeMounts"]) is mounted


@pytest.mark.parametrize(
    ("resource", "more"),
    [
        ("nvidia.com/gpu", []),
        ("nvidia.com/mig-1g.10gb", ["nvidia.com/mig-1g.10gb"]),
        ("nvidia.com/gpu.shared", ["nvidia.com/gpu.shared"]),
        ("amd.com/gpu", ["amd.com/gpu"]),
        ("gpu.intel.com/i915", ["gpu.intel.com/gpu", "gpu.intel.com/i915"]),
        ("example.org/h100", ["example.org/gpu", "example.org/h100"]),
    ],
)
def test_gpu_taints_are_tolerated_whatever_the_resource_is_called(
    resource: str, more: list[str]
) -> None:
    found = spec(SPOT, "sft", f'cluster.profiles.l4-spot.gpuResource="{resource}"')["tolerations"]
    assert [toleration["key"] for toleration in found[1:]] == ["nvidia.com/gpu", *more]


def test_the_orchestrator_can_have_a_queue_of_its_own() -> None:
    rendered = render(KUEUE, sets=('cluster.orchestrator.queue="small"',))
    assert {job["metadata"]["labels"][QUEUE] for job in rendered.all("Job")} == {"small"}
    assert {job["metadata"]["labels"][QUEUE] for job in rendered.stages.values()} == {"research"}
    (rule,) = (rule for rule in rendered.one("Role")["rules"] if "localqueues" in rule["resources"])
    assert rule["resourceNames"] == ["research", "small"]


def test_only_stages_have_a_queue() -> None:
    rendered = render(KUEUE)
    assert {job["metadata"]["labels"][QUEUE] for job in rendered.stages.values()} == {"research"}
    assert all(QUEUE not in job["metadata"]["labels"] for job in rendered.all("Job"))
    for path in CI:
        if path != KUEUE:
            assert all(
                QUEUE not in job["metadata"]["labels"] for job in render(path).stages.values()
            )


@pytest.mark.parametrize(
    ("spot", "selector", "tolerations"),
    [
        ("gke", {"cloud.google.com/gke-spot": "true"}, ["cloud.google.com/gke-spot"]),
        ("eks", {"eks.amazonaws.com/capacityType": "SPOT"}, []),
        ("karpenter", {"karpenter.sh/capacity-type": "spot"}, []),
        ("none", {}, []),
    ],
)
def test_spot_profile_sets_selector_and_toleration(
    spot: str, selector: dict[str, str], tolerations: list[str]
) -> None:
    found = spec(SPOT, "sft", f'cluster.profiles.l4-spot.spot="{spot}"')
    assert (
        found["nodeSelector"]
        == {"cloud.google.com/gke-accelerator": "nvidia-l4"} | AMD64 | selector
    )
    assert [toleration["key"] for toleration in found["tolerations"]] == [
        *tolerations,
        "nvidia.com/gpu",
    ]
    assert spec(SPOT, "fetch")["nodeSelector"] == AMD64


def test_efa_profile_requests_interfaces() -> None:
    pod = render(EFA).stages["sft"]["spec"]["template"]
    for part in ("requests", "limits"):
        assert container(pod)["resources"][part]["vpc.amazonaws.com/efa"] == "32"
        assert container(pod)["resources"][part]["hugepages-2Mi"] == "5120Mi"
    assert environment(pod)["FI_PROVIDER"] == "efa"
    assert (
        "vpc.amazonaws.com/efa"
        not in container(render(EFA).stages["judge"]["spec"]["template"])["resources"]["limits"]
    )


def test_gke_rdma_adds_one_interface_per_gpu() -> None:
    pod = render(EFA, sets=('cluster.profiles.p5-efa.network="gke-rdma"',)).stages["dpo"]["spec"][
        "template"
    ]
    interfaces = yaml.safe_load(pod["metadata"]["annotations"]["networking.gke.io/interfaces"])
    assert [interface["network"] for interface in interfaces] == [
        "default",
        *(f"rdma-{n}" for n in range(8)),
    ]
    assert len({interface["interfaceName"] for interface in interfaces}) == 9


def test_a_digest_takes_precedence_over_a_tag() -> None:
    cluster = values(SPOT)["cluster"]["image"]
    for name, pod in render(SPOT).pods():
        digest, stem = (
            (cluster["fullDigest"], "medjob")
            if name in NAMES
            else (cluster["coreDigest"], "medjob-core")
        )
        assert container(pod)["image"] == f"{cluster['registry']}/{stem}@{digest}"
        assert container(pod)["imagePullPolicy"] == "Always"
    assert {container(pod)["image"] for _, pod in render(KIND).pods()} == {
        "medjob:dev",
        "medjob-core:dev",
    }
    assert {
        container(pod)["image"] for _, pod in render(KIND, sets=('cluster.image.tag=""',)).pods()
    } == {
        "medjob:0.1.0",
        "medjob-core:0.1.0",
    }


VLLM = "cluster.image.vllm=true"


@pytest.mark.parametrize(
    ("sets", "stages"),
    [
        ((), set()),
        (('resources.judge.engine="vllm"',), {"judge"}),
        ((VLLM,), {"candidates", "judge", "evaluate"}),
        ((VLLM, 'resources.judge.engine="openai"'), {"candidates", "evaluate"}),
        ((VLLM, 'resources.evaluate.engine="transformers"'), {"candidates", "judge"}),
        ((VLLM, "resources.judge.gpus=0"), {"candidates", "evaluate"}),
    ],
)
def test_stages_with_the_engine_vllm_use_its_image(sets: tuple[str, ...], stages: set[str]) -> None:
    images = {
        name: container(job["spec"]["template"])["image"]
        for name, job in render(SPOT, sets=sets).stages.items()
    }
    vllm = {name for name, image in images.items() if "/medjob-vllm:" in image}
    assert vllm == stages
    assert all("/medjob@sha256:" in images[name] for name in images.keys() - vllm)


def test_the_image_with_vllm_has_its_own_digest() -> None:
    digest = f"sha256:{'3' * 64}"
    sets = ('resources.judge.engine="vllm"', f'cluster.image.vllmDigest="{digest}"')
    judge = render(SPOT, sets=sets).stages["judge"]["spec"]["template"]
    assert container(judge)["image"].endswith(f"/medjob-vllm@{digest}")


def test_pull_secrets_are_used_by_every_pod() -> None:
    assert all(
        pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        for _, pod in render(SINGLE).pods()
    )
    assert all("imagePullSecrets" not in pod["spec"] for _, pod in render(SPOT).pods())


def test_extra_labels_variables_and_volumes_are_added() -> None:
    cluster = values(KUEUE)["cluster"]
    for _, pod in render(KUEUE).pods():
        assert cluster["podLabels"].items() <= pod["metadata"]["labels"].items()
        assert cluster["podAnnotations"].items() <= pod["metadata"]["annotations"].items()
        assert environment(pod)["NCCL_DEBUG"] == "WARN"


def test_extra_volumes_are_those_of_the_stages() -> None:
    """A disk that the orchestrator holds on its node keeps stages on other nodes from starting."""
    cluster = values(KUEUE)["cluster"]
    own = {"name": "ca", "configMap": {"name": "ca"}}
    mount = {"name": "ca", "mountPath": "/etc/ca"}
    rendered = render(
        KUEUE,
        sets=(
            f"cluster.orchestrator.extraVolumes=[{json.dumps(own)}]",
            f"cluster.orchestrator.extraVolumeMounts=[{json.dumps(mount)}]",
        ),
    )
    for name, pod in rendered.pods():
        of_stages = cluster["extraVolumes"][0] in pod["spec"]["volumes"]
        mounted = cluster["extraVolumeMounts"][0] in container(pod)["volumeMounts"]
        assert (of_stages, mounted) == (name in NAMES, name in NAMES)
        assert (own in pod["spec"]["volumes"]) == (name not in NAMES)
        assert (mount in container(pod)["volumeMounts"]) == (name not in NAMES)


def test_a_profile_sets_the_scheduling_of_its_pods() -> None:
    profile, found = values(KUEUE)["cluster"]["profiles"]["a100"], spec(KUEUE, "sft")
    assert found["nodeSelector"] == profile["nodeSelector"] | AMD64
    for key in ("affinity", "topologySpreadConstraints", "priorityClassName"):
        assert found[key] == profile[key]
        assert key not in spec(KUEUE, "fetch")
    assert profile["tolerations"][0] in found["tolerations"]
    assert spec(SINGLE, "sft")["runtimeClassName"] == "nvidia"
    (shm,) = (volume["emptyDir"] for volume in found["volumes"] if volume["name"] == "shm")
    assert shm == {"medium": "Memory", "sizeLimit": "32Gi"}


def test_scheduling_of_orchestrator_and_preflight_pods() -> None:
    scheduling = {
        "nodeSelector": {"pool": "small"},
        "tolerations": [{"key": "all", "operator": "Exists"}],
        "priorityClassName": "low",
    }
    for sets, selector in (
        ((), AMD64),
        ((f"cluster.orchestrator={json.dumps(scheduling)}",), AMD64 | {"pool": "small"}),
    ):
        for name in ("orchestrator", "preflight"):
            pod = render(KUEUE, sets=sets).core(name)["spec"]["template"]
            assert pod["spec"]["nodeSelector"] == selector
            assert (scheduling["tolerations"][0] in pod["spec"]["tolerations"]) is bool(sets)
            assert pod["spec"].get("priorityClassName") == ("low" if sets else None)
            assert (
                pod["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"]
                == "true"
            )
    elsewhere = 'cluster.profiles.cpu.nodeSelector={"kubernetes.io/arch": "arm64"}'
    assert spec(KUEUE, "fetch", elsewhere)["nodeSelector"] == AMD64 | {
        "kubernetes.io/arch": "arm64"
    }


def test_only_stages_that_need_the_hub_are_online() -> None:
    def online(*sets: str) -> set[str]:
        return {
            name
            for name, job in render(KIND, sets=sets).stages.items()
            if "HF_HUB_OFFLINE" not in environment(job["spec"]["template"])
        }

    assert online() == {"fetch", "prepare", "judge"}
    assert online('run.export.hub_model_id="me/model"') == {"fetch", "prepare", "judge", "export"}


def test_pod_labels_cannot_replace_selectors_but_annotations_can() -> None:
    rendered = render(
        KIND,
        sets=(
            'cluster.podLabels={"app.kubernetes.io/instance": "x"}',
            'cluster.podAnnotations={"karpenter.sh/do-not-disrupt": "false"}',
        ),
    )
    for name, pod in rendered.pods():
        assert pod["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"
        assert pod["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "false"
        assert (
            name not in NAMES
            or pod["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"]
            == "false"
        )


def test_service_account_is_created_or_reused() -> None:
    made, used = render(EFA), render(KUEUE)
    assert (
        made.one("ServiceAccount")["metadata"]["annotations"]
        == values(EFA)["cluster"]["serviceAccount"]["annotations"]
    )
    assert {pod["spec"]["serviceAccountName"] for _, pod in made.pods()} == {
        made.one("ServiceAccount")["metadata"]["name"]
    }
    assert used.all("ServiceAccount") == []
    assert {pod["spec"]["serviceAccountName"] for _, pod in used.pods()} == {"medjob"}
    assert [subject["name"] for subject in used.one("RoleBinding")["subjects"]] == ["medjob"]


def test_network_policy_rules() -> None:
    policy = render(SINGLE).one("NetworkPolicy")["spec"]
    own = {"podSelector": policy["podSelector"]}
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"from": [own]}]
    assert policy["egress"] == [
        {"to": [own]},
        {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
        *values(SINGLE)["cluster"]["networkPolicy"]["egress"],
    ]
    for _, pod in render(SINGLE).pods():
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    closed = render(KIND, sets=("cluster.networkPolicy.egress=[]",)).one("NetworkPolicy")
    assert len(closed["spec"]["egress"]) == 2
    assert render(KIND, sets=("cluster.networkPolicy.enabled=false",)).all("NetworkPolicy") == []


METADATA = "169.254.169.254"
GKE = 'cluster.serviceAccount.annotations={"iam.gke.io/gcp-service-account": "a@b.iam"}'


@pytest.mark.parametrize(
    ("values", "sets", "reachable"),
    [
        (KIND, (), False),
        (EFA, (), False),  # IRSA uses a token in a file
        (SPOT, (), True),  # workload identity, for a bucket of Google Cloud
        (KIND, ('run.base_model="gs://models/tiny"',), True),
        (KIND, (GKE,), True),
        (KIND, ("cluster.networkPolicy.egress=[{}]",), True),
    ],
)
def test_the_metadata_server_is_reachable_only_if_it_is_needed(
    values: Path, sets: tuple[str, ...], reachable: bool
) -> None:
    rules = render(values, sets=sets).one("NetworkPolicy")["spec"]["egress"]
    assert ({} in rules) is reachable
    if not reachable:
        # Rules that name no addresses are limited to ports that metadata servers do not use.
        anywhere = [rule for rule in rules if "to" not in rule]
        ports = {port["port"] for rule in anywhere for port in rule["ports"]}
        assert ports == {53, 443, 6443}
        peers = [
            peer["ipBlock"] for rule in rules for peer in rule.get("to", []) if "ipBlock" in peer
        ]
        assert peers == [
            {"cidr": "0.0.0.0/0", "except": [f"{METADATA}/32"]},
            {"cidr": "::/0", "except": ["fd00:ec2::254/128"]},
        ]


def test_prometheus_can_reach_only_the_orchestrator() -> None:
    rendered = render(KUEUE)
    monitor = rendered.one("PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    pods = {
        name
        for name, pod in rendered.pods()
        if monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    }
    assert pods == {"orchestrator"}
    (port,) = container(rendered.core("orchestrator")["spec"]["template"])["ports"]
    assert monitor["spec"]["podMetricsEndpoints"] == [{"port": port["name"], "path": "/metrics"}]
    assert port["containerPort"] == metrics.PORT
    _, scrape = rendered.one("NetworkPolicy")["spec"]["ingress"]
    assert scrape["from"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ]
    assert scrape["ports"] == [{"protocol": "TCP", "port": port["name"]}]
    assert all(render(path).all("PodMonitor") == [] for path in CI if path != KUEUE)


def test_deadlines_and_retention_of_jobs() -> None:
    assert {
        name for name, job in render(SPOT).stages.items() if "activeDeadlineSeconds" in job["spec"]
    } == {"sft"}
    assert render(SPOT).stages["sft"]["spec"]["activeDeadlineSeconds"] == 172800
    rendered = render(SPOT, sets=("pipeline.ttlSecondsAfterFinished=3600",))
    assert {
        job["spec"]["ttlSecondsAfterFinished"]
        for job in [*rendered.all("Job"), *rendered.stages.values()]
    } == {3600}


def test_a_changed_run_or_pipeline_renames_the_orchestrator() -> None:
    names = [
        render(SPOT, sets=sets).core("orchestrator")["metadata"]["name"]
        for sets in ((), ("pipeline.retries=9",), ("run.seed=1",))
    ]
    assert len(set(names)) == 3
    assert all(name.startswith("demo-orchestrator-") for name in names)


def test_preflight_runs_only_in_helm_test_and_is_then_deleted() -> None:
    hook = render(KIND).core("preflight")["metadata"]["annotations"]
    assert hook == {
        "helm.sh/hook": "test",
        "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded",
    }


@pytest.mark.parametrize("path", CI, ids=lambda path: path.stem)
def test_stages_have_the_labels_that_the_orchestrator_selects(path: Path) -> None:
    for name, job in render(path).stages.items():
        labels = job["metadata"]["labels"]
        for found in (labels, job["spec"]["template"]["metadata"]["labels"]):
            assert (found["medjob/release"], found["medjob/component"]) == ("demo", name)
            assert found["app.kubernetes.io/name"] == "medjob"
        assert labels["app.kubernetes.io/managed-by"] == "medjob"
    orchestrator = render(path).core("orchestrator")["metadata"]["labels"]
    assert (
        orchestrator["app.kubernetes.io/managed-by"],
        orchestrator["app.kubernetes.io/component"],
    ) == ("Helm", "orchestrator")
