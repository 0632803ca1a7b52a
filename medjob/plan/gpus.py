"""GPUs, their memory and speed, and the settings of a training that fit in one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from medjob.config.train import Method, Zero
from medjob.errors import ConfigError
from medjob.plan.memory import GIB, Memory, Setup, estimate
from medjob.plan.shape import ModelShape
from medjob.runtime.host import memory_limit_bytes

Auto = Literal["zero", "micro_batch_size", "checkpoint_every"]

GPU_SHARE = 0.9
"""Share of a GPU's memory to plan with. The rest is a reserve for the allocator's fragmentation and
for tensors that the memory model misses."""
HOST_SHARE = 0.8
"""Share of the machine's or container's memory to plan with when training on a CPU."""
ENOUGH_TOKENS = 8192
"""Micro-batches do not grow beyond this many tokens, which hide the fixed cost of a micro-batch
(see `_cost`)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A model of GPU."""

    name: str
    pattern: str
    """Regular expression for the name that `torch.cuda.get_device_name` returns."""
    memory_gib: float
    """Total of `torch.cuda.mem_get_info` on an idle GPU, rounded down. It is below the advertised
    size, because ECC and the driver take a part."""
    peak_tflops: float | None
    """Without sparsity, in bfloat16, or in float16 if there is no bfloat16. None if unknown."""
    bandwidth_gb_s: float | None = None
    """Memory bandwidth, which limits how fast text is generated. None if unknown."""
    has_bf16: bool = True
    is_mac: bool = False
    """Whether it is the GPU of a Mac, which shares the memory of the CPU."""

    @property
    def usable_bytes(self) -> int:
        """Memory to plan with."""
        return int(self.memory_gib * GIB * GPU_SHARE)


def mac(memory_gib: float) -> Gpu:
    """The GPU of a Mac with Apple silicon, by the Mac's memory: `Mac-16` and so on.

    Metal recommends to use two thirds of up to 36 GiB, and three quarters of more
    (`recommendedMaxWorkingSetSize`). The system and other programs need the rest.
    """
    share = 2 / 3 if memory_gib <= 36 else 3 / 4
    name = f"Mac-{memory_gib:.0f}"
    return Gpu(name, rf"^{name}$", memory_gib * share, None, is_mac=True)


# Peaks and bandwidths are from NVIDIA's data sheets. Those of Ada, Hopper and Blackwell print the
# peak with sparsity, which is halved here. The A10G is made for AWS; its figures are from the pages
# on G5.
# The first pattern that matches wins, so narrower patterns come first.
GPUS = (
    Gpu("T4", r"\bT4\b", 14.5, 65, 320, has_bf16=False),
    Gpu("L4", r"\bL4\b", 22.0, 121, 300),
    Gpu("A10G", r"\bA10G\b", 22.0, 70, 600),
    Gpu("RTX 4090", r"\bRTX 4090\b(?! (D|Laptop))", 23.5, 165, 1008),
    Gpu("L40S", r"\bL40S\b", 44.4, 362, 864),
    Gpu("A100-40", r"\bA100\b.*\b40GB\b", 39.4, 312, 1555),
    Gpu("A100-80", r"\bA100\b.*\b80GB\b", 79.1, 312, 2039),
    Gpu("H100 PCIe", r"\bH100 PCIe\b", 79.1, 756, 2000),
    Gpu("H100 NVL", r"\bH100 NVL\b", 93.0, 835, 3900),
    Gpu("H100", r"\bH100\b", 79.1, 989, 3350),
    Gpu("H200", r"\bH200\b", 139.8, 989, 4800),
    Gpu("B200", r"\bB200\b", 178.0, 2250, 8000),
    *(mac(memory) for memory in (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192)),
)


def find(name: str) -> Gpu | None:
    """Find a GPU by torch's name or by the table's. None if it is unknown, or a MIG slice."""
    if re.search(r"\bMIG\b", name):
        return None
    exact = next((gpu for gpu in GPUS if gpu.name.lower() == name.lower()), None)
    return exact or next((gpu for gpu in GPUS if re.search(gpu.pattern, name, re.IGNORECASE)), None)


def usable_host_bytes() -> float:
    """Memory that all training processes on this machine's CPU may plan with together."""
    return HOST_SHARE * memory_limit_bytes()


