"""Every run file loads and has the settings of the project that it reproduces."""

import subprocess
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from medjob.config import load_run_file
from medjob.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
RUNS = sorted((ROOT / "jobs").glob("*.yaml"))
# The runs that each preset applies to.
PRESETS = {
    "huatuo-qlora": ["huatuo"],
    "mac": ["o1-llama"],
    "o1-llama-cloud": ["o1-llama"],
    "qa-fast": ["qa-phi4-mini", "qa-smollm2"],
    "qa-long": ["qa-phi4-mini", "qa-smollm2"],
}


def run(name: str, *presets: str) -> Any:
    return load_run_file(
        [ROOT / f"jobs/{name}.yaml", *(ROOT / f"jobs/presets/{preset}.yaml" for preset in presets)]
    )


def test_all_tracked_run_files_are_tested() -> None:
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
def test_run_file_loads_and_has_name_and_description(path: Path) -> None:
    run_file = load_run_file([path])
    assert run_file.run.name == path.stem
    assert len(run_file.run.description) > 60


@pytest.mark.parametrize(
    ("preset", "name"), [(preset, name) for preset, names in PRESETS.items() for name in names]
)
def test_presets_change_their_runs_and_need_one(preset: str, name: str) -> None:
    assert run(name, preset) != run(name)
    with pytest.raises(ConfigError):
        load_run_file([ROOT / f"jobs/presets/{preset}.yaml"])  # a preset alone is not a run


def test_the_cloud_preset_changes_only_resources() -> None:
    local, cloud = run("o1-llama"), run("o1-llama", "o1-llama-cloud")
    assert local.run == cloud.run
    assert cloud.resources.sft.gpus > 1


def test_the_mac_preset_leaves_sft_as_it_is() -> None:
    plain, mac = run("o1-llama"), run("o1-llama", "mac")
    assert (plain.run.sft, plain.run.lora) == (mac.run.sft, mac.run.lora)
    assert mac.run.judge.load_in_4bit  # the base model in 16 bits does not fit


# (run, preset, settings that the reproduced project publishes)
QA = {
    "seed": 816,
    "lora.lora_dropout": 0.1,
    "sft.max_steps": 36,
    "sft.early_stopping_patience": 3,
    "sft.max_length": 512,
}
QA_FAST = {"sft.max_steps": 10, "sft.global_batch_size": 4}
QA_LONG = {
    "sft.max_steps": 100,
    "sft.learning_rate": 1e-4,
    "sft.early_stopping_patience": 5,
}
PUBLISHED: list[tuple[str, str | None, dict[str, Any]]] = [
    (
        "o1-llama",
        None,
        {
            "method": "qlora",
            "lora.r": 16,
            "lora.lora_alpha": 32,
            "sft.learning_rate": 2e-4,
            "sft.max_length": 2048,
            "sft.global_batch_size": 8,
        },
    ),
    ("qa-phi4-mini", None, QA),
    ("qa-phi4-mini", "qa-fast", QA_FAST),
    ("qa-phi4-mini", "qa-long", QA_LONG),
    ("qa-smollm2", None, QA),
    ("qa-smollm2", "qa-fast", QA_FAST),
    ("qa-smollm2", "qa-long", QA_LONG),
    (
        "cot-llama3.2",
        None,
        {
            "dtype": "float16",
            "lora.lora_dropout": 0.05,
            "sft.learning_rate": 1e-5,
            "sft.max_steps": 200,
            "sft.eval_steps": 50,
            "prompt.style": "tags",
            "prepare.validation_rows": 100,
        },
    ),
    (
        "rlaif-qwen",
        None,
        {
            "candidates.num_candidates": 2,
            "candidates.temperature": 0.7,
            "candidates.top_p": 0.95,
            "judge.model.id": "Qwen/Qwen2.5-3B-Instruct",
        },
    ),
    ("r1-chat", None, {"evaluate.max_new_tokens": 1200}),
    (
        "huatuo",
        None,
        {
            "method": "full",
            "sft.num_train_epochs": 3,
            "sft.learning_rate": 5e-6,
            "sft.global_batch_size": 128,
            "sft.weight_decay": 0.1,
            "dpo.learning_rate": 1e-6,
            "dpo.beta": 1,
            "candidates.num_candidates": 5,
        },
    ),
]


@pytest.mark.parametrize(("name", "preset", "settings"), PUBLISHED)
def test_runs_have_the_published_settings(
    name: str, preset: str | None, settings: dict[str, Any]
) -> None:
    loaded = run(name, *([preset] if preset else [])).run
    assert {key: attrgetter(key)(loaded) for key in settings} == settings


def test_runs_have_the_published_prompts_and_sources() -> None:
    for name in ("qa-phi4-mini", "qa-smollm2"):
        system = run(name).run.prompt.system
        assert "I don't have enough information to answer this safely" in system
    r1_chat = run("r1-chat").run
    assert r1_chat.prepare.sources[0].split == "train[:500]"
    for heading in ("### Task", "### Query", "### Answer"):
        assert heading in r1_chat.prompt.template


@pytest.mark.parametrize(
    "name", ["o1-llama", "qa-phi4-mini", "qa-smollm2", "cot-llama3.2", "r1-chat", "huatuo"]
)
def test_runs_that_count_steps_over_rows_do_not_pack(name: str) -> None:
    assert not run(name).run.sft.packing
