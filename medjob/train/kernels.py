"""Fused kernels of Liger for the layers of a model (RMSNorm, RoPE, SwiGLU), where they load. The loss is TRL's own fused one."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from medjob.train.model import device

_log = logging.getLogger(__name__)
_CONFIG = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def use_fused_kernels(model: Any) -> bool:
    """Put them in place; whether that was done. A model or a GPU that they do not know keeps transformers' own layers."""
    if device() != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    from transformers.integrations.liger import apply_liger_kernel

    try:
        apply_liger_kernel(model, _CONFIG)
    except Exception as error:  # an architecture whose patch takes other arguments, or a Triton that does not compile
        _log.warning("fused kernels are left out: %s: %s", type(error).__name__, error)
        return False
    return True
