"""Training in several processes and on several nodes: stopped, killed and resumed, it ends with the same bytes."""

import json
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from medjob.artifact import Attempt
from medjob.config.load import merge, validate
from medjob.runner import Line
from medjob.stage import get_stage
from tests.conftest import fetched
from tests.processes import digests, finish, start, wait_for

LONG = {"global_batch_size": 4, "max_steps": 24, "save_steps": 4, "eval_steps": 8}
Base = Callable[..., Path]


_published: dict[str, Path] = {}


@pytest.fixture
def base(tree: dict[str, Any], tmp_path: Path) -> Base:
    """Make a run file whose inputs are published: all stages before the one to try. Made once; tests work on copies."""

    def make(stage: str, **changes: Any) -> Path:
        key = f"{stage} {json.dumps(changes)}"
        if key not in _published:
            values = {"method": "qlora", "sft": {**LONG}, "dpo": {**LONG, "learning_rate": 1e-3, "validation_fraction": 0.2}}
            job = merge(tree, {"run": merge(values, changes)})
            line = Line.open(validate(job))
            for name in ("fetch", "prepare") if stage == "sft" else ("fetch", "prepare", "sft"):
                line.run(get_stage(name))
            if stage == "dpo":
                publish_candidates(line, tmp_path)
                line.run(get_stage("judge"))
            _published[key] = tmp_path / "run.yaml"
            _published[key].write_text(yaml.safe_dump(job))
        return _published[key]

    return make


def publish_candidates(line: Line, tmp_path: Path) -> None:
    """Texts of our own in place of a random model's, so that there are pairs to train on."""
    folder = tmp_path / "candidates"
    folder.mkdir()
    prompts = pq.read_table(fetched(line, "prepare") / "preferences.parquet").to_pylist()
    rows = [
        {"id": prompt["id"], "candidate": n, "text": text, "tokens": 5, "truncated": False}
        for prompt in prompts
        for n, text in enumerate((prompt["reference"], "Nothing is known about it."))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "candidates.parquet")
    Attempt.begin(line.artifact(get_stage("candidates")), "test").publish(folder, {}, {}, {}, {})


def fork(file: Path, target: Path, **cluster: Any) -> Path:
    """The same run file over a copy of its store, in a work folder of its own."""
    tree = yaml.safe_load(file.read_text())
    source = Path(tree["cluster"]["store"].removeprefix("file://"))
    shutil.copytree(source, target / "store")
    tree["cluster"] = {**tree["cluster"], "store": f"file://{target}/store", "workDir": f"{target}/work", **cluster}
    (target / "run.yaml").write_text(yaml.safe_dump(tree))
    return target / "run.yaml"


def devices(stage: str, gpus: int, deepspeed: str, nodes: int = 1) -> list[str]:
    values = {"gpus": gpus, "deepspeed": deepspeed, "nodes": nodes, "microBatchSize": 1}
    return [argument for name, value in values.items() for argument in ("--set", f"resources.{stage}.{name}={value}")]


def marker(file: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads(next(file.parent.glob(f"store/t/{stage}/*/_SUCCESS.json")).read_text()))


def record(file: Path, stage: str, name: str = "1") -> dict[str, Any]:
    return dict(json.loads(next(file.parent.glob(f"store/t/{stage}/*/attempts/{name}.json")).read_text()))


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "medjob.launch.worker" in " ".join(child.cmdline())]


def after(file: Path, stage: str, step: int, epoch: int = 1) -> str:
    return f"t/{stage}/*/checkpoints/step-{step:08d}-{epoch}/MANIFEST.json"


def stop(process: subprocess.Popen[str], file: Path, stage: str, how: str) -> None:
    """Stop a training after its checkpoint of step 8, some random steps later."""
    wait_for(process, after(file, stage, 8), file.parent / "store")
    time.sleep(random.random() * 0.4)
    if how == "one rank":
        random.choice(workers_of(process)).send_signal(signal.SIGTERM)
    elif how == "all ranks":
        for worker in workers_of(process):
            worker.send_signal(signal.SIGTERM)
    else:
        process.send_signal(signal.SIGKILL if how == "kill -9" else signal.SIGTERM)


_calm: dict[str, dict[str, Any]] = {}


def undisturbed(file: Path, folder: Path, stage: str, gpus: int, deepspeed: str) -> dict[str, Any]:
    """The marker of a run that is left alone; each is made once."""
    key = f"{file} {stage} {gpus} {deepspeed}"
    if key not in _calm:
        calm = fork(file, folder / "calm")
        finish(start(calm, stage, *devices(stage, gpus, deepspeed)))
        _calm[key] = marker(calm, stage)
    return _calm[key]


