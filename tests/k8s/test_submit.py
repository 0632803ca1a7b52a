"""What `medjob submit` refuses before it asks a cluster, and what it hands to Helm."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.config.load import load_run_file, validate
from medjob.errors import ConfigError, InputError, RetryError
from medjob.k8s import report
from medjob.k8s.client import submit
from medjob.k8s.client.release import fullname
from tests.fakes.cluster import Cluster
from tests.fakes.cluster_api import ModelApi

ROOT = Path(__file__).parents[2]
VALUES = ROOT / "charts" / "medjob" / "ci" / "kind-cpu-values.yaml"


def tree(**changes: Any) -> dict[str, Any]:
    values = yaml.safe_load(VALUES.read_text())
    values["cluster"] |= changes
    return dict(values)


def medjob(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medjob", *arguments]
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"store": "file://runs"}, "cluster.store: pods share no folder"),
        ({"store": "s3://my-bucket/medjob"}, "still names 'my-bucket'"),
        ({"image": {"registry": "us-docker.pkg.dev/my-project/x"}}, "still names 'my-project'"),
        (
            {"image": {"registry": "111122223333.dkr.ecr.us-west-2.amazonaws.com"}},
            "still names '111122223333'",
        ),
    ],
)
def test_what_no_cluster_could_run_is_refused_here(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        submit.check_locally(validate(tree(**changes)))


def test_names_that_only_look_like_the_placeholders_pass() -> None:
    image = {"registry": "us-docker.pkg.dev/acme-my-project/x"}
    submit.check_locally(validate(tree(store="s3://my-bucket-7f3a/medjob", image=image)))


def test_one_job_alone_is_helms_business() -> None:
    with pytest.raises(ConfigError, match=r"pipeline.mode: direct"):
        submit.check_locally(validate(tree() | {"pipeline": {"mode": "direct", "stage": "sft"}}))


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("Kubernetes cluster unreachable: dial tcp", RetryError),
        ("another operation (install/upgrade/rollback) is in progress", ConfigError),
        ("uninstall: Release not loaded: x: release: not found", InputError),
        ("values don't meet the specifications of the schema", ConfigError),
    ],
)
def test_what_helm_says_has_its_code(said: str, meaning: type[Exception]) -> None:
    assert type(submit._told("upgrade", said)) is meaning


def test_a_path_of_this_machine_is_refused_unless_it_is_mounted() -> None:
    values = tree()
    values["run"]["prepare"]["sources"] = [{"path": "/data/rows.jsonl"}]
    with pytest.raises(ConfigError, match=r"/data/rows.jsonl: is a path of this machine"):
        submit.check_locally(validate(values))
    values["cluster"]["extraVolumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    submit.check_locally(validate(values))


def test_helm_gets_what_was_said_and_reads_it_back_as_the_same_tree(tmp_path: Path) -> None:
    values = tree()
    values["run"]["base_model"] = {
        "id": "org/name",
        "revision": "1234e56",
    }  # a number, to a reader of YAML
    values["run"]["prepare"]["near_duplicate_threshold"] = None  # not the default
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    config = load_run_file([file])
    rendered = submit.render(config, "r", submit.chart_folder(None), "research")
    pipeline = next(
        document for document in yaml.safe_load_all(rendered) if document["kind"] == "ConfigMap"
    )
    assert validate(yaml.safe_load(pipeline["data"]["job.yaml"])) == config


@pytest.mark.parametrize(
    "release",
    [
        "demo",
        "a" * 34,
        "a" * 35,
        "b" * 53,
        "long-name-whose-cut-would-end-in-a-hyphen",
        f"{'a' * 25}--{'b' * 10}",
    ],
)
def test_names_of_objects_are_those_that_the_chart_gives(release: str) -> None:
    rendered = submit.render(validate(tree()), release, submit.chart_folder(None), "research")
    names = {
        document["metadata"]["name"]
        for document in yaml.safe_load_all(rendered)
        if document["kind"] == "ConfigMap"
    }
    assert names == {f"{fullname(release)}-pipeline"}


@pytest.mark.parametrize(("said", "left"), [("failed", []), ("done", []), ("running", ["o"])])
def test_an_orchestrator_that_has_just_ended_makes_room_for_the_next(
    said: str, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Job's own condition comes seconds later; Helm would leave it, and --wait would read the old end."""
    cluster = Cluster(random.Random(0))
    labels = {"app.kubernetes.io/instance": "r", "app.kubernetes.io/component": "orchestrator"}
    annotations = {report.ANNOTATION: json.dumps({"state": said})}
    cluster.added(
        cluster.jobs, {"metadata": {"name": "o", "labels": labels, "annotations": annotations}}
    )
    called: list[str] = []
    monkeypatch.setattr(submit, "_helm", lambda *words: called.append(words[0]))
    submit.install(validate(tree()), "r", "chart", ModelApi(cluster, lambda *_: None))
    assert list(cluster.jobs) == left
    assert called == ["upgrade"]


def test_without_a_cluster_the_error_says_where_to_look(tmp_path: Path) -> None:
    done = medjob(
        "submit",
        "-f",
        str(VALUES),
        "--dry-run",
        KUBECONFIG=str(tmp_path / "none"),
        HOME=str(tmp_path),
    )
    assert done.returncode == 64
    assert "no way to a cluster" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_shows_where_a_run_stands() -> None:
    progress = {
        "step": 120,
        "total": 400,
        "eta_s": 600,
        "tokens_per_second": 4200.4,
        "loss": 1.2345,
    }
    row = {
        "stage": "sft",
        "state": "running",
        "tries": 2,
        "seconds": 5400,
        "gpus": 4,
        "price": 2.0,
        "progress": progress,
        "saved": 100,
    }
    older = row | {"stage": "dpo", "saved": 7}  # of an orchestrator that did not tell how old it is
    status = {
        "state": "running",
        "text": "sft: attempt 2",
        "at": 0.0,
        "stages": [row | {"saved_at": 1.0}, older],
    }
    shown = "\n".join(report.lines(json.loads(json.dumps(status)), "r", "EUR"))
    for cell in ("120/400", "10 min", "4,200 tok/s", "1.234", "100, ", "1.50", "6.00", "12.00 EUR"):
        assert cell in shown, shown
