"""Accelerators: how much memory they have, how fast they multiply, and the settings of a training that fit in one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from medjob.config.train import Method, Zero
from medjob.errors import ConfigError
from medjob.plan.memory import GIB, Memory, Setup, estimate
from medjob.plan.shape import ModelShape

Auto = Literal["zero", "micro_batch_size", "checkpoint_every"]

# A micro-batch of that many tokens hides what comes once for each: see `_cost`.
ENOUGH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. `peak_tflops` is dense (no sparsity): bfloat16, or float16 where there is no bfloat16."""

    name: str
    pattern: str
    """Regular expression for names as `torch.cuda.get_device_name` gives them."""
    memory_gib: float
    """What `torch.cuda.mem_get_info` finds on an idle device, rounded down; less than the name says (ECC, the driver's share)."""
    peak_tflops: float
    has_bf16: bool = True

    @property
    def usable_bytes(self) -> int:
        """Memory to plan with. A tenth is kept back for the allocator's fragmentation and for what the memory model misses."""
        return int(self.memory_gib * GIB * 0.9)


# Peaks from NVIDIA's data sheets, where those of Ada, Hopper and Blackwell print the sparse figure, halved here. The A10G is AWS' own
# part (G5 pages). Order matters: the first pattern that matches wins, so narrower ones come first.
GPUS = (
    Gpu("T4", r"\bT4\b", 14.5, 65, has_bf16=False),
    Gpu("L4", r"\bL4\b", 22.0, 121),
    Gpu("A10G", r"\bA10G\b", 22.0, 70),
    Gpu("RTX 4090", r"\bRTX 4090\b(?! (D|Laptop))", 23.5, 165),
    Gpu("L40S", r"\bL40S\b", 44.4, 362),
    Gpu("A100-40", r"\bA100\b.*\b40GB\b", 39.4, 312),
    Gpu("A100-80", r"\bA100\b.*\b80GB\b", 79.1, 312),
    Gpu("H100 PCIe", r"\bH100 PCIe\b", 79.1, 756),
    Gpu("H100 NVL", r"\bH100 NVL\b", 93.0, 835),
    Gpu("H100", r"\bH100\b", 79.1, 989),
    Gpu("H200", r"\bH200\b", 139.8, 989),
    Gpu("B200", r"\bB200\b", 178.0, 2250),
)


