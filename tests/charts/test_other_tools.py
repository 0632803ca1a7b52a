"""The chart in umbrella charts, and with Flux, Argo CD, kustomize and `helm template | kubectl apply`."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.config import load_run_file
from medjob.config.load import merge, read_yaml
from medjob.config.load import validate as load_tree
from medjob.errors import ConfigError
from medjob.k8s.client import submit
from tests.charts.rendering import (
    CHART,
    EFA,
    KIND,
    KUEUE,
    NAMES,
    Rendered,
    UniqueKeys,
    container,
    environment,
    helm,
    render,
    validate,
)

LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")


def rendered(text: str) -> Rendered:
    """Parse the output of Helm."""
    return Rendered(text, tuple(dict(item) for item in yaml.load_all(text, UniqueKeys) if item))


def umbrella(
    folder: Path, values: dict[str, Any], *aliases: str, condition: bool = False
) -> Rendered:
    """Render a parent chart that has this chart as a dependency, once per alias."""
    dependencies = []
    for alias in aliases or ("",):
        entry = {"name": "medjob", "version": "0.1.0", "repository": ""}
        entry |= {"alias": alias} if alias else {}
        entry |= {"condition": f"{alias or 'medjob'}.enabled"} if condition else {}
        dependencies.append(entry)
    chart = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": dependencies}
    shutil.copytree(CHART, folder / "parent/charts/medjob")
    (folder / "parent/Chart.yaml").write_text(yaml.safe_dump(chart))
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    done = helm(
        "template",
        "demo",
        str(folder / "parent"),
        "-n",
        "research",
        "-f",
        str(folder / "values.yaml"),
    )
    assert done.returncode == 0, done.stderr
    return rendered(done.stdout)


def test_subchart_renders_the_same_objects(tmp_path: Path) -> None:
    own = read_yaml(KIND)
    shared = {"imageRegistry": "r.io", "deep": {"x": [1]}}
    values = {"medjob": {**own, "enabled": True, "tags": {"a": True}}, "global": shared}
    found = umbrella(tmp_path, values, condition=True)
    alone = render(KIND)
    assert found.job_yaml == alone.job_yaml  # without what Helm and the parent chart added
    names = [item["metadata"]["name"] for item in found.objects]
    assert names == [item["metadata"]["name"] for item in alone.objects]  # the same hash
    assert load_tree(found.job_yaml) == load_run_file([KIND])


def test_subchart_can_be_disabled(tmp_path: Path) -> None:
    own = read_yaml(KIND)
    assert umbrella(tmp_path, {"medjob": {**own, "enabled": False}}, condition=True).objects == ()


def test_two_runs_in_one_umbrella_chart_do_not_collide(tmp_path: Path) -> None:
    own = read_yaml(KIND)
    found = umbrella(tmp_path, {"first": own, "secondRun": own}, "first", "secondRun")
    keys = [(item["kind"], item["metadata"]["name"]) for item in found.objects]
    assert len(keys) == len(set(keys))
    maps = {item["metadata"]["name"]: item for item in found.all("ConfigMap")}
    assert set(maps) == {"demo-first-pipeline", "demo-secondrun-pipeline"}
    for name, item in maps.items():  # `medjob status` takes this name
        release = item["metadata"]["labels"]["medjob/release"]
        assert name == f"{release}-pipeline"
        assert json.loads(item["data"]["sft.yaml"])["metadata"]["name"] == f"{release}-sft"


@pytest.mark.parametrize(
    ("version", "label"),
    [
        ("0.1.0+9414ed9678d1", "medjob-0.1.0_9414ed9678d1"),
        ("0.1.0+9414ed9678d1.1", "medjob-0.1.0_9414ed9678d1.1"),
        (f"0.1.0-rc.1+{'a' * 80}", f"medjob-0.1.0-rc.1_{'a' * 45}"),
        (f"0.1.0+{'a' * 49}-.b", f"medjob-0.1.0_{'a' * 49}"),
    ],
)
def test_versions_with_a_plus_are_valid_labels(tmp_path: Path, version: str, label: str) -> None:
    if version.endswith("-.b"):
        version = version.replace("-.b", "--b")
    flags = ("--version", version, "--app-version", version, "-d", str(tmp_path))
    assert helm("package", str(CHART), *flags).returncode == 0
    (package,) = tmp_path.glob("*.tgz")
    sets = ("--set", "cluster.image.tag=")
    done = helm("template", "demo", str(package), "-n", "research", "-f", str(KIND), *sets)
    found = rendered(done.stdout)
    for item in found.everything:
        labels = item["metadata"]["labels"]
        assert labels.get("helm.sh/chart", label) == label
        assert all(LABEL_VALUE.fullmatch(value) for value in labels.values())
        validate(item)
    image = container(found.core("orchestrator")["spec"]["template"])["image"]
    assert re.fullmatch(r"medjob-core:[A-Za-z0-9_.-]+", image)


def test_selectors_use_only_labels_of_medjob() -> None:
    """Argo CD overwrites app.kubernetes.io/instance, also in the pods of Jobs."""
    everything = render(EFA, sets=("cluster.podMonitor.enabled=true",))
    selectors = [
        everything.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        everything.one("PodMonitor")["spec"]["selector"]["matchLabels"],
        *(service["spec"]["selector"] for service in everything.all("Service")),
    ]
    assert {key.partition("/")[0] for selector in selectors for key in selector} == {"medjob"}
    pods = [pod["metadata"]["labels"] for _, pod in everything.pods()]
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in pods)


def test_objects_of_helm_can_be_pruned_by_one_label() -> None:
    for item in render(KUEUE).objects:
        assert item["metadata"]["labels"]["medjob/release"] == "demo"


# Texts that YAML 1.1, YAML 1.2, Go's parsers and Python's read as numbers, dates, nulls, booleans,
# merge keys or line breaks, or refuse.
DIALECTS = [
    *("=", "y", "n", "on", "off", "Yes", "NO", "true", "null", "Null", "~", "", ".inf", "-.INF"),
    *(".nan", "1e3", "0o7", "010", "0x1F", "0b1", "1_000", "12:30", "12:30:45", "2026-01-01"),
    *("2026-01-01T00:00:00Z", "<<", "*a", "&a", "!x", "!!str 1", "%x", "@x", "`x`", "- a", "a: b"),
    *("a #b", "#", "|", ">", "? a", "[", "{", "{{ .Values }}", "${X}", "$(X)", "'", '"', "\\", " x "),
    *("a\nb", "a\r\nb", "\t", "\x1b", "a\u2028b", "\u2029", "\ufeff", "\xa0", "a\xadb"),
    *("\U0001fa7a", "\U0001f468\u200d\u2695\ufe0f", "e\u0301", "\u202e", "<&>", "</script>"),
]  # fmt: skip


def hard_values() -> dict[str, Any]:
    variables = [{"name": f"V{n}", "value": text} for n, text in enumerate(DIALECTS)]
    annotations = {f"example.org/a{n}": text for n, text in enumerate(DIALECTS)}
    cluster = {"extraEnv": variables, "podAnnotations": annotations}
    cluster |= {"serviceAccount": {"annotations": annotations}}
    # Helm cannot read a key "<<", even in quotes.
    where = {text or "empty": [text] for text in DIALECTS if text != "<<"}
    prompt = {"system": "\n".join(DIALECTS), "style": "plain"}
    run = {
        "prompt": prompt,
        "prepare": {"sources": [{"path": "s3://bucket/x.jsonl", "where": where}]},
    }
    return merge(read_yaml(KIND), {"run": run, "cluster": cluster})


def check_texts(found: Rendered, values: dict[str, Any]) -> None:
    expected = {f"V{n}": text for n, text in enumerate(DIALECTS)}
    annotations = values["cluster"]["podAnnotations"]
    assert load_tree(found.job_yaml) == load_tree(values)
    for name, pod in found.pods():
        assert expected.items() <= environment(pod).items(), name
        assert annotations.items() <= pod["metadata"]["annotations"].items()
    assert found.one("ServiceAccount")["metadata"]["annotations"] == annotations


def test_texts_survive_submission() -> None:
    """As `medjob submit` passes them to Helm."""
    run_file = load_tree(hard_values())
    text = submit.render(run_file, "demo", str(CHART), "research")
    check_texts(rendered(text), hard_values())


def test_a_next_line_character_survives_submission() -> None:
    """YAML 1.1 takes U+0085 for the end of a line."""
    tree = merge(read_yaml(KIND), {"run": {"prompt": {"system": "a\x85b", "style": "plain"}}})
    text = submit.render(load_tree(tree), "demo", str(CHART), "research")
    assert load_tree(rendered(text).job_yaml) == load_tree(tree)


@pytest.mark.parametrize("text", ["\x7f", "\x9f", "\uffff"])
def test_characters_that_helm_cannot_read_are_refused(text: str) -> None:
    tree = merge(read_yaml(KIND), {"run": {"prompt": {"system": text, "style": "plain"}}})
    with pytest.raises(ConfigError, match=r"run.prompt.system: contains U\+"):
        submit.render(load_tree(tree), "demo", str(CHART), "research")


@pytest.mark.parametrize("name", NAMES)
def test_jobs_in_the_config_map_are_json(name: str) -> None:
    assert json.loads(render(KUEUE).one("ConfigMap")["data"][f"{name}.yaml"])["kind"] == "Job"
