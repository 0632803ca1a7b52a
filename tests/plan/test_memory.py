"""Compare the memory model with torch's allocations on a CPU, and sizes with real models; check
which settings are chosen. `-s` prints the comparison."""

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from medjob.config.train import LoraParams
from medjob.errors import ConfigError
from medjob.plan import memory
from medjob.plan.gpus import Choice, choose, find
from medjob.plan.memory import GIB, Setup, estimate
from medjob.plan.shape import ModelShape
from medjob.train.adapters import add_adapter
from medjob.train.model import has_instructions
from medjob.train.patches import give_trained_head_a_bias, train_adapter_in_float32
from tests.support.tiny_model import make_tiny_model

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
# 13 M parameters, which train in seconds. As in large models, most weights are in the blocks.
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LENGTH = 192
R = 32
MAX_ERROR = 0.05


@dataclass(frozen=True)
class Case:
    """One measured training. The head's tile is narrow unless its width is measured."""

    method: Any
    every: int = 0
    stage: Any = "sft"
    packing: bool = False
    rows: int = 2
    family: str = "llama"
    columns: int = 256
    evaluation_rows: int = 0
    adapter: str = "lora"

    def __str__(self) -> str:
        changed = {
            name: value for name, value in vars(self).items() if value != getattr(Case, name, None)
        }
        return " ".join(f"{name}={value}" for name, value in changed.items())


ADAPTERS = {
    "lora": LoraParams(r=R),
    "dora": LoraParams(r=R, use_dora=True),
    "embedding": LoraParams(r=R, modules_to_save=["embed_tokens"]),
    "head": LoraParams(r=R, modules_to_save=["lm_head", "norm"]),
    "tokens": LoraParams(r=R, trainable_token_indices=[5, 6]),
}
CASES = [Case(method, every) for method in ("lora", "qlora", "full") for every in (0, 2, 1)] + [
    Case("qlora", columns=32768),
    Case("qlora", packing=True, rows=8),
    Case("qlora", 1, evaluation_rows=8),
    *(Case("qlora", every, stage="dpo") for every in (0, 1)),
    *(Case("qlora", family=family) for family in ("qwen3", "phi3")),
    *(Case("qlora", adapter=adapter) for adapter in ("dora", "embedding", "head", "tokens")),
]


@pytest.fixture
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random model of the case's family, created once per session."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.getbasetemp() / "plan" / case.family
    if not folder.exists():
        make_tiny_model(folder)  # for its tokenizer
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(case.family, **SIZES, bos_token_id=None)
        ).bfloat16().save_pretrained(folder)
    return folder


def load(folder: Path, case: Case) -> Any:
    """Load the model as `medjob.train.model` does."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    quantized = {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4),
        "device_map": {"": "cpu"},
    }
    dtype = torch.float32 if case.method == "full" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, **(quantized if case.method == "qlora" else {})
    )
    if case.method == "full":
        return model
    lora = ADAPTERS[case.adapter]
    return add_adapter(model, lora, 0, lora.trainable_token_indices or ())  # type: ignore[arg-type]


def make_trainer(folder: Path, case: Case, output: Path) -> Any:
    """Build a trainer for two steps of two micro-batches each. In the second step, gradients and
    moments exist throughout."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    # Takes rows that are already tokenised, like the trainer in medjob.stages.dpo.
    tokenised: Any = type(
        "Tokenised", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset}
    )
    # Lengths differ so that there is a mask. Concatenated rows have one anyway.
    rows = [
        torch.randint(3, 400, (LENGTH - 16 * (i % 2 and not case.packing),)).tolist()
        for i in range(case.rows * 4)
    ]
    common: dict[str, Any] = {
        "output_dir": str(output),
        "max_length": LENGTH,
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": case.rows,
        "per_device_eval_batch_size": case.evaluation_rows or 1,
        "eval_strategy": "steps" if case.evaluation_rows else "no",
        "eval_steps": 1,
        "bf16": True,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "gradient_checkpointing": case.every > 0,
        "gradient_checkpointing_kwargs": (
            {"every_n_layers": case.every} if case.every > 1 else None
        ),
    }
    parts = {
        "model": load(folder, case),
        "processing_class": AutoTokenizer.from_pretrained(folder),
    }
    if case.stage == "dpo":
        pairs = [
            {"prompt_ids": ids[:64], "chosen_ids": ids[64:], "rejected_ids": ids[:63:-1]}
            for ids in rows
        ]
        trainer = tokenised(
            args=DPOConfig(**common), train_dataset=Dataset.from_list(pairs), **parts
        )
    else:
        data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])
        args = SFTConfig(packing=case.packing, eval_packing=False, **common)
        trainer = SFTTrainer(
            args=args,
            train_dataset=data,
            eval_dataset=data if case.evaluation_rows else None,
            **parts,
        )
    give_trained_head_a_bias(trainer.model)  # as medjob.train.trainer does
    train_adapter_in_float32(trainer.model)
    return trainer


