"""Disruptions of a training. The adapter must equal that of an undisturbed run bit for bit."""

from __future__ import annotations

import time
from typing import Any

from tests.e2e.environment import ClusterEnvironment, wait
from tests.e2e.release import Release
from tests.e2e.scenarios import on_two_nodes, same_adapter, training

GRACE_S = 30


def eviction(cluster: ClusterEnvironment) -> str:
    """A pod that is evicted during sft exits 143, and the run ends with the same adapter."""
    release = training(cluster, "evicted")
    pod = release.wait_for_pod("sft")["metadata"]["name"]
    release.wait_for_checkpoint()
    cluster.evict(pod)
    release.wait_until_done()
    (outcome,) = release.outcomes("sft")
    assert outcome["kind"] == "preempted", outcome
    assert outcome["code"] == 143, outcome
    assert outcome["reach"] > 0, outcome
    return f"143 at step {outcome['reach']}; {same_adapter(cluster, release)}"


def early_signal(cluster: ClusterEnvironment) -> str:
    """SIGTERM within a second of the start ends the pod at once, and no work is lost."""
    release = training(cluster, "early")
    pod = release.wait_for_pod("sft")["metadata"]["name"]
    cluster.evict(pod)
    began = time.monotonic()
    wait(
        "the end of the pod",
        lambda: pod not in [p["metadata"]["name"] for p in release.pods("sft", running=True)],
        GRACE_S,
    )
    wait("another attempt", lambda: len(release.jobs("sft")) == 2, 60)
    took = time.monotonic() - began
    release.wait_until_done()
    (outcome,) = release.outcomes("sft")
    assert outcome["kind"] == "preempted", outcome
    return f"another attempt after {took:.0f} s; {same_adapter(cluster, release)}"


def eviction_of_a_peer(cluster: ClusterEnvironment) -> str:
    """On two nodes, the eviction of one pod counts as a preemption, and both continue.

    The peer exits 143 too, perhaps first.
    """
    release = on_two_nodes(cluster, "peers")
    release.wait_for_checkpoint()
    cluster.evict(release.pods("sft", running=True)[-1]["metadata"]["name"])
    release.wait_until_done()
    (outcome,) = release.outcomes("sft")
    assert outcome["kind"] == "preempted", outcome
    reason = release.jobs("sft")[0]["status"]["conditions"][0].get("reason")
    adapter = same_adapter(cluster, release, "two")
    return f"the Job's own reason: {reason}; step {outcome['reach']}; {adapter}"


def lost_node(cluster: ClusterEnvironment) -> str:
    """The run recovers if a node loses power during sft and its Node object remains."""
    cluster.require_node_control()
    release = training(cluster, "lost")
    node = release.wait_for_pod("sft")["spec"]["nodeName"]
    release.wait_for_checkpoint()
    orchestrator_node = release.wait_for_pod("orchestrator")["spec"]["nodeName"]
    cluster.node("stop-node", node)
    began = time.monotonic()
    try:
        wait(
            "sft on the other node",
            lambda: any(p["spec"]["nodeName"] != node for p in release.pods("sft", running=True)),
            GRACE_S + 180,
        )
        took = time.monotonic() - began
        release.wait_until_done()
    finally:
        cluster.node("start-node", node)
    cluster.wait_for_nodes()
    (outcome,) = release.outcomes("sft")
    assert outcome["kind"] == "preempted", outcome
    where = "the same" if orchestrator_node == node else "another"
    return (
        f"sft ran again after {took:.0f} s, the orchestrator on {where} node; "
        f"{same_adapter(cluster, release)}"
    )


