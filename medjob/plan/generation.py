"""Forecast of the stages that work through rows: candidates, judge and evaluate.

The figures are rough. Answers are as long as the trained rows, or shorter if the limit is lower,
and the speeds are published ones of other machines, scaled to the model and the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medjob.config.run_file import RowResources, RunFile
from medjob.plan.forecast import profile_of
from medjob.plan.gpus import Gpu
from medjob.plan.shape import ModelShape

LocalEngine = Literal["vllm", "transformers"]

PUBLISHED_TOKENS_PER_SECOND: dict[LocalEngine, float] = {"vllm": 12_500, "transformers": 1_000}
"""Published speeds of offline generation with a model of 8B in bfloat16 on one H100, at high
concurrency. Conditions differ between the sources (November 2026)."""
_PUBLISHED_PARAMETERS = 8.03e9
_PUBLISHED_BANDWIDTH = 3_350.0
_SMALLEST = 1e9
"""Smaller models are not faster in proportion, because the fixed cost of a step dominates."""
READING_MFU = 0.4
"""Model FLOPs utilisation of reading prompts. An assumption, not a measurement."""
ASPECTS = 3
"""Questions that the judge is asked about each answer, each read once."""
_INSTRUCTIONS = 150
"""Tokens of the judge's instructions around question, reference and answer."""
_MODEL_LOADING_H = 3 / 60
"""Hours that each shard needs to start: image, weights and engine. An assumption."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a stage has to generate and to read, in tokens."""

    stage: str
    rows: int
    answers: int
    """Answers to generate, or to score."""
    generated: float
    read: float


@dataclass(frozen=True, slots=True)
class RowForecast:
    """Forecast of one stage."""

    load: Load
    resources: RowResources
    gpu: Gpu | None
    """None for a CPU."""
    engine: LocalEngine
    tokens_per_second: float | None
    """Generated tokens per second of one shard. None for a CPU or a Mac."""
    read_per_second: float | None
    price_per_gpu_hour: float | None

    @property
    def hours(self) -> float | None:
        """Hours until the last of the shards ends, which run at once."""
        if self.tokens_per_second is None or self.read_per_second is None:
            return None
        seconds = self.load.generated / self.tokens_per_second
        seconds += self.load.read / self.read_per_second
        return seconds / self.resources.shards / 3600 + _MODEL_LOADING_H

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all GPUs together."""
        devices = self.resources.shards * max(self.resources.gpus, 1)
        return None if self.hours is None else self.hours * devices

    @property
    def cost(self) -> float | None:
        """Cost in the cluster's currency."""
        if self.gpu_hours is None or self.price_per_gpu_hour is None:
            return None
        return self.gpu_hours * self.price_per_gpu_hour


def forecast_rows(run_file: RunFile, shape: ModelShape, gpu: Gpu | None, load: Load) -> RowForecast:
    """Forecast one stage.

    Args:
        shape: The model that generates or judges.
        gpu: None to run on a CPU.
    """
    resources: RowResources = getattr(run_file.resources, load.stage)
    engine: LocalEngine = "transformers" if resources.engine == "transformers" else "vllm"
    generates = gpu and generation_speed(shape, gpu, engine, resources.gpus)
    reads = gpu and reading_speed(shape, gpu, resources.gpus)
    price = profile_of(run_file, resources).price_per_gpu_hour
    return RowForecast(load, resources, gpu, engine, generates or None, reads or None, price)


def generation_speed(shape: ModelShape, gpu: Gpu, engine: LocalEngine, gpus: int) -> float | None:
    """Tokens per second of one shard: the published speed, scaled by weights and by memory
    bandwidth, which limits generation. None if the bandwidth is unknown."""
    if gpu.bandwidth_gb_s is None:
        return None
    size = _PUBLISHED_PARAMETERS / max(shape.parameters, _SMALLEST)
    bandwidth = gpu.bandwidth_gb_s * max(gpus, 1) / _PUBLISHED_BANDWIDTH
    return PUBLISHED_TOKENS_PER_SECOND[engine] * size * bandwidth


def reading_speed(shape: ModelShape, gpu: Gpu, gpus: int) -> float | None:
    """Prompt tokens per second of one shard, from 2 operations per weight and token."""
    if gpu.peak_tflops is None:
        return None
    operations = gpu.peak_tflops * 1e12 * READING_MFU * max(gpus, 1)
    return operations / (2 * max(shape.parameters, _SMALLEST))


def candidates_load(run_file: RunFile, prompts: int, row_tokens: float) -> Load:
    """Load of `candidates`: `num_candidates` answers to each prompt.

    Args:
        row_tokens: Mean tokens of a prepared row, question and answer together.
    """
    params = run_file.run.candidates
    answers = prompts * params.num_candidates
    generated = answers * min(row_tokens, params.max_new_tokens)
    return Load("candidates", prompts, answers, generated, read=prompts * row_tokens)


def judge_load(run_file: RunFile, prompts: int, row_tokens: float) -> Load:
    """Load of `judge`: it reads question, reference and answer once per aspect, and generates
    nothing, because it takes the probabilities of the digits."""
    answers = prompts * run_file.run.candidates.num_candidates
    read = answers * ASPECTS * (2 * row_tokens + _INSTRUCTIONS)
    return Load("judge", prompts, answers, 0.0, read if run_file.run.judge.kind == "model" else 0.0)


def evaluate_load(
    run_file: RunFile, rows: int, models: Sequence[str], row_tokens: float, judged: bool
) -> Load:
    """Load of `evaluate`: each model answers each row.

    Args:
        judged: Whether a model grades the answers.
    """
    limit = run_file.run.evaluate.max_new_tokens
    answers = rows * len(models)
    read = 2 * answers * row_tokens  # once to answer, once for the likelihood of the reference
    if judged:
        read += answers * ASPECTS * (2 * row_tokens + _INSTRUCTIONS)
    return Load("evaluate", rows, answers, answers * min(row_tokens, limit), read)
