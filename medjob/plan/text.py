"""A forecast as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from medjob.config.run_file import Run, RunFile
from medjob.plan.forecast import MFU, Forecast
from medjob.plan.generation import PUBLISHED_TOKENS_PER_SECOND, READING_MFU, RowForecast
from medjob.plan.memory import GIB
from medjob.plan.shape import ModelShape

# The largest max_lora_rank of vLLM 0.32.
_VLLM_RANK = 512
_UNTIL_PREPARED = "unknown until `medjob prepare` has run"


def model_line(run_file: RunFile, shape: ModelShape) -> str:
    """Describe the model and its trained part in one line."""
    run = run_file.run
    trained = shape.trained_parameters(run.method, run.lora)
    return (
        f"{run.base_model}: {shape.family}, {_count(shape.parameters)} parameters,"
        f" {shape.layers} layers; {run.method} trains {_count(trained)}"
        f" ({100 * trained / shape.parameters:.3g}%)"
    )


def serving_lines(run: Run) -> Iterator[str]:
    """Say which settings of the adapter vLLM does not serve, one per line."""
    if run.method == "full":
        return
    lora = run.lora.published
    refused = ("use_dora", "modules_to_save", "trainable_token_indices")
    ignored = ("rank_pattern", "alpha_pattern")
    rank = max(lora.r, *lora.rank_pattern.values(), 0)
    found = [
        *(f"vLLM refuses run.lora.{name}" for name in refused if getattr(lora, name)),
        *(
            f"vLLM ignores run.lora.{name}, and would scale the adapter wrongly"
            for name in ignored
            if getattr(lora, name)
        ),
        *([f"vLLM refuses the rank {rank}, which is over {_VLLM_RANK}"] * (rank > _VLLM_RANK)),
    ]
    yield from (f"adapter: {line}" for line in found)
    if found:
        yield "adapter: vLLM serves the merged model of `medjob export` like any other model"


def lines(plan: Forecast, currency: str) -> Iterator[str]:
    """Describe the forecast of one stage."""
    resources = plan.resources
    device = plan.gpu.name if plan.gpu else "CPU"
    yield f"{plan.stage}: {resources.nodes} node(s) x {max(resources.gpus, 1)} {device}"
    yield from (f"  {name:<24} {value}" for name, value in _settings(plan))
    yield f"  {'memory per device':<24} {_memory(plan)}"
    for part, gib in plan.choice.memory.table():
        if gib:
            yield f"    {part:<22} {_size(gib):>10}"
    if plan.choice.advice:
        reason, *changes = plan.choice.advice
        yield f"  does not fit: {reason}"
        yield from (f"    change: {change}" for change in changes)
    yield f"  {'steps':<24} {_steps(plan)}"
    yield f"  {'time and cost':<24} {_cost(plan, currency)}"
    if plan.stage == "dpo" and plan.data and not plan.data.exact:
        yield "  (`judge` has not run yet, so each preference prompt is counted as one pair)"


def row_lines(plan: RowForecast, currency: str) -> Iterator[str]:
    """Describe the forecast of a stage that works through rows."""
    resources, load = plan.resources, plan.load
    device = plan.gpu.name if plan.gpu else "CPU"
    engine = "" if resources.engine == "openai" else f", {plan.engine}"
    yield (f"{load.stage}: {resources.shards} shard(s) x {max(resources.gpus, 1)} {device}{engine}")
    yield f"  {'answers':<24} {load.answers:,} ({load.rows:,} rows)"
    tokens = f"about {_count(load.generated)} generated, {_count(load.read)} read"
    yield f"  {'tokens':<24} {tokens}; an answer is taken to be as long as a trained row"
    if resources.engine == "openai":
        yield f"  {'time and cost':<24} those of the endpoint"
        return
    if load.generated and plan.tokens_per_second:
        published = PUBLISHED_TOKENS_PER_SECOND[plan.engine]
        yield (
            f"  {'speed':<24} about {plan.tokens_per_second:,.0f} tokens/s per shard: rough, from "
            f"published {published:,.0f} tokens/s of an 8B model on an H100 ({plan.engine}), "
            "scaled by weights and memory bandwidth"
        )
    yield f"  {'time and cost':<24} {_row_cost(plan, currency)}"


def _row_cost(plan: RowForecast, currency: str) -> str:
    if not plan.load.generated and not plan.load.read:
        return "seconds: no model is needed"
    if plan.hours is None or plan.gpu_hours is None:
        device = "a Mac" if plan.gpu else "CPU"
        return f"not estimated on {device}; `medjob status` shows the speed"
    text = (
        f"{plan.hours:.2f} h, {plan.gpu_hours:.2f} GPU-hours, with 3 min per shard to start and "
        f"prompts read at {100 * READING_MFU:.0f}% of the peak"
    )
    return _with_cost(text, plan.cost, plan.price_per_gpu_hour, currency)


def unknown_rows_line(stage: str) -> str:
    """Say that the stage cannot be forecast yet."""
    return f"{stage}: {_UNTIL_PREPARED} (it needs no GPU)"


def _with_cost(text: str, cost: float | None, price: float | None, currency: str) -> str:
    if cost is None:
        return f"{text}; for the cost, set cluster.profiles.<name>.pricePerGpuHour"
    return f"{text}, {cost:,.2f} {currency} ({price:.2f} per GPU-hour)"


def _settings(plan: Forecast) -> Iterator[tuple[str, str]]:
    """Each setting with its value, and the reason for it."""
    setup = plan.choice.setup
    yield "deepspeed", _deepspeed(plan)
    rows = f"{setup.micro_batch_size} x {setup.max_length} tokens at most"
    yield "micro batch", f"{rows}, {setup.tokens:,} per forward pass"
    yield "activations", _activations(plan)
    yield "packing", _packing(plan)
    yield "attention", _attention(plan)
    yield "loss", "fused with the head (TRL): the full logits never exist in memory"
    fused = plan.gpu is not None and not plan.gpu.is_mac
    yield "fused kernels", "Liger, if it is installed" if fused else "off: for NVIDIA's GPUs only"
    compiled = plan.resources.torch_compile
    yield "torch.compile", "on" if compiled else f"off (resources.{plan.stage}.torchCompile)"


def _deepspeed(plan: Forecast) -> str:
    setup = plan.choice.setup
    if setup.zero == "none" and setup.world_size == 1:
        return "none (one device has nothing to shard)"
    meaning = {
        "none": "plain data parallelism",
        "zero1": "shards the optimizer",
        "zero2": "shards optimizer and gradients; the weights fit on each device",
        "zero3": "shards optimizer, gradients and weights; a full replica does not fit",
    }
    return f"{setup.zero} ({meaning[setup.zero]})"


def _activations(plan: Forecast) -> str:
    every = plan.choice.setup.checkpoint_every
    is_auto = plan.resources.gradient_checkpointing == "auto"
    if every == 0:
        text = "all kept, because they fit" if is_auto else "all kept"
    elif every == 1:
        text = "recomputed in every layer"
    else:
        text = f"recomputed in every {every}th layer"
    return text if is_auto else f"{text} (resources.{plan.stage}.gradientCheckpointing)"


def _packing(plan: Forecast) -> str:
    if plan.choice.setup.packed:
        return "on: rows are concatenated, and attention stays within each row"
    if plan.stage == "dpo":
        return "off: TRL does not pack pairs"
    return "off: run.sft.packing" if plan.gpu else "off: padding is faster on a CPU"


def _attention(plan: Forecast) -> str:
    nvidia = plan.gpu is not None and not plan.gpu.is_mac
    if nvidia and plan.resources.attn_implementation == "auto":
        return "FlashAttention 2 if it is installed, otherwise sdpa"
    return plan.choice.setup.attention


def _memory(plan: Forecast) -> str:
    text = _size(plan.choice.memory.total / GIB)
    if plan.gpu:
        text += f" of {_size(plan.gpu.usable_bytes / GIB)} usable"
    if plan.gpu and plan.gpu.is_mac:
        text += " (shared with the CPU)"
    return text + (": fits" if plan.choice.fits else ": does not fit")


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


def _steps(plan: Forecast) -> str:
    if plan.steps is None:
        return f"{_UNTIL_PREPARED} (it needs no GPU)"
    text = f"{plan.steps:,}"
    if plan.tokens is not None and plan.data is not None:
        text += (
            f", {_count(plan.tokens)} tokens"
            f" ({plan.data.rows:,} rows, {plan.data.mean_length:.0f} tokens each on average)"
        )
    return text


def _cost(plan: Forecast, currency: str) -> str:
    if plan.gpu is None or plan.gpu.peak_tflops is None:
        device = "a Mac" if plan.gpu else "CPU"
        return f"not estimated on {device}; the first steps of the run show the speed"
    if plan.hours is None or plan.gpu_hours is None:
        return _UNTIL_PREPARED
    text = f"{plan.hours:.2f} h, {plan.gpu_hours:.2f} GPU-hours at {100 * MFU:.0f}% of the peak"
    return _with_cost(text, plan.cost, plan.price_per_gpu_hour, currency)


def _count(number: float) -> str:
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f}{suffix}"
    return f"{number:.0f}"
