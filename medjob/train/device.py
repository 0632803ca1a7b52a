"""The device that this machine trains and generates on, and the choices that follow from it.

Only this module asks torch about accelerators. `this_device` collects the facts, and the choices
are methods of `Device`, so that tests can state the facts of a machine that they do not run on.
"""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import dataclass
from typing import Any

from medjob.config.train import Zero
from medjob.errors import ConfigError
from medjob.plan import memory
from medjob.plan.gpus import GPU_SHARE, HOST_SHARE
from medjob.runtime.host import memory_limit_bytes


@dataclass(frozen=True, slots=True)
class Device:
    """Facts about the device of this process."""

    kind: memory.Device
    name: str
    memory_bytes: float
    """Memory of the GPU. On a Mac: what Metal recommends to use of the memory that it shares with
    the CPU. Without a GPU: memory of the machine or container."""
    count: int = 1
    """GPUs of this machine; 1 for a CPU."""
    index: int = 0
    """Number of this process's GPU."""
    has_bf16: bool = True
    has_deepspeed: bool = True
    """Whether DeepSpeed is installed. It exists for Linux only."""

    @property
    def placement(self) -> int | str:
        """The value of `device_map` for a whole model."""
        return self.index if self.kind == "cuda" else self.kind

    @property
    def backends(self) -> str:
        """torch's process group: NCCL for tensors on GPUs, gloo for those on the CPU."""
        return "cpu:gloo,cuda:nccl" if self.kind == "cuda" else "gloo"

    @property
    def fuses_kernels(self) -> bool:
        """Whether Triton's kernels can run."""
        return self.kind == "cuda"

    def budget_bytes(self, processes: int) -> float:
        """Memory that one of this machine's training processes may use. GPUs are not shared."""
        if self.kind == "cpu":
            return HOST_SHARE * self.memory_bytes / processes
        return GPU_SHARE * self.memory_bytes

    def precision(self, dtype: str) -> dict[str, bool]:
        """Arguments of transformers for training in `dtype`. float16 gets loss scaling on CUDA
        only."""
        return {
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16" and self.kind == "cuda",
            "use_cpu": self.kind == "cpu",
            "dataloader_pin_memory": self.kind == "cuda",
        }

    def check_dtype(self, dtype: str) -> None:
        """Refuse bfloat16 on a GPU without it.

        Raises:
            ConfigError: with the setting to use.
        """
        if dtype != "bfloat16" or self.has_bf16:
            return
        raise ConfigError(
            f"run.dtype: {self.name} does not support bfloat16",
            "--set run.dtype=float16, which uses loss scaling"
            if self.kind == "cuda"
            else "update to macOS 14 or later, or --set run.dtype=float32",
        )

    def check_processes(self, processes: int, nodes: int) -> None:
        """Refuse more training processes than GPUs, and several Macs.

        Args:
            processes: Training processes on this machine.

        Raises:
            ConfigError: with the number of GPUs.
        """
        if self.kind == "mps" and nodes > 1:
            raise ConfigError(
                f"resources.<stage>.nodes: a Mac trains alone (got {nodes})",
                "gloo does not exchange tensors on its GPU",
            )
        if self.kind != "cpu" and processes > self.count:
            raise ConfigError(
                f"resources.<stage>.gpus: this machine has {self.count} GPUs (got {processes})",
                "lower it; the global batch size stays the same",
            )

    def check_zero(self, zero: Zero, stage: str) -> None:
        """Refuse DeepSpeed where it is not installed.

        Raises:
            ConfigError: with the setting to use.
        """
        if zero != "none" and not self.has_deepspeed:
            raise ConfigError(
                f"resources.{stage}.deepspeed: {zero} needs DeepSpeed, which is not installed (it "
                "exists for Linux only)",
                f"--set resources.{stage}.deepspeed=none",
            )


def free_memory() -> None:
    """Return to the GPU what torch has kept of deleted tensors, for another process or library."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def this_device() -> Device:
    """The device of this process: a GPU of NVIDIA, the GPU of a Mac, or the CPU."""
    import torch

    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        return Device(
            kind="cuda",
            name=torch.cuda.get_device_name(),
            memory_bytes=torch.cuda.get_device_properties(index).total_memory,
            count=torch.cuda.device_count(),
            index=index,
            has_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
            has_deepspeed=has_deepspeed,
        )
    if torch.backends.mps.is_available():
        return Device(
            kind="mps",
            name="mps",
            memory_bytes=torch.mps.recommended_max_memory(),
            has_bf16=torch.backends.mps.is_macos_or_newer(14, 0),
            has_deepspeed=has_deepspeed,
        )
    return Device("cpu", "cpu", memory_limit_bytes(), has_deepspeed=has_deepspeed)


def select_gpu(number: int) -> None:
    """Make a GPU of this machine the one of this process, if there is one of that number."""
    import torch

    if torch.cuda.is_available() and number < torch.cuda.device_count():
        torch.cuda.set_device(number)


def synchronize(device: Any) -> None:
    """Wait until a GPU has done its work. On a CPU this does nothing."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def gpu_memory_bytes() -> int | None:
    """Memory that this process has taken of its GPU: the peak on CUDA, the current value on a Mac.
    None without a GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return torch.mps.driver_allocated_memory() if torch.backends.mps.is_available() else None
