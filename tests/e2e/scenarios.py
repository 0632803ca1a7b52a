"""What has to hold on a real cluster: one function a row. Each returns what it saw, or raises AssertionError."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from tests.e2e.release import STAGES, Release
from tests.e2e.site import Site, wait


def install_and_complete(site: Site) -> str:
    """The run completes, stage after stage."""
    release = Release(site, "base")
    began = time.monotonic()
    release.submit()
    release.wait_until_done()
    took = time.monotonic() - began
    seen = {stage: release.jobs(stage) for stage in STAGES}
    assert all(len(jobs) == 1 for jobs in seen.values()), {
        stage: len(jobs) for stage, jobs in seen.items()
    }
    log = site.medjob("logs", "base", "sft", "-n", site.namespace).stdout
    assert "published" in log, log
    gaps = _gaps([seen[stage][0] for stage in STAGES])
    return f"8 stages in {took:.0f} s; from a stage's end to the next Job {min(gaps):.0f} to {max(gaps):.0f} s"


def _gaps(jobs: list[dict[str, Any]]) -> list[float]:
    begun = [datetime.fromisoformat(job["metadata"]["creationTimestamp"]) for job in jobs]
    ended = [datetime.fromisoformat(job["status"]["completionTime"]) for job in jobs]
    return [
        (later - earlier).total_seconds()
        for earlier, later in zip(ended[:-1], begun[1:], strict=True)
    ]


def again_skips_everything(site: Site) -> str:
    """Submitting the same run again starts no stage."""
    release = Release(site, "base")
    before = {stage: [job["metadata"]["name"] for job in release.jobs(stage)] for stage in STAGES}
    began = time.monotonic()
    release.submit()
    release.wait_until_done()
    assert before == {
        stage: [job["metadata"]["name"] for job in release.jobs(stage)] for stage in STAGES
    }
    return f"nothing was started; done after {time.monotonic() - began:.0f} s"


def uninstall_leaves_nothing(site: Site) -> str:
    """`medjob cancel` leaves no object."""
    release = Release(site, "base")
    count = len(release.leftovers())
    assert count > 10, count
    release.cancel()
    return f"{count} objects gone; the bucket keeps {len(site.objects('runs/base/'))}"


def helm_test(site: Site) -> str:
    """`helm test`: bucket, permissions and every Job as a dry run, from a pod."""
    said = site.helm("test", "base")
    assert "Phase:          Succeeded" in said, said
    return "succeeded"


def upgrade_and_rollback(site: Site) -> str:
    """`helm upgrade` and `helm rollback` in mid-sft leave the pod alone."""
    release = training(site, "upgraded")
    pod = release.wait_for_pod("sft")["metadata"]
    release.wait_for_checkpoint()
    release.submit(sets={"pipeline.retries": 5})
    site.helm("rollback", "upgraded", "1")
    release.wait_until_done()
    jobs, pods = release.jobs("sft"), release.pods("sft")
    assert [p["metadata"]["uid"] for p in pods] == [pod["uid"]], [
        p["metadata"]["name"] for p in pods
    ]
    return f"{len(jobs)} Job, pod {pod['name']} from start to end; {same_adapter(site, release)}"


def changed_key_waits(site: Site) -> str:
    """An upgrade that changes the running stage's key lets it finish first (onChange: wait)."""
    release = training(site, "waits")
    old = release.wait_for_pod("sft")["metadata"]["name"]
    release.wait_for_checkpoint()
    release.submit(sets={"run.sft.learning_rate": 5e-4})
    release.wait_until_done()
    first, second = release.jobs("sft")
    assert old.startswith(first["metadata"]["name"])
    assert first["status"].get("succeeded") == 1, first["status"]
    assert second["metadata"]["creationTimestamp"] >= first["status"]["completionTime"]
    release.cancel()
    return "the old one was published, then the new one began"


def changed_key_replaces(site: Site) -> str:
    """With onChange: replace it saves, stops and makes room."""
    release = training(site, "replaced", **{"pipeline.onChange": "replace"})
    old = release.wait_for_pod("sft")["metadata"]["name"]
    release.wait_for_checkpoint()
    release.submit(sets={"run.sft.learning_rate": 5e-4, "pipeline.onChange": "replace"})
    release.wait_until_done()
    (job,) = release.jobs("sft")
    assert not old.startswith(job["metadata"]["name"])
    codes = [
        site.read(key)["exit_code"]
        for key in site.objects("runs/replaced/sft/")
        if "/attempts/" in key
    ]
    assert sorted(codes) == [0, 143], codes
    release.cancel()
    return "the old one saved and ended with 143, the new one is published"


def pause_and_resume(site: Site) -> str:
    """`medjob pause` saves and frees the node; `medjob resume` goes on. Meanwhile Prometheus is told so."""
    release = training(site, "paused")
    release.wait_for_pod("sft")
    release.wait_for_checkpoint()
    site.medjob("pause", "paused", "-n", site.namespace)
    release.wait_for_state("paused")
    assert not release.pods("sft", running=True)
    path = f"/api/v1/namespaces/{site.namespace}/pods/{release.wait_for_pod('orchestrator')['metadata']['name']}:9464/proxy/metrics"
    wait(
        "the metric",
        lambda: (
            'medjob_run_state{run="paused",state="paused"} 1.0'
            in site.kubectl("get", "--raw", path)
        ),
        30,
    )
    site.medjob("resume", "paused", "-n", site.namespace)
    release.wait_until_done()
    (verdict,) = release.verdicts("sft")
    assert verdict["kind"] == "paused", verdict
    return f"stopped at step {verdict['reach']}; /metrics said so; {same_adapter(site, release)}"


def two_nodes(site: Site) -> str:
    """sft on two nodes (Indexed Job, headless Service, DeepSpeed over gloo) agrees with the one-node result."""
    release = on_two_nodes(site, "two")
    nodes = {pod["spec"]["nodeName"] for pod in release.pods("sft")}
    release.wait_until_done()
    ours, single = release.marker("sft"), Release(site, "base").marker("sft")
    loss, expected = (
        ours["metrics"]["best_validation_loss"],
        single["metrics"]["best_validation_loss"],
    )
    assert abs(loss - expected) < 2e-3, f"{loss} {expected}"
    return f"on {len(nodes)} nodes; validation loss {loss:.4f} against {expected:.4f}"


def on_two_nodes(site: Site, name: str) -> Release:
    """A run up to sft on two nodes, both pods of which run."""
    release = training(site, name, **{"resources.sft.nodes": 2})
    wait("two pods of sft", lambda: len(release.pods("sft", running=True)) == 2, 240)
    return release


def training(site: Site, name: str, **changes: Any) -> Release:
    """A run up to sft, submitted."""
    release = Release(site, name, {"pipeline.until": "sft", **changes})
    release.submit()
    return release


def same_adapter(site: Site, release: Release, undisturbed: str = "base") -> str:
    """Compare the adapter with that of the undisturbed run, and clear up."""
    expected, got = Release(site, undisturbed).digest("sft"), release.digest("sft")
    assert expected == got, f"the adapter is {got}, undisturbed {expected}"
    release.cancel()
    return f"adapter {got[:19]} as undisturbed"
