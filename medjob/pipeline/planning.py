"""`medjob plan`: collects the inputs of a forecast.

These are the model's sizes, the device, and the rows and tokens that earlier stages counted.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from medjob.config import RunFile
from medjob.config.run_file import StageResources
from medjob.config.train import DpoParams
from medjob.errors import ConfigError, MedjobError
from medjob.pipeline.runner import Pipeline
from medjob.plan import gpus, text
from medjob.plan.forecast import Data, forecast, profile_of
from medjob.plan.gpus import Gpu
from medjob.plan.memory import GIB
from medjob.plan.shape import ModelShape
from medjob.plan.source import read_shape
from medjob.runtime.host import memory_limit_bytes
from medjob.stage import get_stage


def plan_lines(run_file: RunFile, gpu_name: str | None) -> Iterator[str]:
    """Describe memory, steps, hours and cost of both trainings.

    Args:
        gpu_name: Overrides the profiles. Without either, this machine's GPU counts, or its CPU.

    Raises:
        ConfigError: unknown GPU or architecture.
    """
    pipeline = Pipeline.open(run_file)
    shape = _shape(pipeline)
    yield text.model_line(run_file, shape)
    yield from text.serving_lines(run_file.run)
    for params in (run_file.run.sft, run_file.run.dpo):
        stage = "dpo" if isinstance(params, DpoParams) else "sft"
        gpu = _gpu(run_file, getattr(run_file.resources, stage), gpu_name)
        data = _data(pipeline, stage)
        plan = forecast(run_file, params, shape, gpu, data, gpus.usable_host_bytes())
        yield ""
        yield from text.lines(plan, run_file.cluster.currency)


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
    """Rows and tokens, if `prepare` has counted them. Pairs are exact once `judge` has run."""
    prepared = _metrics(pipeline, "prepare")
    if not prepared or not prepared["train"]:
        return None
    mean_length = prepared["tokens"] / prepared["train"]
    if stage == "sft":
        return Data(prepared["train"], mean_length, exact=True)
    judged = _metrics(pipeline, "judge")
    pairs = judged["pairs"] if judged else prepared["preferences"]
    if not pairs:
        return None
    training_share = 1 - pipeline.run_file.run.dpo.validation_fraction
    return Data(round(pairs * training_share), 2 * mean_length, exact=judged is not None)


def _metrics(pipeline: Pipeline, stage: str) -> dict[str, Any] | None:
    # The stage is not published yet, or the store cannot be reached from here.
    with contextlib.suppress(MedjobError):
        manifest = pipeline.artifact(get_stage(stage)).manifest()
        return manifest.metrics if manifest else None
    return None
