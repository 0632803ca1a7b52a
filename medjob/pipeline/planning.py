"""`medjob plan`: gathers what a forecast needs: the model's sizes, the device, and what earlier stages counted."""

from __future__ import annotations

import contextlib
import os
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
from medjob.plan.shape import ModelShape
from medjob.plan.source import read_shape
from medjob.stage import get_stage


def plan_lines(run_file: RunFile, gpu_name: str | None) -> Iterator[str]:
    """The plan of both trainings. `gpu_name` wins over the profiles; without either it is this machine's GPU, or its CPU.

    Raises:
        ConfigError: a GPU or an architecture that is not known.
    """
    pipeline = Pipeline.open(run_file)
    copied = pipeline.copied_config(run_file.run.base_model)
    shape = (
        ModelShape.from_config(copied)
        if copied
        else read_shape(run_file.run.base_model, pipeline.known_pins(), run_file.cluster.store)
    )
    yield text.model_line(run_file, shape)
    for params in (run_file.run.sft, run_file.run.dpo):
        stage = "dpo" if isinstance(params, DpoParams) else "sft"
        gpu = _gpu(run_file, getattr(run_file.resources, stage), gpu_name)
        host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        yield ""
        yield from text.lines(
            forecast(run_file, params, shape, gpu, _data(pipeline, stage), host),
            run_file.cluster.currency,
        )


def _gpu(run_file: RunFile, resources: StageResources, name: str | None) -> Gpu | None:
    if name is None and resources.gpus:
        name = profile_of(run_file, resources).accelerator or _this_machines()
    if name is None:
        return None
    found = gpus.find(name)
    if found is None:
        raise ConfigError(
            f"no GPU is known as {name!r}", f"known: {', '.join(gpu.name for gpu in gpus.GPUS)}"
        )
    return found


def _this_machines() -> str | None:
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
    """Rows and tokens, as far as `prepare` and `judge` have counted them."""
    prepared = _metrics(pipeline, "prepare")
    if not prepared or not prepared["train"]:
        return None
    length = prepared["tokens"] / prepared["train"]
    if stage == "sft":
        return Data(prepared["train"], length, exact=True)
    judged = _metrics(pipeline, "judge")
    held = 1 - pipeline.run_file.run.dpo.validation_fraction
    pairs = judged["pairs"] if judged else prepared["preferences"]
    return Data(round(pairs * held), 2 * length, exact=judged is not None) if pairs else None


def _metrics(pipeline: Pipeline, stage: str) -> dict[str, Any] | None:
    with contextlib.suppress(MedjobError):  # not published yet, or no way to the store from here
        manifest = pipeline.artifact(get_stage(stage)).manifest()
        return manifest.metrics if manifest else None
    return None
