"""Scenarios on a real cluster, one function per scenario.

Each returns a summary of what it observed, or raises AssertionError.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from tests.e2e.environment import ClusterEnvironment, wait
from tests.e2e.release import STAGES, Release


def install_and_complete(cluster: ClusterEnvironment) -> str:
    """The run completes all stages in order."""
    release = Release(cluster, "base")
    began = time.monotonic()
    release.submit()
    release.wait_until_done()
    took = time.monotonic() - began
    seen = {stage: release.jobs(stage) for stage in STAGES}
    assert all(len(jobs) == 1 for jobs in seen.values()), {
        stage: len(jobs) for stage, jobs in seen.items()
    }
    log = cluster.medjob("logs", "base", "sft", "-n", cluster.namespace).stdout
    assert "published" in log, log
    gaps = _gaps([seen[stage][0] for stage in STAGES])
    return (
        f"8 stages in {took:.0f} s; from the end of a stage to the next Job "
        f"{min(gaps):.0f} to {max(gaps):.0f} s"
    )


def _gaps(jobs: list[dict[str, Any]]) -> list[float]:
    begun = [datetime.fromisoformat(job["metadata"]["creationTimestamp"]) for job in jobs]
    ended = [datetime.fromisoformat(job["status"]["completionTime"]) for job in jobs]
    return [
        (later - earlier).total_seconds()
        for earlier, later in zip(ended[:-1], begun[1:], strict=True)
    ]


def again_skips_everything(cluster: ClusterEnvironment) -> str:
    """Submitting the same run again starts no stage."""
    release = Release(cluster, "base")
    before = {stage: [job["metadata"]["name"] for job in release.jobs(stage)] for stage in STAGES}
    began = time.monotonic()
    release.submit()
    release.wait_until_done()
    assert before == {
        stage: [job["metadata"]["name"] for job in release.jobs(stage)] for stage in STAGES
    }
    return f"nothing was started; done after {time.monotonic() - began:.0f} s"


def plain_fine_tuning(cluster: ClusterEnvironment) -> str:
    """A run whose stages are prepare and sft ends after sft."""
    release = Release(cluster, "plain", {"run.stages": ["prepare", "sft"]})
    release.submit()
    release.wait_until_done()
    started = [stage for stage in STAGES if release.jobs(stage)]
    assert started == ["fetch", "prepare", "sft"], started
    shown = cluster.medjob("status", "plain", "-n", cluster.namespace).stdout
    assert "candidates" not in shown, shown
    return f"{', '.join(started)}; {same_adapter(cluster, release)}"


def uninstall_leaves_nothing(cluster: ClusterEnvironment) -> str:
    """`medjob cancel` deletes every object."""
    release = Release(cluster, "base")
    count = len(release.leftovers())
    assert count > 10, count
    release.cancel()
    return f"{count} objects deleted; the bucket keeps {len(cluster.objects('runs/base/'))}"


def helm_test(cluster: ClusterEnvironment) -> str:
    """`helm test` checks the bucket, the permissions and a dry run of every Job from a pod."""
    output = cluster.helm("test", "base")
    assert "Phase:          Succeeded" in output, output
    return "succeeded"


def upgrade_and_rollback(cluster: ClusterEnvironment) -> str:
    """`helm upgrade` and `helm rollback` during sft do not replace the pod."""
    release = training(cluster, "upgraded")
    pod = release.wait_for_pod("sft")["metadata"]
    release.wait_for_checkpoint()
    release.submit(sets={"pipeline.retries": 5})
    cluster.helm("rollback", "upgraded", "1")
    release.wait_until_done()
    jobs, pods = release.jobs("sft"), release.pods("sft")
    assert [p["metadata"]["uid"] for p in pods] == [pod["uid"]], [
        p["metadata"]["name"] for p in pods
    ]
    return f"{len(jobs)} Job, pod {pod['name']} from start to end; {same_adapter(cluster, release)}"


def changed_key_waits(cluster: ClusterEnvironment) -> str:
    """With onChange: wait, an upgrade that changes the running stage's key lets it finish."""
    release = training(cluster, "waits")
    old = release.wait_for_pod("sft")["metadata"]["name"]
    release.wait_for_checkpoint()
    release.submit(sets={"run.sft.learning_rate": 5e-4})
    release.wait_until_done()
    first, second = release.jobs("sft")
    assert old.startswith(first["metadata"]["name"])
    assert first["status"].get("succeeded") == 1, first["status"]
    assert second["metadata"]["creationTimestamp"] >= first["status"]["completionTime"]
    release.cancel()
    return "the old attempt was published, then the new one started"