def cut_off_node(cluster: ClusterEnvironment) -> str:
    """A pod that was cut off and replaced cannot overwrite its successor's objects.

    The node is cut off during an upload, its Node object is deleted, a replacement starts, and the
    node joins again. Both pods have written, and the store answers the old one with 412.
    """
    cluster.require_node_control()
    gateway = cluster.gateway
    release = training(cluster, "cut")
    pod = release.wait_for_pod("sft")
    node = pod["spec"]["nodeName"]
    old_name = pod["metadata"]["name"]
    old_address = pod["status"]["podIP"]
    release.wait_for_checkpoint()
    # By now the pod has checked that it owns the artifact. It continues from here once it is back.
    gateway.hold(old_address, "/part-0/")
    assert gateway.held.wait(60), "no checkpoint was being uploaded"
    cut_at = time.time()
    try:
        cluster.node("cut-node", node)
        cluster.kubectl("delete", "node", node)
        replacements = wait("a replacement pod", lambda: _pods_on_other_nodes(release, node), 240)
        new_address = replacements[0]["status"]["podIP"]
        wait(
            "the first write of the replacement",
            lambda: any(r.client == new_address for r in gateway.writes("/cut/sft/", cut_at)),
            120,
        )
    finally:
        cluster.node("join-node", node)
        gateway.release()
    joined_at = time.time()
    wait(
        "412 for the old pod",
        lambda: any(
            request.client == old_address and request.status == 412
            for request in gateway.writes("/LATEST.json", joined_at)
        ),
        180,
    )
    codes = wait(
        "the recorded outcome of the old pod",
        lambda: [r["exit_code"] for r in _records(cluster, "cut") if r.get("host") == old_name],
        60,
    )
    assert codes == [76], codes
    release.wait_until_done()
    cluster.node("stop-node", node)
    cluster.node("start-node", node)
    cluster.wait_for_nodes()
    total = _count_accepted_writes(cluster, old_address, since=0.0)
    late = _count_accepted_writes(cluster, old_address, since=joined_at)
    new = sum(request.client == new_address for request in gateway.writes("/cut/sft/"))
    checked = cluster.verify(release.run)
    return (
        f"the old pod wrote {total} objects, {late} of them after it was back, then got 412 and "
        f"exited with 76; the new one wrote {new}; {checked}; {same_adapter(cluster, release)}"
    )


def _pods_on_other_nodes(release: Release, node: str) -> list[dict[str, Any]]:
    return [p for p in release.pods("sft", running=True) if p["spec"].get("nodeName") != node]


def _count_accepted_writes(cluster: ClusterEnvironment, address: str, since: float) -> int:
    return sum(
        request.client == address and request.status < 400
        for request in cluster.gateway.writes("/cut/sft/", since)
    )


def _records(cluster: ClusterEnvironment, run: str) -> list[dict[str, Any]]:
    """Read the recorded outcomes of the attempts at sft."""
    return [cluster.read(key) for key in cluster.objects(f"runs/{run}/sft/") if "/attempts/" in key]


def uninstall_and_install(cluster: ClusterEnvironment) -> str:
    """A release reinstalled during sft has two overlapping attempts, and nothing is damaged."""
    release = training(cluster, "again")
    release.wait_for_pod("sft")
    release.wait_for_checkpoint()
    cluster.helm("uninstall", "again")
    release.submit()
    release.wait_until_done()
    checked = cluster.verify(release.run)
    epochs = sorted(
        {
            key.split("/attempts/")[1].split(".")[0]
            for key in cluster.objects("runs/again/sft/")
            if "/attempts/" in key
        }
    )
    return f"attempts {', '.join(epochs)}; {checked}; {same_adapter(cluster, release)}"


def lost_orchestrator(cluster: ClusterEnvironment) -> str:
    """Another orchestrator takes over when the pod is deleted, and sft is not interrupted."""
    release = training(cluster, "neworch")
    pod = release.wait_for_pod("sft")["metadata"]["uid"]
    release.wait_for_checkpoint()
    first = release.wait_for_pod("orchestrator")["metadata"]["name"]
    cluster.kubectl("delete", "pod", first, "--grace-period=0", "--force")
    release.wait_until_done()
    assert [p["metadata"]["uid"] for p in release.pods("sft")] == [pod]
    assert first not in [p["metadata"]["name"] for p in release.pods("orchestrator")]
    return f"one pod of sft from start to end; {same_adapter(cluster, release)}"


def store_away(cluster: ClusterEnvironment) -> str:
    """Training and the orchestrator continue while the S3 server is unreachable for a minute."""
    release = training(cluster, "away")
    pod = release.wait_for_pod("sft")["metadata"]["uid"]
    release.wait_for_checkpoint()
    cluster.gateway.unavailable.set()
    time.sleep(60)
    cluster.gateway.unavailable.clear()
    release.wait_until_done()
    assert [p["metadata"]["uid"] for p in release.pods("sft")] == [pod]
    return f"one attempt; {same_adapter(cluster, release)}"


def deleted_job(cluster: ClusterEnvironment) -> str:
    """Deleting a Job by hand deletes its pod, and the run continues with the next attempt."""
    release = training(cluster, "deleted")
    pod = release.wait_for_pod("sft")["metadata"]["name"]
    release.wait_for_checkpoint()
    cluster.kubectl("delete", "job", release.jobs("sft")[0]["metadata"]["name"], "--wait=false")
    release.wait_until_done()
    assert pod not in [p["metadata"]["name"] for p in release.pods("sft")]
    return f"its pod is gone; {same_adapter(cluster, release)}"
