"""Security, resources, retries and permissions of every pod, for every kind of cluster."""

from pathlib import Path
from typing import Any

import pytest

from medjob import errors
from tests.charts.policy import violations
from tests.charts.rendering import (
    CI,
    EFA,
    KIND,
    NAMES,
    SINGLE,
    SPOT,
    container,
    environment,
    render,
    validate,
)

FILES = [pytest.param(path, id=path.stem) for path in CI]
NEEDED = {"cpu", "memory", "ephemeral-storage"}
FINAL = [
    errors.ConfigError,
    errors.DataError,
    errors.InputError,
    errors.GateError,
    errors.SupersededError,
]
DIRECT = ('pipeline.mode="direct"', 'pipeline.stage="sft"')


@pytest.mark.parametrize("path", FILES)
def test_every_pod_meets_the_restricted_level(path: Path) -> None:
    pods = dict(render(path).pods())
    assert set(pods) == {*NAMES, "orchestrator", "preflight"}
    for name, pod in pods.items():
        assert violations(pod["spec"]) == [], name
        assert pod["spec"]["securityContext"]["runAsUser"] > 10000


@pytest.mark.parametrize(
    ("breach", "found"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "volume v"),
        (
            {"securityContext": {"seccompProfile": {"type": "Unconfined"}, "runAsNonRoot": True}},
            "medjob: seccompProfile",
        ),
        ({"containers": [{"name": "c", "securityContext": {"privileged": True}}]}, "c: privileged"),
        ({"containers": [{"name": "c"}]}, "c: allowPrivilegeEscalation"),
        (
            {
                "containers": [
                    {
                        "name": "c",
                        "securityContext": {
                            "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}
                        },
                    }
                ]
            },
            "c: capabilities",
        ),
    ],
)
def test_violations_of_the_restricted_level_are_found(breach: dict[str, Any], found: str) -> None:
    assert found in violations(render(KIND).stages["sft"]["spec"]["template"]["spec"] | breach)


@pytest.mark.parametrize("path", FILES)
def test_root_is_read_only_and_writable_volumes_are_limited(path: Path) -> None:
    for name, pod in render(path).pods():
        assert container(pod)["securityContext"]["readOnlyRootFilesystem"] is True
        mounts = {mount["mountPath"] for mount in container(pod)["volumeMounts"]}
        assert {"/etc/medjob", "/work", "/tmp"} <= mounts, name
        for volume in pod["spec"]["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], volume["name"]


@pytest.mark.parametrize("path", FILES)
def test_stages_have_equal_requests_and_limits(path: Path) -> None:
    for name, pod in render(path).pods():
        requests, limits = (container(pod)["resources"][part] for part in ("requests", "limits"))
        assert set(requests) >= NEEDED and set(limits) >= NEEDED, name  # noqa: PT018
        assert {k: v for k, v in requests.items() if k not in NEEDED} == {
            k: v for k, v in limits.items() if k not in NEEDED
        }
        if name in NAMES:
            assert requests == limits  # one throttled rank slows down all ranks


def test_only_stages_with_gpus_request_them() -> None:
    gpus = {
        name: container(pod)["resources"]["limits"].get("nvidia.com/gpu")
        for name, pod in render(EFA).pods()
    }
    assert {name for name, count in gpus.items() if count is None} == {
        "fetch",
        "prepare",
        "export",
        "orchestrator",
        "preflight",
    }
    assert (gpus["sft"], gpus["candidates"]) == ("8", "1")
    renamed = render(EFA, sets=('cluster.profiles.p5.gpuResource="amd.com/gpu"',)).stages["judge"][
        "spec"
    ]["template"]
    assert container(renamed)["resources"]["limits"]["amd.com/gpu"] == "1"
    assert {"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in renamed["spec"][
        "tolerations"
    ]


@pytest.mark.parametrize("path", FILES)
def test_only_core_pods_have_an_api_token_and_it_expires(path: Path) -> None:
    for name, pod in render(path).pods():
        sources = [
            source
            for volume in pod["spec"]["volumes"]
            for source in volume.get("projected", {}).get("sources", [])
        ]
        tokens = [
            source["serviceAccountToken"] for source in sources if "serviceAccountToken" in source
        ]
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert [token["expirationSeconds"] for token in tokens] == ([] if name in NAMES else [3600])
    for account in render(path).all("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_the_token_is_mounted_where_clients_expect_it() -> None:
    pod = render(KIND).core("orchestrator")["spec"]["template"]
    (volume,) = (volume for volume in pod["spec"]["volumes"] if "projected" in volume)
    (mount,) = (
        mount for mount in container(pod)["volumeMounts"] if mount["name"] == volume["name"]
    )
    parts = {
        part["path"]
        for source in volume["projected"]["sources"]
        for part in [*next(iter(source.values())).get("items", []), *source.values()]
        if "path" in part
    }
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    assert parts == {"token", "ca.crt", "namespace"}


@pytest.mark.parametrize("path", FILES)
def test_secrets_are_mounted_as_files(path: Path) -> None:
    secret = render(path).job_yaml["cluster"].get("existingSecret")
    for name, pod in render(path).pods():
        used = container(pod)
        assert not used.get("envFrom")
        assert not [
            entry for entry in used.get("env") or [] if "secretKeyRef" in entry.get("valueFrom", {})
        ]
        volumes = {
            volume["secret"]["secretName"]: volume["name"]
            for volume in pod["spec"]["volumes"]
            if "secret" in volume
        }
        mounts = {mount["name"]: mount for mount in used["volumeMounts"]}
        assert set(volumes) == ({secret} if secret else set()), name
        assert all(
            mounts[volumes[used]]["mountPath"] == "/run/secrets/medjob"
            and mounts[volumes[used]]["readOnly"]
            for used in volumes
        )
        assert all(
            volume["secret"]["defaultMode"] == 0o440
            for volume in pod["spec"]["volumes"]
            if "secret" in volume
        )


@pytest.mark.parametrize("path", FILES)
def test_one_job_is_one_attempt_and_final_codes_come_first(path: Path) -> None:
    codes = [error.exit_code for error in FINAL]
    for job in render(path).stages.values():
        spec = job["spec"]
        assert (
            spec["backoffLimit"],
            spec["podReplacementPolicy"],
            spec["template"]["spec"]["restartPolicy"],
        ) == (0, "Failed", "Never")
        assert spec["podFailurePolicy"]["rules"] == _rules("FailJob", codes)
    retried = {errors.RetryError.exit_code, 1, 137} & {*codes, errors.Preempted.exit_code}
    assert not retried  # these codes are retried


def _rules(preempted: str, codes: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "medjob", "operator": "In", "values": codes},
        },
        {"action": preempted, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": preempted,
            "onExitCodes": {
                "containerName": "medjob",
                "operator": "In",
                "values": [errors.Preempted.exit_code],
            },
        },
    ]


