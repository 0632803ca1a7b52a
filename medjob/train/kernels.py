"""Liger's fused kernels for RMSNorm, RoPE and SwiGLU. The loss is TRL's own fused one."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from medjob.train.device import this_device

_log = logging.getLogger(__name__)
_CONFIG = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def use_fused_kernels(model: Any) -> bool:
    """Replace the model's layers with fused ones, and return whether that worked.

    A model or GPU that Liger does not support keeps the layers of transformers.
    """
    if not this_device().fuses_kernels or importlib.util.find_spec("liger_kernel") is None:
        return False
    from transformers.integrations.liger import apply_liger_kernel

    try:
        apply_liger_kernel(model, _CONFIG)
    except Exception as error:  # an unsupported architecture, or Triton that does not compile
        _log.warning("fused kernels are not used: %s: %s", type(error).__name__, error)
        return False
    return True
