"""Training in several processes and on several nodes: stopped, killed and resumed, it ends with the same bytes."""

import json
import random
import shutil
import signal
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


@pytest.fixture
def base(tree: dict[str, Any], tmp_path: Path) -> Base:
    """Make a run file whose inputs are published: all stages before the one to try."""

    def make(stage: str, **changes: Any) -> Path:
        values = {"method": "qlora", "sft": {**LONG}, "dpo": {**LONG, "learning_rate": 1e-3, "validation_fraction": 0.2}}
        job = merge(tree, {"run": merge(values, changes)})
        line = Line.open(validate(job))
        for name in ("fetch", "prepare") if stage == "sft" else ("fetch", "prepare", "sft"):
            line.run(get_stage(name))
        if stage == "dpo":
            publish_candidates(line, tmp_path)
            line.run(get_stage("judge"))
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(job))
        return file

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


def fork(file: Path, name: str, **cluster: Any) -> Path:
    """The same run file over a copy of its store, in a work folder of its own."""
    tree = yaml.safe_load(file.read_text())
    source = Path(tree["cluster"]["store"].removeprefix("file://"))
    target = file.parent / name
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


def undisturbed_then_stopped(file: Path, stage: str, arguments: list[str], ways: list[str]) -> None:
    """However a training is stopped, the same command ends it with the bytes of one that was left alone."""
    calm = fork(file, "calm")
    finish(start(calm, stage, *arguments))
    expected = marker(calm, stage)
    for way in ways:
        stopped = fork(file, way.replace(" ", "-"))
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


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["none", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_resume_is_bit_exact(base: Base, stage: str, deepspeed: str) -> None:
    """NF4 and LoRA on two processes."""
    ways = ["parent", "one rank", "all ranks", "kill -9"]
    undisturbed_then_stopped(base(stage), stage, devices(stage, 2, deepspeed), random.sample(ways[:3], 1) + ways[3:])


def test_a_stopped_training_on_two_ranks_goes_on(base: Base) -> None:
    """The fast part of the matrix."""
    undisturbed_then_stopped(base("sft", method="lora"), "sft", devices("sft", 2, "zero2"), ["one rank"])
