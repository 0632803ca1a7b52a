"""Load run files and `--set` options. Later files override earlier ones, and `--set` overrides all."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from medjob.config.base import NAME_PATTERN, Strict, is_union, keys_of, nested_model
from medjob.config.cluster import DIGEST_PATTERN, QUANTITY_PATTERN, Cluster
from medjob.config.run_file import RunFile
from medjob.config.store import URI_PATTERN, StoreRef
from medjob.errors import ConfigError

_PATTERN_HINTS = {
    NAME_PATTERN: "use lower-case letters, digits, dots and hyphens",
    QUANTITY_PATTERN: "use a Kubernetes quantity such as 4, 500m or 16Gi",
    DIGEST_PATTERN: "use sha256: and 64 hexadecimal digits",
    URI_PATTERN: "use file://FOLDER, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
}
_COMPARISONS = {
    "greater_than": ">",
    "greater_than_equal": ">=",
    "less_than": "<",
    "less_than_equal": "<=",
}
_NAMES_NO_INPUT = ("missing", "extra_forbidden", "value_error")

Tree = dict[str, Any]
M = TypeVar("M", bound=BaseModel)


def load_run_file(files: Sequence[Path], sets: Sequence[str] = ()) -> RunFile:
    """Merge `files` in order and then `sets` of the form `a.b=c`. Maps are merged, lists replaced.

    Raises:
        ConfigError: The message names the key and the value, the hint a correction if there is one.
    """
    tree: Tree = {}
    for file in files:
        tree = merge(tree, read_yaml(file))
    for text in sets:
        tree = merge(tree, parse_set(text))
    return validate(tree)


def store_ref(uri: str, sets: Sequence[str] = ()) -> StoreRef:
    """The store at `uri`, with options such as `cluster.store.endpoint=http://localhost:9000`.

    Raises:
        ConfigError: As in `load_run_file`.
    """
    tree: Tree = {"cluster": {"store": uri}}
    for text in sets:
        tree = merge(tree, parse_set(text))
    return _validated(_OnlyStore, tree).cluster.store


def validate(tree: Tree) -> RunFile:
    """Validate a plain tree and report all its errors at once."""
    return _validated(RunFile, tree)


def _validated(model: type[M], tree: Tree) -> M:
    try:
        return model.model_validate(tree, by_alias=True, by_name=False)
    except ValidationError as error:
        errors = error.errors()
        hints = [hint for hint in map(_hint, errors) if hint]
        message = "\nerror: ".join(_messages(errors))
        raise ConfigError(message, hints[0] if hints else "") from None


class _OnlyStore(Strict):
    cluster: Cluster


def merge(below: Tree, above: Tree) -> Tree:
    """Merge `above` into `below`. Maps are merged recursively, other values are replaced.

    A store given as a plain URI keeps it when `above` sets options of the store.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if key == "store" and isinstance(old, str):
            old = {"uri": old}
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def read_yaml(path: Path) -> Tree:
    """Read a YAML file that contains a map."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "`ls jobs/*.yaml` lists the run files") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the file: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a map with the key `run` (got {type(tree).__name__})")
    return tree


def parse_set(text: str) -> Tree:
    """Turn `a.b=c` into `{a: {b: c}}`. The value is parsed as YAML, as in a file."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {text}: must have the form a.b=value")
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {text}: the value is invalid YAML: {' '.join(str(error).split())}"
        ) from None
    for key in reversed(path.split(".")):
        tree = {key: tree}
    return dict(tree)


def _messages(errors: Sequence[ErrorDetails]) -> list[str]:
    """One message per key. pydantic reports each alternative of a union; they are joined by "or"."""
    problems: dict[str, list[str]] = {}
    inputs: dict[str, str] = {}
    for error in errors:
        path = _path(error["loc"])
        problems.setdefault(path, []).append(_problem(error))
        if error["type"] not in _NAMES_NO_INPUT:
            inputs[path] = f" (got {error['input']!r})"
    messages = []
    for path, texts in problems.items():
        alternatives = [text.removeprefix("must be ") for text in texts[1:]]
        text = " or ".join([texts[0], *alternatives])
        messages.append(f"{path}: {text}{inputs.get(path, '')}".removeprefix(": "))
    return messages


def _path(location: Sequence[int | str]) -> str:
    """The dotted key of an error, without pydantic's names for map keys and union alternatives."""
    parts = list(location)
    if parts and (parts[-1] == "[key]" or _is_alternative(parts)):
        parts.pop()
    return ".".join(map(str, parts))


def _is_alternative(location: Sequence[int | str]) -> bool:
    """Whether the last part is pydantic's name for an alternative, such as `literal['auto']`."""
    parent = _annotation_at(location[:-1])
    is_union_of_scalars = is_union(parent) and nested_model(parent) is None
    return is_union_of_scalars and isinstance(location[-1], str)


def _problem(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            return "unknown key"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal" as comparison:
            limit = next(iter(context.values()))
            return f"must be {_COMPARISONS[comparison]} {limit:g}"
        case "literal_error":
            return f"must be {context['expected']}"
        case "model_type" | "dict_type":
            takes_string = context.get("class_name") in ("ModelRef", "StoreRef")
            return "must be a string or a map" if takes_string else "must be a map"
        case "string_pattern_mismatch" if context["pattern"] == URI_PATTERN:
            return "must be a URI with a scheme"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case "value_error":
            return str(context["error"])
        case _:
            message = re.sub(r"^\w+ should ", "must ", error["msg"])
            message = re.sub(r"( after validation|, unable).*", "", message)
            return message[:1].lower() + message[1:]


def _hint(error: ErrorDetails) -> str:
    match error["type"]:
        case "extra_forbidden":
            return _suggest(error["loc"])
        case "string_pattern_mismatch":
            return _PATTERN_HINTS.get(error["ctx"]["pattern"], "")
        case _:
            return ""


def _suggest(location: Sequence[int | str]) -> str:
    """Name the known key closest to an unknown one, or all known keys if none is close."""
    known = _keys_at(location[:-1])
    by_letters = {_letters(key): key for key in known}
    close = difflib.get_close_matches(_letters(str(location[-1])), by_letters, n=1)
    if close:
        return f"did you mean {by_letters[close[0]]}?"
    return f"known keys: {', '.join(known)}" if known else ""


def _letters(key: str) -> str:
    """The key without underscores and capitals, so that snake_case and camelCase compare equal."""
    return key.replace("_", "").lower()


def _keys_at(location: Sequence[int | str]) -> list[str]:
    model = nested_model(_annotation_at(location))
    return list(keys_of(model)) if model else []


def _annotation_at(location: Sequence[int | str]) -> Any:
    annotation: Any = RunFile
    for part in location:
        annotation = _annotation_below(annotation, part)
    return annotation


def _annotation_below(annotation: Any, part: int | str) -> Any:
    """The type of a model's field, of an item of a list, or of a value of a map."""
    model = nested_model(annotation)
    if model is None:
        arguments = get_args(annotation)
        return arguments[-1] if arguments else None
    field = keys_of(model).get(str(part))
    return field.annotation if field else None