def changed_key_replaces(cluster: ClusterEnvironment) -> str:
    """With onChange: replace, the running stage saves, stops and is replaced."""
    release = training(cluster, "replaced", **{"pipeline.onChange": "replace"})
    old = release.wait_for_pod("sft")["metadata"]["name"]
    release.wait_for_checkpoint()
    release.submit(sets={"run.sft.learning_rate": 5e-4, "pipeline.onChange": "replace"})
    release.wait_until_done()
    (job,) = release.jobs("sft")
    assert not old.startswith(job["metadata"]["name"])
    codes = [
        cluster.read(key)["exit_code"]
        for key in cluster.objects("runs/replaced/sft/")
        if "/attempts/" in key
    ]
    assert sorted(codes) == [0, 143], codes
    release.cancel()
    return "the old attempt saved and exited with 143; the new one is published"


def pause_and_resume(cluster: ClusterEnvironment) -> str:
    """`medjob pause` saves and frees the node, `medjob resume` continues, and a metric shows it."""
    release = training(cluster, "paused")
    release.wait_for_pod("sft")
    release.wait_for_checkpoint()
    cluster.medjob("pause", "paused", "-n", cluster.namespace)
    release.wait_for_state("paused")
    assert not release.pods("sft", running=True)
    orchestrator = release.wait_for_pod("orchestrator")["metadata"]["name"]
    path = f"/api/v1/namespaces/{cluster.namespace}/pods/{orchestrator}:9464/proxy/metrics"
    wait(
        "the metric",
        lambda: (
            'medjob_run_state{run="paused",state="paused"} 1.0'
            in cluster.kubectl("get", "--raw", path)
        ),
        30,
    )
    cluster.medjob("resume", "paused", "-n", cluster.namespace)
    release.wait_until_done()
    (outcome,) = release.outcomes("sft")
    assert outcome["kind"] == "paused", outcome
    adapter = same_adapter(cluster, release)
    return f"stopped at step {outcome['reach']}; the metric showed it; {adapter}"


def two_nodes(cluster: ClusterEnvironment) -> str:
    """sft on two nodes (Indexed Job, DeepSpeed over gloo) reaches the loss of one node."""
    release = on_two_nodes(cluster, "two")
    nodes = {pod["spec"]["nodeName"] for pod in release.pods("sft")}
    release.wait_until_done()
    loss = release.marker("sft")["metrics"]["best_validation_loss"]
    expected = Release(cluster, "base").marker("sft")["metrics"]["best_validation_loss"]
    assert abs(loss - expected) < 2e-3, f"{loss} {expected}"
    return f"on {len(nodes)} nodes; validation loss {loss:.4f} against {expected:.4f}"


def on_two_nodes(cluster: ClusterEnvironment, name: str) -> Release:
    """Submit a run up to sft on two nodes, and wait until both pods run."""
    release = training(cluster, name, **{"resources.sft.nodes": 2})
    wait("two pods of sft", lambda: len(release.pods("sft", running=True)) == 2, 240)
    return release


def training(cluster: ClusterEnvironment, name: str, **changes: Any) -> Release:
    """Submit a run up to sft."""
    release = Release(cluster, name, {"pipeline.until": "sft", **changes})
    release.submit()
    return release


def same_adapter(cluster: ClusterEnvironment, release: Release, undisturbed: str = "base") -> str:
    """Compare the adapter with that of an undisturbed run, and cancel the release."""
    expected, got = Release(cluster, undisturbed).digest("sft"), release.digest("sft")
    assert expected == got, f"adapter {got}, but {expected} in the undisturbed run"
    release.cancel()
    return f"adapter {got[:19]} as in the undisturbed run"
