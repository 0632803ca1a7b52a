"""Measures time, energy and memory of training steps, in the same way for every variant."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bench.train_setup import Plan
from medjob.runtime.link import Link, World

History = list[dict[str, Any]]


class Window:
    """The steps after the warm-up, from the end of the last warm-up step to the end of training."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._energy = Energy()
        self.seconds = 0.0
        self.joules: float | None = None

    def step_ended(self, step: int) -> None:
        """Call this after optimizer step `step`."""
        if step not in (self._plan.warmup, self._plan.total_steps):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        joules = self._energy.joules()
        if step == self._plan.warmup:
            self.seconds, self.joules = -time.perf_counter(), joules
        else:
            self.seconds += time.perf_counter()
            self.joules = None if joules is None or self.joules is None else joules - self.joules

    def result(
        self, history: History, flops_per_token: float, peak_flops: float | None
    ) -> dict[str, Any]:
        """Build a variant's result.

        `history` is the trainer's log, with TRL's count of tokens without padding.
        """
        counted = {int(entry["step"]): entry for entry in history if "num_tokens" in entry}
        before = counted[self._plan.warmup]["num_tokens"]
        tokens = counted[self._plan.total_steps]["num_tokens"] - before
        per_second = tokens / self.seconds
        return {
            "tokens_per_second": per_second,
            "mfu": per_second * flops_per_token / peak_flops if peak_flops else None,
            "peak_gib": peak_bytes() / 2**30,
            "joules": self.joules,
            "seconds_per_step": self.seconds / self._plan.steps,
            "tokens": tokens,
            "first_loss": history[0]["loss"],
            "last_loss": counted[self._plan.total_steps]["loss"],
        }


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Reports steps to a Window, for trainers other than medjob's."""

    def __init__(self, window: Window) -> None:
        self._window = window

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._window.step_ended(state.global_step)


class MeterLink(Link):
    """Replaces a stage's link to its parent: reports steps to a Window, ignores everything else."""

    def __init__(self, window: Window) -> None:
        self.world = World()
        self.resume_step = None
        self._window = window

    @property
    def stop_requested(self) -> bool:
        return False

    def step(self, step: int, seconds: float, numbers: Any) -> None:  # noqa: ARG002
        self._window.step_ended(step)

    def saved(self, step: int, seconds: float, best_step: int | None) -> None:
        pass

    def send(self, event: Any) -> None:
        pass


class Energy:
    """The GPU's energy counter, through NVIDIA's management library, if there is one."""

    def __init__(self) -> None:
        self._device = ctypes.c_void_p()
        self._library: Any = None
        if not torch.cuda.is_available():
            return
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        name = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}".encode()
        if (
            library.nvmlInit_v2() == 0
            and library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self._device)) == 0
        ):
            self._library = library

    def joules(self) -> float | None:
        """Energy since the driver was loaded, in joules; None without a counter."""
        value = ctypes.c_ulonglong()
        if (
            self._library is None
            or self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value))
            != 0
        ):
            return None
        return value.value / 1000


def peak_bytes() -> float:
    """Peak memory: reserved by torch on the GPU, or resident in this process without one."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_reserved())
    # ru_maxrss starts with the parent's value.
    held = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return 1024.0 * int(held.split()[1])
