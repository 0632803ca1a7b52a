"""The model and rows of bench.train: a Llama with random weights, random rows of real lengths."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

LENGTHS = Path(__file__).with_name("token_lengths.json")
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "flash_attn",
    "liger_kernel",
    "unsloth",
)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH_ROWS = 8
"""Rows per optimizer step. Notebooks use one row, accumulated 8 times."""
SEED = 0
SPECIAL = ("<|endoftext|>", "<|pad|>")
SHARD_BYTES = 4e9
COMMON = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "dtype": "bfloat16"}
LLAMA_8B = COMMON | {  # Llama 3.1 8B
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
TINY = LLAMA_8B | {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Plan:
    """What to measure, and where the files are."""

    device: str
    """Torch's name of the GPU; `cpu` without one."""
    machine: str
    versions: dict[str, str | None]
    sizes: dict[str, Any]
    max_length: int
    shortened: int
    """Divisor of the rows' lengths."""
    mean_length: float
    batch_rows: int
    packed_rows: int
    """Packed rows of `max_length` tokens with about as many tokens as `batch_rows` rows. Without
    packing, `batch_rows`."""
    warmup: int
    steps: int
    """Counted optimizer steps, after the warm-up."""
    folder: str

    @property
    def total_steps(self) -> int:
        return self.warmup + self.steps

    @property
    def model(self) -> Path:
        return (
            Path(self.folder)
            / f"llama-{self.sizes['hidden_size']}x{self.sizes['num_hidden_layers']}"
        )

    @property
    def rows(self) -> Path:
        """Directory of train.parquet and validation.parquet, as the stage `prepare` writes them."""
        return Path(self.folder) / "rows"

    @classmethod
    def read(cls, folder: Path) -> Plan:
        return cls(**json.loads((folder / "plan.json").read_text()))

    def write(self) -> None:
        (Path(self.folder) / "plan.json").write_text(json.dumps(asdict(self), indent=1))


def prepare(folder: Path, steps: int | None) -> None:
    """Choose what to measure on this machine, and create the model and the rows."""
    import torch

    gpu = torch.cuda.is_available()
    max_length, shortened = (2048, 1) if gpu else (256, 8)
    lengths = shorten(read_lengths(), shortened, max_length)
    versions: dict[str, str | None] = {"python": platform.python_version()}
    mean = sum(total for _, total in lengths) / len(lengths)
    plan = Plan(
        device=torch.cuda.get_device_name() if gpu else "cpu",
        machine=f"{_processor()}, torch threads: {torch.get_num_threads()}",
        versions=versions | {name: version(name) for name in PACKAGES},
        sizes=LLAMA_8B if gpu else TINY,
        max_length=max_length,
        shortened=shortened,
        mean_length=mean,
        batch_rows=BATCH_ROWS,
        packed_rows=max(1, round(BATCH_ROWS * mean / max_length)) if gpu else BATCH_ROWS,
        warmup=5 if gpu else 1,
        steps=steps or (25 if gpu else 8),
        folder=str(folder.resolve()),
    )
    build_model(plan.model, plan.sizes, "cuda" if gpu else "cpu")
    # A quarter more rows than needed, so that no variant has a short step at an epoch's end.
    rows = make_rows(
        lengths, math.ceil(1.25 * plan.total_steps * BATCH_ROWS), plan.sizes["vocab_size"]
    )
    write_rows(plan.rows, rows)
    plan.write()


def read_lengths() -> list[tuple[int, int]]:
    """Lengths of real rows in tokens: the prompt, and prompt and answer together."""
    return [(prompt, total) for prompt, total in json.loads(LENGTHS.read_text())["rows"]]


def shorten(lengths: Sequence[tuple[int, int]], by: int, max_length: int) -> list[tuple[int, int]]:
    """Divide all lengths by `by`. Rows over `max_length` are left out, as medjob does."""
    short = [(max(1, prompt // by), max(2, total // by)) for prompt, total in lengths]
    return [(prompt, total) for prompt, total in short if total <= max_length]


def make_rows(lengths: Sequence[tuple[int, int]], count: int, vocab: int) -> list[dict[str, Any]]:
    """Make `count` rows of random tokens, cycling through `lengths`.

    The tokens have no text, because the tokenizer knows none of them: their completion is empty.
    """
    import numpy as np

    draw = np.random.default_rng(SEED)
    rows = []
    for number in range(count):
        prompt, total = lengths[number % len(lengths)]
        rows.append(
            {
                "completion": "",
                "prompt_tokens": prompt,
                "completion_mask": [0] * prompt + [1] * (total - prompt),
                "is_last": True,
                "input_ids": draw.integers(len(SPECIAL), vocab, total).tolist(),
            }
        )
    return rows


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the files of the stage `prepare`, without validation rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from medjob.data.prompts import TRAIN_SCHEMA

    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", list(rows)), ("validation", [])):
        pq.write_table(pa.Table.from_pylist(chosen, TRAIN_SCHEMA), folder / f"{name}.parquet")


def build_model(folder: Path, sizes: dict[str, Any], device: str) -> None:
    """Write a Llama with random bfloat16 weights, unless it exists. Holds one shard in memory."""
    if folder.is_dir():
        return
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config).state_dict()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(SEED)
    index: dict[str, str] = {}
    for number, names in enumerate(
        _shards({name: 2 * tensor.numel() for name, tensor in empty.items()})
    ):
        shard = {}
        for name in names:
            weight = torch.ones(empty[name].shape, dtype=torch.bfloat16, device=device)
            shard[name] = (
                weight
                if name.endswith("norm.weight")
                else weight.normal_(0, 0.02, generator=generator)
            ).cpu()
        file = f"model-{number:05d}.safetensors"
        save_file(shard, partial / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (partial / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(partial)
    _tokenizer().save_pretrained(partial)
    partial.rename(folder)


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Group the names into shards of at most SHARD_BYTES."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > SHARD_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _tokenizer() -> Any:
    """A tokenizer with special tokens only, because rows are tokenized already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel(
            {token: number for number, token in enumerate(SPECIAL)}, unk_token=SPECIAL[0]
        )
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=SPECIAL[0], pad_token=SPECIAL[1]
    )


def version(package: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
