"""Loads base models, adapters and tokenizers. Quantization is handled here only."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from medjob.config.base import ADAPTER_CONFIG, ModelRef
from medjob.config.run_file import Run
from medjob.errors import ConfigError, InputError
from medjob.plan.memory import Attention
from medjob.plan.settings import choose_attention
from medjob.runtime.cpus import cpus
from medjob.sources.locations import Location
from medjob.train.adapter_files import publish_adapter
from medjob.train.device import this_device
from medjob.train.gguf import convert_gguf
from medjob.train.gptq import dequantize, gptq_config, is_gptq_linear
from medjob.train.integrity import (
    check_adapter,
    check_index,
    check_numbers,
    check_tensors,
    check_tokenizer,
    load_files,
    refuse_kernels,
)
from medjob.train.patches import keep_4bit_weights_in_place, undo_layer_compilation

_log = logging.getLogger(__name__)
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


def model_directory(location: Location) -> str:
    """The name that `from_pretrained` takes. A GGUF file is converted first, once."""
    if location.converted is None:
        return location.path
    source, target = Path(location.path), Path(location.converted)
    return str(load_files(lambda: convert_gguf(source, target), location))


def load_config(location: Location) -> Any:
    """The model's configuration as an object of transformers.

    Raises:
        InputError: it cannot be read, or it names code on a hub.
    """
    from transformers import AutoConfig, PreTrainedConfig

    name = model_directory(location)
    if (Path(name) / ADAPTER_CONFIG).is_file() and not (Path(name) / "config.json").is_file():
        raise InputError(
            f"{location.name}: is a LoRA adapter, not a model",
            "name its base model, and set run.adapter to start from the adapter; or merge it first",
        )
    config = load_files(
        lambda: AutoConfig.from_pretrained(
            name, revision=location.revision, trust_remote_code=False
        ),
        location,
    )
    values, _ = PreTrainedConfig.get_config_dict(name, revision=location.revision)
    refuse_kernels(values, location)
    return config


def model_config(location: Location) -> dict[str, Any]:
    """The model's `config.json`, with its architecture's defaults."""
    return dict(load_config(location).to_dict())


def load_generation_config(name: str, revision: str | None) -> Any:
    """The generation configuration that `from_pretrained` gives the model."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # many models have none
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        return GenerationConfig.from_model_config(config)


def load_tokenizer(location: Location, convert: bool = True) -> Any:
    """Load the tokenizer. One without a pad token pads with the end token.

    A tokenizer that was saved after a call with padding or truncation keeps both in its file. They
    are dropped.

    Args:
        convert: Whether to convert a GGUF file first, weights included. Otherwise its tokenizer is
            read from the file itself, unless it is converted already.

    Raises:
        ConfigError: it has neither an end token nor a pad token.
        InputError: it cannot be loaded, or knows no words.
    """
    from transformers import AutoTokenizer

    name, options = _tokenizer_files(location, convert)
    tokenizer = load_files(
        lambda: AutoTokenizer.from_pretrained(
            name, revision=location.revision, trust_remote_code=False, **options
        ),
        location,
    )
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    check_tokenizer(tokenizer, location)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_files(location: Location, convert: bool) -> tuple[str, dict[str, str]]:
    """The directory of the tokenizer, and the option that names a GGUF file in it."""
    if convert or location.converted is None or Path(location.converted).is_dir():
        return model_directory(location), {}
    file = Path(location.path)
    return str(file.parent), {"gguf_file": file.name}


def load_model(spec: ModelSpec) -> Any:
    """Load the model in evaluation mode on this machine's device.

    Raises:
        ConfigError: a package for its quantization is missing.
        InputError: the model cannot be loaded, is no causal language model, or its files are
            not whole.
        RetryError: the hub cannot be reached.
    """
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    location = spec.location
    name = model_directory(location)
    check_index(Path(name), location)
    device = this_device()
    torch.set_num_threads(min(torch.get_num_threads(), cpus()))
    if device.kind == "cpu" and not has_instructions(spec.dtype):
        _log.warning(
            "this CPU has no %s instructions: "
            "run.dtype=float32 needs twice the memory and a fraction of the time",
            spec.dtype,
        )
    config = load_config(location)
    auto_class, model_class = _classes(config, location)
    kwargs: dict[str, Any] = {
        "revision": location.revision,
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # check_tensors refuses them, with their names
        "dtype": getattr(torch, spec.dtype),
        "attn_implementation": _kernel(spec, model_class),
    }
    kwargs |= _quantization(spec, getattr(config, "quantization_config", None))
    sharded = is_deepspeed_zero3_enabled()  # ZeRO-3 places the weights itself
    if not sharded and ("quantization_config" in kwargs or hasattr(config, "quantization_config")):
        kwargs["device_map"] = {"": device.placement}
    model, info = load_files(lambda: auto_class.from_pretrained(name, **kwargs), location)
    check_tensors(info, location)
    check_numbers(model, location)
    if not sharded and "device_map" not in kwargs:
        model = model.to(device.kind)
    return undo_layer_compilation(model).eval()


