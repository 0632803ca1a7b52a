"""Adapters on other architectures: which layers they adapt, and that they train, load and merge."""

import dataclasses
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medjob.config import RunFile
from medjob.config.train import LoraParams
from medjob.errors import ConfigError
from medjob.pipeline.runner import Pipeline
from medjob.sources.locations import Location
from medjob.stage import get_stage
from medjob.train.adapters import add_adapter, target_modules
from medjob.train.model import ModelSpec, load_adapter, load_model, load_policy
from medjob.train.strategy import PACKABLE
from tests.support.architectures import CONFIGS, gemma3_config, make_architecture

ADAPTED = {
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "gptj": "attn.q_proj attn.k_proj attn.v_proj attn.out_proj mlp.fc_in mlp.fc_out",
    "gpt_neox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "bloom": "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "opt": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    "biogpt": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    "falcon": "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "mpt": "attn.Wqkv attn.out_proj ffn.up_proj ffn.down_proj",
    "phi": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense mlp.fc1 mlp.fc2",
    "phi3": "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj",
    "mamba": "mixer.in_proj mixer.x_proj",
    "deepseek_v3": "self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa "
    "self_attn.kv_b_proj self_attn.o_proj",
}
ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
MLP = "mlp.gate_proj mlp.up_proj mlp.down_proj"
ADAPTED |= dict.fromkeys(("gemma2", "gemma3", "mllama", "qwen2_vl", "llava"), f"{ATTENTION} {MLP}")
ADAPTED |= dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "phimoe"), ATTENTION)
ADAPTED["qwen2_moe"] = f"{ATTENTION} {MLP.replace('mlp', 'mlp.shared_expert')}"
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "phimoe", "deepseek_v3"}
IDS = torch.arange(3, 13)[None]


@pytest.fixture(params=CONFIGS)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSpec:
    folder = make_architecture(request.param, tmp_path / request.param)
    return ModelSpec(Location(request.param, str(folder)), False, "float32", "auto")


def adapted_layers(model: Any) -> set[str]:
    """Paths of the adapted layers below their block, such as `mlp.fc1`."""
    paths = [
        name.removesuffix(".lora_A")
        for name, _ in model.named_modules()
        if name.endswith(".lora_A")
    ]
    return {re.sub(r".*\.\d+\.", "", path) for path in paths}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=IDS).logits)


def test_adapter_trains_loads_and_merges(
    spec: ModelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = spec.location.name
    base = load_model(spec)
    before = logits(base)
    with caplog.at_level(logging.WARNING, "medjob"):
        model = add_adapter(base, LoraParams(r=2), 0)
    assert adapted_layers(model) == set(ADAPTED[name].split())
    assert ("but not the experts" in caplog.text) == (name in EXPERTS)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n in trained if "vision" in n or "visual" in n or "cross_attn" in n]
    with torch.no_grad():
        for weight in trained.values():
            weight.normal_(std=0.05)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert not [n for n, p in trained.items() if p.grad is None]  # DDP would wait for it
    policy = logits(model)
    assert (policy - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_policy(spec, tmp_path / "adapter")), policy)
    merged = load_adapter(load_model(spec), tmp_path / "adapter").merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path / "merged")
    exported = dataclasses.replace(spec, location=Location.of_folder(tmp_path / "merged"))
    assert torch.allclose(logits(load_model(exported)), policy, atol=1e-4)


def test_packing_is_limited_to_architectures_that_keep_rows_apart(spec: ModelSpec) -> None:
    model = load_model(spec)
    rows = [torch.arange(3, 13), torch.arange(20, 28)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False)
        apart = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    keeps_apart = torch.allclose(packed.logits[0], torch.cat(apart), atol=1e-5)
    if model.config.model_type in PACKABLE:
        assert keeps_apart


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("gpt2", ["q_proj"], "the model has no q_proj"),
        ("gemma3", ["q_proj", "fc1"], "the model has no fc1"),
        ("gemma3", ["lm_head"], "the model has no lm_head"),
        ("gpt2", ["wte"], "the model has no wte"),
        ("opt", ["project_in"], "the model has no project_in"),
        ("deepseek_v3", ["o_proj", "gate_proj"], "gate_proj: medjob trains no adapter on experts"),
        ("mamba", ["dt_proj"], "the model has no dt_proj"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(
    tmp_path: Path, name: str, wanted: list[str], message: str
) -> None:
    folder = make_architecture(name, tmp_path)
    model = load_model(ModelSpec(Location(name, str(folder)), False, "float32", "auto"))
    with pytest.raises(ConfigError, match=message) as caught:
        target_modules(model, wanted)
    assert caught.value.message.startswith("run.lora.target_modules: ")


def test_named_layers_are_those_of_the_language_model(tmp_path: Path) -> None:
    folder = make_architecture("llava", tmp_path)
    model = load_model(ModelSpec(Location("llava", str(folder)), False, "float32", "auto"))
    adapted = add_adapter(model, LoraParams(r=2, target_modules=["q_proj", "v_proj"]), 0)
    paths = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    assert len(paths) == 4
    assert all("language_model" in path for path in paths)


@pytest.mark.slow
def test_multimodal_base_trains_in_two_processes(
    make_run_file: Callable[..., RunFile], tiny: Path, tmp_path: Path
) -> None:
    """DDP waits for ever for the gradient of a weight that a step does not use."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    base = tmp_path / "multimodal"
    config = gemma3_config()
    config.text_config.vocab_size = 432
    AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    changes = {"base_model": str(base), "dtype": "float32", "sft": {"max_steps": 2}}
    pipeline = Pipeline.open(make_run_file({"run": changes, "resources": {"sft": {"gpus": 2}}}))
    for name in ("fetch", "prepare"):
        pipeline.run(get_stage(name))
    assert pipeline.run(get_stage("sft")).metrics["steps"] == 2
