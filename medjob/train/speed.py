"""How fast a training is: tokens a second, share of the device's peak, memory, and whether the data keep up."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections import deque

import torch

_log = logging.getLogger(__name__)
_WINDOW = 20  # steps
_STARVED = 0.1  # share of the time spent on waiting for data that is worth a warning


class Speed:
    """Times of optimizer steps, without validation and saving."""

    def __init__(self, model_flops_per_token: float, peak_flops: float | None) -> None:
        """`peak_flops` is that of all devices together; None where it is not known, as on a CPU: no MFU then."""
        self._flops, self._peak = model_flops_per_token, peak_flops
        self._began = time.perf_counter()
        self._steps: deque[tuple[float, float]] = deque(
            maxlen=_WINDOW
        )  # seconds of a step, and of them waiting for data
        self._waited = 0.0
        self._tokens = 0
        self._warned = False
        self.step_seconds = 0.0

    def step_begins(self) -> None:
        """The next step's data are asked for."""
        self._began = time.perf_counter()

    def data_came(self) -> None:
        """They are there."""
        self._waited = time.perf_counter() - self._began

    def step_ended(self) -> None:
        """The optimizer has stepped."""
        self.step_seconds = time.perf_counter() - self._began
        self._steps.append((self.step_seconds, self._waited))
        self._warn_if_starved()

    def numbers(self, tokens: int) -> dict[str, float]:
        """Speed since the last call; `tokens` (without padding) are counted from the start, over all processes."""
        if not self._steps or tokens <= self._tokens:
            return {}
        per_second = (tokens - self._tokens) / self.step_seconds
        self._tokens = tokens
        numbers = {"tokens_per_second": per_second, "memory_gib": memory_gib()}
        if self._peak:
            numbers["mfu"] = per_second * self._flops / self._peak
        return numbers

    def _warn_if_starved(self) -> None:
        waited, total = sum(wait for _, wait in self._steps), sum(step for step, _ in self._steps)
        if len(self._steps) == _WINDOW and not self._warned and waited > _STARVED * total:
            self._warned = True
            _log.warning(
                "the data loader is too slow: %.0f%% of the last %d steps (%.2f of %.2f s) went into waiting for rows",
                100 * waited / total,
                _WINDOW,
                waited,
                total,
            )


def memory_gib() -> float:
    """Peak memory of this process in GiB: of its GPU where it has one, else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