@dataclass(frozen=True, slots=True)
class Choice:
    """The settings chosen for one training, and their memory."""

    setup: Setup
    """The fastest settings that fit. If none fit, those that need the least memory."""
    memory: Memory
    fits: bool
    advice: tuple[str, ...]
    """If it does not fit: the reason, followed by changes that would make it fit."""


def choose(
    shape: ModelShape,
    setup: Setup,
    budget_bytes: float,
    *,
    auto: Collection[Auto],
    global_batch_size: int,
) -> Choice:
    """Choose the fields of `setup` named in `auto`, for the least time per token (see `_cost`) with
    a peak of memory within `budget_bytes`.

    One device gets no ZeRO. Several get stage 2, which gathers no weights, and stage 3 only if a
    full replica does not fit. Micro-batches divide the device's share of `global_batch_size`, and
    grow up to `ENOUGH_TOKENS`.

    Raises:
        ConfigError: the global batch is not divisible by the number of devices, or an error of
            `estimate`.
    """
    if found := _fastest_that_fits(shape, setup, budget_bytes, auto, global_batch_size):
        return Choice(found, estimate(shape, found), fits=True, advice=())
    tried = [
        (estimate(shape, candidate), candidate)
        for candidate in _candidates(shape, setup, auto, global_batch_size)
    ]
    memory, smallest = min(tried, key=lambda pair: (pair[0].total, pair[0].activations))
    advice = _advice(shape, setup, budget_bytes, auto, global_batch_size, memory)
    return Choice(smallest, memory, fits=False, advice=tuple(advice))


def _fastest_that_fits(
    shape: ModelShape, setup: Setup, budget: float, auto: Collection[Auto], batch: int
) -> Setup | None:
    fitting = [
        candidate
        for candidate in _candidates(shape, setup, auto, batch)
        if estimate(shape, candidate).total <= budget
    ]
    return min(
        fitting,
        key=lambda candidate: (candidate.zero == "zero3", _cost(shape, candidate)),
        default=None,
    )


def _candidates(
    shape: ModelShape, setup: Setup, auto: Collection[Auto], batch: int
) -> Iterator[Setup]:
    per_device, rest = divmod(batch, setup.world_size)
    if rest:
        raise ConfigError(
            f"run.{setup.stage}.global_batch_size: {batch} is not divisible by the"
            f" {setup.world_size} devices",
            f"choose resources.{setup.stage}.gpus x nodes so that it divides the batch",
        )
    zeros: tuple[Zero, ...] = (setup.zero,)
    if "zero" in auto:
        sharded: tuple[Zero, ...] = ("zero2", "zero3") if setup.allows_zero3 else ("zero2",)
        zeros = sharded if setup.world_size > 1 else ("none",)
    micro_batches = [setup.micro_batch_size]
    if "micro_batch_size" in auto:
        micro_batches = _micro_batches(setup, per_device)
    intervals: tuple[int, ...] = (setup.checkpoint_every,)
    if "checkpoint_every" in auto:
        intervals = _checkpoint_intervals(shape, setup)
    for zero in zeros:
        for rows in micro_batches:
            for every in intervals:
                yield replace(setup, zero=zero, micro_batch_size=rows, checkpoint_every=every)


def _checkpoint_intervals(shape: ModelShape, setup: Setup) -> tuple[int, ...]:
    # TRL 1.16 turns checkpointing off for DPO's reference model, and passes `every_n_layers` to
    # torch when it turns it on again. That recomputes all blocks, or raises an error.
    if setup.stage == "dpo":
        return (0, 1)
    return (0, *range(shape.layers, 0, -1))


