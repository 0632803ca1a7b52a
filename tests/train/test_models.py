"""Model folders that are damaged or do not fit together are refused with the folder's name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medjob.config.train import LoraParams
from medjob.errors import ConfigError, InputError, MedjobError
from medjob.sources.locations import Location
from medjob.train.adapters import add_adapter
from medjob.train.model import (
    ModelSpec,
    load_model,
    load_policy,
    load_tokenizer,
    model_directory,
)

Damage = Callable[[Path], Any]
WEIGHTS = "model.safetensors"


def spec(folder: Path) -> ModelSpec:
    return ModelSpec(Location("the/base", str(folder)), False, "float32", "auto")


def tokenizer(folder: Path) -> Any:
    return load_tokenizer(spec(folder).location)


def write(name: str, content: str | bytes) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, size: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def remove(pattern: str) -> Damage:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def change(name: str, **values: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return damage


def config(**values: Any) -> Damage:
    return change("config.json", **values)


def tokens(**values: Any) -> Damage:
    return change("tokenizer_config.json", **values)


def weights(edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / WEIGHTS
        save_file(edit(load_file(path)), path, metadata={"format": "pt"})

    return damage


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in sorted(tensors)[::2]}


def one_layer_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    third = {name.replace("layers.1", "layers.2"): value.clone() for name, value in tensors.items()}
    return tensors | third


def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"lm_head.weight": tensors["lm_head.weight"] * float("nan")}


def index(content: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(content)

    return damage


def shard_elsewhere(folder: Path) -> None:
    names = sorted(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder.parent / "other.safetensors")
    files = dict.fromkeys(names, "../other.safetensors")
    content = json.dumps({"metadata": {}, "weight_map": files})
    (folder / f"{WEIGHTS}.index.json").write_text(content)


def absent_shard(folder: Path) -> None:
    names = sorted(load_file(folder / WEIGHTS))
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    index(json.dumps({"metadata": {}, "weight_map": files}))(folder)


BROKEN_MODELS: dict[str, tuple[Damage, str]] = {
    "tensors missing": (
        weights(half),
        r"are not in its files: model.* and \d+ more \(\d+ in total\)",
    ),
    "a bias too many": (
        weights(lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}),
        "does not have: model.layers.0.self_attn.q_proj.bias",
    ),
    "a layer too many": (
        weights(one_layer_more),
        r"layers.2.input_layernorm.weight.*\(9 in total\)",
    ),
    "other names": (weights(lambda t: {f"x.{k}": v for k, v in t.items()}), "not in its files"),
    "another width": (config(intermediate_size=100), "shape of tensors .*mlp.down_proj.weight"),
    "another vocabulary": (
        config(vocab_size=500),
        "shape of .*: lm_head.weight, model.embed_tokens",
    ),
    "one layer less": (config(num_hidden_layers=1), "does not have: model.layers.1"),
    "another architecture": (config(model_type="qwen2"), "k_proj.bias"),
    "weights are NaN": (weights(with_nan), "NaN or infinite: lm_head.weight"),
    "cut in half": (cut(WEIGHTS, 50_000), "incomplete metadata"),
    "cut in the header": (cut(WEIGHTS, 100), "header"),
    "empty": (write(WEIGHTS, ""), "header too small"),
    "a page of HTML": (write(WEIGHTS, "<html>404</html>" * 100), "header"),
    "a pointer of Git LFS": (
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "Git LFS pointers instead of files: model.safetensors",
    ),
    "no weights": (remove(WEIGHTS), "no file named model.safetensors"),
    "a shard is absent": (absent_shard, "model-00002-of-00002"),
    "a shard in another folder": (
        shard_elsewhere,
        r"names files outside the model's folder: \.\./other.safetensors",
    ),
    "an index of nothing": (index("{}"), "weight_map"),
    "an index that is not JSON": (index("{"), "cannot be loaded"),
    "configuration is text": (write("config.json", "hello"), "not a valid JSON"),
    "configuration is a list": (write("config.json", "[1]"), "cannot be loaded"),
    "configuration is null": (write("config.json", "null"), "cannot be loaded"),
    "configuration is empty": (write("config.json", "{}"), "model_type"),
    "no configuration": (remove("config.json"), "model_type"),
    "a word for a number": (config(num_hidden_layers="two"), "num_hidden_layers"),
    "nothing for a number": (config(num_hidden_layers=None), "num_hidden_layers"),
    "zero heads": (config(num_attention_heads=0), "ZeroDivisionError"),
    "heads that do not divide": (config(num_attention_heads=5), "not a multiple"),
    "unknown activation": (config(hidden_act="nope"), "KeyError: 'nope'"),
    "unknown dtype": (config(dtype="nope"), "nope"),
    "unknown architecture": (config(model_type="nope"), "nope"),
    "quantization is text": (config(quantization_config="x"), "cannot be loaded"),
    "a kernel on a hub": (
        config(_attn_implementation="org/kernel:attention"),
        "names code on a hub, which medjob does not run: org/kernel:attention",
    ),
    "a kernel for a part": (
        config(_experts_implementation={"text_config": "org/kernel"}),
        "names code on a hub",
    ),
    "an encoder": (config(model_type="bert"), "'bert' is not a causal language model"),
    "an encoder and decoder": (config(model_type="bart"), "'bart' is not a causal language model"),
    "no language model": (config(model_type="clip"), "'clip' is not a causal language model"),
    "generation config is a list": (write("generation_config.json", "[]"), "cannot be loaded"),
    "an end token is a word": (
        write("generation_config.json", '{"eos_token_id": ["x"]}'),
        "eos_token_id in generation_config.json must be",
    ),
    "an adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "is a LoRA adapter, not a model",
    ),
}
BROKEN_TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "an empty map": (write("tokenizer.json", "{}"), "cannot be loaded"),
    "an empty file": (write("tokenizer.json", ""), "cannot be loaded"),
    "a list": (write("tokenizer.json", "[]"), "cannot be loaded"),
    "cut": (cut("tokenizer.json", 9000), "cannot be loaded"),
    "no vocabulary": (
        change("tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}),
        "knows no words",
    ),
    "no tokenizer": (remove("token*"), "cannot be loaded"),
    "only its configuration": (remove("tokenizer.json"), "cannot be loaded"),
    "configuration is text": (write("tokenizer_config.json", "hello"), "cannot be loaded"),
    "configuration is a list": (write("tokenizer_config.json", "[]"), "cannot be loaded"),
    "another class": (tokens(tokenizer_class="BertTokenizer"), "cannot be loaded"),
    "a class that is a number": (tokens(tokenizer_class=3), "cannot be loaded"),
    "an end token that is a number": (tokens(eos_token=3), "eos_token"),
}


def refused(load: Callable[[], Any], message: str, code: int = 66) -> None:
    with pytest.raises(MedjobError, match=message) as caught:
        load()
    assert caught.value.exit_code == code
    assert caught.value.message.startswith("the/base: ")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@pytest.mark.parametrize(("damage", "message"), BROKEN_MODELS.values(), ids=BROKEN_MODELS)
def test_broken_model_is_refused(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    refused(lambda: load_model(spec(folder)), message)


@pytest.mark.parametrize(("damage", "message"), BROKEN_TOKENIZERS.values(), ids=BROKEN_TOKENIZERS)
def test_broken_tokenizer_is_refused(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    refused(lambda: tokenizer(folder), message)


@pytest.mark.parametrize(
    "damage",
    [
        config(auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}, model_type="nope"),
        tokens(auto_map={"AutoTokenizer": ["x.T", None]}, tokenizer_class="NopeTokenizer"),
    ],
    ids=["model", "tokenizer"],
)
def test_code_of_a_model_never_runs(folder: Path, damage: Damage) -> None:
    damage(folder)
    (folder / "x.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")

    def load() -> None:
        tokenizer(folder)
        load_model(spec(folder))

    refused(load, "contains Python code, which medjob does not run")
    assert not (folder / "ran").exists()


def test_tensors_that_a_model_computes_itself_may_be_there(folder: Path) -> None:
    """Older checkpoints store rotary frequencies."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}
    weights(lambda tensors: tensors | extra)(folder)
    assert not set(extra) & set(load_model(spec(folder)).state_dict())


