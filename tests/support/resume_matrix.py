"""Starts trainings on several processes, stops them, and compares them with undisturbed ones."""

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
import yaml

from medjob.artifacts.artifact import Attempt
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.support.build_once import build_once
from tests.support.cli_process import digests, finish, start, wait_for
from tests.support.small_run import fetched

LONG = {"global_batch_size": 4, "max_steps": 24, "save_steps": 4, "eval_steps": 8}
Base = Callable[..., Path]


def publish_candidates(pipeline: Pipeline, tmp_path: Path) -> None:
    """Publish written answers, because those of a random model make no pairs."""
    folder = tmp_path / "candidates"
    folder.mkdir()
    prompts = pq.read_table(fetched(pipeline, "prepare") / "preferences.parquet").to_pylist()
    rows = [
        {"id": prompt["id"], "candidate": n, "text": text, "tokens": 5, "truncated": False}
        for prompt in prompts
        for n, text in enumerate((prompt["reference"], "Nothing is known about it."))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "candidates.parquet")
    Attempt.begin(pipeline.artifact(get_stage("candidates")), "test").publish(
        folder, {}, {}, {}, {}
    )


def fork(file: Path, target: Path, **cluster: Any) -> Path:
    """Copy a run file and its store, with a separate work folder."""
    tree = yaml.safe_load(file.read_text())
    source = Path(tree["cluster"]["store"].removeprefix("file://"))
    shutil.copytree(source, target / "store")
    tree["cluster"] = {
        **tree["cluster"],
        "store": f"file://{target}/store",
        "workDir": f"{target}/work",
        **cluster,
    }
    (target / "run.yaml").write_text(yaml.safe_dump(tree))
    return target / "run.yaml"


def devices(stage: str, gpus: int, deepspeed: str, nodes: int = 1) -> list[str]:
    values = {"gpus": gpus, "deepspeed": deepspeed, "nodes": nodes, "microBatchSize": 1}
    return [
        argument
        for name, value in values.items()
        for argument in ("--set", f"resources.{stage}.{name}={value}")
    ]


def marker(file: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads(next(file.parent.glob(f"store/t/{stage}/*/_SUCCESS.json")).read_text()))


def record(file: Path, stage: str, name: str = "1") -> dict[str, Any]:
    return dict(
        json.loads(next(file.parent.glob(f"store/t/{stage}/*/attempts/{name}.json")).read_text())
    )


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(process.pid).children()
        if "medjob.launch.worker" in " ".join(child.cmdline())
    ]


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


def undisturbed(file: Path, stage: str, gpus: int, deepspeed: str) -> dict[str, Any]:
    """Marker of the same training without an interruption, which runs once per session."""

    def train(folder: Path) -> None:
        finish(start(fork(file, folder), stage, *devices(stage, gpus, deepspeed)))

    folder = file.parent / f"undisturbed-{stage}-{gpus}-{deepspeed}"
    return marker(build_once(folder, train) / "run.yaml", stage)


def assert_resumed_as_undisturbed(
    file: Path, folder: Path, stage: str, deepspeed: str, ways: list[str]
) -> dict[str, Any]:
    """Stop a training on two processes in several ways; each time it resumes to the same bytes."""
    arguments = devices(stage, 2, deepspeed)
    expected = undisturbed(file, stage, 2, deepspeed)
    for way in ways:
        stopped = fork(file, folder / way.replace(" ", "-"))
        process = start(stopped, stage, *arguments)
        stop(process, stopped, stage, way)
        errors = finish(process, -9 if way == "kill -9" else 143)
        assert stage not in digests(stopped.parent / "store"), errors  # it was interrupted
        if way != "kill -9":
            assert record(stopped, stage)["exit_code"] == 143
        errors = finish(start(stopped, stage, *arguments))
        assert "resuming from step" in errors
        found = marker(stopped, stage)
        assert found["digest"] == expected["digest"], way
        assert found["metrics"] == expected["metrics"], way
    return expected
