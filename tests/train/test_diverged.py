"""A training whose numbers are no longer finite ends with exit code 65 and publishes nothing."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medjob.config import RunFile
from medjob.config.train import LoraParams, SftParams
from medjob.errors import ConfigError, DataError
from medjob.pipeline.runner import Pipeline
from medjob.sources.locations import Location
from medjob.stage import get_stage
from medjob.train.adapters import add_adapter
from medjob.train.divergence import Divergence
from medjob.train.integrity import check_finite
from medjob.train.model import ModelSpec, load_model
from tests.support.in_process import in_this_process

NAN, INF = math.nan, math.inf


def overflowing(tiny: Path, folder: Path) -> Path:
    """A base whose weights are finite and whose logits are not."""
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].sign() * 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prepared(run_file: RunFile) -> Pipeline:
    pipeline = Pipeline.open(run_file)
    for name in ("fetch", "prepare"):
        pipeline.run(get_stage(name))
    return pipeline


@pytest.mark.parametrize("method", ["lora", "full"])
def test_infinite_loss_ends_the_training_at_its_step(
    make_run_file: Callable[..., RunFile], tiny: Path, tmp_path: Path, method: str
) -> None:
    import medjob.stages.sft as stage

    base = overflowing(tiny, tmp_path / "base")
    run = {"base_model": str(base), "method": method, "dtype": "float32"}
    context = in_this_process(prepared(make_run_file({"run": run})), "sft")
    with pytest.raises(
        DataError, match=r"sft: the training diverged: .* at step 1; nothing"
    ) as got:
        stage.run(context)
    assert "lower run.sft.learning_rate" in got.value.hint
    assert not list(context.output.iterdir())
    assert not list((context.work / "trainer").glob("checkpoint-*"))


@pytest.mark.slow
def test_all_processes_stop_when_one_diverges(
    make_run_file: Callable[..., RunFile], tiny: Path, tmp_path: Path
) -> None:
    base = overflowing(tiny, tmp_path / "base")
    changes = {"base_model": str(base), "dtype": "float32"}
    run_file = make_run_file({"run": changes, "resources": {"sft": {"gpus": 2}}})
    pipeline = prepared(run_file)
    with pytest.raises(DataError, match="diverged"):
        pipeline.run(get_stage("sft"))
    assert pipeline.artifact(get_stage("sft")).manifest() is None


def test_checkpoint_with_nan_is_not_trained_on(make_run_file: Callable[..., RunFile]) -> None:
    import medjob.stages.sft as stage

    context = in_this_process(prepared(make_run_file({"run": {"dtype": "float32"}})), "sft")
    stage.run(context)
    (context.output / "adapter_model.safetensors").unlink()
    checkpoint = context.work / "trainer" / "checkpoint-2"
    adapter = checkpoint / "adapter_model.safetensors"
    tensors = load_file(adapter)
    next(value for name, value in tensors.items() if "lora_B" in name)[0, 0] = NAN
    save_file(tensors, adapter, metadata={"format": "pt"})
    context.extras.link.resume_step = 2
    with pytest.raises(DataError, match=r"diverged.* at step 3"):
        stage.run(context)
    assert not (context.output / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("logs", "problem"),
    [
        ({"loss": NAN}, "the loss is nan"),
        ({"loss": INF}, "the loss is inf"),
        ({"loss": 1.0, "grad_norm": NAN}, "the gradient norm is nan"),
        ({"loss": 1.0, "grad_norm": INF}, "the gradient norm is inf"),
        ({"eval_loss": NAN}, "the validation loss is nan"),
    ],
)
def test_any_number_that_is_not_finite_ends_it(logs: dict[str, float], problem: str) -> None:
    divergence = Divergence("dpo", scales_loss=False)
    divergence.check_numbers({"loss": 1e9, "grad_norm": 1e9, "eval_loss": 2.0}, 6)
    with pytest.raises(DataError, match=f"dpo: the training diverged: {problem} at step 7"):
        divergence.check_numbers(logs, 7)


def test_float16_skips_steps_that_overflow_but_not_for_ever() -> None:
    divergence = Divergence("sft", scales_loss=True)
    for step in range(1, 61):
        divergence.check_numbers({"loss": 1.0, "grad_norm": INF if step % 10 else 1.0}, step)
    divergence.check_end(60)
    for step in range(20):
        divergence.check_numbers({"loss": 1.0, "grad_norm": INF}, step)
    with pytest.raises(DataError, match="gradient norm"):
        divergence.check_numbers({"loss": 1.0, "grad_norm": INF}, 21)
    with pytest.raises(DataError, match="the loss is nan"):
        divergence.check_numbers({"loss": NAN}, 22)
    short = Divergence("sft", scales_loss=True)
    short.check_numbers({"loss": 1.0, "grad_norm": NAN}, 1)
    with pytest.raises(DataError, match="every step"):
        short.check_end(1)


def test_weights_are_checked_before_each_checkpoint(tiny: Path, tmp_path: Path) -> None:
    spec = ModelSpec(Location.of_folder(tiny), False, "float32", "sdpa")
    model = add_adapter(load_model(spec), LoraParams(r=2), 0)
    divergence = Divergence("sft", scales_loss=False)
    divergence.check_weights(model, 1)
    weight = next(value for name, value in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        weight[0, 0] = INF
    with pytest.raises(DataError, match=r"weights are NaN or infinite \(.*lora_B.*\) at step 2"):
        divergence.check_weights(model, 2)
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"sft: weights are NaN or infinite in .*lora_B"):
        check_finite(tmp_path, "sft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prepare": {"validation_rows": 0}, "sft": {"early_stopping_patience": 1}},
            "run.prepare.validation_rows is 0, but run.sft.early_stopping_patience needs",
        ),
        (
            {"prepare": {"validation_rows": 0}, "sft": {"load_best_model_at_end": True}},
            "run.sft.load_best_model_at_end needs validation rows",
        ),
        (
            {"dpo": {"validation_fraction": 0, "early_stopping_patience": 1}},
            "run.dpo.validation_fraction is 0, but run.dpo.early_stopping_patience needs",
        ),
        (
            {"dpo": {"validation_fraction": 0.0, "load_best_model_at_end": True}},
            "run.dpo.load_best_model_at_end needs",
        ),
        (
            {"sft": {"early_stopping_threshold": 0.1}},
            "early_stopping_threshold has no effect without early_stopping_patience",
        ),
        (
            {"sft": {"early_stopping_patience": 1, "eval_steps": 9, "save_steps": 9}},
            r"the first one is at step 9 \(eval_steps\) of 4 \(max_steps\)",
        ),
    ],
)
def test_best_checkpoint_needs_validation(
    make_run_file: Callable[..., RunFile], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run_file({"run": changes})


def test_validation_may_be_off_if_nothing_needs_it(make_run_file: Callable[..., RunFile]) -> None:
    for best in ({}, {"early_stopping_patience": 1, "load_best_model_at_end": False}):
        rows = 4 if best else 0
        made = make_run_file({"run": {"prepare": {"validation_rows": rows}, "sft": best}})
        assert made.run.sft.needs_validation == ("early_stopping_patience" if best else None)


@pytest.mark.parametrize(
    "setting", [{"early_stopping_patience": 1}, {"load_best_model_at_end": True}]
)
def test_overlong_validation_rows_are_not_silently_ignored(
    make_run_file: Callable[..., RunFile], setting: dict[str, Any]
) -> None:
    from medjob.train.trainer import check_validation

    context = in_this_process(prepared(make_run_file({"run": {"sft": setting}})), "sft")
    params: SftParams = context.run.sft
    check_validation(context, params, usable=1, left_out=3)
    with pytest.raises(DataError, match="needs validation rows, but all 4 have over 512 tokens"):
        check_validation(context, params, usable=0, left_out=4)
    with pytest.raises(DataError, match="needs validation rows, but there are none"):
        check_validation(context, params, usable=0)


def test_training_too_short_for_its_validation_stops_at_its_start(
    make_run_file: Callable[..., RunFile],
) -> None:
    import medjob.stages.sft as stage

    params = {"max_steps": None, "num_train_epochs": 0.3, "eval_steps": 50, "save_steps": 50}
    params["early_stopping_patience"] = 1
    context = in_this_process(prepared(make_run_file({"run": {"sft": params}})), "sft")
    with pytest.raises(
        ConfigError, match=r"the first one is at step 50 .* the training has 3 steps"
    ):
        stage.run(context)
    assert not list(context.output.iterdir())