def held_bytes(model: Any) -> int:
    """Bytes of parameters, buffers and the scales of 4-bit weights. Shared storage counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    states = [
        tensor.quant_state for tensor in tensors if getattr(tensor, "quant_state", None) is not None
    ]
    tensors += [scales for state in states for scales in (state.absmax, state.state2.absmax)]
    return sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors
        }.values()
    )


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak of torch's CPU allocator while `run` runs, above its level before."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return max(
        accumulate(
            int(event.nbytes()) for event in sorted(events, key=lambda event: event.start_ns())
        )
    )


SLOW_HERE = pytest.mark.skipif(
    not has_instructions("bfloat16"),
    reason="this CPU has no bfloat16 instructions: a case takes minutes",
)


@pytest.mark.parametrize(
    "case", [CASES[0], *(pytest.param(case, marks=SLOW_HERE) for case in CASES[1:])], ids=str
)
def test_estimate_matches_measured_memory(
    case: Case, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import bitsandbytes.nn.modules
    import torch
    import trl.trainer.utils

    # bitsandbytes repacks weights on CPUs with AVX512-BF16, but not on GPUs.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    # PEFT copies activations unless autocast is on for GPUs. Make the CPU follow the path of a GPU.
    is_autocast_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda device="cpu": is_autocast_enabled(device)
    )
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", case.columns)
    monkeypatch.setattr(memory, "HEAD_TILE", (memory.HEAD_TILE[0], case.columns))
    trainer = make_trainer(folder, case, tmp_path)
    measured = held_bytes(trainer.model) + peak_bytes(trainer.train)
    setup = Setup(
        case.stage,
        case.method,
        lora=ADAPTERS[case.adapter],
        micro_batch_size=case.rows,
        max_length=LENGTH,
        checkpoint_every=case.every,
        packing=case.packing,
        evaluation_rows=case.evaluation_rows,
        device="cpu",
    )
    config = json.loads((folder / "config.json").read_text())
    expected = estimate(ModelShape.from_config(config), setup)
    error = expected.total / measured - 1
    parts = " ".join(f"{name} {gib * 1024:.0f}" for name, gib in expected.table()[:-1])
    print(
        f"\n{case!s:32} measured {measured / 2**20:6.1f} MiB,"
        f" estimated {expected.total / 2**20:6.1f} ({error:+.1%}): {parts}"
    )
    assert abs(error) < MAX_ERROR


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "smollm3"],
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"head_dim": 80, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}],
)
def test_shape_matches_the_layers_of_transformers(family: str, changes: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SIZES, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # As in config.json, without the defaults of the configuration class.
    found = ModelShape.from_config(json.loads(config.to_json_string()))
    linears = {
        name.rpartition(".")[2]: part
        for name, part in model.model.layers[0].named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.linears == {
        name: (part.in_features, part.out_features) for name, part in linears.items()
    }
    assert found.biased == {name for name, part in linears.items() if part.bias is not None}


def shape(config: dict[str, Any], **changes: Any) -> ModelShape:
    return ModelShape.from_config({"model_type": "llama"} | config | changes)


def test_parameters_of_published_models_and_adapters() -> None:
    assert shape(LLAMA_8B).parameters == 8_030_261_248
    assert shape(LLAMA_70B).parameters == 70_553_706_496
    assert shape(LLAMA_8B).lora_parameters(LoraParams(r=16)) == 41_943_040
    phi = shape(SIZES, model_type="phi3")
    assert phi.adapted(["q_proj", "v_proj", "o_proj"]) == ("qkv_proj", "o_proj")
    assert phi.lora_parameters(LoraParams(r=8, target_modules=["q_proj"])) == 4 * 8 * (
        512 + 512 + 2 * 128
    )
    with pytest.raises(ConfigError, match="the model has no fc1"):
        phi.adapted(["fc1"])


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
    ({"model_type": "qwen3_moe"}, "mixture of experts"),
    ({"model_type": "gemma3", "text_config": {}}, "more than text"),
    ({"model_type": "mamba"}, "not a known family"),
    ({"hidden_size": None}, "no usable hidden_size"),
    ({"hidden_size": 10**30}, "no usable hidden_size"),
    ({"head_dim": "64"}, "no usable head_dim"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "stored quantisation 'awq'"),
]


@pytest.mark.parametrize(("config", "message"), UNKNOWN)
def test_unknown_shapes_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape(LLAMA_8B, **config)


@pytest.mark.parametrize(
    "stored",
    [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_4bit": True}],
)
def test_a_base_stored_in_4_bits_is_not_trained_in_full(stored: dict[str, Any]) -> None:
    base = shape(LLAMA_8B, quantization_config=stored)
    assert estimate(base, Setup("sft", "lora")).parameters < 6 * GIB
    with pytest.raises(ConfigError, match=r"run\.method"):
        estimate(base, Setup("sft", "full"))


def test_flops_match_those_that_torch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
        with FlopCounterMode(display=False) as forward:
            logits = model(torch.ones((1, 64), dtype=torch.long)).logits
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    assert shape(SIZES).forward_flops_per_token(64) * 64 == forward.get_total_flops()
    assert (
        shape(SIZES).training_flops_per_token("full", 64) * 64
        == forward.get_total_flops() + backward.get_total_flops()
    )


def test_flops_by_method_and_stage() -> None:
    llama = shape(LLAMA_8B)
    weights = llama.linear_parameters + llama.vocab * llama.hidden
    attention = 4 * 32 * 4096 * 1000
    assert llama.training_flops_per_token("qlora", 1000) == 4 * weights + 3 * attention
    assert llama.training_flops_per_token("lora", 1000, "dpo") == 6 * weights + 4 * attention
    assert llama.recompute_flops_per_token(3, 0) == 2 * llama.linear_parameters * 11 / 32
    assert llama.recompute_flops_per_token(0, 1000) == 0


NAMES = {
    "Tesla T4": "T4",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA A10G": "A10G",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100 80GB PCIe": "A100-80",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "h200": "H200",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
}


def test_gpus_are_found_by_name() -> None:
    assert {name: gpu.name for name in NAMES if (gpu := find(name))} == NAMES
    for unknown in ("NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L40"):
        assert find(unknown) is None


FLASH = Setup("sft", "qlora", attention="flash_attention_2", evaluation_rows=4)


def chosen(config: dict[str, Any], gpu: str, setup: Setup = FLASH, **changes: Any) -> Choice:
    found = find(gpu)
    batch = 16
    assert found is not None
    auto: Any = ("zero", "micro_batch_size", "checkpoint_every")
    choice = choose(
        shape(config),
        replace(setup, **changes),
        found.usable_bytes,
        auto=auto,
        global_batch_size=batch,
    )
    assert choice.fits == (choice.memory.total <= found.usable_bytes)
    assert batch % (choice.setup.micro_batch_size * choice.setup.world_size) == 0
    return choice


def test_8b_qlora_on_one_gpu() -> None:
    small = chosen(LLAMA_8B, "L4", max_length=8192)
    assert (small.fits, small.setup.checkpoint_every, small.setup.zero) == (True, 1, "none")
    assert chosen(LLAMA_8B, "A100-40", max_length=8192).setup.checkpoint_every > 1
    large = chosen(LLAMA_8B, "H200").setup
    assert (large.checkpoint_every, large.tokens) == (0, 8192)


def test_sdpa_gets_few_concatenated_rows_per_batch() -> None:
    assert chosen(LLAMA_8B, "H200", attention="sdpa").setup.tokens == 2048
    assert chosen(LLAMA_8B, "H200", attention="sdpa", packing=False).setup.tokens == 8192


def test_dpo_checkpoints_all_blocks_or_none() -> None:
    choices = [
        chosen(LLAMA_8B, gpu, Setup("dpo", "qlora"), max_length=4096)
        for gpu in ("L4", "A100-40", "H200")
    ]
    assert [choice.setup.checkpoint_every for choice in choices] == [1, 1, 0]


def test_zero3_is_chosen_only_if_a_replica_does_not_fit() -> None:
    assert chosen(LLAMA_70B, "H100", world_size=8).setup.zero == "zero2"
    assert chosen(LLAMA_70B, "L40S", world_size=8).setup.zero == "zero3"
    choice = chosen(LLAMA_70B, "L4", world_size=8)
    assert not choice.fits
    assert "loading the whole 4-bit base" in choice.advice[0]
    assert "run.base_model" in choice.advice[1]


def test_full_8b_needs_several_gpus() -> None:
    alone = chosen(LLAMA_8B, "H100", method="full")
    assert not alone.fits
    assert [line.split()[0] for line in alone.advice[1:]] == [
        "run.method=lora",
        "resources.sft.gpus",
    ]
    assert "gpus x nodes = 4 " in alone.advice[2]
    assert chosen(LLAMA_8B, "H100", method="full", world_size=4).fits
    assert chosen(LLAMA_8B, "H100", method="full", world_size=8).setup.zero == "zero2"


def test_advice_names_keys_and_explicit_settings_are_kept() -> None:
    assert any(
        "run.sft.max_length=" in line for line in chosen(LLAMA_8B, "T4", max_length=32768).advice
    )
    with pytest.raises(
        ConfigError, match=r"run\.sft\.global_batch_size: 16 is not divisible by the 3 devices"
    ):
        chosen(LLAMA_8B, "H100", world_size=3)
    given = Setup("sft", "qlora", micro_batch_size=4, checkpoint_every=3)
    assert choose(shape(LLAMA_8B), given, 10**12, auto=(), global_batch_size=16).setup == given
