"""The real vLLM on a CPU: the same results as transformers, and the same bytes for any shards."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.config.load import validate
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.support.small_run import fetched, small_run
from tests.support.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="make .venv-vllm/installed"),
]


def run_program(name: str, folder: Path) -> subprocess.Popen[str]:
    """Start a program of `vllm_programs`, as the leader of its own process group."""
    return subprocess.Popen(
        [PYTHON, "-m", "tests.generate.vllm_programs", name, str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def result_of(name: str, folder: Path) -> Any:
    """Return what a program has written. It then stops itself by SIGTERM, and vLLM's processes must
    end with it: they hold its pipes, so waiting for these takes as long."""
    process = run_program(name, folder)
    _, errors = process.communicate(timeout=1500)
    assert process.returncode == 143, errors[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in a size that vLLM has kernels for, an adapter, and a run over them."""
    root = tmp_path_factory.mktemp("vllm")
    model = make_tiny_model(root / "model", hidden=128)
    tree = small_run(root, model)
    tree["run"]["dtype"] = "float32"
    tree["run"]["judge"] = {"min_margin": 0.0, "on_uncalibrated": "overlap", "pairwise_check": True}
    tree["cluster"]["store"] = f"file://{root}/trained"
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    pipeline = Pipeline.open(validate(tree))
    for name in ("fetch", "prepare", "sft"):
        pipeline.run(get_stage(name))
    shutil.copytree(fetched(pipeline, "sft"), root / "adapter")
    for name in ("whole", "two", "five", "killed"):
        shutil.copytree(root / "trained", root / name)
    return root


def test_vllm_answers_as_transformers_does(folder: Path) -> None:
    found = result_of("engines", folder)
    for name in ("base", "adapter"):
        ours, theirs = found[name]["vllm"], found[name]["transformers"]
        for row_id, (text, tokens, probabilities) in theirs.items():
            assert ours[row_id][:2] == [text, tokens], name
            assert ours[row_id][2] == pytest.approx(probabilities, abs=1e-3)
        drawn = found[name]["sampled"]
        assert found[name]["sampled alone"] == found[name]["sampled reversed"] == drawn
        assert all(first != second for first, second in drawn.values())
    assert found["base"]["vllm"] != found["adapter"]["vllm"]
    ours, theirs = found["completions"]
    for row_id, (nats, tokens) in theirs.items():
        assert ours[row_id] == [pytest.approx(nats, rel=1e-3), tokens]
    assert "does not score given answers beside adapters" in found["refused"]
    assert found["too long"] == [[True, True]]


def test_bytes_are_the_same_for_any_shards_and_after_a_kill(folder: Path) -> None:
    process = run_program("killed", folder)
    process.wait()
    kill_group(process)  # the engine's processes outlive it, and hold its pipes
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors[-4000:]
    parts = list((folder / "killed/t/candidates").glob("*/shards/0-of-2/parts/answers/*"))
    assert len(parts) == 2  # the fault was injected in the middle
    found = result_of("shards", folder)
    assert found["whole"] is not None
    assert found["two"] == found["five"] == found["killed"] == found["whole"]
    assert all(part.exists() for part in parts)


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads its group, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
