"""The trainings that bench.train compares, each in a separate process."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

from bench.train_setup import MODULES, SEED, Plan

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": MODULES}
OPTIMIZER = {"optim": "adamw_torch_fused", "learning_rate": 2e-4}


def run(name: str, plan: Plan) -> dict[str, Any]:
    """Train one variant and return its measurements."""
    work = Path(plan.folder) / "work" / name
    work.mkdir(parents=True)
    match name:
        case "recipe":
            return _recipe(plan, work)
        case "unsloth":
            return _unsloth(plan, work)
        case _:
            return _medjob(plan, work, "lora" if name == "medjob-bf16" else "qlora")


def _recipe(plan: Plan, work: Path) -> dict[str, Any]:
    """The usual notebook: TRL with its defaults, an NF4 base, one row at a time."""
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    lora = LoraConfig(**LORA, task_type="CAUSAL_LM")
    model = {"model": str(plan.model), "quantization_config": nf4, "peft_config": lora}
    return _trl(plan, work, model, rows=1, model_init_kwargs={"dtype": "bfloat16"})


def _unsloth(plan: Plan, work: Path) -> dict[str, Any]:
    """Unsloth's notebook: two rows at a time, its own kernels and activation checkpointing."""
    fast = importlib.import_module("unsloth").FastLanguageModel  # before trl, which it patches
    model, tokenizer = fast.from_pretrained(
        str(plan.model), max_seq_length=plan.max_length, load_in_4bit=True
    )
    model = fast.get_peft_model(
        model, **LORA, use_gradient_checkpointing="unsloth", random_state=SEED
    )
    return _trl(plan, work, {"model": model, "processing_class": tokenizer}, rows=2)


def _trl(
    plan: Plan, work: Path, model: dict[str, Any], rows: int, **settings: Any
) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from bench.train_meter import StepCallback, Window

    config = SFTConfig(
        output_dir=str(work),
        max_length=plan.max_length,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=plan.batch_rows // rows,
        max_steps=plan.total_steps,
        **OPTIMIZER,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
        use_cpu=not torch.cuda.is_available(),
        **settings,
    )
    window = Window(plan)
    data = Dataset.from_parquet(str(plan.rows / "train.parquet"), cache_dir=str(work / "cache"))
    data = data.map(_labelled, remove_columns=data.column_names)
    trainer = SFTTrainer(args=config, train_dataset=data, callbacks=[StepCallback(window)], **model)
    trainer.train()
    return window.result(trainer.state.log_history, *_rates(plan, "qlora"))


def _labelled(row: dict[str, Any]) -> dict[str, list[int]]:
    ids, prompt = row["input_ids"], row["prompt_tokens"]
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def _medjob(plan: Plan, work: Path, method: str) -> dict[str, Any]:
    """The stage `sft` as `medjob run` calls it, with its `auto` settings."""
    from bench.train_meter import MeterLink, Window
    from medjob.config.load import validate
    from medjob.sources.locations import Location
    from medjob.stage import StageContext, TrainingExtras, get_stage, select

    steps = {"max_steps": plan.total_steps, "save_steps": plan.total_steps}
    sft = OPTIMIZER | steps | {"global_batch_size": plan.packed_rows, "max_length": plan.max_length}
    run = {
        "name": "bench",
        "base_model": str(plan.model),
        "method": method,
        "seed": SEED,
        "lora": LORA,
        "sft": sft,
    }
    run_file = validate({"run": run | {"prepare": {"sources": [{"path": "none.jsonl"}]}}})
    stage = get_stage("sft")
    window = Window(plan)
    log = _LogLines()
    logging.getLogger("medjob").setLevel(logging.INFO)
    logging.getLogger("medjob").addHandler(log)
    folders = {name: work / name for name in ("output", "work", "tensorboard")}
    for folder in folders.values():
        folder.mkdir()
    stage.entry()(
        StageContext(
            run=select(run_file.run, stage.reads),
            resources=run_file.resources.sft,
            locations={str(plan.model): Location.of_folder(plan.model)},
            inputs={"prepare": plan.rows},
            report_to=(),
            extras=TrainingExtras(MeterLink(window)),
            **folders,
        )
    )
    checkpoint = work / "work" / "trainer" / f"checkpoint-{plan.total_steps}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return window.result(state["log_history"], *_rates(plan, method)) | {"said": log.lines}


class _LogLines(logging.Handler):
    """Collects the stage's log: the strategy it chose, and whether fused kernels are used."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _rates(plan: Plan, method: Any) -> tuple[float, float | None]:
    """Model FLOPs per token, and the device's peak. Packed rows count with their own length."""
    from medjob.plan import gpus
    from medjob.plan.shape import ModelShape

    shape = ModelShape.from_config({"model_type": "llama"} | plan.sizes)
    gpu = gpus.find(plan.device)
    flops = shape.training_flops_per_token(method, plan.mean_length)
    return flops, gpu.peak_tflops * 1e12 if gpu and gpu.peak_tflops else None
