"""A run that is killed and restarted ends like an undisturbed one."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.build_once import build_once
from tests.support.cli_process import digests, finish, kill_when, start, write_run_file
from tests.support.small_run import small_run
from tests.support.waiting import catches, wait_until

LONG = {
    "global_batch_size": 4,
    "max_length": 512,
    "max_steps": 24,
    "save_steps": 4,
    "eval_steps": 4,
    "learning_rate": 1e-3,
}


def slow(*values: Any) -> Any:
    """Mark a parameter set as slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


# With two threads, sums must still be added in the same order after a restart.
THREADS = {"OMP_NUM_THREADS": "2"}
CHANGES = {"sft": LONG, "candidates": {"max_new_tokens": 24}}


@pytest.fixture
def undisturbed(shared: Path, tiny: Path) -> dict[str, str]:
    """Digests of the same run without an interruption, which runs once per session."""

    def run(folder: Path) -> None:
        file = write_run_file(small_run(folder, tiny), folder, "store", **CHANGES)
        finish(start(file, "run", "--until", "candidates", env=THREADS))

    return digests(build_once(shared / "undisturbed-until-candidates", run) / "store")


def publish(trained_store: Path, store: Path, *stages: str) -> None:
    """Copy published stages of the small run, which a run with the same fields then skips."""
    for stage in stages:
        shutil.copytree(trained_store / "t" / stage, store / "t" / stage)


@pytest.mark.parametrize(
    ("moment", "how", "code"),
    [
        slow("t/prepare/*/LATEST.json", signal.SIGKILL, -9),
        slow("t/sft/*/LATEST.json", signal.SIGKILL, -9),
        slow(
            "t/sft/*/checkpoints/step-00000008-1/part-0/adapter_model.safetensors",
            signal.SIGKILL,
            -9,
        ),  # torn: no manifest
        ("t/sft/*/checkpoints/step-00000008-1/MANIFEST.json", signal.SIGTERM, 143),
        slow("t/candidates/*/parts/answers/000001-00000001.jsonl", signal.SIGKILL, -9),
    ],
)
def test_killed_run_resumes_and_ends_with_the_same_bytes(
    tree: dict[str, Any],
    tmp_path: Path,
    trained_store: Path,
    undisturbed: dict[str, str],
    moment: str,
    how: signal.Signals,
    code: int,
) -> None:
    file = write_run_file(tree, tmp_path, "store", **CHANGES)
    if "prepare" not in moment:
        publish(trained_store, tmp_path / "store", "fetch", "prepare")
    process = start(file, "run", "--until", "candidates", env=THREADS)
    kill_when(process, moment, tmp_path / "store", how)
    process.communicate(timeout=120)
    assert process.returncode == code
    assert "candidates" not in digests(tmp_path / "store")

    errors = finish(start(file, "run", "--until", "candidates", env=THREADS))
    assert digests(tmp_path / "store") == undisturbed
    stage = moment.split("/")[1]
    marker = json.loads(next((tmp_path / "store").glob(f"t/{stage}/*/_SUCCESS.json")).read_text())
    assert marker["epoch"] == 2
    if how is signal.SIGTERM:
        record = next((tmp_path / "store").glob(f"t/{stage}/*/attempts/1.json"))
        assert json.loads(record.read_text())["exit_code"] == 143
    if "MANIFEST" in moment:
        assert "resuming from step" in errors
    if stage == "candidates":  # finished rows were not sampled again
        batches = (tmp_path / "store").glob("t/candidates/*/parts/answers/*")
        rows = [
            line for path in batches for line in path.read_text().splitlines()[1:]
        ]  # the first line is the seal
        assert len(rows) == len({json.loads(row)["id"] for row in rows}) == 16


def test_sigterm_ends_a_long_generation_at_once(
    tree: dict[str, Any], tmp_path: Path, trained_store: Path
) -> None:
    """Finished rows are already in the store, so nothing has to be saved.

    A spot machine leaves 13 seconds.
    """
    file = write_run_file(tree, tmp_path, "store", candidates={"max_new_tokens": 400})
    publish(trained_store, tmp_path / "store", "fetch", "prepare", "sft")
    process = start(file, "candidates", "--set", "resources.candidates.batchSize=2")
    first_batch = "t/candidates/*/parts/answers/000001-*.jsonl"
    kill_when(process, first_batch, tmp_path / "store", signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 143
    assert "candidates" not in digests(tmp_path / "store")


def test_sigterm_before_the_first_stage_exits_with_143(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    process = start(write_run_file(tree, tmp_path, "store"))
    wait_until(lambda: catches(process.pid, signal.SIGTERM), 60, "the signal handler")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_damaged_checkpoint_is_skipped(
    tree: dict[str, Any], tmp_path: Path, trained_store: Path
) -> None:
    file = write_run_file(tree, tmp_path, "store", sft=LONG)
    publish(trained_store, tmp_path / "store", "fetch", "prepare")
    process = start(file, "run", "--until", "sft")
    kill_when(
        process,
        "t/sft/*/checkpoints/step-00000012-1/MANIFEST.json",
        tmp_path / "store",
        signal.SIGKILL,
    )
    process.communicate(timeout=60)
    newest = max((tmp_path / "store").glob("t/sft/*/checkpoints/step-*-1"))
    victim = newest / "part-0/optimizer.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    errors = finish(start(file, "run", "--until", "sft"))
    assert f"skipping checkpoint {newest.name}:" in errors
    assert "optimizer.pt is damaged" in errors
    assert f"resuming from step {int(newest.name.split('-')[1]) - 4}" in errors
