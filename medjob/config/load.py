"""Load run files and `--set`. Later files override earlier ones, and `--set` overrides files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from medjob.config.base import ADAPTER_CONFIG, Strict, is_hub_id
from medjob.config.cluster import Cluster
from medjob.config.messages import config_error
from medjob.config.run_file import RunFile
from medjob.config.store import StoreRef
from medjob.errors import ConfigError, InputError

_MAX_BYTES = 10_000_000
_MAX_VALUES = 100_000  # each alias counts as the values that it repeats
_MAX_DEPTH = 50

Tree = dict[str, Any]
M = TypeVar("M", bound=BaseModel)
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


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
    return validate(_with_base_of_adapter(tree))


def _with_base_of_adapter(tree: Tree) -> Tree:
    """Replace the directory of an adapter in `run.base_model` by its base, and name the directory
    in `run.adapter`.

    Raises:
        ConfigError: the adapter does not say of which model it is.
    """
    run = tree.get("run")
    model = run.get("base_model") if isinstance(run, dict) else None
    folder = model.get("id") if isinstance(model, dict) else model
    if not isinstance(run, dict) or not isinstance(folder, str) or not _is_adapter(folder):
        return tree
    base, revision = _base_of(Path(folder).expanduser() / ADAPTER_CONFIG)
    if run.get("adapter"):
        raise ConfigError(
            f"run.base_model: {folder} is a LoRA adapter, and run.adapter names another one",
            f"set run.base_model={base or 'the model that it adapts'}, and keep one adapter",
        )
    if not base or not _may_be_model(base):
        named = f"names {base}, which is not there" if base else "does not name its base model"
        raise ConfigError(
            f"run.base_model: {folder} is a LoRA adapter, and its {ADAPTER_CONFIG} {named}",
            f"set run.adapter={folder}, and run.base_model to the model that it adapts",
        )
    reference = {"id": base, "revision": revision} if revision else base
    return {**tree, "run": {**run, "base_model": reference, "adapter": folder}}


def _is_adapter(name: str) -> bool:
    if "\0" in name:  # validation refuses it
        return False
    folder = Path(name).expanduser()
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def _may_be_model(name: str) -> bool:
    """Whether the base that an adapter names can be found: a directory that is here and no adapter
    itself, or something that is elsewhere."""
    if Path(name).expanduser().is_dir():
        return not _is_adapter(name)
    return is_hub_id(name) or ":" in name


def _base_of(config: Path) -> tuple[str | None, str | None]:
    try:
        values = json.loads(config.read_bytes())
        return values.get("base_model_name_or_path"), values.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"run.base_model: {config}: cannot be read: {error}") from None


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
    _check_tree(tree)
    try:
        return model.model_validate(tree, by_alias=True, by_name=False)
    except ValidationError as error:
        raise config_error(error) from None


def _check_tree(tree: Tree) -> None:
    """Refuse what YAML can express and no run file means.

    Raises:
        ConfigError: aliases or maps that expand to a gigantic tree, or text that no file system, no
            environment variable and no UTF-8 file can hold.
    """
    left: list[tuple[str, Any, int]] = [("", tree, 0)]
    seen = 0
    while left:
        key, value, depth = left.pop()
        seen += 1
        if seen > _MAX_VALUES or depth > _MAX_DEPTH:
            raise ConfigError(
                f"{key[:100]}: a run file has at most {_MAX_VALUES:,} values, nested at most "
                f"{_MAX_DEPTH} deep (aliases count as often as they are used)"
            )
        if isinstance(value, dict):
            left += [(f"{key}.{name}".removeprefix("."), name, depth) for name in value]
            left += [
                (f"{key}.{name}".removeprefix("."), each, depth + 1) for name, each in value.items()
            ]
        elif isinstance(value, list):
            left += [(f"{key}.{index}", each, depth + 1) for index, each in enumerate(value)]
        elif isinstance(value, str) and _UNUSABLE.search(value):
            raise ConfigError(
                f"{key}: contains a NUL character or half of a surrogate pair",
                "remove the escape sequence (\\0, \\u0000 or \\ud800 to \\udfff)",
            )


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
        tree = _parse(_read(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "`ls jobs/*.yaml` lists the run files") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the file: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a map with the key `run` (got {type(tree).__name__})")
    return tree


def _read(path: Path) -> str:
    """Read a run file. A pipe works as well, such as `-f <(envsubst < run.yaml)`."""
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: a run file has at most {_MAX_BYTES:,} bytes")
    return data.decode()


def _parse(text: str) -> Any:
    """Parse YAML whose maps have every key once. PyYAML would keep the last value silently.

    Raises:
        yaml.YAMLError: the text is not YAML, or a key is set twice.
        ValueError: a date or number does not exist, such as 2026-13-01.
        RecursionError: the text is nested too deeply.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        _refuse_repeated_keys(root, "", set())
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _refuse_repeated_keys(node: yaml.Node | None, prefix: str, seen: set[int]) -> None:
    """Check the maps below `node`, whose keys start with `prefix`. Aliases repeat nodes."""
    if isinstance(node, yaml.ScalarNode) or node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _refuse_repeated_keys(item, f"{prefix}{index}.", seen)
        return
    first: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = str(key.value)
        other = first.setdefault(name, key)
        if other is not key and key.tag == other.tag:
            lines = f"lines {other.start_mark.line + 1} and {key.start_mark.line + 1}"
            raise yaml.YAMLError(f"the key {prefix}{name} is set twice, in {lines}")
        _refuse_repeated_keys(value, f"{prefix}{name}.", seen)


def parse_set(text: str) -> Tree:
    """Turn `a.b=c` into `{a: {b: c}}`. The value is parsed as YAML, as in a file."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {text}: must have the form a.b=value")
    try:
        tree = _parse(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--set {text}: the value is invalid YAML: {' '.join(str(error).split())}"
        ) from None
    for key in reversed(path.split(".")):
        tree = {key: tree}
    return dict(tree)
