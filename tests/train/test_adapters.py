"""Adapters beyond plain LoRA: they are published for the original base, load and merge as they were
trained, are the reference of DPO, and what a model does not have is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medjob.config import RunFile
from medjob.config.base import ModelRef
from medjob.config.load import validate
from medjob.config.train import LoraParams
from medjob.errors import ConfigError
from medjob.pipeline.runner import Pipeline
from medjob.plan import text
from medjob.plan.adapter import adapter_params
from medjob.plan.memory import GIB, Setup, estimate
from medjob.plan.settings import setup_of
from medjob.plan.shape import ModelShape
from medjob.sources.locations import Location
from medjob.stage import get_stage
from medjob.stages.export import _merge
from medjob.train.adapter_files import initial_weights
from medjob.train.adapters import add_adapter, token_ids
from medjob.train.model import ModelSpec, load_model, load_policy, load_tokenizer, save_policy
from tests.support.build_once import build_once
from tests.support.in_process import in_this_process
from tests.support.resume_matrix import publish_candidates
from tests.support.small_run import small_run

IDS = torch.arange(5, 85).reshape(2, 40)
TOKENS = [5, 7, 300]
ADAPTERS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "init_lora_weights": "gaussian"},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"q_proj": 64},
        "layers_to_transform": [1],
    },
    "embedding": {"modules_to_save": ["embed_tokens", "input_layernorm"]},
    "tokens": {"trainable_token_indices": TOKENS, "use_dora": True},
}
CHANGED_BASE: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa", "use_rslora": True},
    "fast pissa": {"init_lora_weights": "pissa_niter_4", "rank_pattern": {"down_proj": 2}},
    "olora": {"init_lora_weights": "olora", "alpha_pattern": {"q_proj": 64}, "use_dora": True},
}


@pytest.fixture(scope="session")
def tied(shared: Path, tiny: Path) -> Path:
    """A model whose head shares the weight of the embedding."""

    def make(folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(folder)

    return build_once(shared / "tied", make)


def spec(folder: Path, method: str = "lora", dtype: str = "float32") -> ModelSpec:
    return ModelSpec(Location.of_folder(folder), method == "qlora", dtype, "sdpa")


def log_p(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model.eval()(input_ids=IDS).logits.float(), -1)


def kl(policy: torch.Tensor, other: torch.Tensor) -> float:
    return float((policy.exp() * (policy - other)).sum(-1).mean().abs())


def trained(base: ModelSpec, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model with an adapter after three steps, and the initial weights taken from its base."""
    params = LoraParams(r=4, **values)
    tokens = TOKENS if params.trainable_token_indices else ()
    model = add_adapter(load_model(base), params, 0, tokens)
    initial = initial_weights(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=base.dtype != "float32"):
            model.train()(input_ids=IDS, labels=IDS).loss.backward()
        assert all(weight.grad is not None for weight in weights)
        optimizer.step()
        optimizer.zero_grad()
    return model, initial


def publish(model: Any, initial: dict[str, Any], folder: Path) -> Path:
    model.save_pretrained(folder / "checkpoint")
    (folder / "published").mkdir()
    save_policy(folder / "checkpoint", None, folder / "published", ModelRef(id="a/base"), initial)
    return folder / "published"


CASES = [
    *(
        (model, method, name)
        for model in ("tiny", "tied")
        for method in ("lora", "qlora")
        for name in ADAPTERS
    ),
    *((model, "lora", name) for model in ("tiny", "tied") for name in CHANGED_BASE),
    ("tiny", "qlora", "head"),
]


@pytest.mark.parametrize(("model", "method", "name"), CASES)
def test_published_and_merged_adapter_are_the_trained_policy(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, method: str, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    head = {"head": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}}
    base = spec(request.getfixturevalue(model), method)
    policy, initial = trained(base, (ADAPTERS | CHANGED_BASE | head)[name])
    expected = log_p(policy)
    assert kl(log_p(load_model(base)), expected) > 1e-3  # the training changed the model
    folder = publish(policy, initial, tmp_path)
    assert kl(expected, log_p(load_policy(base, folder))) < 1e-6
    merged = _merge(base, folder)
    merged.save_pretrained(tmp_path / "merged")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert kl(expected, log_p(exported)) < 1e-6


