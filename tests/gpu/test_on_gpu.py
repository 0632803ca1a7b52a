"""What only a GPU can show. Skipped without one; run them with `pytest tests/gpu -s`, which prints what was measured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from medjob.config import RunFile
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def train(run_file: RunFile) -> dict[str, Any]:
    pipeline = Pipeline.open(run_file)
    for name in ("fetch", "prepare", "sft"):
        manifest = pipeline.run(get_stage(name))
    return manifest.metrics


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_method_trains(
    make_run_file: Callable[..., RunFile], method: str, dtype: str
) -> None:
    """float16 with loss scaling, as on GPUs without bfloat16."""
    resources = {"gpus": 1, "microBatchSize": "auto", "gradientCheckpointing": "auto"}
    metrics = train(
        make_run_file(
            {
                "run": {"method": method, "dtype": dtype, "sft": {"max_steps": 4}},
                "resources": {"sft": resources},
            }
        )
    )
    assert metrics["steps"] == 4
    assert metrics["last_loss"] < metrics["first_loss"]


def test_packing_and_attention_kernels_agree(make_run_file: Callable[..., RunFile]) -> None:
    losses = []
    for number, attention in enumerate(("sdpa", "auto", "flex_attention")):
        resources = {"gpus": 1, "microBatchSize": 4, "attnImplementation": attention}
        store = {"store": f"{make_run_file().cluster.store.uri}-{number}"}
        metrics = train(
            make_run_file(
                {
                    "run": {"sft": {"packing": True, "max_steps": 2}},
                    "resources": {"sft": resources},
                    "cluster": store,
                }
            )
        )
        losses.append(metrics["first_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-2)
