"""GPTQ-quantized bases (Frantar et al. 2023): load them for training, and dequantize them.

The packages have a separate environment (`make gptq`): gptqmodel requires a newer torch than the
rest, and once it is installed, PEFT imports it for every adapter.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from medjob.errors import ConfigError
from medjob.train.patches import import_gptqmodel


def gptq_config(base: object) -> Any:
    """Build the `quantization_config` with which `from_pretrained` loads a GPTQ base.

    The backend is `gptq_torch`, whose layers stay trainable. On a CPU, `auto_trainable` picks a
    backend that repacks its weights at the first evaluation, after which gradients are silently
    wrong (norm 0.13 instead of 0.46).

    Raises:
        ConfigError: the packages are not installed.
    """
    missing = [name for name in ("optimum", "gptqmodel") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"run.base_model: {base} is GPTQ-quantized, which needs {' and '.join(missing)}",
            "`make gptq` installs them; then run .venv-gptq/bin/python -m medjob",
        )
    from transformers import GPTQConfig

    import_gptqmodel()
    # Bits, group size and the rest are read from the base's own configuration.
    return GPTQConfig(bits=4, backend="gptq_torch")


def is_gptq_linear(module: Any) -> bool:
    """Whether `module` is a GPTQ layer. These do not inherit from torch.nn.Linear."""
    return hasattr(module, "dequantize_weight")


def dequantize(model: Any, dtype: Any) -> Any:
    """Replace GPTQ layers with linear ones.

    transformers cannot dequantize GPTQ, and PEFT cannot merge an adapter into GPTQ layers.
    """
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
