"""The benchmark of training speed: its rows, what it counts, and that the command runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import wheels
from bench.train_setup import TINY, Plan, make_rows, read_lengths, shorten

ROOT = Path(__file__).parents[2]


def plan(folder: Path) -> Plan:
    versions: dict[str, str | None] = {}
    return Plan(
        "cpu",
        "",
        versions,
        TINY,
        256,
        8,
        90.0,
        batch_rows=8,
        packed_rows=8,
        warmup=1,
        steps=2,
        folder=str(folder),
    )


def test_lengths_are_those_of_120_rows() -> None:
    lengths = read_lengths()
    assert len(lengths) == 120
    assert all(0 < prompt < total <= 2048 for prompt, total in lengths)
    assert 600 < sum(total for _, total in lengths) / 120 < 900


def test_rows_have_the_lengths_in_turn_and_follow_from_the_seed() -> None:
    lengths = shorten([(80, 800), (8, 16_000), (4, 8)], 8, 256)
    assert lengths == [(10, 100), (1, 2)]  # 2,000 tokens are over 256
    rows = make_rows(lengths, 5, vocab=50)
    assert [(row["prompt_tokens"], len(row["input_ids"])) for row in rows] == [
        (10, 100),
        (1, 2),
        (10, 100),
        (1, 2),
        (10, 100),
    ]
    assert rows[0]["input_ids"] != rows[2]["input_ids"]
    assert {token for row in rows for token in row["input_ids"]} <= set(range(2, 50))
    assert rows == make_rows(lengths, 5, vocab=50)


def test_only_steps_after_the_warm_up_count(tmp_path: Path) -> None:
    from bench.train_meter import MeterLink, Window

    window = Window(plan(tmp_path))
    link = MeterLink(window)
    for step in (1, 2, 3):
        link.step(step, 1.0, {})
    history: list[dict[str, Any]] = [
        {"step": step, "loss": 9.0 - step, "num_tokens": 100.0 * step} for step in (1, 2, 3)
    ]
    result = window.result(
        [*history, {"step": 3, "train_loss": 7.0}], flops_per_token=10.0, peak_flops=None
    )
    assert result["tokens"] == 200
    assert result["tokens_per_second"] == pytest.approx(200 / window.seconds)
    assert (result["first_loss"], result["last_loss"], result["mfu"]) == (8.0, 6.0, None)


def test_every_wheel_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = [re.fullmatch(r"([\w-]+)==[\d.]+", line) for line in wheels.requirements()]
    assert [name[1] for name in names if name] == [*wheels.LOCKED, *wheels.GPU_ONLY]


@pytest.mark.slow
def test_the_command_measures_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "train.json"
    command = [
        sys.executable,
        "-m",
        "bench.train",
        "--steps",
        "1",
        "--scratch",
        str(tmp_path / "scratch"),
        "--output",
        str(output),
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    last = re.fullmatch(r"medjob/recipe: (\d+\.\d\d)", done.stdout.splitlines()[-1])
    assert last
    told = json.loads(output.read_text())
    assert last[1] == f"{told['medjob/recipe']:.2f}"
    assert told["device"] == "cpu"
    assert told["versions"]["torch"]
    assert told["date"]
    assert told["command"].startswith("python -m bench.train --steps 1")
    for name in ("recipe", "medjob", "medjob-bf16"):
        result = told["variants"][name]
        assert result["tokens_per_second"] == pytest.approx(
            result["tokens"] / result["seconds_per_step"]
        )
        assert result["peak_gib"] > 0
        assert result["mfu"] is None
        assert result["joules"] is None
    # The same rows in the same order, over the same base: the first loss is the same.
    assert told["variants"]["medjob"]["first_loss"] == pytest.approx(
        told["variants"]["recipe"]["first_loss"], abs=0.001
    )
    assert "micro batch 1" in told["variants"]["medjob"]["said"][0]
