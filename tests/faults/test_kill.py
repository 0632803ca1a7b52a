"""A run that is killed and started again ends as an undisturbed one."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli_process import digests, finish, kill_when, start, write_run_file

LONG = {
    "global_batch_size": 4,
    "max_length": 512,
    "max_steps": 24,
    "save_steps": 4,
    "eval_steps": 4,
    "learning_rate": 1e-3,
}


def slow(*values: Any) -> Any:
    """A case of the long half."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {}


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
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tree: dict[str, Any],
    tmp_path: Path,
    undisturbed: dict[str, Any],
    moment: str,
    how: signal.Signals,
    code: int,
) -> None:
    changes = {"sft": LONG, "candidates": {"max_new_tokens": 24}}
    if not undisturbed:
        finish(
            start(write_run_file(tree, tmp_path, "calm", **changes), "run", "--until", "candidates")
        )
        undisturbed |= digests(tmp_path / "calm")
    file = write_run_file(tree, tmp_path, "store", **changes)
    process = start(file, "run", "--until", "candidates")
    kill_when(process, moment, tmp_path / "store", how)
    process.communicate(timeout=120)
    assert process.returncode == code
    assert "candidates" not in digests(tmp_path / "store")  # it really was cut off

    errors = finish(start(file, "run", "--until", "candidates"))
    assert digests(tmp_path / "store") == undisturbed
    stage = moment.split("/")[1]
    marker = json.loads(next((tmp_path / "store").glob(f"t/{stage}/*/_SUCCESS.json")).read_text())
    assert marker["epoch"] == 2
    if how is signal.SIGTERM:
        record = next((tmp_path / "store").glob(f"t/{stage}/*/attempts/1.json"))
        assert json.loads(record.read_text())["exit_code"] == 143
    if "MANIFEST" in moment:
        assert "resuming from step" in errors
    if stage == "candidates":  # what was drawn was not drawn again
        batches = (tmp_path / "store").glob("t/candidates/*/parts/answers/*")
        rows = [
            line for path in batches for line in path.read_text().splitlines()[1:]
        ]  # the first one is the seal
        assert len(rows) == len({json.loads(row)["id"] for row in rows}) == 16


def test_a_signal_in_a_long_generation_ends_it_at_once(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """What is finished is in the store already, so nothing is waited for: a spot machine leaves 13 seconds."""
    file = write_run_file(tree, tmp_path, "store", candidates={"max_new_tokens": 4000})
    process = start(file, "run", "--until", "candidates")
    kill_when(process, "t/candidates/*/LATEST.json", tmp_path / "store", signal.SIGCONT)
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 143


def test_a_signal_before_anything_is_begun_ends_at_once_with_143(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    process = start(write_run_file(tree, tmp_path, "store"))
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_damaged_checkpoint_is_passed_over(tree: dict[str, Any], tmp_path: Path) -> None:
    file = write_run_file(tree, tmp_path, "store", sft=LONG)
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
