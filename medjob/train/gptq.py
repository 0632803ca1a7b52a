"""GPTQ-quantized bases (Frantar et al. 2023): load them for training, and dequantize them.

The packages are in a folder that is not on Python's path: `gptq` in the environment, written by
`make gptq` and part of the container images. Once gptqmodel can be imported, PEFT imports it for
every adapter, which changes every LoRA training. So the folder is added for a GPTQ base only.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from medjob.errors import ConfigError
from medjob.train.patches import import_gptqmodel

FOLDER = Path(sys.prefix) / "gptq"


def gptq_config(base: object) -> Any:
    """Build the `quantization_config` with which `from_pretrained` loads a GPTQ base.

    The backend is `gptq_torch`, whose layers stay trainable. On a CPU, `auto_trainable` picks a
    backend that repacks its weights at the first evaluation, after which gradients are silently
    wrong (norm 0.13 instead of 0.46).

    Raises:
        ConfigError: the packages are not installed.
    """
    _add_folder_to_path()
    missing = [name for name in ("optimum", "gptqmodel") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{base} is GPTQ-quantized, which needs {' and '.join(missing)}",
            "`make gptq` installs them into .venv; in a container, use the image medjob",
        )
    from transformers import GPTQConfig

    import_gptqmodel()
    # Bits, group size and the rest are read from the base's own configuration.
    return GPTQConfig(bits=4, backend="gptq_torch")


def _add_folder_to_path() -> None:
    """Make the packages importable in this process, after all others.

    transformers and PEFT remember what was installed when they first looked, which may have been
    for a base that is not quantized.
    """
    if not FOLDER.is_dir() or str(FOLDER) in sys.path:
        return
    sys.path.append(str(FOLDER))
    importlib.invalidate_caches()
    import peft.import_utils
    import transformers.utils.import_utils

    for module in (peft.import_utils, transformers.utils.import_utils):
        module.is_gptqmodel_available.cache_clear()
        module.is_optimum_available.cache_clear()


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
