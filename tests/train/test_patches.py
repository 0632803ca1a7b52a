"""Each patch in medjob/train/patches.py is still needed, and works.

A test that fails at "is still needed" after an upgrade means: remove the patch.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import modules

from medjob.config.train import LoraParams
from medjob.sources.locations import Location
from medjob.train import patches
from medjob.train.adapters import add_adapter
from medjob.train.model import ModelSpec, load_model


@pytest.fixture
def avx512bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which bitsandbytes repacks weights."""
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    # The packed kernel needs the instructions; what it computes does not matter here.
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda x, *args, **kwargs: x)


def bytes_change_in_evaluation() -> bool:
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict({"weight": torch.randn(64, 64)}, strict=False)
    layer = layer.to("cpu").eval()
    before = layer.weight.data.flatten().clone()
    with torch.no_grad():
        layer(torch.randn(1, 64))
    return not torch.equal(before, layer.weight.data.flatten())


@pytest.mark.usefixtures("avx512bf16")
def test_bitsandbytes_still_repacks_weights_in_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert bytes_change_in_evaluation(), "keep_4bit_weights_in_place is no longer needed"
    monkeypatch.setattr(modules, "has_avx512bf16", modules.has_avx512bf16)
    patches.keep_4bit_weights_in_place()
    assert not bytes_change_in_evaluation()


def test_deepspeed_still_saves_quantization_constants() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    class Engine:
        module_state_dict = DeepSpeedEngine.module_state_dict
        random_ltd_enabled = staticmethod(lambda: False)

        def __init__(self) -> None:
            base = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
            self.module = torch.nn.ModuleDict({"base": base, "lora": torch.nn.Linear(64, 4)})

    engine = Engine()
    kept = engine.module_state_dict(exclude_frozen_parameters=True)
    assert any("absmax" in name for name in kept), (
        "exclude_quantization_constants is no longer needed"
    )
    patches.exclude_quantization_constants(engine)
    kept = engine.module_state_dict(exclude_frozen_parameters=True)
    assert set(kept) == {"lora.weight", "lora.bias"}


def test_transformers_still_copies_the_base_to_save_an_adapter() -> None:
    """Under ZeRO-2, `Trainer.save_model` asks accelerate for the state dict of the whole model."""
    from transformers import Trainer

    asked: list[str] = []

    class Recorder:
        is_deepspeed_enabled = True
        is_fsdp_enabled = False
        args = SimpleNamespace(output_dir="out", should_save=True, push_to_hub=False)
        model = SimpleNamespace(peft_config={})
        model_wrapped = SimpleNamespace(
            save_checkpoint=lambda folder, exclude_frozen_parameters=False: None,
            zero_optimization_partition_weights=lambda: False,
        )
        deepspeed = SimpleNamespace(config={"zero_optimization": {"stage": 2}})
        accelerator = SimpleNamespace(get_state_dict=lambda _: asked.append("whole model"))

        def _save(self, output_dir: str, state_dict: Any = None) -> None:
            asked.append(f"save to {output_dir}")

    class Plain(Recorder):
        save_model = Trainer.save_model

    class Patched(patches.AdapterCheckpoints, Recorder):
        pass

    Plain().save_model("out")
    assert asked == ["whole model", "save to out"], "AdapterCheckpoints is no longer needed"
    asked.clear()
    Patched().save_model("out")
    assert asked == ["save to out"]


def test_deepspeed_still_compiles_a_shared_memory_extension() -> None:
    import deepspeed
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    assert ShareMemCommBuilder.NAME in deepspeed.ops.__compatible_ops__, (
        "skip_shared_memory_extension is no longer needed"
    )
    patches.skip_shared_memory_extension()
    assert deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] is False


def test_trl_still_casts_adapters_over_a_4bit_base_to_bfloat16() -> None:
    import inspect

    from trl.trainer import dpo_trainer, sft_trainer

    for module in (sft_trainer, dpo_trainer):
        assert "param.data = param.data.to(torch.bfloat16)" in inspect.getsource(module), (
            "train_adapter_in_float32 is no longer needed"
        )
    model = torch.nn.Linear(4, 4).to(torch.bfloat16)
    model.bias.requires_grad = False
    patches.train_adapter_in_float32(model)
    assert (model.weight.dtype, model.bias.dtype) == (torch.float32, torch.bfloat16)


@pytest.fixture
def with_trained_token(tiny: Path) -> Any:
    """A model with one trained token."""
    spec = ModelSpec(Location.of_folder(tiny), False, "float32", "sdpa")
    return add_adapter(load_model(spec), LoraParams(r=2, trainable_token_indices=[5]), 0, [5])


def test_trl_still_leaves_trained_tokens_out_of_the_reference(with_trained_token: Any) -> None:
    """The reference would have the base's rows, so that DPO's first loss would not be ln 2."""
    rows = {
        name: weight
        for name, weight in with_trained_token.named_parameters()
        if name.endswith(".trainable_tokens_delta.default")
    }
    assert len(rows) == 2  # of the embedding and of the head
    assert not any(".default." in name for name in rows), "copy_trained_tokens is no longer needed"
    for weight in rows.values():
        weight.data += 1
    with_trained_token.add_adapter("ref", with_trained_token.peft_config["default"])
    patches.copy_trained_tokens(with_trained_token)
    for name, weight in rows.items():
        copy = with_trained_token.get_parameter(name.removesuffix("default") + "ref")
        assert torch.equal(copy, weight)
        assert not copy.requires_grad


def test_peft_still_hides_the_bias_of_a_head_with_trained_tokens(with_trained_token: Any) -> None:
    head = with_trained_token.get_output_embeddings()
    assert not hasattr(head, "bias"), "give_trained_head_a_bias is no longer needed"
    patches.give_trained_head_a_bias(with_trained_token)
    assert head.bias is None
