"""`medjob submit`: the checks before it connects to a cluster, and the values that Helm gets."""

import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.config import RunFile
from medjob.config.load import load_run_file, validate
from medjob.errors import ConfigError, InputError, RetryError
from medjob.k8s import preflight, report
from medjob.k8s.client import submit
from medjob.k8s.client.release import fullname
from medjob.pipeline.consent import with_consent
from medjob.pipeline.runner import Pipeline
from tests.fakes.cluster import Cluster
from tests.fakes.cluster_api import ModelApi

ROOT = Path(__file__).parents[2]
VALUES = ROOT / "charts" / "medjob" / "ci" / "kind-cpu-values.yaml"


def tree(**changes: Any) -> dict[str, Any]:
    """A run file as plain data, with `changes` to the section `cluster`."""
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
    ("changes", "message"),
    [
        ({"store": "file://runs"}, "cluster.store: pods cannot share a local folder"),
        ({"store": "s3://my-bucket/medjob"}, "contains the placeholder 'my-bucket'"),
        (
            {"image": {"registry": "us-docker.pkg.dev/my-project/x"}},
            "contains the placeholder 'my-project'",
        ),
        (
            {"image": {"registry": "111122223333.dkr.ecr.us-west-2.amazonaws.com"}},
            "contains the placeholder '111122223333'",
        ),
    ],
)
def test_submit_refuses_what_no_cluster_can_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        submit.check_locally(validate(tree(**changes)))


def test_names_that_contain_a_placeholder_are_accepted() -> None:
    image = {"registry": "us-docker.pkg.dev/acme-my-project/x"}
    submit.check_locally(validate(tree(store="s3://my-bucket-7f3a/medjob", image=image)))


def test_submit_refuses_direct_mode() -> None:
    with pytest.raises(ConfigError, match=r"pipeline.mode: direct"):
        submit.check_locally(validate(tree() | {"pipeline": {"mode": "direct", "stage": "sft"}}))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Kubernetes cluster unreachable: dial tcp", RetryError),
        ("another operation (install/upgrade/rollback) is in progress", ConfigError),
        ("uninstall: Release not loaded: x: release: not found", InputError),
        ("values don't meet the specifications of the schema", ConfigError),
    ],
)
def test_helm_errors_are_translated(message: str, error: type[Exception]) -> None:
    assert type(submit._translate_helm_error("upgrade", message)) is error