def test_the_orchestrator_restarts_when_its_node_is_lost() -> None:
    spec = render(SPOT).core("orchestrator")["spec"]
    assert spec["podReplacementPolicy"] == "TerminatingOrFailed"
    assert spec["backoffLimit"] > 100
    assert {t["key"]: t["tolerationSeconds"] for t in spec["template"]["spec"]["tolerations"]} == {
        "node.kubernetes.io/not-ready": 30,
        "node.kubernetes.io/unreachable": 30,
    }
    for name in NAMES:  # a short network partition must not end a training
        keys = {
            toleration["key"]
            for toleration in render(SPOT)
            .stages[name]["spec"]["template"]["spec"]
            .get("tolerations", [])
        }
        assert not {key for key in keys if key.startswith("node.kubernetes.io/")}


@pytest.mark.parametrize(("seconds", "expected"), [("13", 13), ("100", 100), ("12.5", 13)])
def test_grace_period_is_that_of_the_cluster(seconds: str, expected: int) -> None:
    for name, pod in render(SPOT, sets=(f"cluster.graceSeconds={seconds}",)).pods():
        assert name not in NAMES or pod["spec"]["terminationGracePeriodSeconds"] == expected


def test_direct_mode_is_one_job_that_kubernetes_retries() -> None:
    rendered = render(SPOT, sets=(*DIRECT, "pipeline.retries=5"))
    (job,) = rendered.all("Job")
    assert job["spec"]["backoffLimit"] == 5
    assert job["spec"]["podFailurePolicy"]["rules"] == _rules(
        "Ignore", [error.exit_code for error in FINAL]
    )
    assert {item["kind"] for item in rendered.objects} == {
        "Job",
        "ConfigMap",
        "ServiceAccount",
        "NetworkPolicy",
    }
    assert list(rendered.one("ConfigMap")["data"]) == ["job.yaml"]
    assert container(job["spec"]["template"])["args"] == ["sft", "-f", "/etc/medjob/job.yaml"]


def test_shards_do_not_change_the_job_that_the_orchestrator_copies() -> None:
    alone, shards = (
        render(SPOT, sets=(f"resources.candidates.shards={count}",)).stages["candidates"]
        for count in (1, 5)
    )
    assert alone == shards
    assert (shards["spec"]["completions"], "completionMode" in shards["spec"]) == (1, False)


