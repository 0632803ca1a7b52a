"""Measures a training: tokens per second, MFU, memory, and time spent waiting for data."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections import deque

from medjob.train.device import gpu_memory_bytes

_log = logging.getLogger(__name__)
_WINDOW = 20  # steps
_STARVED = 0.1  # warn if more than this fraction of the time is spent waiting for data


class Speed:
    """Times optimizer steps, without validation and saving."""

    def __init__(self, model_flops_per_token: float, peak_flops: float | None) -> None:
        """Args:
        model_flops_per_token: FLOPs of the forward and backward pass per token.
        peak_flops: Peak FLOP/s of all devices together; None if unknown, as on a CPU. Then no MFU
            is reported.
        """
        self._flops = model_flops_per_token
        self._peak = peak_flops
        self._began = time.perf_counter()
        # Seconds of each step, and how many of them were spent waiting for data.
        self._steps: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._waited = 0.0
        self._tokens = 0
        self._warned = False
        self.step_seconds = 0.0

    def step_begins(self) -> None:
        """Call this when the next step's data are requested."""
        self._began = time.perf_counter()

    def data_came(self) -> None:
        """Call this when the data have arrived."""
        self._waited = time.perf_counter() - self._began

    def step_ended(self) -> None:
        """Call this after the optimizer's step."""
        self.step_seconds = time.perf_counter() - self._began
        self._steps.append((self.step_seconds, self._waited))
        self._warn_if_starved()

    def numbers(self, tokens: int) -> dict[str, float]:
        """Speed and memory since the last call.

        `tokens` counts all processes' tokens from the start, without padding.
        """
        if not self._steps or tokens <= self._tokens:
            return {}
        per_second = (tokens - self._tokens) / self.step_seconds
        self._tokens = tokens
        numbers = {"tokens_per_second": per_second, "memory_gib": memory_gib()}
        if self._peak:
            numbers["mfu"] = per_second * self._flops / self._peak
        return numbers

    def _warn_if_starved(self) -> None:
        waited = sum(wait for _, wait in self._steps)
        total = sum(step for step, _ in self._steps)
        if len(self._steps) == _WINDOW and not self._warned and waited > _STARVED * total:
            self._warned = True
            _log.warning(
                "the data loader is too slow: %.0f%% of the last %d steps (%.2f of %.2f s) "
                "was spent waiting for rows",
                100 * waited / total,
                _WINDOW,
                waited,
                total,
            )


def memory_gib() -> float:
    """Peak memory of this process in GiB: of its GPU if there is one, otherwise of the host."""
    taken = gpu_memory_bytes()
    if taken is not None:
        return taken / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
