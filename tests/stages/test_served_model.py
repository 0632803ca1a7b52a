"""The exported model, read by plain transformers, answers as the evaluated one did."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medjob.config import RunFile
from medjob.config.load import merge, validate
from medjob.config.train import LoraParams
from medjob.data.render import Conversation, Renderer
from medjob.errors import DataError
from medjob.generate.protocol import Prompt, Sampling
from medjob.generate.transformers_engine import TransformersEngine
from medjob.sources.locations import Location
from medjob.stage import RowContext, StageContext
from medjob.stages import export
from medjob.train.adapters import add_adapter
from medjob.train.model import ModelSpec, load_model, load_policy, load_tokenizer
from tests.support.architectures import gemma3_config

QUESTIONS = ["A man has chest pain. What is it?", "What helps against gout (38.5 °C)?"]
SYSTEM = 'You\'re a "doctor".\nAnswer {briefly}.'
PROMPTS: dict[str, dict[str, Any]] = {
    "chat template": {},
    "system message": {"system": SYSTEM},
    "raw prompt": {"template": "Question: {question}\nAnswer:"},
}


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """As Qwen2.5: the tokenizer and the configuration name another end token than the template, and
    there are sampling defaults."""
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    sampling = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.3, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **sampling}))
    return folder


def trained(base: Path, folder: Path) -> Path:
    """An adapter with random weights, as `sft` publishes it."""
    spec = ModelSpec(Location.of_folder(base), False, "float32", "auto")
    model = add_adapter(load_model(spec), LoraParams(r=2), 0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def exported(run_file: RunFile, base: Path, adapter: Path, folder: Path) -> Path:
    folder.mkdir()
    context: RowContext = StageContext(
        run=run_file.run,
        resources=run_file.resources.export,
        locations={run_file.run.base_model.key: Location.of_folder(base)},
        inputs={"sft": adapter},
        output=folder,
        work=folder,
        report_to=(),
        tensorboard=folder,
        extras=None,  # type: ignore[arg-type]
    )
    export.run(context)
    return folder


def settings(base: Path, **run: Any) -> dict[str, Any]:
    return {
        "run": {"base_model": str(base), "dtype": "float32", "export": {"source": "sft"}, **run}
    }


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_export_answers_as_the_evaluated_model(
    make_run_file: Callable[..., RunFile], base: Path, tmp_path: Path, prompt: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_file = make_run_file(settings(base, prompt={"style": "plain", **prompt}))
    adapter = trained(base, tmp_path / "adapter")
    folder = exported(run_file, base, adapter, tmp_path / "export")

    location = Location.of_folder(base)
    tokenizer = load_tokenizer(location)
    renderer = Renderer(tokenizer, run_file.run.prompt)
    policy = load_policy(ModelSpec.base_of(run_file.run, location), adapter)
    engine = TransformersEngine(policy, tokenizer, 4, 0, renderer)
    ids = renderer.prompt_ids([Conversation(question) for question in QUESTIONS])
    drawn = engine.generate([[Prompt("id", each)] for each in ids], Sampling(max_new_tokens=24))
    evaluated = [answer for _, (answer,) in drawn]

    served, its_tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    for question, prompt_ids, answer in zip(QUESTIONS, ids, evaluated, strict=True):
        inputs = its_tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert inputs["input_ids"][0].tolist() == prompt_ids
        output = served.generate(**inputs, max_new_tokens=24)[0, len(prompt_ids) :]
        assert its_tokenizer.decode(output, skip_special_tokens=True).strip() == answer.text
    stops = json.loads((folder / "generation_config.json").read_text())
    template_ends = prompt.get("template") is None
    assert stops["eos_token_id"] == ([0, 2] if template_ends else [0])
    assert not {"do_sample", "temperature", "repetition_penalty", "top_k"} & set(stops)


def test_tied_weights_stay_tied_and_the_dtype_is_the_run_s(
    make_run_file: Callable[..., RunFile], base: Path, tmp_path: Path
) -> None:
    model = load_model(ModelSpec(Location.of_folder(base), False, "float32", "auto"))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    run_file = make_run_file(settings(base, dtype="bfloat16"))
    folder = exported(run_file, base, trained(base, tmp_path / "adapter"), tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    reloaded = load_model(ModelSpec(Location.of_folder(folder), False, "bfloat16", "auto"))
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_multimodal_base_is_exported_whole(
    make_run_file: Callable[..., RunFile], base: Path, tmp_path: Path
) -> None:
    from transformers import Gemma3ForConditionalGeneration

    config = gemma3_config()
    config.text_config.vocab_size = 432
    (base / "model.safetensors").unlink()
    Gemma3ForConditionalGeneration(config).save_pretrained(base)
    (base / "preprocessor_config.json").write_text(
        '{"image_processor_type": "Gemma3ImageProcessor"}'
    )
    run_file = make_run_file(settings(base))
    folder = exported(run_file, base, trained(base, tmp_path / "adapter"), tmp_path / "export")
    before, after = (load_file(path / "model.safetensors") for path in (base, folder))
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("language_model" in name for name in changed)
    assert "Gemma3ImageProcessor" in (folder / "preprocessor_config.json").read_text()


def test_weights_that_overflow_are_not_exported(
    make_run_file: Callable[..., RunFile], base: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    adapter = trained(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    huge = {name: value * 1e30 for name, value in load_file(path).items()}
    save_file(huge, path, metadata={"format": "pt"})
    run_file = make_run_file(settings(base))
    with pytest.raises(DataError, match="export: cannot merge the adapter"):
        exported(run_file, base, adapter, tmp_path / "export")


def test_the_prompt_is_part_of_the_export_s_key(tree: dict[str, Any]) -> None:
    from medjob.stage import get_stage, select

    reads = get_stage("export").reads
    runs = [validate(merge(tree, {"run": {"prompt": {"system": each}}})).run for each in ("a", "b")]
    assert select(runs[0], reads).prompt != select(runs[1], reads).prompt
