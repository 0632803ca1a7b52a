"""A training on several processes that is stopped or killed resumes to the same bytes."""

import random
from pathlib import Path

import pytest

from tests.support.cli_process import finish, start, wait_for
from tests.support.resume_matrix import (
    LONG,
    Base,
    after,
    assert_resumed_as_undisturbed,
    devices,
    fork,
    marker,
    stop,
    undisturbed,
    workers_of,
)

SIGTERM = random.choice(["parent", "one rank", "all ranks"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "deepspeed", "ways"),
    [
        ("sft", "none", [SIGTERM, "kill -9"]),
        ("sft", "zero1", [SIGTERM]),
        ("sft", "zero2", [SIGTERM, "kill -9"]),
        ("sft", "zero3", [SIGTERM, "kill -9"]),
        ("dpo", "none", ["kill -9"]),
        ("dpo", "zero2", [SIGTERM, "kill -9"]),
        ("dpo", "zero3", [SIGTERM]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resume_is_bit_exact(
    base: Base, tmp_path: Path, stage: str, deepspeed: str, ways: list[str]
) -> None:
    """NF4 and LoRA on two processes."""
    expected = assert_resumed_as_undisturbed(base(stage), tmp_path, stage, deepspeed, ways)
    if stage == "dpo":  # ln 2: policy and reference are the same model, in every layout
        assert expected["metrics"]["first_loss"] == pytest.approx(0.693147, abs=2e-4)


def test_a_stopped_training_on_two_ranks_resumes(base: Base, tmp_path: Path) -> None:
    """The part of the matrix that runs with `make test`."""
    assert_resumed_as_undisturbed(
        base("sft", method="lora"), tmp_path, "sft", "zero2", ["one rank"]
    )


@pytest.mark.slow
def test_full_fine_tuning_resumes(base: Base, tmp_path: Path) -> None:
    assert_resumed_as_undisturbed(base("sft", method="full"), tmp_path, "sft", "zero3", ["kill -9"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deepspeed", "before", "then"),
    [("none", 2, 1), ("zero2", 2, 1), ("zero2", 1, 2), ("zero3", 2, 1)],
)
def test_a_different_number_of_processes_resumes(
    base: Base, tmp_path: Path, deepspeed: str, before: int, then: int
) -> None:
    """The loss curve continues as in an undisturbed run, up to rounding."""
    expected = undisturbed(base("sft"), "sft", before, deepspeed)["metrics"]
    stopped = fork(base("sft"), tmp_path / "stopped")
    process = start(stopped, "sft", *devices("sft", before, deepspeed))
    stop(process, stopped, "sft", "kill -9")
    finish(process, -9)
    errors = finish(start(stopped, "sft", *devices("sft", then, "auto")))
    assert f"processes for {then}" in errors or deepspeed == "none"
    found = marker(stopped, "sft")["metrics"]
    assert found["steps"] == expected["steps"]
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=2e-3)
    assert found["last_loss"] == pytest.approx(expected["last_loss"], rel=2e-3)


@pytest.mark.slow
def test_a_checkpoint_of_a_different_sharding_is_refused_or_used(
    base: Base, tmp_path: Path
) -> None:
    file = fork(base("sft"), tmp_path / "run")
    process = start(file, "sft", *devices("sft", 2, "zero2"))
    stop(process, file, "sft", "kill -9")
    finish(process, -9)
    errors = finish(start(file, "sft", *devices("sft", 2, "none")), 64)
    assert "resources.sft.deepspeed: none cannot read the checkpoint of zero2" in errors
    # Without the checkpoint, `auto` would choose no DeepSpeed for one process.
    errors = finish(start(file, "sft", *devices("sft", 1, "auto")))
    assert "deepspeed zero2, because the checkpoint was written with it" in errors


@pytest.mark.slow
def test_early_stopping_keeps_its_counter(base: Base, tmp_path: Path) -> None:
    """Without the counter, a resumed run would stop later."""
    patient = {
        **LONG,
        "max_steps": 40,
        "eval_steps": 4,
        "early_stopping_patience": 4,
        "early_stopping_threshold": 5.0,
    }
    file = base("sft", method="lora", sft=patient)
    expected = assert_resumed_as_undisturbed(file, tmp_path, "sft", "zero2", ["kill -9"])
    assert expected["metrics"]["steps"] == 20


@pytest.mark.slow
def test_a_killed_rank_ends_the_training_with_75(base: Base, tmp_path: Path) -> None:
    file = fork(base("sft"), tmp_path / "run")
    process = start(file, "sft", *devices("sft", 2, "zero2"))
    wait_for(process, after(file, "sft", 4), file.parent / "store")
    ranks = workers_of(process)
    ranks[1].kill()
    errors = finish(process, 75)
    assert "was killed by SIGKILL" in errors
    assert "out of host memory" in errors
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_and_not_the_base(base: Base, tmp_path: Path) -> None:
    """It has no 4-bit weights, no quantization constants and no copy of DPO's reference adapter."""
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
