"""A forecast as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from medjob.config.run_file import RunFile
from medjob.plan.forecast import MFU, Forecast
from medjob.plan.memory import GIB
from medjob.plan.shape import ModelShape


def model_line(run_file: RunFile, shape: ModelShape) -> str:
    """The model in one line."""
    adapter = shape.lora_parameters(run_file.run.lora.r, run_file.run.lora.target_modules)
    trained = shape.parameters if run_file.run.method == "full" else adapter
    return (
        f"{run_file.run.base_model}: {shape.family}, {_count(shape.parameters)} parameters, {shape.layers} layers; "
        f"{run_file.run.method} trains {_count(trained)} ({100 * trained / shape.parameters:.3g}%)"
    )


def lines(plan: Forecast, currency: str) -> Iterator[str]:
    """One stage's forecast."""
    setup, resources = plan.choice.setup, plan.resources
    device = plan.gpu.name if plan.gpu else "CPU"
    yield f"{plan.stage}: {resources.nodes} node(s) x {max(resources.gpus, 1)} {device}"
    yield from (f"  {name:<24} {value}" for name, value in _settings(plan))
    yield f"  {'memory per device':<24} {_memory(plan)}"
    yield from (
        f"    {name:<22} {_size(gib):>10}" for name, gib in plan.choice.memory.table() if gib
    )
    if plan.choice.advice:
        wrong, *changes = plan.choice.advice
        yield f"  does not fit: {wrong}"
        yield from (f"    change: {change}" for change in changes)
    yield f"  {'steps':<24} {_steps(plan)}"
    yield f"  {'time and cost':<24} {_cost(plan, currency)}"
    if setup.stage == "dpo" and plan.data and not plan.data.exact:
        yield "  (pairs are known once `judge` is published; as many as there are preference prompts are counted here)"


def _settings(plan: Forecast) -> Iterator[tuple[str, str]]:
    """What will be on, and why."""
    setup, resources = plan.choice.setup, plan.resources
    alone = "one device has nothing to share" if setup.world_size == 1 else "plain data parallelism"
    zero = {
        "none": alone,
        "zero1": "optimizer sharded",
        "zero2": "optimizer and gradients sharded; the weights fit",
        "zero3": "weights sharded too: a whole replica does not fit",
    }
    yield "deepspeed", f"{setup.zero} ({zero[setup.zero]})"
    yield (
        "micro batch",
        f"{setup.micro_batch_size} x {setup.max_length} tokens at most, {setup.tokens:,} in a forward pass",
    )
    every = setup.checkpoint_every
    kept = (
        "all kept: there is room"
        if every == 0
        else "recomputed in every layer"
        if every == 1
        else f"recomputed in every {every}th layer"
    )
    yield (
        "activations",
        kept if resources.gradient_checkpointing == "auto" else f"{kept} (as the file says)",
    )
    yield (
        "packing",
        "on: rows end to end, attention kept apart" if setup.packed else _why_unpacked(plan),
    )
    yield (
        "attention",
        f"{resources.attn_implementation}"
        + (" (FlashAttention 2 where it is installed, else sdpa)" if plan.gpu else ""),
    )
    yield "loss", "fused with the head: logits are never held as a whole (TRL)"
    yield (
        "fused kernels",
        "Liger's, where it is installed" if plan.gpu else "off: they are for GPUs",
    )
    yield (
        "torch.compile",
        "on" if resources.torch_compile else "off (resources.<stage>.torchCompile)",
    )


def _why_unpacked(plan: Forecast) -> str:
    if plan.stage == "dpo":
        return "off: TRL packs no pairs"
    return "off: run.sft.packing" if plan.gpu else "off: padding is faster on a CPU"


def _memory(plan: Forecast) -> str:
    text = _size(plan.choice.memory.total / GIB)
    if plan.gpu:
        text += f" of {_size(plan.gpu.usable_bytes / GIB)} that can be planned with"
    return text + (": fits" if plan.choice.fits else ": does not fit")


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


def _steps(plan: Forecast) -> str:
    if plan.steps is None:
        return "not known before `medjob prepare` (a CPU is enough for it)"
    text = f"{plan.steps:,}"
    if plan.tokens is not None and plan.data is not None:
        text += f", {_count(plan.tokens)} tokens ({plan.data.rows:,} rows, {plan.data.mean_length:.0f} tokens each)"
    return text


def _cost(plan: Forecast, currency: str) -> str:
    if plan.gpu is None:
        return "not reckoned for a CPU; the first steps of the run show it"
    if plan.hours is None or plan.gpu_hours is None:
        return "not known before `medjob prepare`"
    text = f"{plan.hours:.2f} h, {plan.gpu_hours:.2f} GPU-hours at {100 * MFU:.0f}% of the peak"
    if plan.cost is None:
        return text + "; no price: cluster.profiles.<name>.pricePerGpuHour"
    return text + f", {plan.cost:,.2f} {currency} ({plan.price_per_gpu_hour:.2f} a GPU-hour)"


def _count(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return f"{number:.0f}"
