"""What has to hold on a real cluster: one function a row. Each returns what it saw, or raises AssertionError."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from tests.e2e.release import STAGES, Release
from tests.e2e.site import Site


def install_and_complete(site: Site) -> str:
    """The run completes, stage after stage."""
    release = Release(site, "base")
    began = time.monotonic()
    release.submit()
    release.wait_until_done()
    took = time.monotonic() - began
    seen = {stage: release.jobs(stage) for stage in STAGES}
    assert all(len(jobs) == 1 for jobs in seen.values()), {stage: len(jobs) for stage, jobs in seen.items()}
    gaps = _gaps([seen[stage][0] for stage in STAGES])
    return f"8 stages in {took:.0f} s; from a stage's end to the next Job {min(gaps):.0f} to {max(gaps):.0f} s"


def _gaps(jobs: list[dict[str, Any]]) -> list[float]:
    begun = [datetime.fromisoformat(job["metadata"]["creationTimestamp"]) for job in jobs]
    ended = [datetime.fromisoformat(job["status"]["completionTime"]) for job in jobs]
    return [(later - earlier).total_seconds() for earlier, later in zip(ended[:-1], begun[1:], strict=True)]


def again_skips_everything(site: Site) -> str:
    """Submitting the same run again starts no stage."""
    release = Release(site, "base")
    before = {stage: [job["metadata"]["name"] for job in release.jobs(stage)] for stage in STAGES}
    began = time.monotonic()
    release.submit()
    release.wait_until_done()
    assert before == {stage: [job["metadata"]["name"] for job in release.jobs(stage)] for stage in STAGES}
    return f"nothing was started; done after {time.monotonic() - began:.0f} s"


def uninstall_leaves_nothing(site: Site) -> str:
    """`medjob cancel` leaves no object."""
    release = Release(site, "base")
    count = len(release.leftovers())
    assert count > 10, count
    release.cancel()
    return f"{count} objects gone; the bucket keeps {len(site.objects('runs/base/'))}"


def eviction(site: Site) -> str:
    """A pod evicted in mid-sft exits 143; the run goes on and ends with the same adapter."""
    release = _training(site, "evicted")
    pod = release.wait_for_pod("sft")["metadata"]["name"]
    release.wait_for_checkpoint()
    site.evict(pod)
    release.wait_until_done()
    (verdict,) = release.verdicts("sft")
    assert verdict["kind"] == "preempted", verdict
    assert verdict["code"] == 143, verdict
    assert verdict["reach"] > 0, verdict
    return f"143 at step {verdict['reach']}; {_same(site, release)}"


def _training(site: Site, name: str, **changes: Any) -> Release:
    """A run up to sft, submitted."""
    release = Release(site, name, {"pipeline.until": "sft", **changes})
    release.submit()
    return release


def _same(site: Site, release: Release) -> str:
    """Compare the adapter with that of the undisturbed run."""
    undisturbed, disturbed = Release(site, "base").digest("sft"), release.digest("sft")
    assert undisturbed == disturbed, f"{undisturbed} {disturbed}"
    release.cancel()
    return f"adapter {disturbed[:19]}... as undisturbed"


SMOKE = (install_and_complete, eviction, uninstall_leaves_nothing)
ALL = (install_and_complete, again_skips_everything, eviction, uninstall_leaves_nothing)