def _classes(config: Any, location: Location) -> tuple[Any, Any]:
    """The class that loads the model, and the model's own: a multimodal one is loaded as a whole,
    so that its export keeps the parts that text does not use.

    Raises:
        InputError: the model does not continue text. transformers would load the encoders of BERT
            and BART as if they did.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    is_encoder = hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True)
    if not is_encoder and not getattr(config, "is_encoder_decoder", False):
        for auto_class, classes in (
            (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
            (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        ):
            if type(config) in classes:
                return auto_class, classes[type(config)]
    raise InputError(
        f"{location.name}: model_type {config.model_type!r} is not a causal language model",
        "use a model that continues text, such as Llama, Qwen, Mistral or Gemma",
    )


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

    return choose_attention(requested, this_device().kind, dtype, is_flash_attn_2_available())


def _kernel(spec: ModelSpec, model_class: Any) -> Attention:
    """The attention kernel of a model. `auto` chooses one that the architecture has: Gemma 2, for
    example, caps its attention scores, which only `eager` can do.

    Raises:
        ConfigError: the architecture does not have the requested kernel.
    """
    kernel = attention(spec.attn_implementation, spec.dtype)
    has = {
        "sdpa": getattr(model_class, "_supports_sdpa", True),
        "flash_attention_2": getattr(model_class, "_supports_flash_attn", True),
        "flex_attention": getattr(model_class, "_supports_flex_attn", True),
    }
    if has.get(kernel, True):
        return kernel
    if spec.attn_implementation != "auto":
        raise ConfigError(
            f"resources.<stage>.attnImplementation: {spec.location.name} does not support {kernel}",
            "use auto",
        )
    return "sdpa" if has["sdpa"] else "eager"


def _quantization(spec: ModelSpec, stored: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a quantized base. One that is stored quantized already
    names its method in its configuration."""
    method = stored_method(stored)
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


def stored_method(stored: Any) -> str | None:
    """Quantization method of a stored base, such as `gptq`; None if it is not quantized."""
    if not stored:
        return None
    if isinstance(stored, dict):
        method = stored.get("quant_method")
    else:
        method = getattr(stored, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def load_policy(spec: ModelSpec, folder: Path, trainable: bool = False) -> Any:
    """Load a trained model from an artifact: base and adapter, or all weights."""
    from dataclasses import replace

    if (folder / ADAPTER_CONFIG).is_file():
        base = load_model(spec)
        model = load_adapter(base, folder, trainable).eval()
        # A published adapter names the base's hub id. PEFT would ask the hub at every checkpoint.
        model.peft_config["default"].base_model_name_or_path = base.name_or_path
        return model
    return load_model(replace(spec, location=Location.of_folder(folder), load_in_4bit=False))


def load_adapter(base: Any, folder: Path, trainable: bool = False) -> Any:
    """Put the adapter in `folder` onto `base`.

    Raises:
        InputError: its file is damaged, or is of another base.
    """
    from peft import PeftModel

    location = Location.of_folder(folder)
    model = load_files(
        lambda: PeftModel.from_pretrained(base, str(folder), is_trainable=trainable), location
    )
    load_files(lambda: check_adapter(model, folder, location), location)
    return model


def save_policy(
    checkpoint: Path,
    tokenizer: Any,
    folder: Path,
    ref: ModelRef,
    initial: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Copy the files that later stages need from a trainer's checkpoint, without local paths.

    Args:
        initial: Initial weights of the adapter that were subtracted from the base.
    """
    for file in sorted(checkpoint.iterdir()):
        if (
            file.name.endswith((".safetensors", ".safetensors.index.json"))
            or file.name in _MODEL_FILES
        ):
            shutil.copyfile(file, folder / file.name)
    if (folder / ADAPTER_CONFIG).is_file():
        publish_adapter(folder, ref, initial)
    else:
        tokenizer.save_pretrained(str(folder))
