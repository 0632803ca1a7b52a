"""All run files and cluster files render to valid objects with the same run in them."""

import json
from pathlib import Path

import pytest
import yaml

from medjob import __version__
from medjob.codegen.chart import files
from medjob.config import load_run_file
from medjob.config.load import validate as load_tree
from tests.charts.goldens import GOLDENS
from tests.charts.rendering import (
    CHART,
    CI,
    CLUSTERS,
    EFA,
    NAMES,
    ROOT,
    RUNS,
    SPOT,
    Rendered,
    helm,
    refusal,
    render,
    template,
    validate,
)

PAIRS = [
    pytest.param((run, cluster), id=f"{run.stem}-{cluster.stem}")
    for cluster in CLUSTERS
    for run in RUNS
]
ALL = [*(pytest.param((path,), id=path.stem) for path in CI), *PAIRS]
# Placeholders that users replace. Any other bucket or registry name could be a real one.
PLACEHOLDERS = ("my-bucket", "my-project", "111122223333")


def test_the_expected_files_were_found() -> None:
    assert [path.stem for path in CI] == [
        "eks-efa-values",
        "gke-spot-values",
        "kind-cpu-values",
        "kueue-values",
        "single-gpu-values",
    ]
    assert len(RUNS) >= 8
    assert all(path.is_file() for path in CLUSTERS)


@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_helm_lint_passes(values: Path) -> None:
    done = helm("lint", "--strict", str(CHART), "-n", "research", "-f", str(values))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", ALL)
def test_every_object_is_valid_for_oldest_and_newest_kubernetes(
    values: tuple[Path, ...],
) -> None:
    rendered = render(*values)
    listed = rendered.job_yaml["run"].get("stages")
    assert tuple(rendered.stages) == (("fetch", *listed) if listed else NAMES)
    for item in rendered.everything:
        validate(item)


@pytest.mark.parametrize("values", ALL)
def test_the_rendered_run_equals_the_run_file(values: tuple[Path, ...]) -> None:
    assert load_tree(render(*values).job_yaml) == load_run_file(values)


@pytest.mark.parametrize("values", ALL)
def test_every_object_is_in_the_namespace_of_the_release(values: tuple[Path, ...]) -> None:
    for item in render(*values).everything:
        assert item["metadata"]["namespace"] == "research", item["metadata"]["name"]


@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_rendering_is_deterministic(values: Path) -> None:
    assert template(values).stdout == render(values).text


STRINGS = [
    "no",
    "1e3",
    "1234e56",
    "0o17",
    "0x1F",
    "12:30:45",
    "~",
    "",
    " x ",
    "2026-01-01",
    "=",
    "1_000",
    "- a",
    "a: b",
    "#",
    "\t",
    "\u2028",
    "<&>",
    "|\n ",
]


@pytest.mark.parametrize("name", ["end", "1e3", "123"])
@pytest.mark.parametrize(
    "template",
    [
        "ends in empty lines {question}\n\n\n",
        "  begins\n with spaces {question}",
        "{question}\r\n{{ .Values }}",
    ],
)
def test_unusual_texts_and_numbers_survive_rendering(
    tmp_path: Path, name: str, template: str
) -> None:
    """The template comes last in job.yaml. YAML parsers disagree about what is a number."""
    sources = [{"path": "data/x.jsonl", "where": {text or "empty": STRINGS for text in STRINGS}}]
    prepare = {"sources": sources, "preference_rows": 1_000_000, "near_duplicate_threshold": 1e-7}
    run = {
        "name": name,
        "base_model": {"id": "org/model", "revision": "1234e56"},
        "prepare": prepare,
        "prompt": {"template": template},
    }
    path = tmp_path / "hard.yaml"
    path.write_text(json.dumps({"run": run, "cluster": {"store": "s3://bucket/prefix"}}))
    assert load_tree(render(path).job_yaml) == load_run_file([path])


def test_only_the_jobs_of_stages_that_the_run_lists_are_rendered() -> None:
    run = ROOT / "jobs" / "make-preferences.yaml"
    rendered = render(run, CLUSTERS[0])
    assert list(rendered.stages) == ["fetch", "prepare", "candidates", "judge"]
    assert not {"dpo.yaml", "sft.yaml"} & rendered.one("ConfigMap")["data"].keys()


def test_long_release_names_fit_and_do_not_collide() -> None:
    beginning = "a-run-of-a-research-group-with-much-to-say-about"
    long = [f"{beginning}-{end}" for end in ("x123", "y123")]
    assert [len(name) for name in long] == [53, 53]
    first, second = (render(EFA, release=name) for name in long)
    for rendered in (first, second):
        for item in rendered.everything:
            assert len(_longest(item)) <= 63, item["metadata"]["name"]
    assert not _names(first) & _names(second)


def _names(rendered: Rendered) -> set[tuple[str, str]]:
    return {(item["kind"], item["metadata"]["name"]) for item in rendered.everything}


def _longest(item: dict) -> str:  # type: ignore[type-arg]
    """The longest name derived from an object.

    The orchestrator appends key and attempt to the name of a Job, and Kubernetes appends an index.
    """
    name = str(item["metadata"]["name"])
    manager = item["metadata"]["labels"]["app.kubernetes.io/managed-by"]
    is_stage = item["kind"] == "Job" and manager == "medjob"
    return f"{name}-12345678-a999-15" if is_stage else name


@pytest.mark.parametrize("release", ["123", "true", "1e5", "null", "off"])
def test_release_names_that_yaml_could_misread_work(release: str) -> None:
    rendered = render(SPOT, release=release)
    for item in rendered.everything:
        validate(item)
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == release


def test_release_names_that_are_not_host_names_are_refused() -> None:
    assert "release: must not contain a dot" in refusal(SPOT, release="my.run")
    assert "must begin with a letter if a stage has several nodes" in refusal(
        EFA, release="2026-run"
    )


def test_generated_files_are_up_to_date() -> None:
    for name, text in files().items():
        assert (CHART / name).read_text() == text, f"{name}: run `make generate`"


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_output_equals_the_golden_file(golden: Path) -> None:
    assert render(GOLDENS[golden]).text == golden.read_text(), (
        "if this change is intended, run `make goldens`"
    )


def test_values_that_users_must_replace_are_placeholders() -> None:
    for name in ("gke", "eks"):
        text = (ROOT / "jobs" / "clusters" / f"{name}.yaml").read_text()
        run_file = load_run_file(
            [ROOT / "jobs" / "demo.yaml", ROOT / "jobs" / "clusters" / f"{name}.yaml"]
        )
        for value in (run_file.cluster.store.uri, run_file.cluster.image.registry):
            assert any(placeholder in value for placeholder in PLACEHOLDERS), value
        assert all(
            word in text.partition("resources:")[0]
            for word in PLACEHOLDERS
            if word in text.partition("cluster:")[2]
        )
