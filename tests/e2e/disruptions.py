"""What clusters do to a training, and what must come of it: the adapter of an undisturbed run, bit for bit."""

from __future__ import annotations

import time
from typing import Any

from tests.e2e.scenarios import on_two_nodes, same_adapter, training
from tests.e2e.site import Site, wait

GRACE_S = 30


def eviction(site: Site) -> str:
    """A pod evicted in mid-sft exits 143; the run goes on and ends with the same adapter."""
    release = training(site, "evicted")
    pod = release.wait_for_pod("sft")["metadata"]["name"]
    release.wait_for_checkpoint()
    site.evict(pod)
    release.wait_until_done()
    (verdict,) = release.verdicts("sft")
    assert verdict["kind"] == "preempted", verdict
    assert verdict["code"] == 143, verdict
    assert verdict["reach"] > 0, verdict
    return f"143 at step {verdict['reach']}; {same_adapter(site, release)}"


def early_signal(site: Site) -> str:
    """SIGTERM within a second of the start ends the pod at once, and costs nothing."""
    release = training(site, "early")
    pod = release.wait_for_pod("sft")["metadata"]["name"]
    site.evict(pod)
    began = time.monotonic()
    wait(
        "the pod's end",
        lambda: pod not in [p["metadata"]["name"] for p in release.pods("sft", running=True)],
        GRACE_S,
    )
    wait("another attempt", lambda: len(release.jobs("sft")) == 2, 60)
    took = time.monotonic() - began
    release.wait_until_done()
    (verdict,) = release.verdicts("sft")
    assert verdict["kind"] == "preempted", verdict
    return f"another attempt after {took:.0f} s; {same_adapter(site, release)}"


def eviction_of_a_peer(site: Site) -> str:
    """On two nodes: one pod is evicted, its peer exits 143 too, perhaps first; booked as a preemption, and both go on."""
    release = on_two_nodes(site, "peers")
    release.wait_for_checkpoint()
    site.evict(release.pods("sft", running=True)[-1]["metadata"]["name"])
    release.wait_until_done()
    (verdict,) = release.verdicts("sft")
    assert verdict["kind"] == "preempted", verdict
    reason = release.jobs("sft")[0]["status"]["conditions"][0].get("reason")
    return f"the Job's own reason: {reason}; step {verdict['reach']}; {same_adapter(site, release, 'two')}"


def lost_node(site: Site) -> str:
    """A node loses power in mid-sft and its Node object stays: the run recovers by itself."""
    site.needs_power_switches()
    release = training(site, "lost")
    node = release.wait_for_pod("sft")["spec"]["nodeName"]
    release.wait_for_checkpoint()
    walker = release.wait_for_pod("orchestrator")["spec"]["nodeName"]
    site.node("stop-node", node)
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
        site.node("start-node", node)
    site.wait_for_nodes()
    (verdict,) = release.verdicts("sft")
    assert verdict["kind"] == "preempted", verdict
    where = "the same" if walker == node else "another"
    return f"sft ran again after {took:.0f} s, the orchestrator on {where} node; {same_adapter(site, release)}"


