"""Stages with shards. Whatever happens to one shard, the others run on, and no row is drawn twice."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from typing import Any

from tests.e2e.environment import BUCKET, ClusterEnvironment, wait
from tests.e2e.release import Release
from tests.support.store_servers import s3_client

_STAGE = "candidates"
_SHARD = "medjob/shard"
# Answers that take a shard about a minute, so that it can be disturbed at work.
_CHANGES = {
    "pipeline.until": _STAGE,
    "run.stages": ["prepare", _STAGE],
    "run.prepare.preference_rows": 40,
    "run.candidates.num_candidates": 32,
    "run.candidates.max_new_tokens": 384,
    "resources.candidates.batchSize": 1,
}


def three_shards(cluster: ClusterEnvironment) -> str:
    """Three pods share the rows, and their artifact is that of a single pod."""
    release = _with_shards(cluster, "inthree")
    pods = release.pods(_STAGE, running=True)
    nodes = {pod["spec"]["nodeName"] for pod in pods}
    shown = wait(
        "the status of the shards",
        lambda: _status_line(cluster, "inthree", "3 shards: "),
        120,
    )
    release.wait_until_done()
    jobs = release.jobs(_STAGE)
    assert sorted(job["metadata"]["labels"][_SHARD] for job in jobs) == [
        "0-of-3",
        "1-of-3",
        "2-of-3",
    ]
    assert not [pod for pod in release.pods(_STAGE) if pod["status"]["phase"] != "Succeeded"]
    rows = _rows_by_shard(cluster, "inthree")
    return f"{shown}, on {len(nodes)} nodes; {rows}; {_same_artifact(cluster, release)}"


def evicted_shard(cluster: ClusterEnvironment) -> str:
    """Only the evicted shard gets another pod, which continues from its rows."""
    release = _with_shards(cluster, "shardout")
    uids = _uids(release)
    _wait_for_rows(cluster, "shardout", "1-of-3")
    (pod,) = [p for p in release.pods(_STAGE) if p["metadata"]["labels"][_SHARD] == "1-of-3"]
    cluster.evict(pod["metadata"]["name"])
    release.wait_until_done()
    _assert_only_redone(release, uids, {"1-of-3"})
    (outcome,) = release.outcomes(_STAGE)
    assert outcome["kind"] == "preempted", outcome
    assert outcome["reach"] > 0, outcome
    rows = _rows_by_shard(cluster, "shardout")
    return f"143 after {outcome['reach']} part(s); {rows}; {_same_artifact(cluster, release)}"


def lost_shard(cluster: ClusterEnvironment) -> str:
    """The shards of a node that loses power run again; the pods on the other node are kept."""
    cluster.require_node_control()
    release = _with_shards(cluster, "shardlost")
    uids = _uids(release)
    pods = release.pods(_STAGE, running=True)
    nodes = Counter(str(pod["spec"]["nodeName"]) for pod in pods)
    node = min(nodes, key=lambda name: nodes[name])
    lost = {p["metadata"]["labels"][_SHARD] for p in pods if p["spec"]["nodeName"] == node}
    assert len(lost) < 3, "all shards are on one node"
    for shard in lost:
        _wait_for_rows(cluster, "shardlost", shard)
    cluster.node("stop-node", node)
    began = time.monotonic()
    try:
        wait(
            "the lost shards on the other node",
            lambda: lost <= {_shard(p) for p in _elsewhere(release, node) if _is_new(p, uids)},
            480,  # the orchestrator may have been on the same node
        )
        took = time.monotonic() - began
        release.wait_until_done()
    finally:
        cluster.node("start-node", node)
    cluster.wait_for_nodes()
    _assert_only_redone(release, uids, lost)
    kinds = {outcome["kind"] for outcome in release.outcomes(_STAGE)}
    assert kinds == {"preempted"}, kinds
    rows = _rows_by_shard(cluster, "shardlost")
    return (
        f"{', '.join(sorted(lost))} ran again after {took:.0f} s; {rows}; "
        f"{_same_artifact(cluster, release)}"
    )


def _with_shards(cluster: ClusterEnvironment, name: str, shards: int = 3) -> Release:
    """Submit a run up to candidates, and wait until all of its shards run."""
    release = Release(cluster, name, {**_CHANGES, "resources.candidates.shards": shards})
    release.submit()
    wait(f"{shards} shards", lambda: len(release.pods(_STAGE, running=True)) == shards, 300)
    return release


def _uids(release: Release) -> dict[str, str]:
    """Uid of each shard's pod."""
    return {_shard(pod): str(pod["metadata"]["uid"]) for pod in release.pods(_STAGE, running=True)}


