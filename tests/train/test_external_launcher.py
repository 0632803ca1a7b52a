"""Training processes that torchrun starts: on one node, and on two nodes with private disks."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.cli_process import digests, finish, start, wait_for
from tests.support.ports import free_ports
from tests.support.resume_matrix import Base, after, fork, marker, record, undisturbed

EXTERNAL = ("--set", "resources.sft.launcher=external")
SETTINGS = ("--set", "resources.sft.deepspeed=zero2", "--set", "resources.sft.microBatchSize=1")


def torchrun(file: Path, *options: str, disk: str = "disk") -> subprocess.Popen[str]:
    """Start `medjob sft` with torchrun. Nothing but its variables names the processes."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "medjob", "sft"]
    work_dir = f"cluster.workDir={file.parent}/{disk}"
    arguments = ["-f", str(file), *EXTERNAL, *SETTINGS, "--set", work_dir]
    return subprocess.Popen(
        [*command, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=file.parent,
    )


def two_processes(file: Path) -> subprocess.Popen[str]:
    """Start one node with two processes."""
    port = free_ports(3)[0]
    return torchrun(file, "--nproc-per-node", "2", "--master-port", str(port))


def two_nodes(file: Path, disks: str) -> list[subprocess.Popen[str]]:
    """Start two nodes with one process each."""
    port = str(free_ports(3)[0])
    shared = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    return [
        torchrun(file, *shared, "--node-rank", str(node), disk=f"{disks}-{node}") for node in (0, 1)
    ]


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes that torchrun has started, by local rank."""
    children = psutil.Process(launcher.pid).children()
    return {int(child.environ()["LOCAL_RANK"]): child for child in children}


@pytest.mark.slow
def test_two_processes_produce_the_bytes_of_our_own_launcher(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft"), tmp_path / "run")
    finish(two_processes(file))
    assert record(file, "sft")["exit_code"] == 0
    finish(start(file, "outcome", "sft"), 0)
    assert marker(file, "sft")["digest"] == undisturbed(base("sft"), "sft", 2, "zero2")["digest"]
    assert "skipped" in finish(two_processes(file))  # both processes end, though nothing trains


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["torchrun", "local rank 1"])
def test_stopped_training_resumes(base: Base, tmp_path: Path, victim: str) -> None:
    """torchrun itself exits with 1 after a stop, so the record tells how the attempt ended."""
    file = fork(base("sft"), tmp_path / "run")
    launcher = two_processes(file)
    wait_for(launcher, after(file, "sft", 8), file.parent / "store")
    if victim == "torchrun":
        launcher.send_signal(signal.SIGTERM)
    else:
        ranks_of(launcher)[int(victim[-1])].send_signal(signal.SIGTERM)
    errors = finish(launcher, 1)
    assert "sft" not in digests(file.parent / "store")  # it was interrupted
    assert record(file, "sft")["exit_code"] == 143, errors
    assert "the state is saved" in record(file, "sft")["reason"]
    finish(start(file, "outcome", "sft"), 143)
    assert "resuming from step" in finish(two_processes(file))
    assert marker(file, "sft")["digest"] == undisturbed(base("sft"), "sft", 2, "zero2")["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_the_others(base: Base, tmp_path: Path, victim: int) -> None:
    file = fork(base("sft"), tmp_path / "run")
    launcher = two_processes(file)
    wait_for(launcher, after(file, "sft", 8), file.parent / "store")
    ranks = ranks_of(launcher)
    ranks[victim].kill()
    finish(launcher, 1)
    assert not any(rank.is_running() for rank in ranks.values())
    errors = finish(start(file, "outcome", "sft"), 75)
    if victim == 0:  # the parent: nothing is left that could store an outcome
        assert "attempt 1 has stored no outcome" in errors
    else:
        assert "training process 1 ended" in record(file, "sft")["reason"]


@pytest.mark.slow
def test_two_nodes_with_private_disks_stop_and_resume(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft"), tmp_path / "run")
    nodes = two_nodes(file, "disk")
    wait_for(nodes[0], after(file, "sft", 8), file.parent / "store")
    nodes[1].send_signal(signal.SIGTERM)
    for node in nodes:
        finish(node, 1)
    assert record(file, "sft")["exit_code"] == record(file, "sft", "1-node1")["exit_code"] == 143
    for node in two_nodes(file, "new-disk"):
        assert "resuming from step" in finish(node)
    assert marker(file, "sft")["digest"] == undisturbed(base("sft"), "sft", 2, "zero2")["digest"]


@pytest.mark.slow
def test_a_killed_node_ends_the_other_one(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft"), tmp_path / "run")
    nodes = two_nodes(file, "disk")
    wait_for(nodes[0], after(file, "sft", 8), file.parent / "store")
    for process in (*psutil.Process(nodes[1].pid).children(), nodes[1]):
        process.kill()
    finish(nodes[0], 1)
    assert record(file, "sft")["exit_code"] == 75
    assert "lost the connection to node 1" in record(file, "sft")["reason"]
    for node in two_nodes(file, "new-disk"):
        finish(node)
    assert marker(file, "sft")["digest"] == undisturbed(base("sft"), "sft", 2, "zero2")["digest"]


def test_a_launcher_is_needed(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft", method="lora"), tmp_path / "run")
    errors = finish(start(file, "sft", *EXTERNAL), 64)
    assert "resources.sft.launcher is external, but RANK is not set" in errors
    assert "torchrun" in errors
    errors = finish(start(file, "run", *EXTERNAL), 64)
    assert "`medjob run` starts the processes itself" in errors


def test_batch_size_must_fit_the_launchers_processes(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft", method="lora"), tmp_path / "run")
    environment = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment["MASTER_ADDR"] = "127.0.0.1"
    errors = finish(start(file, "sft", *EXTERNAL, env=environment), 64)
    assert "run.sft.global_batch_size (4) must be a multiple of" in errors


def test_wrong_rank_ends_with_the_code_of_its_parent(base: Base, tmp_path: Path) -> None:
    """A process without its own error exits as local rank 0 does, here with 64."""
    file = fork(base("sft", method="lora"), tmp_path / "run")
    tree = {"WORLD_SIZE": "3", "MASTER_PORT": str(free_ports(3)[0])}
    ranks = [
        start(file, "sft", *EXTERNAL, env=tree | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1", "2")
    ]
    errors = [finish(rank, 64) for rank in ranks]
    assert "global_batch_size" in errors[0]
    assert errors[1:] == ["", ""]  # the reason is printed once