def test_shards_in_direct_mode_are_one_indexed_job() -> None:
    sets = ('pipeline.mode="direct"', 'pipeline.stage="candidates"', "pipeline.retries=5")
    rendered = render(SPOT, sets=(*sets, "resources.candidates.shards=4"))
    (job,) = rendered.all("Job")
    validate(job)
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["backoffLimitPerIndex"] == 5
    assert "backoffLimit" not in spec
    assert "subdomain" not in spec["template"]["spec"]
    assert not rendered.all("Service")
    index = {"fieldPath": "metadata.labels['batch.kubernetes.io/job-completion-index']"}
    assert environment(spec["template"])["MEDJOB_SHARD"] == {"fieldRef": index}
    assert container(spec["template"])["resources"]["limits"]["nvidia.com/gpu"] == "1"
    fails, _, ignored = spec["podFailurePolicy"]["rules"]
    superseded = errors.SupersededError.exit_code  # two shards may join the set at once
    assert superseded not in fails["onExitCodes"]["values"]
    assert ignored["onExitCodes"]["values"] == [errors.Preempted.exit_code, superseded]


def test_direct_mode_on_several_nodes_is_not_retried_by_kubernetes() -> None:
    rendered = render(EFA, sets=DIRECT)
    (job,) = rendered.all("Job")
    assert job["spec"]["backoffLimit"] == 0
    assert [service["metadata"]["name"] for service in rendered.all("Service")] == ["demo-sft"]


@pytest.mark.parametrize(
    "change",
    ["run.sft.learning_rate=0.5", 'cluster.store="s3://elsewhere/x"', "resources.sft.batchSize=3"],
)
def test_a_change_in_direct_mode_creates_a_new_job(
    change: str,
) -> None:
    names = {
        render(KIND, sets=(*DIRECT, *more)).one("Job")["metadata"]["name"]
        for more in ((), (change,))
    }
    assert len(names) == 2


def test_nodes_of_a_stage_can_find_each_other() -> None:
    rendered = render(EFA)
    services = {service["metadata"]["name"]: service["spec"] for service in rendered.all("Service")}
    assert set(services) == {"demo-sft", "demo-dpo"}
    for stage in ("sft", "dpo"):
        job, service = rendered.stages[stage]["spec"], services[f"demo-{stage}"]
        labels = job["template"]["metadata"]["labels"]
        assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
        assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
        assert service["selector"].items() <= labels.items()
        assert job["template"]["spec"]["subdomain"] == f"demo-{stage}"
        assert environment(job["template"])["MASTER_ADDR"] == f"$(JOB_NAME)-0.demo-{stage}"
        # The nodes authenticate each other with the uid of their Job.
        token = environment(job["template"])["MEDJOB_PEER_TOKEN"]["fieldRef"]["fieldPath"]
        assert token == "metadata.labels['batch.kubernetes.io/controller-uid']"
        names = list(environment(job["template"]))
        # A variable can only refer to variables before it.
        assert names.index("JOB_NAME") < names.index("MASTER_ADDR")
    assert render(SPOT).all("Service") == []
    assert "completionMode" not in render(SPOT).stages["sft"]["spec"]


def test_stages_with_gpus_do_not_download() -> None:
    offline = {
        name for name, pod in render(SPOT).pods() if environment(pod).get("HF_HUB_OFFLINE") == "1"
    }
    assert offline == set(NAMES) - {"fetch", "prepare", "judge"}


def test_the_orchestrator_has_few_permissions() -> None:
    rendered = render(KIND)
    permissions = {
        (resource, verb)
        for rule in rendered.one("Role")["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert not {resource for resource, _ in permissions} & {
        "secrets",
        "pods/exec",
        "roles",
        "rolebindings",
        "serviceaccounts",
    }
    assert not {(resource, verb) for resource, verb in permissions if "*" in (resource, verb)}
    assert {verb for resource, verb in permissions if resource == "configmaps"} == {"get"}
    assert ("pods", "delete") not in permissions
    (subject,) = rendered.one("RoleBinding")["subjects"]
    pod = rendered.core("orchestrator")["spec"]["template"]["spec"]
    assert (subject["name"], subject["namespace"]) == (pod["serviceAccountName"], "research")
    named = {
        name for rule in rendered.one("Role")["rules"] for name in rule.get("resourceNames", [])
    }
    assert named == {"demo-orchestrator", "demo-pipeline"}


def test_pods_mount_the_configmap_and_know_their_release() -> None:
    rendered = render(SINGLE, release="mine")
    assert rendered.one("ConfigMap")["metadata"]["name"] == "mine-pipeline"
    for name, pod in rendered.pods():
        (config,) = (
            volume["configMap"] for volume in pod["spec"]["volumes"] if "configMap" in volume
        )
        assert config["name"] == "mine-pipeline"
        # Stages see only the run file; the orchestrator also sees the Jobs.
        assert ("items" in config) == (name in NAMES)
        assert container(pod)["args"][1:] == ["-f", "/etc/medjob/job.yaml"]
    known = environment(rendered.core("orchestrator")["spec"]["template"])
    assert (known["MEDJOB_RELEASE"], known["MEDJOB_INSTANCE"]) == ("mine", "mine")
    assert {"POD_NAME", "JOB_NAME", "JOB_UID"} <= set(known)
