"""Training on two nodes with private disks, simulated by process groups on this machine."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.cli_process import finish, start, wait_for
from tests.support.ports import free_ports
from tests.support.resume_matrix import Base, after, devices, fork, marker, record, undisturbed


def start_nodes(file: Path, stage: str, deepspeed: str, disks: str) -> list[subprocess.Popen[str]]:
    """Start two nodes with private disks and one store."""
    port, nodes = str(free_ports(2)[0]), []
    for n in (0, 1):
        env = {"NODE_RANK": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        disk = ["--set", f"cluster.workDir={file.parent}/{disks}-{n}"]
        nodes.append(start(file, stage, *devices(stage, 1, deepspeed, nodes=2), *disk, env=env))
    return nodes


@pytest.mark.slow
def test_two_nodes_produce_the_bytes_of_one_node(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft"), tmp_path / "run")
    for node in start_nodes(file, "sft", "zero2", "disk"):
        finish(node)
    assert marker(file, "sft")["digest"] == undisturbed(base("sft"), "sft", 2, "zero2")["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_two_nodes_with_private_disks_stop_and_resume(
    base: Base, tmp_path: Path, deepspeed: str
) -> None:
    signalled = fork(base("sft"), tmp_path / "signalled")
    nodes = start_nodes(signalled, "sft", deepspeed, "disk")
    wait_for(nodes[0], after(signalled, "sft", 8), signalled.parent / "store")
    nodes[1].send_signal(signal.SIGTERM)
    for node in nodes:
        finish(node, 143)  # both nodes save, also the one without the signal
    assert (
        record(signalled, "sft")["exit_code"]
        == record(signalled, "sft", "1-node1")["exit_code"]
        == 143
    )
    step = max((signalled.parent / "store").glob("t/sft/*/checkpoints/step-*"))
    shards = [
        {path.name for path in (step / f"part-{n}").rglob("*optim_states.pt")} for n in (0, 1)
    ]
    assert len(shards[0]) == len(shards[1]) == 1  # each node stored its own shard
    assert shards[0] != shards[1]
    for node in start_nodes(signalled, "sft", deepspeed, "new-disk"):
        assert "resuming from step" in finish(node)
    assert (
        marker(signalled, "sft")["digest"]
        == undisturbed(base("sft"), "sft", 2, deepspeed)["digest"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_node_ends_the_other_with_75(base: Base, tmp_path: Path, victim: int) -> None:
    """Within ten seconds and without a save. Both resume from the last checkpoint."""
    file = fork(base("sft"), tmp_path / "run")
    nodes = start_nodes(file, "sft", "zero2", "disk")
    wait_for(nodes[0], after(file, "sft", 8), file.parent / "store")
    nodes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    finish(nodes[victim], -9)
    errors = finish(nodes[1 - victim], 75)
    assert time.monotonic() - killed < 10
    assert "lost the connection to node" in errors
    assert record(file, "sft", "1" if victim else "1-node1")["exit_code"] == 75
    for node in start_nodes(file, "sft", "zero2", "new-disk"):
        finish(node)
    assert marker(file, "sft")["digest"] == undisturbed(base("sft"), "sft", 2, "zero2")["digest"]


def test_several_nodes_need_a_rank(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft", method="lora"), tmp_path / "run")
    errors = finish(start(file, "sft", *devices("sft", 1, "auto", nodes=2)), 64)
    assert "resources.sft.nodes is 2, but NODE_RANK or MASTER_ADDR is not set" in errors
    errors = finish(start(file, "run", *devices("sft", 1, "auto", nodes=2)), 64)
    assert "resources.sft.nodes is 2, but `medjob run` uses one machine" in errors
