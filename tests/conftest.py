"""Shared parts: the tiny model, rows of our own, and a job over them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medjob.config import RunFile
from medjob.config.load import merge, validate
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.tiny import make_tiny_model

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask a hub

TOPICS = (
    "chest pain",
    "a rash",
    "fever",
    "a cough",
    "back pain",
    "dizziness",
    "thirst",
    "a swollen knee",
    "blurred vision",
    "a sore throat",
)
SIGNS = (
    "for two days",
    "since childhood",
    "after a long flight",
    "with weight loss",
    "at night only",
    "after a new medicine",
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def reasoning_rows(count: int) -> list[dict[str, str]]:
    """Different rows in the medical-o1 format."""
    return [
        {
            "Question": f"Case {n}: someone has {TOPICS[n % 10]} {SIGNS[n // 10 % 6]}, and the value is {n * 37}. What is likely?",
            "Complex_CoT": f"The sign is {TOPICS[n % 10]}. It lasts {SIGNS[n // 10 % 6]}.",
            "Response": f"Likely cause number {n}; see a doctor.",
        }
        for n in range(count)
    ]


def choice_rows(count: int) -> list[dict[str, Any]]:
    """Multiple-choice rows."""
    options = {"A": "insulin", "B": "aspirin", "C": "oxygen", "D": "rest"}
    return [
        {
            "question": f"Which treatment fits item {n} of the list?",
            "options": options,
            "answer_idx": "ABCD"[n % 4],
        }
        for n in range(count)
    ]


def safety_rows(count: int) -> list[dict[str, str]]:
    """Half harmful, half benign."""
    return [
        {
            "prompt": f"Request {n} about {TOPICS[n % 10]}",
            "response": "I cannot help with that." if n % 2 else "Drink water.",
            "kind": "harmful" if n % 2 else "benign",
        }
        for n in range(count)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One JSON value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture
def tree(tmp_path: Path, tiny: Path) -> dict[str, Any]:
    """A whole run that takes seconds, as plain data."""
    write_jsonl(tmp_path / "data/rows.jsonl", reasoning_rows(48))
    write_jsonl(tmp_path / "data/choices.jsonl", choice_rows(6))
    write_jsonl(tmp_path / "data/safety.jsonl", safety_rows(12))
    training = {
        "global_batch_size": 4,
        "max_length": 512,
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
    }
    small = {"gpus": 0, "microBatchSize": 2, "batchSize": 8, "gradientCheckpointing": False}
    return {
        "run": {
            "name": "t",
            "base_model": str(tiny),
            "method": "lora",
            "lora": {"r": 4},
            "prompt": {
                "style": "plain"
            },  # any text of a random model complies, so that there are pairs
            "prepare": {
                "sources": [{"path": str(tmp_path / "data/rows.jsonl")}],
                "evaluation_sources": [{"path": str(tmp_path / "data/choices.jsonl")}],
                "safety": {
                    "sources": [{"path": str(tmp_path / "data/safety.jsonl")}],
                    "share": 0.1,
                    "evaluation_rows": 4,
                },
                "validation_rows": 4,
                "evaluation_rows": 4,
                "preference_rows": 16,
                "near_duplicate_threshold": None,  # the made-up questions are alike
                "contamination": {"threshold": 1.0},
            },
            "sft": {**training, "learning_rate": 1e-3},
            "candidates": {"max_new_tokens": 12},
            "judge": {"kind": "overlap", "min_margin": 0.0},
            "dpo": {**training, "min_pairs": 1, "learning_rate": 1e-4},
            "evaluate": {
                "max_new_tokens": 12,
                "multiple_choice_max_new_tokens": 12,
                "bootstrap_samples": 100,
            },
        },
        "resources": {
            stage: dict(small) for stage in ("sft", "candidates", "judge", "dpo", "evaluate")
        },
        "cluster": {"store": f"file://{tmp_path}/store", "workDir": str(tmp_path / "work")},
    }


@pytest.fixture
def make_run_file(tree: dict[str, Any]) -> Callable[..., RunFile]:
    """A job like `tree`, with changes laid over it."""
    return lambda changes=None: validate(merge(tree, changes or {}))


def fetched(pipeline: Pipeline, name: str) -> Path:
    """A verified copy of a published artifact."""
    artifact = pipeline.artifact(get_stage(name))
    manifest = artifact.manifest()
    assert manifest is not None, name
    return artifact.fetch(manifest, Path(pipeline.run_file.cluster.work_dir) / "fetched" / name)
