"""Time, energy and memory of a training's steps, read in the same way for every variant."""

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
    """The steps after the warm-up, from the end of the step before them to the end of the last one."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._energy = Energy()
        self.seconds = 0.0
        self.joules: float | None = None

    def step_ended(self, step: int) -> None:
        """The optimizer has stepped `step` times."""
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
        """What a variant hands over; `history` is the trainer's log, with TRL's count of tokens without padding."""
        counted = {int(entry["step"]): entry for entry in history if "num_tokens" in entry}
        tokens = (
            counted[self._plan.total_steps]["num_tokens"] - counted[self._plan.warmup]["num_tokens"]
        )
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
    """Tells a Window of steps, for trainers that are not ours."""

    def __init__(self, window: Window) -> None:
        self._window = window

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._window.step_ended(state.global_step)


class MeterLink(Link):
    """In place of a stage's link to its parent: it tells a Window of steps, and takes what else is said."""

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
    """The GPU's own meter, through NVIDIA's management library; it reads nothing where there is none."""

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
        """Since the driver was loaded; the counter is in millijoules."""
        value = ctypes.c_ulonglong()
        if (
            self._library is None
            or self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value))
            != 0
        ):
            return None
        return value.value / 1000


def peak_bytes() -> float:
    """Of the GPU what the allocator has reserved at most; without one what this process has held in memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_reserved())
    # Not ru_maxrss, which begins with the parent's.
    held = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return 1024.0 * int(held.split()[1])