def cut_off_node(site: Site) -> str:
    """A node is cut off in mid-upload, its Node object deleted, a replacement starts, the node joins again: both wrote, the old one gets 412."""
    site.needs_power_switches()
    release = training(site, "cut")
    pod = release.wait_for_pod("sft")
    node, address, old = pod["spec"]["nodeName"], pod["status"]["podIP"], pod["metadata"]["name"]
    release.wait_for_checkpoint()
    site.door.hold(
        address, "/part-0/"
    )  # it has seen that it owns the artifact, and goes on from there once it is back
    assert site.door.held.wait(60), "no checkpoint was under way"
    began = time.time()
    try:
        site.node("cut-node", node)
        site.kubectl("delete", "node", node)
        wait(
            "a replacement",
            lambda: any(
                p["spec"].get("nodeName") != node for p in release.pods("sft", running=True)
            ),
            240,
        )
        other = next(p for p in release.pods("sft", running=True) if p["spec"]["nodeName"] != node)[
            "status"
        ]["podIP"]
        wait(
            "its first write",
            lambda: any(r.client == other for r in site.door.writes("/cut/sft/", began)),
            120,
        )
    finally:
        site.node("join-node", node)
        site.door.let_go()
    joined = time.time()
    wait(
        "412 for the old one",
        lambda: [
            r
            for r in site.door.writes("/LATEST.json", joined)
            if r.client == address and r.status == 412
        ],
        180,
    )
    codes = wait(
        "its record",
        lambda: [r["exit_code"] for r in _records(site, "cut") if r.get("host") == old],
        60,
    )
    assert codes == [76], codes
    release.wait_until_done()
    site.node("stop-node", node)
    site.node("start-node", node)
    site.wait_for_nodes()
    before, after = (
        sum(r.client == address and r.status < 400 for r in site.door.writes("/cut/sft/", t))
        for t in (0.0, joined)
    )
    checked = site.verify(release.run)
    return (
        f"the old pod wrote {before} objects, {after} of them after it was back, then got 412 and ended with 76; the new one wrote "
        f"{sum(r.client == other for r in site.door.writes('/cut/sft/'))}; {checked}; {same_adapter(site, release)}"
    )


def _records(site: Site, run: str) -> list[dict[str, Any]]:
    """What the attempts at sft have stored of their ends."""
    return [site.read(key) for key in site.objects(f"runs/{run}/sft/") if "/attempts/" in key]


def uninstall_and_install(site: Site) -> str:
    """Uninstalled and installed at once in mid-sft: two attempts overlap, and nothing is damaged."""
    release = training(site, "again")
    release.wait_for_pod("sft")
    release.wait_for_checkpoint()
    site.helm("uninstall", "again")
    release.submit()
    release.wait_until_done()
    checked = site.verify(release.run)
    epochs = sorted(
        {
            key.split("/attempts/")[1].split(".")[0]
            for key in site.objects("runs/again/sft/")
            if "/attempts/" in key
        }
    )
    return f"attempts {', '.join(epochs)}; {checked}; {same_adapter(site, release)}"


def lost_orchestrator(site: Site) -> str:
    """The orchestrator's pod is deleted in mid-sft: another one takes over, and sft does not notice."""
    release = training(site, "walker")
    pod = release.wait_for_pod("sft")["metadata"]["uid"]
    release.wait_for_checkpoint()
    first = release.wait_for_pod("orchestrator")["metadata"]["name"]
    site.kubectl("delete", "pod", first, "--grace-period=0", "--force")
    release.wait_until_done()
    assert [p["metadata"]["uid"] for p in release.pods("sft")] == [pod]
    assert first not in [p["metadata"]["name"] for p in release.pods("orchestrator")]
    return f"one pod of sft from start to end; {same_adapter(site, release)}"


def store_away(site: Site) -> str:
    """The S3 server is away for a minute in mid-sft: training goes on, and so does the orchestrator."""
    release = training(site, "away")
    pod = release.wait_for_pod("sft")["metadata"]["uid"]
    release.wait_for_checkpoint()
    site.door.away.set()
    time.sleep(60)
    site.door.away.clear()
    release.wait_until_done()
    assert [p["metadata"]["uid"] for p in release.pods("sft")] == [pod]
    return f"one attempt; {same_adapter(site, release)}"


def deleted_job(site: Site) -> str:
    """A Job deleted by hand leaves no pod without an owner, and the run goes on with the next attempt."""
    release = training(site, "deleted")
    pod = release.wait_for_pod("sft")["metadata"]["name"]
    release.wait_for_checkpoint()
    site.kubectl("delete", "job", release.jobs("sft")[0]["metadata"]["name"], "--wait=false")
    release.wait_until_done()
    assert pod not in [p["metadata"]["name"] for p in release.pods("sft")]
    return f"its pod is gone; {same_adapter(site, release)}"
