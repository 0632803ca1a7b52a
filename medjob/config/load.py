"""Run files and `--set` to a validated Job. Precedence: defaults, files from left to right, `--set`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from medjob.config.base import Strict
from medjob.config.cluster import Cluster
from medjob.config.run_file import RunFile
from medjob.config.store import StoreRef
from medjob.errors import ConfigError

Tree = dict[str, Any]
M = TypeVar("M", bound=BaseModel)


def load_run_file(files: Sequence[Path], sets: Sequence[str] = ()) -> RunFile:
    """Merge `files` in order (maps deeply, lists replaced), then `sets` of the form `a.b=c`.

    Raises:
        ConfigError: naming the key, the value and, where one is known, what to write instead.
    """
    tree: Tree = {}
    for file in files:
        tree = merge(tree, read_yaml(file))
    for text in sets:
        tree = merge(tree, parse_set(text))
    return validate(tree)


def store_ref(uri: str, sets: Sequence[str] = ()) -> StoreRef:
    """The store at `uri`, with options from `sets` such as `cluster.store.endpoint=http://localhost:9000`.

    Raises:
        ConfigError: as in `load_job`; also for a setting that is none of the store's.
    """
    tree: Tree = {"cluster": {"store": uri}}
    for text in sets:
        tree = merge(tree, parse_set(text))
    return _validated(_OnlyStore, tree).cluster.store


def validate(tree: Tree) -> RunFile:
    """Make a Job of a plain tree; all its errors at once."""
    return _validated(RunFile, tree)


def _validated(model: type[M], tree: Tree) -> M:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        messages = [explain(details) for details in error.errors()]
        raise ConfigError(
            "\nerror: ".join(m for m, _ in messages), next((h for _, h in messages if h), "")
        ) from None


class _OnlyStore(Strict):
    cluster: Cluster


def merge(below: Tree, above: Tree) -> Tree:
    """Lay `above` over `below`: maps deeply, everything else replaced. An option laid over a store's URI keeps the URI."""
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
    """Read one file that must hold a map."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file", "run files are in jobs/; `ls jobs/*.yaml` lists them"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a map with `run` in it (got {type(tree).__name__})")
    return tree


def parse_set(text: str) -> Tree:
    """`a.b=c` to `{a: {b: c}}`; the value is read as YAML, so `[1, 2]`, `true` and `null` mean what they mean in a file."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {text}: must have the form a.b=value")
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {text}: the value is no valid YAML: {' '.join(str(error).split())}"
        ) from None
    for key in reversed(path.split(".")):
        tree = {key: tree}
    return dict(tree)


def explain(details: ErrorDetails) -> tuple[str, str]:
    """One pydantic error as (message, hint)."""
    path = ".".join(str(part) for part in details["loc"])
    context = details.get("ctx", {})
    match details["type"]:
        case "missing":
            return f"{path}: is required", ""
        case "extra_forbidden":
            return f"{path}: is no known key", _nearest(details["loc"])
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            sign = {
                "greater_than": ">",
                "greater_than_equal": ">=",
                "less_than": "<",
                "less_than_equal": "<=",
            }[details["type"]]
            limit = next(iter(context.values()))
            return f"{path}: must be {sign} {limit:g} (got {details['input']!r})", ""
        case "literal_error":
            return f"{path}: must be {context['expected']} (got {details['input']!r})", ""
        case "string_pattern_mismatch" if path == "cluster.store.uri":
            return (
                f"{path}: must be a URI with a scheme (got {details['input']!r})",
                "file://FOLDER, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
            )
        case "string_pattern_mismatch":
            return (
                f"{path}: must match {context['pattern']} (got {details['input']!r})",
                "lower-case letters, digits, dots and hyphens",
            )
        case "value_error":
            return f"{path}: {context['error']}".removeprefix(": "), ""
        case _:
            message = details["msg"][:1].lower() + details["msg"][1:]
            return f"{path}: {message} (got {details['input']!r})".removeprefix(": "), ""


def _nearest(location: Sequence[int | str]) -> str:
    """The known keys beside an unknown one, nearest first."""
    fields = _fields_at(RunFile, location[:-1])
    close = difflib.get_close_matches(str(location[-1]), fields, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known keys: {', '.join(fields)}" if fields else ""


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        found = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        nested = _model_in(found.annotation) if found else None
        if found is not None and nested is None:
            return []
        model = nested or model
    return [f.alias or name for name, f in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Model`, `Model | None` or `list[Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, getattr(annotation, "__args__", ()))), None)