def _shard(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["labels"][_SHARD])


def _is_new(pod: dict[str, Any], uids: dict[str, str]) -> bool:
    return uids[_shard(pod)] != pod["metadata"]["uid"]


def _elsewhere(release: Release, node: str) -> list[dict[str, Any]]:
    return [p for p in release.pods(_STAGE, running=True) if p["spec"].get("nodeName") != node]


def _assert_only_redone(release: Release, uids: dict[str, str], redone: set[str]) -> None:
    """Check that each other shard has one Job, and that its pod is the first one."""
    jobs = Counter(job["metadata"]["labels"][_SHARD] for job in release.jobs(_STAGE))
    assert {shard for shard in uids if jobs[shard] == 1} >= uids.keys() - redone, jobs
    pods = {_shard(pod): pod["metadata"]["uid"] for pod in release.pods(_STAGE)}
    for shard, uid in uids.items():
        assert (pods[shard] == uid) is (shard not in redone), f"{shard}: {pods} {uids}"


def _wait_for_rows(cluster: ClusterEnvironment, run: str, shard: str) -> None:
    """Wait until a shard has stored rows."""
    wait(f"rows of {shard}", lambda: f"{shard}" in _parts(cluster, run), 240)


def _parts(cluster: ClusterEnvironment, run: str) -> dict[str, list[str]]:
    """Keys of the finished rows by shard."""
    found: dict[str, list[str]] = {}
    for key in cluster.objects(f"runs/{run}/{_STAGE}/"):
        match = re.search(r"/shards/([0-9]+-of-[0-9]+)/parts/", key)
        if match:
            found.setdefault(match[1], []).append(key)
    return found


def _rows_by_shard(cluster: ClusterEnvironment, run: str) -> str:
    """Count the stored rows of each shard, and check that none was drawn twice."""
    client: Any = s3_client(cluster.gateway.endpoint)
    drawn: Counter[tuple[str, str]] = Counter()
    counts: dict[str, int] = {}
    for shard, keys in sorted(_parts(cluster, run).items()):
        for key in keys:
            kind = key.split("/parts/")[1].split("/")[0]
            lines = client.get_object(Bucket=BUCKET, Key=key)["Body"].read().splitlines()[1:]
            ids = [str(json.loads(line)["id"]) for line in lines]
            drawn.update((kind, each) for each in ids)
            if not kind.endswith("longer"):
                counts[shard] = counts.get(shard, 0) + len(ids)
    twice = [each for each, number in drawn.items() if number > 1]
    assert not twice, f"drawn twice: {twice}"
    assert sum(counts.values()) == _CHANGES["run.prepare.preference_rows"], counts
    return f"rows by shard: {', '.join(map(str, counts.values()))}, none twice"


def _status_line(cluster: ClusterEnvironment, name: str, text: str) -> str:
    lines = cluster.medjob("status", name, "-n", cluster.namespace, check=False).stdout.splitlines()
    return next((line for line in lines if text in line), "")


def _same_artifact(cluster: ClusterEnvironment, release: Release) -> str:
    """Compare the artifact with that of a run without shards, and cancel the release."""
    whole = Release(cluster, "whole", _CHANGES)
    if not cluster.objects("runs/whole/candidates/"):
        whole.submit()
        whole.wait_until_done()
        whole.cancel()
    expected, got = whole.digest(_STAGE), release.digest(_STAGE)
    assert expected == got, f"artifact {got}, but {expected} without shards"
    release.cancel()
    return f"artifact {got[:19]} as without shards"