@pytest.mark.parametrize("name", ["dora", "embedding", "tokens", "pissa", "olora"])
def test_bfloat16_costs_no_more_than_its_rounding(tiny: Path, tmp_path: Path, name: str) -> None:
    base = spec(tiny, dtype="bfloat16")
    policy, initial = trained(base, (ADAPTERS | CHANGED_BASE)[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = log_p(policy)
    folder = publish(policy, initial, tmp_path)
    assert kl(expected, log_p(load_policy(base, folder))) < 1e-5
    assert kl(expected, log_p(_merge(base, folder))) < 1e-5


@pytest.mark.parametrize("name", CHANGED_BASE)
def test_a_new_adapter_computes_what_the_base_does(tiny: Path, name: str) -> None:
    before = log_p(load_model(spec(tiny)))
    model = add_adapter(load_model(spec(tiny)), LoraParams(r=4, **CHANGED_BASE[name]), 0)
    assert kl(before, log_p(model)) < 1e-6
    first = next(iter(model.get_base_model().model.layers)).mlp.down_proj.base_layer.weight
    original = load_model(spec(tiny)).model.layers[0].mlp.down_proj.weight
    assert (first - original).abs().max() > 1e-3  # and its weights are not the base's


def test_an_adapter_that_changed_the_base_is_published_as_plain_lora(
    tiny: Path, tmp_path: Path
) -> None:
    """vLLM and PEFT would otherwise decompose the base again when they load it."""
    params = LoraParams(r=4, rank_pattern={"down_proj": 2}, init_lora_weights="pissa")
    model = add_adapter(load_model(spec(tiny)), params, 0)
    folder = publish(model, initial_weights(model), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 8, 64)
    weights = load_file(folder / "adapter_model.safetensors")
    shapes = {name.split(".")[-3]: w.shape[0] for name, w in weights.items() if "lora_A" in name}
    assert shapes["q_proj"] == 8
    assert shapes["down_proj"] == 4
    assert adapter_params(folder).published == adapter_params(folder)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"modules_to_save": ["lm_heads"]},
        "modules_to_save: the model has no lm_heads",
        "embed_tokens",
    ),
    ({"modules_to_save": ["q_proj"]}, "modules_to_save: the model has no q_proj", "lm_head"),
    ({"layers_to_transform": [1, 2]}, "layers_to_transform: the model has no layer 2", "0 to 1"),
    ({"rank_pattern": {"query": 2}}, "rank_pattern: the adapter does not cover query", "q_proj"),
    ({"init_lora_weights": "pissa", "r": 64}, "the rank of .* is at most", "run.lora.r"),
    (
        {"modules_to_save": ["lm_head"], "trainable_token_indices": TOKENS},
        "modules_to_save trains all rows of lm_head already",
        "leave out",
    ),
]


@pytest.mark.parametrize(("values", "message", "hint"), REFUSED)
def test_what_the_model_does_not_have_is_refused(
    tiny: Path, values: dict[str, Any], message: str, hint: str
) -> None:
    params = LoraParams(**values)
    with pytest.raises(ConfigError, match=message) as caught:
        add_adapter(load_model(spec(tiny)), params, 0, params.trainable_token_indices or ())  # type: ignore[arg-type]
    assert caught.value.message.startswith("run.lora.")
    assert hint in caught.value.hint


def test_a_head_that_shares_the_embedding_is_refused(tied: Path) -> None:
    with pytest.raises(ConfigError, match="lm_head shares the weight of the embedding") as caught:
        add_adapter(load_model(spec(tied)), LoraParams(modules_to_save=["lm_head"]), 0)
    assert "embed_tokens" in caught.value.hint


def test_a_base_in_4_bits_keeps_its_weights(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="olora needs a base that is not quantized"):
        add_adapter(load_model(spec(tiny, "qlora")), LoraParams(init_lora_weights="olora"), 0)


