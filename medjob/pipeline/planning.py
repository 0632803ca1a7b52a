"""`medjob plan`: collects the inputs of a forecast.

These are the model's sizes, the device, and the rows and tokens that earlier stages counted.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medjob.config import RunFile
from medjob.config.base import ADAPTER_CONFIG
from medjob.config.run_file import StageResources
from medjob.config.stages import unused_sections
from medjob.errors import ConfigError, MedjobError
from medjob.pipeline.runner import Pipeline
from medjob.plan import gpus, text
from medjob.plan.adapter import adapter_params
from medjob.plan.forecast import Data, forecast, profile_of
from medjob.plan.generation import (
    Load,
    candidates_load,
    evaluate_load,
    forecast_rows,
    judge_load,
)
from medjob.plan.gpus import Gpu
from medjob.plan.memory import GIB
from medjob.plan.shape import ModelShape
from medjob.plan.source import read_shape
from medjob.runtime.host import memory_limit_bytes
from medjob.sources.references import is_remote
from medjob.stage import get_stage, stages_of


def plan_lines(run_file: RunFile, gpu_name: str | None) -> Iterator[str]:
    """Describe memory, steps, hours and cost of the trainings of the run, and hours and cost of the
    stages that generate and score answers.

    Args:
        gpu_name: Overrides the profiles. Without either, this machine's GPU counts, or its CPU.

    Raises:
        ConfigError: unknown GPU or architecture.
    """
    pipeline = Pipeline.open(run_file)
    shape = _shape(pipeline)
    run_file, note = _with_own_lora(run_file)
    stages = stages_of(run_file.run)
    trainings = [stage.name for stage in stages if stage.trains]
    if trainings:
        yield text.model_line(run_file, shape)
    else:
        yield f"{run_file.run.base_model}: the run trains nothing"
    yield f"stages: {' -> '.join(stage.name for stage in stages)}"
    yield from unused_sections(run_file.run)
    yield from note
    yield from text.serving_lines(run_file.run)
    for stage in trainings:
        params = getattr(run_file.run, stage)
        gpu = _gpu(run_file, getattr(run_file.resources, stage), gpu_name)
        data = _data(pipeline, stage)
        plan = forecast(run_file, params, shape, gpu, data, gpus.usable_host_bytes())
        yield ""
        yield from text.lines(plan, run_file.cluster.currency)
    for name in ("candidates", "judge", "evaluate"):
        if name in [stage.name for stage in stages]:
            yield ""
            yield from _row_stage_lines(pipeline, name, shape, gpu_name)


def _row_stage_lines(
    pipeline: Pipeline, stage: str, base: ModelShape, gpu_name: str | None
) -> Iterator[str]:
    """Describe the forecast of a stage that generates or scores answers."""
    run_file = pipeline.run_file
    prepared = _metrics(pipeline, "prepare")
    if prepared is None:
        yield text.unknown_rows_line(stage)
        return
    shape = base
    if stage == "judge" and run_file.run.judge.model is not None:
        try:
            shape = read_shape(
                run_file.run.judge.model, pipeline.known_pins(), run_file.cluster.store
            )
        except MedjobError as error:  # its size matters only here
            yield f"{stage}: not estimated, because its model cannot be read here: {error.message}"
            return
    gpu = _gpu(run_file, getattr(run_file.resources, stage), gpu_name)
    plan = forecast_rows(run_file, shape, gpu, _load(run_file, stage, prepared))
    yield from text.row_lines(plan, run_file.cluster.currency)


def _load(run_file: RunFile, stage: str, prepared: dict[str, Any]) -> Load:
    """Number and length of the texts of a stage, from the rows that `prepare` has counted."""
    run = run_file.run
    rows = prepared["train"] + prepared["further_rows"]
    row_tokens = prepared["tokens"] / rows if rows else run.candidates.max_new_tokens
    if stage == "candidates":
        return candidates_load(run_file, prepared["preferences"], row_tokens)
    if stage == "judge":
        return judge_load(run_file, prepared["preferences"], row_tokens)
    models = [*run.evaluate.models, *map(str, run.evaluate.extra_models)]
    judged = "judge" in (run.stages or ()) and run.judge.kind == "model"
    return evaluate_load(run_file, prepared["evaluation"], models, row_tokens, judged)


def _with_own_lora(run_file: RunFile) -> tuple[RunFile, list[str]]:
    """Replace `run.lora` by the parameters of the adapter that the run continues, if they can be
    read here, and describe that."""
    adapter = run_file.run.adapter
    if adapter is None:
        return run_file, []
    folder = Path(adapter.id).expanduser()
    if is_remote(adapter) or not (folder / ADAPTER_CONFIG).is_file():
        return run_file, [f"{adapter} has its own rank and layers; run.lora is counted instead"]
    run = run_file.run.model_copy(update={"lora": adapter_params(folder)})
    text = f"{adapter} has its own rank and layers, and run.lora has no effect"
    return run_file.model_copy(update={"run": run}), [text]


def _shape(pipeline: Pipeline) -> ModelShape:
    """The base model's shape, from the store's copy if there is one."""
    run_file = pipeline.run_file
    copied = pipeline.copied_config(run_file.run.base_model)
    if copied:
        return ModelShape.from_config(copied)
    return read_shape(run_file.run.base_model, pipeline.known_pins(), run_file.cluster.store)


def _gpu(run_file: RunFile, resources: StageResources, name: str | None) -> Gpu | None:
    if name is None and resources.gpus:
        name = profile_of(run_file, resources).accelerator or _local_gpu_name()
        if name is None and _is_mac():
            return gpus.mac(memory_limit_bytes() / GIB)
    if name is None:
        return None
    gpu = gpus.find(name)
    if gpu is None:
        known = ", ".join(gpu.name for gpu in gpus.GPUS)
        raise ConfigError(f"unknown GPU {name!r}", f"known: {known}")
    return gpu


def _is_mac() -> bool:
    """Whether this is a Mac with Apple silicon."""
    return (platform.system(), platform.machine()) == ("Darwin", "arm64")


def _local_gpu_name() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _data(pipeline: Pipeline, stage: str) -> Data | None:
    """Rows and tokens, if `prepare` has counted them. The judge's pairs are exact once `judge` has
    run."""
    prepared = _metrics(pipeline, "prepare")
    if not prepared:
        return None
    rows = prepared["train"] + prepared["further_rows"]
    mean_length = prepared["tokens"] / rows if rows else 0.0
    run = pipeline.run_file.run
    if stage == "dpo":
        return _pairs(pipeline, prepared, mean_length)
    if not rows:
        return None
    # Answers of dialogues that are rows of their own are left out if only the last is trained.
    trained = rows if run.sft.assistant_turns == "all" else prepared["train"]
    return Data(trained, mean_length, exact=trained == rows)


def _pairs(pipeline: Pipeline, prepared: dict[str, Any], mean_length: float) -> Data | None:
    """Pairs and their tokens. Those of the judge are as long as two training rows on average."""
    params = pipeline.run_file.run.dpo
    pairs, tokens, exact = 0, 0.0, True
    if params.uses_data:
        pairs, tokens = prepared["pairs"], prepared["pair_tokens"]
    if params.uses_judge:
        judged = _metrics(pipeline, "judge")
        exact = judged is not None
        more = judged["pairs"] if judged else prepared["preferences"]
        pairs, tokens = pairs + more, tokens + 2 * more * mean_length
    if not tokens:
        return None
    return Data(round(pairs * (1 - params.validation_fraction)), tokens / pairs, exact)


def _metrics(pipeline: Pipeline, stage: str) -> dict[str, Any] | None:
    # The stage is not published yet, or the store cannot be reached from here.
    with contextlib.suppress(MedjobError):
        manifest = pipeline.artifact(get_stage(stage)).manifest()
        return manifest.metrics if manifest else None
    return None
