"""Every run file loads, and says what the project that it reproduces says."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from medjob.config import load_run_file
from medjob.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
RUNS = sorted((ROOT / "jobs").glob("*.yaml"))
# Which run a preset is laid over.
PRESETS = {
    "huatuo-qlora": ["huatuo"],
    "o1-llama-cloud": ["o1-llama"],
    "qa-fast": ["qa-phi4-mini", "qa-smollm2"],
    "qa-long": ["qa-phi4-mini", "qa-smollm2"],
}


def run(name: str, *presets: str) -> Any:
    return load_run_file(
        [ROOT / f"jobs/{name}.yaml", *(ROOT / f"jobs/presets/{preset}.yaml" for preset in presets)]
    )


def test_the_list_is_what_git_tracks() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "jobs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {str(path.relative_to(ROOT)) for path in RUNS} == {
        name for name in tracked if name.count("/") == 1 and name.endswith(".yaml")
    }
    assert {f"jobs/presets/{name}.yaml" for name in PRESETS} == {
        name for name in tracked if "/presets/" in name
    }
    assert len(RUNS) >= 8


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_it_loads_under_its_own_name_and_says_what_it_is(path: Path) -> None:
    run_file = load_run_file([path])
    assert run_file.run.name == path.stem
    assert len(run_file.run.description) > 60


@pytest.mark.parametrize(
    ("preset", "name"), [(preset, name) for preset, names in PRESETS.items() for name in names]
)
def test_presets_load_over_their_runs(preset: str, name: str) -> None:
    assert run(name, preset) != run(name)
    with pytest.raises(ConfigError):
        load_run_file([ROOT / f"jobs/presets/{preset}.yaml"])  # no run of its own


def test_the_cloud_variant_is_the_same_run() -> None:
    local, cloud = run("o1-llama"), run("o1-llama", "o1-llama-cloud")
    assert local.run == cloud.run
    assert cloud.resources.sft.gpus > 1


def test_given_numbers() -> None:
    """The numbers that the reproduced projects give."""
    o1 = run("o1-llama").run
    assert (o1.method, o1.lora.r, o1.lora.lora_alpha, o1.sft.learning_rate, o1.sft.max_length, o1.sft.global_batch_size) == (
        "qlora", 16, 32, 2e-4, 2048, 8,
    )  # fmt: skip
    for name in ("qa-phi4-mini", "qa-smollm2"):
        qa, fast, long = run(name).run, run(name, "qa-fast").run, run(name, "qa-long").run
        assert (
            qa.seed,
            qa.lora.lora_dropout,
            qa.sft.max_steps,
            qa.sft.early_stopping_patience,
            qa.sft.max_length,
        ) == (
            816,
            0.1,
            36,
            3,
            512,
        )
        assert "I don't have enough information to answer this safely" in qa.prompt.system
        assert (fast.sft.max_steps, fast.sft.global_batch_size) == (10, 4)
        assert (long.sft.max_steps, long.sft.learning_rate, long.sft.early_stopping_patience) == (
            100,
            1e-4,
            5,
        )
    cot = run("cot-llama3.2").run
    assert (
        cot.dtype,
        cot.lora.lora_dropout,
        cot.sft.learning_rate,
        cot.sft.max_steps,
        cot.sft.eval_steps,
    ) == (
        "float16",
        0.05,
        1e-5,
        200,
        50,
    )
    assert (cot.prompt.style, cot.prepare.validation_rows) == ("tags", 100)
    rlaif = run("rlaif-qwen").run
    assert (
        rlaif.candidates.num_candidates,
        rlaif.candidates.temperature,
        rlaif.candidates.top_p,
    ) == (2, 0.7, 0.95)
    assert rlaif.judge.model.id == "Qwen/Qwen2.5-3B-Instruct"
    r1 = run("r1-chat").run
    assert (r1.prepare.sources[0].split, r1.evaluate.max_new_tokens) == ("train[:500]", 1200)
    assert all(heading in r1.prompt.template for heading in ("### Task", "### Query", "### Answer"))
    huatuo = run("huatuo").run
    assert (
        huatuo.method,
        huatuo.sft.num_train_epochs,
        huatuo.sft.learning_rate,
        huatuo.sft.global_batch_size,
    ) == ("full", 3, 5e-6, 128)
    assert (
        huatuo.sft.weight_decay,
        huatuo.dpo.learning_rate,
        huatuo.dpo.beta,
        huatuo.candidates.num_candidates,
    ) == (0.1, 1e-6, 1, 5)
    assert all(not r.sft.packing for r in (o1, qa, cot, r1, huatuo))
