"""Ends a training whose loss, gradient or weights are no longer finite, so that no later checkpoint
replaces a good one and nothing is published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from medjob.errors import DataError
from medjob.train.distributed import any_rank
from medjob.train.integrity import first_names, is_finite

_LOSSES = ("loss", "eval_loss")
# Loss scaling starts at 65536 and halves at every overflow. After this many in a row it is below 1,
# and an overflow no longer comes from the scale.
_OVERFLOWS = 20


class Divergence:
    """Checks the numbers of a training. All processes see the same ones and stop alike."""

    def __init__(self, stage: str, *, scales_loss: bool) -> None:
        """Watch the training of `stage`.

        Args:
            scales_loss: Whether the loss is scaled (float16 on a GPU). A gradient that overflows
                then lowers the scale, and the step is skipped.
        """
        self._stage = stage
        self._scales_loss = scales_loss
        self._overflows = 0
        self._trained = False

    def check_numbers(self, logs: Mapping[str, Any], step: int) -> None:
        """Check the losses and the gradient norm of a step.

        Raises:
            DataError: one of them is NaN or infinite.
        """
        for name in _LOSSES:
            if name in logs and not math.isfinite(logs[name]):
                label = "validation loss" if name == "eval_loss" else "loss"
                raise self._error(f"the {label} is {logs[name]}", step)
        if "grad_norm" not in logs:
            return
        norm = float(logs["grad_norm"])
        self._overflows = 0 if math.isfinite(norm) else self._overflows + 1
        self._trained |= math.isfinite(norm)
        if self._overflows > (_OVERFLOWS if self._scales_loss else 0):
            raise self._error(f"the gradient norm is {norm}", step)

    def check_weights(self, model: Any, step: int) -> None:
        """Check this process's part of the trained weights.

        Raises:
            DataError: a weight is NaN or infinite, in any process.
        """
        broken = [
            name
            for name, weight in model.named_parameters()
            if weight.requires_grad and not is_finite(getattr(weight, "ds_tensor", weight))
        ]
        if any_rank(bool(broken)):
            names = f" ({first_names(broken)})" if broken else ""
            raise self._error(f"weights are NaN or infinite{names}", step)

    def check_end(self, step: int) -> None:
        """Check that at least one step changed the weights.

        Raises:
            DataError: the gradient of every step overflowed.
        """
        if self._overflows and not self._trained:
            raise self._error("the gradient of every step was NaN or infinite", step)

    def _error(self, problem: str, step: int) -> DataError:
        return DataError(
            f"{self._stage}: the training diverged: {problem} at step {step}; nothing is published",
            f"lower run.{self._stage}.learning_rate, and check the rows; use run.dtype=bfloat16 if "
            "it is float16",
        )
