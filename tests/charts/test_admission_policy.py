"""The optional ValidatingAdmissionPolicy, which limits what the orchestrator can do with its rights."""

from pathlib import Path
from typing import Any

import pytest

from tests.charts.rendering import (
    CI,
    KIND,
    KUEUE,
    SPOT,
    Rendered,
    container,
    render,
    template,
    validate,
)

ON = "cluster.admissionPolicy.enabled=true"


def policies(rendered: Rendered) -> list[dict[str, Any]]:
    return rendered.all("ValidatingAdmissionPolicy")


def expressions(policy: dict[str, Any]) -> str:
    spec = policy["spec"]
    return "\n".join(each["expression"] for each in spec["matchConditions"] + spec["validations"])


@pytest.mark.parametrize("path", CI, ids=lambda path: path.stem)
def test_policies_are_valid_and_bound_to_the_namespace(path: Path) -> None:
    rendered = render(path, sets=(ON,))
    bindings = rendered.all("ValidatingAdmissionPolicyBinding")
    names = [policy["metadata"]["name"] for policy in policies(rendered)]
    assert names == ["medjob-research-demo", "medjob-research-demo-pods"]
    assert [binding["spec"]["policyName"] for binding in bindings] == names
    for binding in bindings:
        assert binding["spec"]["validationActions"] == ["Deny"]
        selector = binding["spec"]["matchResources"]["namespaceSelector"]["matchLabels"]
        assert selector == {"kubernetes.io/metadata.name": "research"}
    for item in [*policies(rendered), *bindings]:
        validate(item)
    assert all(policy["spec"]["failurePolicy"] == "Fail" for policy in policies(rendered))


def test_policies_name_what_the_stages_use() -> None:
    volume = '{"name": "x", "%s": {"%s": "%s"}}'
    claim = volume % ("persistentVolumeClaim", "claimName", "rows")
    secret = volume % ("secret", "secretName", "keys")
    key = '{"name": "K", "valueFrom": {"secretKeyRef": {"name": "token", "key": "k"}}}'
    sets = (ON, f"cluster.extraVolumes=[{claim}, {secret}]", f"cluster.extraEnv=[{key}]")
    rendered = render(SPOT, sets=sets)
    jobs, pods = map(expressions, policies(rendered))
    pod = rendered.stages["sft"]["spec"]["template"]
    assert f'c.image in ["{container(pod)["image"]}"]' in jobs
    assert f'serviceAccountName == "{pod["spec"]["serviceAccountName"]}"' in jobs
    assert 'object.metadata.labels["medjob/release"] == "demo"' in jobs
    assert 'claimName in ["rows"]' in jobs
    assert 'secretName in ["medjob","keys"]' in jobs
    assert 'secretKeyRef.name in ["token"]' in jobs
    assert "hostPath.path in []" in jobs
    assert "has(request.dryRun) && request.dryRun" in pods
    for text in (jobs, pods):
        assert '"system:serviceaccount:research:demo"' in text
        assert '"^demo-(orchestrator-[0-9a-f]{8}|preflight)-"' in text


def test_policies_are_off_by_default_and_where_the_api_lacks_them() -> None:
    assert policies(render(KIND)) == []
    direct = (ON, 'pipeline.mode="direct"', 'pipeline.stage="sft"')
    assert policies(render(KIND, sets=direct)) == []
    # A connected Helm knows the kinds of the API.
    for kinds, expected in (
        ("batch/v1/Job", 0),
        ("batch/v1/Job,admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy", 2),
    ):
        done = template(KUEUE, sets=(ON,), flags=("--api-versions", kinds))
        assert done.stdout.count("kind: ValidatingAdmissionPolicy\n") == expected, done.stderr
