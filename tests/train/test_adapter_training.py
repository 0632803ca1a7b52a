"""Adapters beyond plain LoRA: a training that is stopped resumes to the same bytes, and DPO starts
from the SFT adapter."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.resume_matrix import Base, assert_resumed_as_undisturbed, undisturbed

ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"lora": {"use_dora": True, "use_rslora": True}},
    "modules": {"lora": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}},
    "tokens": {
        "lora": {"trainable_token_indices": ["<|im_start|>", 7], "layers_to_transform": [1]}
    },
    "pissa": {"lora": {"init_lora_weights": "pissa"}, "method": "lora"},
}


# Each adapter, each sharding and each stage at least once: a case takes a minute. ZeRO-3 refuses
# dora and tokens.
CASES = [
    ("dora", "zero2", "sft"),
    ("modules", "zero3", "sft"),
    ("modules", "zero3", "dpo"),
    ("tokens", "zero2", "dpo"),
    ("pissa", "zero3", "sft"),
    ("pissa", "none", "dpo"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "deepspeed", "stage"), CASES)
def test_resume_is_bit_exact(
    base: Base, tmp_path: Path, adapter: str, deepspeed: str, stage: str
) -> None:
    file = base(stage, **ADAPTERS[adapter])
    expected = assert_resumed_as_undisturbed(file, tmp_path, stage, deepspeed, ["kill -9"])
    if stage == "dpo":  # ln 2: policy and reference are the same model
        assert expected["metrics"]["first_loss"] == pytest.approx(0.693147, abs=2e-4)


@pytest.mark.slow
def test_initial_weights_are_subtracted_from_a_sharded_base(base: Base) -> None:
    """The first loss is that of the base, however its weights are laid out."""
    file = base("sft", **ADAPTERS["pissa"])
    sharded, whole = (undisturbed(file, "sft", 2, zero)["metrics"] for zero in ("zero3", "zero2"))
    plain = undisturbed(base("sft", method="lora"), "sft", 2, "zero2")["metrics"]
    assert sharded["first_loss"] == pytest.approx(plain["first_loss"], rel=2e-3)
    assert sharded["validation_loss"] == pytest.approx(whole["validation_loss"], rel=2e-3)
