"""Run files whose earlier stages are published."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.config.load import merge, validate
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.support.build_once import build_once
from tests.support.resume_matrix import LONG, Base, publish_candidates
from tests.support.small_run import small_run


@pytest.fixture(scope="session")
def base(shared: Path, tiny: Path) -> Base:
    """Make a run file whose stages before `stage` are published.

    Each is made once per session, and tests work on copies of it (`fork`).
    """

    def make(stage: str, **changes: Any) -> Path:
        def publish_inputs(folder: Path) -> None:
            values = {
                "method": "qlora",
                "sft": {**LONG},
                "dpo": {**LONG, "learning_rate": 1e-3, "validation_fraction": 0.2},
            }
            run_file = merge(small_run(folder, tiny), {"run": merge(values, changes)})
            pipeline = Pipeline.open(validate(run_file))
            for name in ("fetch", "prepare") if stage == "sft" else ("fetch", "prepare", "sft"):
                pipeline.run(get_stage(name))
            if stage == "dpo":
                publish_candidates(pipeline, folder)
                pipeline.run(get_stage("judge"))
            (folder / "run.yaml").write_text(yaml.safe_dump(run_file))

        digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:12]
        folder = shared / f"inputs-of-{stage}-{digest}"
        return build_once(folder, publish_inputs) / "run.yaml"

    return make
