"""Checks that a model's files are whole and fit together, and that its weights are numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from medjob.errors import ConfigError, DataError, InputError, MedjobError, translate
from medjob.sources.hub import translate_hub_error
from medjob.sources.locations import Location

_REPAIR = "copy, download or convert the model again"
_NAMES_SHOWN = 3
# Tensors of older checkpoints that current models compute themselves: causal masks, positions and
# rotary frequencies.
_COMPUTED = re.compile(r"(\.attn\.(masked_)?bias|attention\.(masked_)?bias|inv_freq|position_ids)$")
# Parts of a model that text does not pass through: additional heads for speculative decoding.
_UNUSED = re.compile(r"(^|\.)(mtp|nextn)(_|\.|$)")
# A few words in English. A tokenizer that knows none of them belongs to no language model.
_WORDS = "The patient has a fever."
_CODE = "trust_remote_code"


def load_files(load: Callable[[], Any], location: Location) -> Any:
    """Call `load`, which reads the files of a model, and translate its errors.

    Any error counts as one of the files: transformers, tokenizers, safetensors and huggingface_hub
    raise a dozen unrelated types for damaged files, and plain `Exception` for some.

    Raises:
        ConfigError: a package is missing.
        InputError: the files are damaged or do not fit together.
        RetryError: the hub cannot be reached, or memory or disk space ran out.
    """
    try:
        return load()
    except MedjobError:
        raise
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{location.name}: needs a package that is missing: {reason}") from None
    except Exception as error:
        if translate(error) is not error or isinstance(error, MemoryError) or _of_device(error):
            raise
        translated = location.on_hub and translate_hub_error(error, location.name, "model")
        if translated:
            raise translated from None
        raise InputError(*_reason(error, location)) from None


def _of_device(error: Exception) -> bool:
    """Whether the GPU or its driver failed."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("CUDA" in text or "NCCL" in text)


def _reason(error: Exception, location: Location) -> tuple[str, str]:
    """Message and hint for an error of a library."""
    text = " ".join(str(error).split())
    if _CODE in text:
        return (
            f"{location.name}: contains Python code, which medjob does not run",
            "use a model of an architecture that transformers contains",
        )
    pointers = _git_lfs_pointers(Path(location.path))
    if pointers:
        return (
            f"{location.name}: holds Git LFS pointers instead of files: {first_names(pointers)}",
            "run `git lfs pull` in the folder",
        )
    if not isinstance(error, OSError | ValueError):
        text = f"{type(error).__name__}: {text}"  # a KeyError's text, for example, is just the key
    return f"{location.name}: cannot be loaded: {text[:600]}", _REPAIR


def _git_lfs_pointers(folder: Path) -> list[str]:
    """Names of the files that `git clone` left as pointers."""
    if not folder.is_dir():
        return []
    start = b"version https://git-lfs"
    small = (path for path in folder.iterdir() if path.is_file() and path.stat().st_size < 1000)
    return [path.name for path in small if path.read_bytes().startswith(start)]


def refuse_kernels(config: Mapping[str, Any], location: Location) -> None:
    """Refuse a configuration that names kernels on a hub: transformers would download and run them.

    Raises:
        InputError: it does.
    """
    names = sorted(_kernels_in(config))
    if names:
        raise InputError(
            f"{location.name}: config.json names code on a hub, which medjob does not run: "
            f"{first_names(names)}",
            "remove the key ..._implementation from it",
        )


