"""Loads base models, adapters and tokenizers. Quantization and devices are handled here only."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medjob.config.base import ModelRef
from medjob.config.run_file import Run
from medjob.config.train import LoraParams
from medjob.errors import ConfigError, InputError
from medjob.plan.memory import Attention
from medjob.plan.settings import choose_attention
from medjob.plan.shape import resolve_target_modules
from medjob.runtime.cpus import cpus
from medjob.sources.hub import translate_hub_error
from medjob.sources.locations import Location
from medjob.train.gguf import convert_gguf
from medjob.train.gptq import dequantize, gptq_config, is_gptq_linear
from medjob.train.patches import keep_4bit_weights_in_place, undo_layer_compilation

_log = logging.getLogger(__name__)
ADAPTER_CONFIG = "adapter_config.json"
_MODEL_FILES = (ADAPTER_CONFIG, "config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How to load a model."""

    location: Location
    load_in_4bit: bool
    """Quantize to NF4 with double quantization (QLoRA, Dettmers et al. 2023)."""
    dtype: str
    attn_implementation: str = "auto"

    @classmethod
    def base_of(cls, run: Run, location: Location, attn_implementation: str = "auto") -> ModelSpec:
        """The run's base model at `location`. Full fine-tuning keeps its weights in float32,
        because bfloat16 loses small updates."""
        dtype = "float32" if run.method == "full" else run.dtype
        return cls(location, run.method == "qlora", dtype, attn_implementation)


def device() -> str:
    """The best device of this machine: `cuda`, `mps` or `cpu`."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def model_directory(location: Location) -> str:
    """The name that `from_pretrained` takes. A GGUF file is converted first, once."""
    if location.converted is None:
        return location.path
    return str(convert_gguf(Path(location.path), Path(location.converted)))


def model_config(location: Location) -> dict[str, Any]:
    """The model's `config.json`, with its architecture's defaults."""
    from transformers import AutoConfig

    name = model_directory(location)
    config = _load(lambda: AutoConfig.from_pretrained(name, revision=location.revision), location)
    return dict(config.to_dict())


def load_tokenizer(location: Location) -> Any:
    """Load the tokenizer. One without a pad token pads with the end token."""
    from transformers import AutoTokenizer

    name = model_directory(location)
    tokenizer = _load(
        lambda: AutoTokenizer.from_pretrained(name, revision=location.revision), location
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(spec: ModelSpec) -> Any:
    """Load the model in evaluation mode on this machine's device.

    Raises:
        ConfigError: a package for its quantization is missing.
        InputError: the model cannot be loaded.
        RetryError: the hub cannot be reached.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    location = spec.location
    name, revision = model_directory(location), location.revision
    target = device()
    torch.set_num_threads(min(torch.get_num_threads(), cpus()))
    if target == "cpu" and not has_instructions(spec.dtype):
        _log.warning(
            "this CPU has no %s instructions: "
            "run.dtype=float32 needs twice the memory and a fraction of the time",
            spec.dtype,
        )
    config = _load(lambda: AutoConfig.from_pretrained(name, revision=revision), location)
    kwargs: dict[str, Any] = {
        "revision": revision,
        "dtype": getattr(torch, spec.dtype),
        "attn_implementation": attention(spec.attn_implementation, spec.dtype),
    }
    kwargs |= _quantization(spec, getattr(config, "quantization_config", None))
    sharded = is_deepspeed_zero3_enabled()  # ZeRO-3 places the weights itself
    if not sharded and ("quantization_config" in kwargs or hasattr(config, "quantization_config")):
        kwargs["device_map"] = {"": torch.cuda.current_device() if target == "cuda" else target}
    model = _load(lambda: AutoModelForCausalLM.from_pretrained(name, **kwargs), location)
    if not sharded and "device_map" not in kwargs:
        model = model.to(target)
    return undo_layer_compilation(model).eval()


def has_instructions(dtype: str) -> bool:
    """Whether this CPU has matrix instructions for `dtype`.

    Without them torch multiplies element by element: 1.1 GFLOP/s in bfloat16 against 57 in float32
    on one core of an EPYC with AVX2 (torch 2.13.0).
    """
    import torch

    if dtype == "float32" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    name = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


