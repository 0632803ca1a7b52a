"""Run files whose inputs are published."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.config.load import merge, validate
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.support.resume_matrix import LONG, Base, publish_candidates

_made: dict[str, Path] = {}


@pytest.fixture
def base(tree: dict[str, Any], tmp_path: Path) -> Base:
    """Make a run file whose inputs are published: all stages before the one to try. Made once; tests work on copies."""

    def make(stage: str, **changes: Any) -> Path:
        key = f"{stage} {json.dumps(changes)}"
        if key not in _made:
            values = {
                "method": "qlora",
                "sft": {**LONG},
                "dpo": {**LONG, "learning_rate": 1e-3, "validation_fraction": 0.2},
            }
            run_file = merge(tree, {"run": merge(values, changes)})
            pipeline = Pipeline.open(validate(run_file))
            for name in ("fetch", "prepare") if stage == "sft" else ("fetch", "prepare", "sft"):
                pipeline.run(get_stage(name))
            if stage == "dpo":
                publish_candidates(pipeline, tmp_path)
                pipeline.run(get_stage("judge"))
            _made[key] = tmp_path / "run.yaml"
            _made[key].write_text(yaml.safe_dump(run_file))
        return _made[key]

    return make