def _kernels_in(value: Any, implementation: bool = False) -> Iterator[str]:
    """Values with a slash below keys such as `_attn_implementation`: `org/kernel` is on a hub."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _kernels_in(each, implementation or "_implementation" in str(key))
    elif implementation and isinstance(value, str) and "/" in value:
        yield value


def check_index(folder: Path, location: Location) -> None:
    """Check that the index of a model's shards names files of its folder only.

    A file elsewhere is not covered by the model's digest, so it could change without any key.

    Raises:
        InputError: a name is a path.
    """
    for file in sorted(folder.glob("*.index.json")) if folder.is_dir() else ():
        try:
            shards = set(json.loads(file.read_text())["weight_map"].values())
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            continue  # transformers explains what is wrong with the index that it reads
        paths = [str(name) for name in shards if str(name) != Path(str(name)).name]
        if paths:
            raise InputError(
                f"{location.name}: {file.name} names files outside the model's folder: "
                f"{first_names(paths)}",
                _REPAIR,
            )


def check_tensors(info: Mapping[str, Any], location: Location) -> None:
    """Check that the files of a model hold the tensors of its architecture, and no others.

    transformers fills missing tensors with random numbers and ignores unexpected ones.

    Args:
        info: The loading information of `from_pretrained`.

    Raises:
        InputError: tensors are missing, unexpected or damaged.
    """
    errors = [*info.get("error_msgs", ()), *info.get("conversion_errors", ())]
    unexpected = {
        name
        for name in info.get("unexpected_keys", ())
        if not _COMPUTED.search(name) and not _UNUSED.search(name)
    }
    mismatched = {str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]}
    _refuse(info["missing_keys"], "has no", location)
    _refuse(mismatched, "has the wrong shape for", location)
    _refuse(unexpected, "does not use", location)
    if errors:
        reason = " ".join(str(errors[0]).split())[:300]
        raise InputError(f"{location.name}: cannot be loaded: {reason}", _REPAIR)


def _refuse(names: Collection[str], problem: str, location: Location) -> None:
    if not names:
        return
    meaning = {
        "has no": "tensors that its architecture needs are not in its files",
        "does not use": "its files hold tensors that its architecture does not have",
    }.get(problem, "the shape of tensors in its files is not the one in its config.json")
    raise InputError(f"{location.name}: {meaning}: {first_names(names)}", _REPAIR)


def first_names(names: Collection[str]) -> str:
    """The first few names, and the number of all if there are more."""
    shown = sorted(names)[:_NAMES_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more ({len(names)} in total)" if more else "")


def check_numbers(model: Any, location: Location) -> None:
    """Check that a loaded model's weights are finite, and that its end tokens are token ids.

    Under ZeRO-3 the weights are elsewhere, and only the end tokens are checked.

    Raises:
        InputError: they are not.
    """
    broken = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    if broken:
        raise InputError(
            f"{location.name}: weights are NaN or infinite: {first_names(broken)}", _REPAIR
        )
    ends = getattr(model.generation_config, "eos_token_id", None)
    for end in ends if isinstance(ends, list) else [ends]:
        if not isinstance(end, int | None):
            raise InputError(
                f"{location.name}: eos_token_id in generation_config.json must be a token id or a "
                f"list of token ids (got {ends!r})",
                "copy the model again, or correct the file",
            )


def check_adapter(model: Any, folder: Path, location: Location) -> None:
    """Check that an adapter's file holds exactly the weights that its model has.

    PEFT keeps new weights for missing ones, with a warning.

    Raises:
        InputError: weights are missing or unexpected.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    expected = set(get_peft_model_state_dict(model))
    for names, meaning in (
        (expected - stored, "weights of its layers are not in its file"),
        (stored - expected, "its file holds weights of layers that the base model does not have"),
    ):
        if names:
            raise InputError(
                f"{location.name}: the adapter does not fit: {meaning}: {first_names(names)}",
                "delete the artifact, and train again",
            )


def check_tokenizer(tokenizer: Any, location: Location) -> None:
    """Check that the tokenizer knows words and can pad. The renderer checks its chat template.

    Raises:
        InputError: its files are empty, or of another model.
        ConfigError: it has neither an end token nor a pad token.
    """
    if tokenizer.eos_token is None and tokenizer.pad_token is None:
        raise ConfigError(
            f"{location.name}: the tokenizer has neither an end token nor a pad token",
            "set eos_token in its tokenizer_config.json",
        )
    ids = load_files(lambda: tokenizer(_WORDS, add_special_tokens=False)["input_ids"], location)
    if not set(ids) - {tokenizer.unk_token_id}:
        raise InputError(f"{location.name}: the tokenizer knows no words", _REPAIR)


def check_finite(folder: Path, stage: str) -> None:
    """Check that all weights in a folder's safetensors files are finite.

    Raises:
        DataError: a tensor holds NaN or infinite numbers.
    """
    broken = [name for name, tensor in _tensors(folder) if not is_finite(tensor)]
    if broken:
        raise DataError(
            f"{stage}: weights are NaN or infinite in {first_names(broken)}; nothing is published",
            f"lower run.{stage}.learning_rate, and check the rows",
        )


def is_finite(tensor: Any) -> bool:
    """Whether all numbers in a tensor are finite. Integers and quantized weights always are."""
    return not tensor.dtype.is_floating_point or bool(tensor.isfinite().all())


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                yield name, file.get_tensor(name)