def _micro_batches(setup: Setup, per_device: int) -> list[int]:
    """Divisors of `per_device`, up to the first that has enough tokens."""
    tokens_per_row = replace(setup, micro_batch_size=1).tokens
    sizes: list[int] = []
    for rows in range(1, per_device + 1):
        if per_device % rows:
            continue
        if sizes and sizes[-1] * tokens_per_row >= ENOUGH_TOKENS:
            break
        sizes.append(rows)
    return sizes


def _cost(shape: ModelShape, setup: Setup) -> float:
    """Time per token, relative to that of the model's operations alone. Calculated, not measured.

    Recomputing all blocks adds a half to the 4N operations of LoRA, and a third to the 6N of
    `full`. Each micro-batch has a fixed cost: kernel launches, and converting 4-bit weights to 16
    bits, twice. It is expressed in tokens that could be trained in that time. NF4 moves 2.5 bytes
    per weight, which takes as long as 0.5 x FLOP/s / (bytes/s) tokens at 40% of the peak: 150
    tokens on an H100 and 80 on an A100. The overheads of 256 and 128 allow for launches as well. It
    follows that smaller micro-batches beat recomputation down to about 500 tokens.

    sdpa has no kernel for concatenated rows and computes all pairs of their tokens. There, larger
    micro-batches cost more than they save.
    """
    all_pairs = setup.packed and setup.attention != "flash_attention_2"
    length = setup.tokens if all_pairs else setup.max_length
    operations = shape.training_flops_per_token(setup.method, length, setup.stage)
    operations += shape.recompute_flops_per_token(setup.checkpoint_every, length)
    needed = shape.training_flops_per_token(setup.method, setup.max_length, setup.stage)
    overhead_tokens = 256 if setup.method == "qlora" or shape.quantization else 128
    return operations / needed + overhead_tokens / setup.tokens


def _advice(
    shape: ModelShape,
    setup: Setup,
    budget: float,
    auto: Collection[Auto],
    batch: int,
    memory: Memory,
) -> Iterator[str]:
    """The reason why nothing fits, then single changes that would help. Each was tried."""
    part, gib = max(memory.table()[:-1], key=lambda row: row[1])
    if part == "transient" and memory.quantization:
        part = "loading the whole 4-bit base on each device before ZeRO-3 shards it"
    yield (
        f"the smallest settings need {memory.total / GIB:.1f} GiB, but only"
        f" {budget / GIB:.1f} GiB are usable; the largest part: {part} ({gib:.1f} GiB)"
    )
    found = False
    for changes in _changes(shape, setup, batch):
        for text, changed in changes:
            if _fastest_that_fits(shape, changed, budget, auto, batch):
                found = True
                yield text
                break
    if not found:
        yield (
            "no single change is enough: use a smaller run.base_model, or GPUs with more memory"
            f" for resources.{setup.stage}"
        )


def _changes(shape: ModelShape, setup: Setup, batch: int) -> Iterator[list[tuple[str, Setup]]]:
    """Yield each kind of change, as a list that starts with the smallest one."""
    stage = setup.stage
    methods: tuple[Method, ...] = ("full", "lora", "qlora")
    lighter = () if shape.quantization else methods[methods.index(setup.method) + 1 :]
    yield [
        (f"run.method={method} trains an adapter instead", replace(setup, method=method))
        for method in lighter
    ]
    # A Mac trains alone, and bitsandbytes has no 8-bit optimizers for it.
    has_more = setup.device != "mps"
    yield [
        (
            f"resources.{stage}.gpus x nodes = {devices} shards gradients and optimizer",
            replace(setup, world_size=devices),
        )
        for devices in range(setup.world_size + 1, 65)
        if has_more and batch % devices == 0
    ]
    lengths = [setup.max_length // 2**halvings for halvings in range(1, 6)]
    yield [
        (
            f"run.{stage}.max_length={length} or less keeps fewer activations",
            replace(setup, max_length=length),
        )
        for length in lengths
        if length >= 256
    ]
    optim = f"run.{stage}.optim=paged_adamw_8bit stores the optimizer's moments in 8 bits"
    yield [(optim, replace(setup, optim="paged_adamw_8bit"))] if has_more else []
