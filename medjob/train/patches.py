"""Every change that we make to the behaviour of a library, and why.

Each function names the library, the version in which the problem was seen, and the upstream issue
or source. tests/train/test_patches.py fails once a library no longer needs its patch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


def keep_4bit_weights_in_place() -> None:
    """bitsandbytes 0.50.2: stop the repacking of 4-bit weights at the first evaluation on a CPU.

    On a CPU with AVX512-BF16, `Linear4bit.forward` packs the weights for inference when the layer
    is in evaluation mode, and never unpacks them for training. Gradients are then silently wrong,
    with norms up to ten times off. No upstream issue is known.
    """
    from bitsandbytes.nn import modules

    modules.has_avx512bf16 = lambda: False


def train_adapter_in_float32(model: Any) -> None:
    """TRL 1.16.0: undo the cast of LoRA weights over a 4-bit base to bfloat16.

    With bfloat16 weights a resumed run is not bit-exact, and small updates round to zero, as
    huggingface/trl#7268 found for DoRA. DPO's reference is cast as well, so that it computes what
    the policy does.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or _of_reference(name):
            parameter.data = parameter.data.float()


def _of_reference(name: str) -> bool:
    """Whether a parameter belongs to the adapter that TRL adds as DPO's reference."""
    return ".ref." in name or name.endswith(".ref")


def copy_trained_tokens(model: Any) -> None:
    """TRL 1.16.0: copy the rows of trained tokens to DPO's reference, and freeze them there.

    TRL copies parameters whose name contains `.default.`, but these end with `.default`, so that
    the reference would have the rows of the base model. PEFT 0.21.2 leaves the copies trainable. No
    upstream issue is known.
    """
    parameters = dict(model.named_parameters())
    for name, reference in parameters.items():
        if name.endswith(".trainable_tokens_delta.ref"):
            reference.data = parameters[name.removesuffix("ref") + "default"].data.clone()
            reference.requires_grad_(False)


def give_trained_head_a_bias(model: Any) -> None:
    """PEFT 0.21.2: give a head with trained tokens the attribute `bias`, which is None.

    TRL's fused head reads it, and PEFT's wrapper passes on `weight` only. Heads with a bias are
    refused before. No upstream issue is known.
    """
    from peft.utils.other import TrainableTokensWrapper

    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = None


class AdapterCheckpoints(_Trainer):
    """Trainer mixin that keeps the frozen base out of DeepSpeed's checkpoints of an adapter."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers 5.23.0: save the adapter without a copy of the base.

        Under ZeRO-1 and 2, `Trainer.save_model` passes the whole state dict to `_save`: each
        process clones the 4-bit base into host memory, only for PEFT to discard it
        (huggingface/transformers#24489 introduced the clone).
        """
        if self.is_deepspeed_enabled and self._is_adapter and not self._shards_weights:
            self._save(output_dir or self.args.output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """PEFT 0.21.2: save an adapter beside DPO's reference under ZeRO-3.

        PEFT saves all adapters, and ZeRO-3's state has the trained one only: whole modules of the
        reference raise a KeyError. It gets the trained weights, and its files are deleted
        afterwards. No upstream issue is known.
        """
        if state_dict is not None and "ref" in getattr(self.model, "peft_config", ()):
            copies = {name.replace(".default.", ".ref."): each for name, each in state_dict.items()}
            state_dict = copies | state_dict
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled and self._is_adapter:
            exclude_quantization_constants(self.model_wrapped)
        super()._save_optimizer_and_scheduler(output_dir)

    @property
    def _is_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def _shards_weights(self) -> bool:
        return bool(self.model_wrapped.zero_optimization_partition_weights())


def exclude_quantization_constants(engine: Any) -> None:
    """DeepSpeed 0.19.8: keep the quantization constants of a frozen base out of checkpoints.

    `exclude_frozen_parameters` removes frozen parameters but not the entries that bitsandbytes adds
    beside them (`weight.absmax` and others): 0.13 GB per rank for a model of 8B parameters. No
    upstream issue is known.
    """
    parameters = engine.module.named_parameters()
    trained = {name for name, parameter in parameters if parameter.requires_grad}
    original = type(engine).module_state_dict

    def module_state_dict(*args: Any, **kwargs: Any) -> Any:
        state = original(engine, *args, **kwargs)
        return {name: value for name, value in state.items() if name in trained}

    engine.module_state_dict = module_state_dict


def skip_shared_memory_extension() -> None:
    """DeepSpeed 0.19.8: do not compile the shared-memory extension for collectives on a CPU.

    Compiling takes a minute and a C++ compiler, and a killed process leaves a lock file behind that
    blocks the next one. gloo does the same work. No upstream issue is known.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def import_gptqmodel() -> None:
    """gptqmodel 7.7.0: import it without the environment variables that it sets.

    It moves HF_HOME to /tmp and configures CUDA's allocator, and child processes inherit both.
    No upstream issue is known.
    """
    before = set(os.environ)
    import gptqmodel  # noqa: F401

    for name in set(os.environ) - before:
        del os.environ[name]


def undo_layer_compilation(model: Any) -> Any:
    """gptqmodel 7.7.0: undo torch.compile of `dequantize_weight` in every layer.

    It costs half a minute at the first forward pass and, on a CPU, needs a C++ compiler. Models
    without GPTQ layers are returned unchanged. No upstream issue is known.
    """
    for module in model.modules():
        vars(module).pop("dequantize_weight", None)
    return model