def test_tokens_are_ids_or_texts_of_the_vocabulary(tiny: Path) -> None:
    tokenizer = load_tokenizer(Location.of_folder(tiny))
    assert token_ids(tokenizer, ["<|im_end|>", 9, 2]) == [2, 9]
    with pytest.raises(ConfigError, match="has no token <think>, 500") as caught:
        token_ids(tokenizer, ["<think>", 500, 3])
    assert "<|im_start|>" in caught.value.hint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "eva"}, "got 'eva': it needs the gradients or activations"),
        ({"init_lora_weights": False}, "must be true, gaussian, olora, pissa or pissa_niter_4"),
        ({"init_lora_weights": "pissa"}, "pissa subtracts the adapter from the base's weights"),
        ({"modules_to_save": []}, "modules_to_save is an empty list"),
    ],
)
def test_unusable_settings_are_refused_with_the_run_file(
    tiny: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    tree = small_run(tmp_path, tiny)
    tree["run"] |= {"method": "qlora", "lora": values}
    with pytest.raises(ConfigError, match=message) as caught:
        validate(tree)
    assert caught.value.message.startswith("run.lora")


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"trainable_token_indices": [3]}])
def test_zero3_is_refused_or_not_chosen(
    make_run_file: Callable[..., RunFile], setting: dict[str, Any]
) -> None:
    run_file = make_run_file({"resources": {"sft": {"deepspeed": "zero3"}}})
    arguments = (LoraParams(**setting), run_file.resources.sft, "sdpa", "cuda")
    with pytest.raises(
        ConfigError, match=f"zero3 shards weights that run.lora.{next(iter(setting))}"
    ):
        setup_of(run_file.run, run_file.run.sft, *arguments)  # type: ignore[arg-type]
    assert not Setup("sft", "qlora", lora=LoraParams(**setting)).allows_zero3


def test_the_first_loss_of_dpo_is_ln_2(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    """The reference has the trained modules and tokens of the SFT adapter too."""
    from medjob.stages.dpo import run

    adapter = {
        "r": 4,
        "use_dora": True,
        "modules_to_save": ["norm"],
        "trainable_token_indices": ["<|im_start|>", "<|im_end|>", 9],
    }
    sft = {"learning_rate": 3e-2, "max_steps": 2}
    dpo = {"max_steps": 3, "learning_rate": 1e-2, "validation_fraction": 0.0}
    run_file = make_run_file({"run": {"method": "lora", "lora": adapter, "sft": sft, "dpo": dpo}})
    pipeline = Pipeline.open(run_file)
    for name in ("fetch", "prepare", "sft"):
        pipeline.run(get_stage(name))
    publish_candidates(pipeline, tmp_path)
    pipeline.run(get_stage("judge"))
    context = in_this_process(pipeline, "dpo")
    metrics = run(context)
    assert metrics["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["last_loss"] < 0.69
    trained = load_file(context.output / "adapter_model.safetensors")
    started = load_file(context.inputs["sft"] / "adapter_model.safetensors")
    assert started.keys() == trained.keys()
    moved = [name for name in trained if not torch.equal(trained[name], started[name])]
    assert any("trainable_tokens" in name for name in moved)
    assert any(name.endswith("model.norm.weight") for name in moved)


def test_plan_counts_what_is_trained_beside_the_adapter() -> None:
    shape = ModelShape.from_config(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
        }
    )
    plain = shape.trained_parameters("qlora", LoraParams())
    assert shape.trained_parameters("qlora", LoraParams(layers_to_transform=[0, 1])) == plain / 16
    head = LoraParams(modules_to_save=["lm_head", "norm"])
    assert shape.trained_parameters("qlora", head) - plain == 4096 * (128256 + 1)
    tokens = LoraParams(trainable_token_indices=["<a>", 7])
    assert shape.trained_parameters("qlora", tokens) - plain == 2 * 2 * 4096
    dora = LoraParams(use_dora=True)
    outputs = sum(width for _, width in shape.linears.values())
    assert shape.trained_parameters("qlora", dora) - plain == 32 * outputs
    needed = estimate(shape, Setup("sft", "qlora")).total
    for lora in (head, tokens, dora):
        assert estimate(shape, Setup("sft", "qlora", lora=lora)).total > needed + GIB


def test_plan_says_what_vllm_does_not_serve(make_run_file: Callable[..., RunFile]) -> None:
    def lines(**lora: Any) -> list[str]:
        return list(text.serving_lines(make_run_file({"run": {"lora": lora}}).run))

    assert lines(use_rslora=True, layers_to_transform=[0], init_lora_weights="pissa") == []
    refused = lines(use_dora=True, modules_to_save=["norm"], alpha_pattern={"q_proj": 8}, r=1024)
    assert [line.removeprefix("adapter: vLLM ") for line in refused] == [
        "refuses run.lora.use_dora",
        "refuses run.lora.modules_to_save",
        "ignores run.lora.alpha_pattern, and would scale the adapter wrongly",
        "refuses the rank 1024, which is over 512",
        "serves the merged model of `medjob export` like any other model",
    ]
    assert "the rank 600" in lines(r=300, init_lora_weights="pissa")[0]