def dequantized(model: Any, dtype: Any) -> Any:
    """Return `model` with ordinary instead of quantized weights."""
    if not getattr(model, "is_quantized", False):
        return model
    if any(is_gptq_linear(module) for module in model.modules()):
        return dequantize(model, dtype)
    return model.dequantize(dtype=dtype)


def attention(requested: str, dtype: str) -> Attention:
    """The attention kernel on this machine: `requested`, or for `auto` the fastest."""
    from transformers.utils import is_flash_attn_2_available

    return choose_attention(requested, device(), dtype, is_flash_attn_2_available())


def _quantization(spec: ModelSpec, stored: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a quantized base. One that is stored quantized already
    names its method in its configuration."""
    method = _stored_method(stored)
    if method == "gptq":
        return {"quantization_config": gptq_config(spec.location.name)}
    if method is None and not spec.load_in_4bit:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "run.method: 4-bit models need bitsandbytes, which is not installed",
            "pip install bitsandbytes, or --set run.method=lora",
        )
    keep_4bit_weights_in_place()
    if method is not None:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, spec.dtype)
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    }


def _stored_method(stored: Any) -> str | None:
    """Quantization method of a stored base, such as `gptq`; None if it is not quantized."""
    if not stored:
        return None
    if isinstance(stored, dict):
        method = stored.get("quant_method")
    else:
        method = getattr(stored, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _load(load: Callable[[], Any], location: Location) -> Any:
    """Call `load`, and translate the errors of transformers and of the hub."""
    try:
        return load()
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{location.name}: needs a package that is missing: {reason}") from None
    except (OSError, ValueError) as error:
        if location.on_hub:
            translated = translate_hub_error(error, location.name, "model")
            if translated is not None:
                raise translated from None
        reason = " ".join(str(error).split())
        raise InputError(f"{location.name}: cannot be loaded: {reason}") from None


def add_adapter(model: Any, params: LoraParams, seed: int) -> Any:
    """Add a new LoRA adapter to `model`. Its weights are float32, whatever the base's dtype."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    config = LoraConfig(
        r=params.r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=target_modules(model, params.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def target_modules(model: Any, wanted: list[str] | None) -> list[str]:
    """Names of the linear layers to adapt: those in `wanted`, or all of each block.

    If the model fuses q/k/v or gate/up into one layer, their names stand for the fused layer.

    Raises:
        ConfigError: no block has a layer of that name. PEFT accepts this silently if any other name
            matches.
    """
    import torch

    head = model.get_output_embeddings()
    present = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if (isinstance(module, torch.nn.Linear) or is_gptq_linear(module))
            and module is not head
        }
    )
    if wanted is None:
        return present
    resolved = resolve_target_modules(wanted, present)
    fused = {name: real for name, real in resolved.items() if name != real}
    if fused:
        _log.info(
            "target_modules: %s",
            ", ".join(f"{name} is part of {real}" for name, real in fused.items()),
        )
    return sorted(set(resolved.values()))


def load_policy(spec: ModelSpec, folder: Path, trainable: bool = False) -> Any:
    """Load a trained model from an artifact: base and adapter, or all weights."""
    from dataclasses import replace

    from peft import PeftModel

    if (folder / ADAPTER_CONFIG).is_file():
        base = load_model(spec)
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable).eval()
        # A published adapter names the base's hub id. PEFT would ask the hub at every checkpoint.
        model.peft_config["default"].base_model_name_or_path = base.name_or_path
        return model
    return load_model(replace(spec, location=Location.of_folder(folder), load_in_4bit=False))


def save_policy(checkpoint: Path, tokenizer: Any, folder: Path, ref: ModelRef) -> None:
    """Copy the files that later stages need from a trainer's checkpoint, without local paths."""
    for file in sorted(checkpoint.iterdir()):
        if (
            file.name.endswith((".safetensors", ".safetensors.index.json"))
            or file.name in _MODEL_FILES
        ):
            shutil.copyfile(file, folder / file.name)
    config = folder / ADAPTER_CONFIG
    if config.is_file():
        values = json.loads(config.read_text())
        values["base_model_name_or_path"] = ref.id
        values["revision"] = ref.revision
        # PEFT writes a set, whose order changes from run to run.
        values["target_modules"] = sorted(values["target_modules"])
        config.write_text(json.dumps(values, indent=2, sort_keys=True))
    else:
        tokenizer.save_pretrained(str(folder))