def test_tied_head_may_be_absent(folder: Path) -> None:
    weights(lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})(folder)
    config(tie_word_embeddings=True)(folder)
    model = load_model(spec(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_padding_and_truncation_of_the_file_are_dropped(folder: Path) -> None:
    saved = tokenizer(folder)
    saved(["one", "a longer text"], padding=True, truncation=True, max_length=4)
    saved.save_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is not None
    loaded = tokenizer(folder)
    text = "the pain of the man " * 20
    assert loaded.backend_tokenizer.truncation is loaded.backend_tokenizer.padding is None
    assert len(loaded.backend_tokenizer.encode(text).ids) > 20


def test_pad_token_is_the_end_token_unless_there_is_one(folder: Path) -> None:
    tokens(pad_token=None)(folder)
    assert tokenizer(folder).pad_token == "<|im_end|>"
    tokens(eos_token=None)(folder)
    refused(lambda: tokenizer(folder), "neither an end token nor a pad token", 64)


def test_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    add_adapter(load_model(spec(folder)), LoraParams(r=2), 0).save_pretrained(adapter)
    load_policy(spec(folder), adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)

    def refused_with(edited: dict[str, torch.Tensor], message: str) -> None:
        save_file(edited, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            load_policy(spec(folder), adapter)

    first = min(tensors)
    missing = {name: value for name, value in tensors.items() if name != first}
    refused_with(missing, "does not fit: weights of its layers are not in its file: base_model")
    refused_with(
        tensors | {first.replace("layers.0", "layers.7"): tensors[first].clone()},
        "its file holds weights of layers that the base model does not have",
    )
    refused_with(tensors | {first: torch.zeros(2, 50)}, "size mismatch")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_policy(spec(folder), adapter)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x00" * 5000])
def test_broken_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    location = Location("the/base", str(file), converted=str(tmp_path / "converted"))
    refused(lambda: model_directory(location), "cannot be loaded")
    assert not (tmp_path / "converted").exists()


def test_kernel_that_the_model_lacks_is_refused_by_name(folder: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    model = load_model(spec(folder))
    assert model.config._attn_implementation == "eager"
    location = spec(folder).location
    with pytest.raises(ConfigError, match=r"attnImplementation: the/base does not support sdpa"):
        load_model(ModelSpec(location, False, "float32", "sdpa"))
