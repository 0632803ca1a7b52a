"""Bases stored as GPTQ (Frantar et al. 2023): loading them so that they train, and turning them back into linear layers.

The packages are in an environment of their own (`make gptq`): gptqmodel asks for a newer torch than ours, and once it is
installed PEFT imports it for every adapter.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from medjob.errors import ConfigError


def gptq_config(base: object) -> Any:
    """What `from_pretrained` takes for a GPTQ base.

    The backend is the one whose layers stay trainable: `auto_trainable` picks one on a CPU that repacks its weights at the
    first evaluation, and gradients are wrong after it without a word (norm 0.13 in place of 0.46).

    Raises:
        ConfigError: the packages are not installed.
    """
    missing = [name for name in ("optimum", "gptqmodel") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"run.base_model: {base} is GPTQ-quantised, which needs {' and '.join(missing)}",
            "`make gptq` installs them beside the rest; then run .venv-gptq/bin/python -m medjob",
        )
    from transformers import GPTQConfig

    before = set(os.environ)
    import gptqmodel  # noqa: F401

    for name in (
        set(os.environ) - before
    ):  # it moves HF_HOME to /tmp and sets the allocator, for child processes too
        del os.environ[name]
    return GPTQConfig(
        bits=4, backend="gptq_torch"
    )  # bits, groups and the rest are then read from the base


def uncompiled(model: Any) -> Any:
    """Undo gptqmodel's torch.compile of every layer: half a minute at the first forward pass, and a C++ compiler on a CPU."""
    for module in model.modules():
        vars(module).pop("dequantize_weight", None)
    return model


def is_gptq_linear(module: Any) -> bool:
    """Whether `module` is a GPTQ layer; they are no torch.nn.Linear."""
    return hasattr(module, "dequantize_weight")


def dequantize(model: Any, dtype: Any) -> Any:
    """`model` with linear layers in place of GPTQ ones: transformers cannot do it, and PEFT cannot merge into them."""
    import torch

    for name, module in list(model.named_modules()):
        if is_gptq_linear(module):
            linear = torch.nn.Linear(
                module.in_features, module.out_features, module.bias is not None, "meta", dtype
            )
            with torch.no_grad():
                linear.weight = torch.nn.Parameter(
                    module.dequantize_weight().T.to(dtype).contiguous()
                )
                if module.bias is not None:
                    linear.bias = torch.nn.Parameter(module.bias.to(dtype))
            model.set_submodule(name, linear)
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    return model