def find(name: str) -> Gpu | None:
    """The device that torch calls `name` (or that the table does); None for one that is not in the table, or a slice of one (MIG)."""
    if re.search(r"\bMIG\b", name):
        return None
    exact = next((gpu for gpu in GPUS if gpu.name.lower() == name.lower()), None)
    return exact or next((gpu for gpu in GPUS if re.search(gpu.pattern, name, re.IGNORECASE)), None)


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings for one training, and what they take."""

    setup: Setup
    """The fastest that fits, or the smallest."""
    memory: Memory
    fits: bool
    advice: tuple[str, ...]
    """What is wrong and what to change, where it does not fit."""


def choose(
    shape: ModelShape,
    setup: Setup,
    budget_bytes: float,
    *,
    auto: Collection[Auto],
    global_batch_size: int,
) -> Choice:
    """Fill in what of `setup` is in `auto`, so that its peak is within `budget_bytes` and a token takes the least time (see `_cost`).

    ZeRO: none on one device, stage 2 on several (of one node or more: it gathers no weights), stage 3 only where a whole replica does
    not fit. Micro-batches divide the device's share of `global_batch_size`, and grow to `ENOUGH_TOKENS` and no further.

    Raises:
        ConfigError: the global batch cannot be shared out evenly; what `estimate` raises.
    """
    if found := _search(shape, setup, budget_bytes, auto, global_batch_size):
        return Choice(found, estimate(shape, found), True, ())
    tried = [
        (estimate(shape, candidate), candidate)
        for candidate in _candidates(shape, setup, auto, global_batch_size)
    ]
    memory, smallest = min(tried, key=lambda pair: (pair[0].total, pair[0].activations))
    return Choice(
        smallest,
        memory,
        False,
        tuple(_advice(shape, setup, budget_bytes, auto, global_batch_size, memory)),
    )


def _search(
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
    share, rest = divmod(batch, setup.world_size)
    if rest:
        key = f"run.{setup.stage}.global_batch_size"
        raise ConfigError(
            f"{key}: {batch} cannot be shared by {setup.world_size} devices",
            f"resources.{setup.stage}.gpus x nodes must divide it",
        )
    stages: tuple[Zero, ...] = ("zero2", "zero3") if setup.world_size > 1 else ("none",)
    # TRL 1.16's DPO turns checkpointing off for the reference and on again with `every_n_layers` as if it were torch's: all blocks, or an error.
    some = (0, 1) if setup.stage == "dpo" else (0, *range(shape.layers, 0, -1))
    every = some if "checkpoint_every" in auto else (setup.checkpoint_every,)
    micros = (
        _micro_batches(setup, share) if "micro_batch_size" in auto else [setup.micro_batch_size]
    )
    for zero, rows, n in product(stages if "zero" in auto else (setup.zero,), micros, every):
        yield replace(setup, zero=zero, micro_batch_size=rows, checkpoint_every=n)


def _micro_batches(setup: Setup, share: int) -> list[int]:
    """Divisors of `share`, up to the first with enough tokens."""
    divisors = [rows for rows in range(1, share + 1) if share % rows == 0]
    one = replace(setup, micro_batch_size=1).tokens
    return [
        rows for i, rows in enumerate(divisors) if i == 0 or divisors[i - 1] * one < ENOUGH_TOKENS
    ]


def _cost(shape: ModelShape, setup: Setup) -> float:
    """Time of a token, relative to its model operations alone. Arithmetic, not measured.

    Recomputing everything adds a half to LoRA's 4N operations and a third to `full`'s 6N. What comes once a micro-batch (launches, and
    turning 4-bit weights into 16-bit ones, twice) takes as long as some tokens do: NF4 moves 2.5 bytes a weight in the time of
    0.5 x FLOP/s / (bytes/s) tokens at 40 % of peak, 150 on an H100 and 80 on an A100; 256 and 128 allow for launches. So smaller
    micro-batches are better than recomputation down to some 500 tokens. Rows laid end to end make sdpa, which has no kernel for them,
    compute all pairs of tokens: there larger micro-batches cost more than they save.
    """
    every, wide = setup.checkpoint_every, setup.packed and setup.attention != "flash"
    length = setup.tokens if wide else setup.max_length
    spent = shape.training_flops_per_token(
        setup.method, length, setup.stage
    ) + shape.recompute_flops_per_token(every, length)
    overhead = 256 if setup.method == "qlora" or shape.quantization else 128
    return (
        spent / shape.training_flops_per_token(setup.method, setup.max_length, setup.stage)
        + overhead / setup.tokens
    )


def _advice(
    shape: ModelShape,
    setup: Setup,
    budget: float,
    auto: Collection[Auto],
    batch: int,
    memory: Memory,
) -> Iterator[str]:
    """What is wrong, and each single change that mends it, tried out."""
    name, gib = max(memory.table()[:-1], key=lambda row: row[1])
    if name == "working" and memory.quantization:
        name = "loading the whole 4-bit base, as each device does before ZeRO-3 shards it"
    yield f"the smallest setting needs {memory.total / GIB:.1f} GiB and there are {budget / GIB:.1f}; most of it: {name} ({gib:.1f} GiB)"
    found = False
    for changes in _changes(shape, setup, batch):
        if text := next(
            (text for text, changed in changes if _search(shape, changed, budget, auto, batch)),
            None,
        ):
            found = True
            yield text
    if not found:
        yield f"no single change is enough: take a smaller run.base_model, or GPUs of more memory for resources.{setup.stage}"


def _changes(shape: ModelShape, setup: Setup, batch: int) -> Iterator[list[tuple[str, Setup]]]:
    """Kinds of change, each from the smallest on."""
    stage = setup.stage
    methods: tuple[Method, ...] = ("full", "lora", "qlora")
    lighter = () if shape.quantization else methods[methods.index(setup.method) + 1 :]
    worlds = [world for world in range(setup.world_size + 1, 65) if batch % world == 0]
    lengths = [setup.max_length // 2**n for n in range(1, 6) if setup.max_length // 2**n >= 256]
    yield [
        (f"run.method={method} trains an adapter instead", replace(setup, method=method))
        for method in lighter
    ]
    yield [
        (
            f"resources.{stage}.gpus x nodes = {n} shares out what is trained",
            replace(setup, world_size=n),
        )
        for n in worlds
    ]
    yield [
        (
            f"run.{stage}.max_length={n} or less keeps fewer activations",
            replace(setup, max_length=n),
        )
        for n in lengths
    ]
    yield [
        (
            f"run.{stage}.optim=paged_adamw_8bit holds smaller moments",
            replace(setup, optim="paged_adamw_8bit"),
        )
    ]