def stopped_and_resumed(file: Path, folder: Path, stage: str, deepspeed: str, ways: list[str]) -> dict[str, Any]:
    """However a training on two processes is stopped, the same command ends it with the bytes of one that was left alone."""
    expected, arguments = undisturbed(file, folder, stage, 2, deepspeed), devices(stage, 2, deepspeed)
    for way in ways:
        stopped = fork(file, folder / way.replace(" ", "-"))
        process = start(stopped, stage, *arguments)
        stop(process, stopped, stage, way)
        errors = finish(process, -9 if way == "kill -9" else 143)
        assert stage not in digests(stopped.parent / "store"), errors  # it really was cut off
        if way != "kill -9":
            assert record(stopped, stage)["exit_code"] == 143
        errors = finish(start(stopped, stage, *arguments))
        assert "going on from step" in errors
        found = marker(stopped, stage)
        assert found["digest"] == expected["digest"], way
        assert found["metrics"] == expected["metrics"], way
    return expected


SIGTERM = random.choice(["parent", "one rank", "all ranks"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "deepspeed", "ways"),
    [
        ("sft", "none", [SIGTERM, "kill -9"]),
        ("sft", "zero1", [SIGTERM]),
        ("sft", "zero2", ["parent", "all ranks", "kill -9"]),
        ("sft", "zero3", [SIGTERM, "kill -9"]),
        ("dpo", "none", ["kill -9"]),
        ("dpo", "zero2", [SIGTERM, "kill -9"]),
        ("dpo", "zero3", [SIGTERM]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resume_is_bit_exact(base: Base, tmp_path: Path, stage: str, deepspeed: str, ways: list[str]) -> None:
    """NF4 and LoRA on two processes."""
    expected = stopped_and_resumed(base(stage), tmp_path, stage, deepspeed, ways)
    if stage == "dpo":  # ln 2: policy and reference are the same model, in every layout
        assert expected["metrics"]["first_loss"] == pytest.approx(0.693147, abs=2e-4)


def test_a_stopped_training_on_two_ranks_goes_on(base: Base, tmp_path: Path) -> None:
    """The fast part of the matrix."""
    stopped_and_resumed(base("sft", method="lora"), tmp_path, "sft", "zero2", ["one rank"])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "deepspeed"), [("lora", "none"), ("full", "zero3")])
def test_other_methods_resume_too(base: Base, tmp_path: Path, method: str, deepspeed: str) -> None:
    stopped_and_resumed(base("sft", method=method), tmp_path, "sft", deepspeed, ["kill -9"])


@pytest.mark.slow
@pytest.mark.parametrize(("deepspeed", "before", "then"), [("none", 2, 1), ("zero2", 2, 1), ("zero2", 1, 2), ("zero3", 2, 1)])
def test_another_number_of_processes_goes_on(base: Base, tmp_path: Path, deepspeed: str, before: int, then: int) -> None:
    """The global batch and the data stay: the curve goes on as that of an undisturbed run, to rounding."""
    expected = undisturbed(base("sft"), tmp_path, "sft", before, deepspeed)["metrics"]
    stopped = fork(base("sft"), tmp_path / "stopped")
    process = start(stopped, "sft", *devices("sft", before, deepspeed))
    stop(process, stopped, "sft", "kill -9")
    finish(process, -9)
    errors = finish(start(stopped, "sft", *devices("sft", then, "auto")))
    assert f"now there are {then}: converting it" in errors or deepspeed == "none"
    found = marker(stopped, "sft")["metrics"]
    assert found["steps"] == expected["steps"]
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=2e-3)
    assert found["last_loss"] == pytest.approx(expected["last_loss"], rel=2e-3)


