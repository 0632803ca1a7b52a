"""A run of all stages that takes seconds on a CPU."""

from pathlib import Path
from typing import Any

from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.support.rows import choice_rows, reasoning_rows, safety_rows, write_jsonl


def small_run(folder: Path, model: Path) -> dict[str, Any]:
    """Write the data to `folder` and return a run file over it, as plain data."""
    data = folder / "data"
    write_jsonl(data / "rows.jsonl", reasoning_rows(48))
    write_jsonl(data / "choices.jsonl", choice_rows(6))
    write_jsonl(data / "safety.jsonl", safety_rows(12))
    training = {
        "global_batch_size": 4,
        "max_length": 512,
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
    }
    device = {"gpus": 0, "microBatchSize": 2, "batchSize": 8, "gradientCheckpointing": False}
    return {
        "run": {
            "name": "t",
            "base_model": str(model),
            "method": "lora",
            "lora": {"r": 4},
            # Any text of a random model complies with this style, so that there are pairs.
            "prompt": {"style": "plain"},
            "prepare": {
                "sources": [{"path": str(data / "rows.jsonl")}],
                "evaluation_sources": [{"path": str(data / "choices.jsonl")}],
                "safety": {
                    "sources": [{"path": str(data / "safety.jsonl")}],
                    "share": 0.1,
                    "evaluation_rows": 4,
                },
                "validation_rows": 4,
                "evaluation_rows": 4,
                "preference_rows": 16,
                "near_duplicate_threshold": None,  # the generated questions are alike
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
            stage: dict(device) for stage in ("sft", "candidates", "judge", "dpo", "evaluate")
        },
        "cluster": {"store": f"file://{folder}/store", "workDir": str(folder / "work")},
    }


def fetched(pipeline: Pipeline, name: str) -> Path:
    """Fetch a verified copy of a published artifact."""
    artifact = pipeline.artifact(get_stage(name))
    manifest = artifact.manifest()
    assert manifest is not None, name
    return artifact.fetch(manifest, Path(pipeline.run_file.cluster.work_dir) / "fetched" / name)
