"""Programs for the Python that has vLLM: `python -m tests.generate.vllm_programs NAME FOLDER`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.shard import Shard
from medjob.config.load import validate
from medjob.config.prepare import PromptParams
from medjob.data.render import Conversation, Renderer
from medjob.errors import ConfigError
from medjob.generate import vllm_engine, work
from medjob.generate.protocol import Engine, Prompt, Sampling
from medjob.generate.transformers_engine import (
    TransformersEngine,
    end_tokens,
)
from medjob.pipeline.runner import Pipeline
from medjob.runtime import signals
from medjob.sources.locations import Location
from medjob.stage import get_stage
from medjob.train.model import (
    ModelSpec,
    load_generation_config,
    load_model,
    load_policy,
    load_tokenizer,
)

QUESTIONS = ["Why does a man have chest pain?", "What is an infarction?", "Who calls for help?"]


def engines(folder: Path) -> dict[str, Any]:
    """Ask vLLM and transformers the same, of the base and of the adapter."""
    location = Location.of_folder(folder / "model")
    tokenizer = load_tokenizer(location)
    renderer = Renderer(tokenizer, PromptParams(style="plain"))
    ids = renderer.prompt_ids([Conversation(text) for text in QUESTIONS])
    prompts = [Prompt(f"row{n}", each) for n, each in enumerate(ids)]
    ends = end_tokens(load_generation_config(location.path, None), tokenizer, renderer)
    base = vllm_engine.Base(location.path, None, "float32", 0, rank=4)
    spec = ModelSpec(location, False, "float32", "sdpa")
    adapter = folder / "adapter"
    found: dict[str, Any] = {}
    for name, folder_or_none in (("base", None), ("adapter", adapter)):
        vllm: Engine = vllm_engine.VllmEngine(base, tokenizer, 1, renderer, ends, folder_or_none)
        model = load_policy(spec, folder_or_none) if folder_or_none else load_model(spec)
        plain = TransformersEngine(model, tokenizer, 8, 1, renderer)
        found[name] = {
            "vllm": _ask(vllm, prompts),
            "transformers": _ask(plain, prompts),
            "sampled": _sample(vllm, prompts),
            "sampled alone": {
                key: value for each in prompts for key, value in _sample(vllm, [each]).items()
            },
            "sampled reversed": _sample(vllm, prompts[::-1]),
        }
    after = {each.id: renderer.completion_ids(["It is the heart."])[0] for each in prompts}
    try:
        list(vllm.negative_log_likelihoods([prompts], after))
    except ConfigError as error:
        found["refused"] = error.message
    long = Prompt("long", [5] * 2048)
    found["too long"] = [
        [answer.truncated for answer in answers]
        for _, answers in vllm.generate([[long]], Sampling(5, num_return_sequences=2))
    ]
    vllm_engine.release()
    alone = vllm_engine.Base(location.path, None, "float32", 0)
    vllm = vllm_engine.VllmEngine(alone, tokenizer, 1, renderer, ends)
    found["completions"] = [
        dict(engine.negative_log_likelihoods([prompts], after))
        for engine in (vllm, TransformersEngine(load_model(spec), tokenizer, 8, 1, renderer))
    ]
    return found


def _ask(engine: Engine, prompts: list[Prompt]) -> dict[str, Any]:
    batches = engine.batches(prompts)
    answers = dict(engine.generate(batches, Sampling(16)))
    choices = dict(engine.choice_probabilities(batches, "Score:", ["1", "2", "3"]))
    return {
        each.id: [answers[each.id][0].text, answers[each.id][0].tokens, choices[each.id]]
        for each in prompts
    }


def _sample(engine: Engine, prompts: list[Prompt]) -> dict[str, list[str]]:
    sampling = Sampling(16, 0.7, 0.95, 2)
    drawn = engine.generate(engine.batches(prompts), sampling)
    return {name: [answer.text for answer in answers] for name, answers in drawn}


def killed(folder: Path) -> None:
    """Kill this process when the second part of a shard is stored."""
    work._ROWS_PER_PART = 2
    add = FinishedRows.add

    def add_and_die(self: FinishedRows, kind: str, rows: Any) -> None:
        add(self, kind, rows)
        if self._count == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    FinishedRows.add = add_and_die  # type: ignore[method-assign]
    _pipeline(folder, "killed", 2).run_shard(get_stage("candidates"), Shard(0, 2))


def shards(folder: Path) -> dict[str, Any]:
    """Run candidates undivided, with 2 and 5 shards, and after the kill."""
    found = {}
    for name, count in (("whole", 1), ("two", 2), ("five", 5), ("killed", 2)):
        pipeline = _pipeline(folder, name, count)
        stage = get_stage("candidates")
        if count == 1:
            pipeline.run(stage)
        for index in reversed(range(count)) if count > 1 else ():
            pipeline.run_shard(stage, Shard(index, count))
        manifest = pipeline.artifact(stage).manifest()
        found[name] = manifest and manifest.digest
    return found


def _pipeline(folder: Path, name: str, count: int) -> Pipeline:
    tree = yaml.safe_load((folder / "run.yaml").read_text())
    tree["cluster"]["store"] = f"file://{folder / name}"
    for stage in ("candidates", "judge"):
        tree["resources"][stage] |= {"engine": "vllm", "shards": count}
    return Pipeline.open(validate(tree))


if __name__ == "__main__":
    program = {"engines": engines, "killed": killed, "shards": shards}[sys.argv[1]]
    result = program(Path(sys.argv[2]))  # vLLM writes its log to stdout
    Path(sys.argv[2], "result.json").write_text(json.dumps(result))
    signals.install()
    os.kill(os.getpid(), signal.SIGTERM)