def test_local_paths_are_refused_unless_they_are_mounted() -> None:
    values = tree()
    values["run"]["prepare"]["sources"] = [{"path": "/data/rows.jsonl"}]
    with pytest.raises(ConfigError, match=r"/data/rows.jsonl is a path on this machine"):
        submit.check_locally(validate(values))
    values["cluster"]["extraVolumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    submit.check_locally(validate(values))


def test_run_file_survives_rendering_by_helm(tmp_path: Path) -> None:
    values = tree()
    # A YAML parser reads an unquoted 1234e56 as a number.
    values["run"]["base_model"] = {"id": "org/name", "revision": "1234e56"}
    values["run"]["prepare"]["near_duplicate_threshold"] = None  # not the default
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    config = load_run_file([file])
    rendered = submit.render(config, "r", submit.find_chart(None), "research")
    pipeline = next(
        document for document in yaml.safe_load_all(rendered) if document["kind"] == "ConfigMap"
    )
    assert validate(yaml.safe_load(pipeline["data"]["job.yaml"])) == config


def test_submit_tells_the_chart_which_stages_the_run_file_implies() -> None:
    values = tree()
    assert "stages" not in values["run"]
    config = validate(values)
    rendered = submit.render(config, "r", submit.find_chart(None), "research")
    pipeline = next(
        document for document in yaml.safe_load_all(rendered) if document["kind"] == "ConfigMap"
    )
    jobs = [f"{name}.yaml" for name in ("fetch", *(config.run.stages or ()))]
    assert sorted(pipeline["data"]) == sorted(["job.yaml", *jobs])
    assert submit.stage_names(config) == ["fetch", *(config.run.stages or ())]


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
def test_fullname_equals_the_name_in_the_chart(release: str) -> None:
    rendered = submit.render(validate(tree()), release, submit.find_chart(None), "research")
    names = {
        document["metadata"]["name"]
        for document in yaml.safe_load_all(rendered)
        if document["kind"] == "ConfigMap"
    }
    assert names == {f"{fullname(release)}-pipeline"}


@pytest.mark.parametrize(
    ("state", "remaining_jobs"), [("failed", []), ("done", []), ("running", ["o"])]
)
def test_install_deletes_the_job_of_an_ended_orchestrator(
    state: str, remaining_jobs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The annotation says so seconds before the Job's condition does.

    Helm would keep the Job, and --wait would read the old state.
    """
    cluster = Cluster(random.Random(0))
    labels = {"medjob/release": "r", "medjob/component": "orchestrator"}
    annotations = {report.ANNOTATION: json.dumps({"state": state})}
    cluster.added(
        cluster.jobs, {"metadata": {"name": "o", "labels": labels, "annotations": annotations}}
    )
    called: list[str] = []
    monkeypatch.setattr(submit, "_helm", lambda *arguments: called.append(arguments[0]))
    submit.install(validate(tree()), "r", "chart", ModelApi(cluster, lambda *_: None))
    assert list(cluster.jobs) == remaining_jobs
    assert called == ["upgrade"]


def described(values: dict[str, Any]) -> list[str]:
    """The lines above the confirmation prompt."""
    api = types.SimpleNamespace(server="https://k", namespace="research")
    return list(submit.describe(validate(values), api))  # type: ignore[arg-type]


def test_summary_lists_what_the_run_file_sets_for_the_pods() -> None:
    values = tree(
        image={"registry": "evil.example.org", "tag": "1"},
        serviceAccount={"create": False, "name": "admin"},
        extraEnv=[{"name": "HTTPS_PROXY", "value": "http://user:secret@evil"}],
        extraVolumes=[{"name": "h", "hostPath": {"path": "/"}}],
        podAnnotations={"a/b": "\x1b[2J\u202e"},
    )
    values["cluster"]["profiles"]["cpu"]["runtimeClassName"] = "kata"
    shown = described(values)
    assert '  cluster.image: {"registry": "evil.example.org", "tag": "1"}' in shown
    assert '  cluster.serviceAccount: {"create": false, "name": "admin"}' in shown
    assert '  cluster.extraVolumes: [{"name": "h", "hostPath": {"path": "/"}}]' in shown
    assert '  cluster.extraEnv: ["HTTPS_PROXY"]' in shown
    assert any("cluster.profiles.cpu" in line and "kata" in line for line in shown)
    text = "\n".join(shown)
    assert "secret@" not in text
    assert "\x1b" not in text  # no control character reaches the terminal
    assert "\u202e" not in text


def test_summary_tells_what_leaves_the_cluster() -> None:
    values = tree(reportTo=["wandb", "tensorboard"])
    values["run"]["export"] = {"hub_model_id": "me/model"}
    shown = described(values)
    assert 'export uploads the model to the private hub repository "me/model"' in shown
    assert "training sends its metrics to wandb" in shown
    values["pipeline"] = {"until": "dpo"}
    assert not any("me/model" in line for line in described(values))


def hosted(tmp_path: Path) -> RunFile:
    values = tree(endpoints={"hosted": {"url": "https://judge.example.org/v1", "maxCost": 5}})
    prices = {"pricePerMillionInputTokens": 1, "pricePerMillionOutputTokens": 2}
    values["cluster"]["endpoints"]["hosted"] |= prices
    values["run"]["judge"] = {"model": "endpoint:hosted/big"}
    values["cluster"]["store"] = f"file://{tmp_path}"
    return validate(values)


def test_consent_to_the_submission_is_passed_to_the_pods(tmp_path: Path) -> None:
    run_file = hosted(tmp_path)
    assert "allow_hosted" not in submit.values(run_file)["run"]["judge"]
    values = submit.values(with_consent(run_file))
    assert values["run"]["judge"] == {"model": {"id": "endpoint:hosted/big"}, "allow_hosted": True}
    api = types.SimpleNamespace(server="https://api", namespace="n")
    summary = "\n".join(submit.describe(run_file, api))
    assert (
        "judge sends up to 32 answers with questions and references to judge.example.org" in summary
    )
    assert "at most 5 USD (hosted.maxCost)" in summary


def test_preflight_refuses_to_send_rows_without_consent(tmp_path: Path) -> None:
    run_file = hosted(tmp_path)
    stages = submit.stage_names(run_file)
    api: Any = None  # both checks come before the first request to the API server
    with pytest.raises(
        ConfigError, match=r"needs your consent: judge sends .* judge\.example\.org"
    ):
        preflight.check(Pipeline.open(run_file), api, {}, stages)
    with pytest.raises(ConfigError, match="pods cannot share a local folder"):  # the next check
        preflight.check(Pipeline.open(with_consent(run_file)), api, {}, stages)


def test_status_shows_what_was_spent_at_endpoints() -> None:
    running = {
        "stage": "judge",
        "state": "running",
        "tries": 1,
        "seconds": 0,
        "gpus": 0,
        "price": None,
        "progress": {"endpoint_requests": 1200, "endpoint_tokens": 345678, "endpoint_cost": 1.5},
    }
    spent = {"requests": 30, "input_tokens": 1000, "output_tokens": 500, "cost": 0.25}
    published = {**running, "stage": "evaluate", "progress": {}, "endpoints": {"hosted": spent}}
    status = {"state": "running", "text": "", "at": 0.0, "stages": [running, published]}
    shown = list(report.lines(json.loads(json.dumps(status)), "r", "EUR"))
    assert "judge: 1,200 requests to endpoints, 345,678 tokens, 1.50 EUR" in shown
    assert "evaluate: 30 requests to endpoints, 1,500 tokens, 0.25 EUR" in shown
    assert any(line.startswith("judge") and line.endswith("1.50 EUR") for line in shown[1:4])


def test_error_without_a_cluster_has_no_traceback(tmp_path: Path) -> None:
    done = medjob(
        "submit",
        "-f",
        str(VALUES),
        "--dry-run",
        KUBECONFIG=str(tmp_path / "none"),
        HOME=str(tmp_path),
    )
    assert done.returncode == 64
    assert "cannot connect to a cluster" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_table_shows_progress_and_cost() -> None:
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
    older = row | {"stage": "dpo", "saved": 7}  # an older orchestrator writes no `saved_at`
    status = {
        "state": "running",
        "text": "sft: attempt 2",
        "at": 0.0,
        "stages": [row | {"saved_at": 1.0}, older],
    }
    shown = "\n".join(report.lines(json.loads(json.dumps(status)), "r", "EUR"))
    for cell in ("120/400", "10 min", "4,200 tok/s", "1.234", "100, ", "1.50", "6.00", "12.00 EUR"):
        assert cell in shown, shown


def test_status_lists_the_shards_of_a_stage() -> None:
    row = {"stage": "candidates", "state": "running", "tries": 3, "seconds": 60, "gpus": 1}
    row |= {"price": None, "progress": {"step": 5, "total": 90, "tokens_per_second": 1234.0}}
    row |= {"shards": {"published": [], "running": [0, 1], "waiting": [2]}}
    status = {"state": "running", "text": "candidates", "at": 0.0, "stages": [row]}
    *_, table, last = report.lines(status, "r", "EUR")
    assert "5/90" in table
    assert "1,234 tok/s" in table
    assert last == "candidates: 3 shards: 2 running (0-1), 1 waiting (2)"