@pytest.mark.slow
def test_a_checkpoint_of_another_kind_is_refused_or_followed(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft"), tmp_path / "run")
    process = start(file, "sft", *devices("sft", 2, "zero2"))
    stop(process, file, "sft", "kill -9")
    finish(process, -9)
    errors = finish(start(file, "sft", *devices("sft", 2, "none")), 64)
    assert "resources.sft.deepspeed: this training began with zero2, whose checkpoint none cannot read" in errors
    errors = finish(start(file, "sft", *devices("sft", 1, "auto")))  # left to itself one process would take none
    assert "deepspeed zero2, as the checkpoint was written with it" in errors


@pytest.mark.slow
def test_early_stopping_keeps_its_counter(base: Base, tmp_path: Path) -> None:
    """Without the counter a resumed run would stop later."""
    patient = {**LONG, "max_steps": 40, "eval_steps": 4, "early_stopping_patience": 4, "early_stopping_threshold": 5.0}
    file = base("sft", method="lora", sft=patient)
    expected = stopped_and_resumed(file, tmp_path, "sft", "zero2", ["kill -9"])
    assert expected["metrics"]["steps"] == 20


def free_ports() -> int:
    """The first of two free ports in a row."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            try:
                two.bind(("127.0.0.1", one.getsockname()[1] + 1))
            except OSError:
                continue
            return int(one.getsockname()[1])


def start_nodes(file: Path, stage: str, deepspeed: str, disks: str) -> list[subprocess.Popen[str]]:
    """Two nodes with private disks and one store."""
    port, nodes = str(free_ports()), []
    for n in (0, 1):
        env = {"NODE_RANK": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        disk = ["--set", f"cluster.workDir={file.parent}/{disks}-{n}"]
        nodes.append(start(file, stage, *devices(stage, 1, deepspeed, nodes=2), *disk, env=env))
    return nodes


@pytest.mark.slow
def test_two_nodes_end_as_one_node_does(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft"), tmp_path / "run")
    for node in start_nodes(file, "sft", "zero2", "disk"):
        finish(node)
    assert marker(file, "sft")["digest"] == undisturbed(base("sft"), tmp_path, "sft", 2, "zero2")["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_two_nodes_with_private_disks_stop_and_resume(base: Base, tmp_path: Path, deepspeed: str) -> None:
    signalled = fork(base("sft"), tmp_path / "signalled")
    nodes = start_nodes(signalled, "sft", deepspeed, "disk")
    wait_for(nodes[0], after(signalled, "sft", 8), signalled.parent / "store")
    nodes[1].send_signal(signal.SIGTERM)
    for node in nodes:
        finish(node, 143)  # the node that got no signal saved with it
    assert record(signalled, "sft")["exit_code"] == record(signalled, "sft", "1-node1")["exit_code"] == 143
    step = max((signalled.parent / "store").glob("t/sft/*/checkpoints/step-*"))
    shards = [{path.name for path in (step / f"part-{n}").rglob("*optim_states.pt")} for n in (0, 1)]
    assert len(shards[0]) == len(shards[1]) == 1  # each node stored what only it has
    assert shards[0] != shards[1]
    for node in start_nodes(signalled, "sft", deepspeed, "new-disk"):
        assert "going on from step" in finish(node)
    assert marker(signalled, "sft")["digest"] == undisturbed(base("sft"), tmp_path, "sft", 2, deepspeed)["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_node_that_is_gone(base: Base, tmp_path: Path, victim: int) -> None:
    """The other one ends with 75 within ten seconds and saves nothing; both go on from the last checkpoint."""
    file = fork(base("sft"), tmp_path / "run")
    nodes = start_nodes(file, "sft", "zero2", "disk")
    wait_for(nodes[0], after(file, "sft", 8), file.parent / "store")
    nodes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    finish(nodes[victim], -9)
    errors = finish(nodes[1 - victim], 75)
    assert time.monotonic() - killed < 10
    assert "is gone" in errors
    assert record(file, "sft", "1" if victim else "1-node1")["exit_code"] == 75
    for node in start_nodes(file, "sft", "zero2", "new-disk"):
        finish(node)
    assert marker(file, "sft")["digest"] == undisturbed(base("sft"), tmp_path, "sft", 2, "zero2")["digest"]


@pytest.mark.slow
def test_a_rank_that_is_killed(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft"), tmp_path / "run")
    process = start(file, "sft", *devices("sft", 2, "zero2"))
    wait_for(process, after(file, "sft", 4), file.parent / "store")
    ranks = workers_of(process)
    ranks[1].kill()
    errors = finish(process, 75)
    assert "was ended by SIGKILL" in errors
    assert "out of host memory" in errors
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_and_not_the_base(base: Base, tmp_path: Path) -> None:
    """Neither the 4-bit weights nor their constants, nor the copy of the SFT adapter that DPO compares with."""
    import torch

    for deepspeed in ("zero2", "zero3"):
        file = fork(base("dpo"), tmp_path / deepspeed)
        finish(start(file, "dpo", *devices("dpo", 2, deepspeed)))
        newest = max((file.parent / "store").glob("t/dpo/*/checkpoints/step-*"))
        assert not list(newest.rglob("ref"))
        for states in newest.rglob("*model_states.pt"):
            module = torch.load(states, weights_only=False)["module"]
            assert all("lora_" in name for name in module), states
            assert module or deepspeed == "zero3"


def test_several_nodes_need_to_be_told_apart(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft", method="lora"), tmp_path / "run")
    errors = finish(start(file, "sft", *devices("sft", 1, "auto", nodes=2)), 64)
    assert "resources.sft.nodes is 2, but nothing says which node this is" in errors
    errors = finish(start(file, "run", *devices("sft", 1, "auto", nodes=2)), 64)
    assert "`medjob run` walks the line on one machine" in errors
