"""Turn pydantic's validation errors into a ConfigError with the keys of the run file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from medjob.config.base import HUB_ID_PATTERN, NAME_PATTERN, is_union, keys_of, nested_model
from medjob.config.cluster import (
    DIGEST_PATTERN,
    QUANTITY_PATTERN,
    REGISTRY_PATTERN,
    RESOURCE_PATTERN,
    TAG_PATTERN,
)
from medjob.config.run_file import RunFile
from medjob.config.store import URI_PATTERN
from medjob.errors import ConfigError

_PATTERN_HINTS = {
    HUB_ID_PATTERN: "use org/name, as the hub shows it",
    NAME_PATTERN: "use lower-case letters, digits, dots and hyphens",
    QUANTITY_PATTERN: "use a Kubernetes quantity such as 4, 500m or 16Gi",
    DIGEST_PATTERN: "use sha256: and 64 hexadecimal digits",
    REGISTRY_PATTERN: "use HOST[:PORT][/PATH], such as registry.example.org/team",
    TAG_PATTERN: "use at most 128 letters, digits, underscores, dots and hyphens",
    RESOURCE_PATTERN: "use DOMAIN/NAME, such as nvidia.com/gpu",
    URI_PATTERN: "use file://FOLDER, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
}
_COMPARISONS = {
    "greater_than": ">",
    "greater_than_equal": ">=",
    "less_than": "<",
    "less_than_equal": "<=",
}
_SHOWN_CHARS = 300
_NAMES_NO_INPUT = ("missing", "extra_forbidden", "value_error")


def config_error(error: ValidationError) -> ConfigError:
    """Describe all problems of a run file. The hint belongs to the first problem that has one."""
    errors = error.errors()
    hints = [hint for hint in map(_hint, errors) if hint]
    return ConfigError("\nerror: ".join(_messages(errors)), hints[0] if hints else "")


def _messages(errors: Sequence[ErrorDetails]) -> list[str]:
    """One message per key. Alternatives of a union are separate errors; join them with "or"."""
    problems: dict[str, list[str]] = {}
    inputs: dict[str, str] = {}
    for error in errors:
        path, text = _located(_path(error["loc"]), _problem(error), error["loc"])
        problems.setdefault(path, []).append(text)
        if error["type"] not in _NAMES_NO_INPUT:
            inputs[path] = f" (got {_shown(error['input'])})"
    messages = []
    for path, texts in problems.items():
        alternatives = [text.removeprefix("must be ") for text in texts[1:]]
        text = " or ".join([texts[0], *alternatives])
        messages.append(f"{path}: {text}{inputs.get(path, '')}".removeprefix(": "))
    return messages


def _located(path: str, text: str, location: Sequence[int | str]) -> tuple[str, str]:
    """Add the key at the start of a section's own message to the path: `run` and `stages: ...` are
    `run.stages` and `...`."""
    key, colon, rest = text.partition(": ")
    if colon and path and key.split(".")[0] in _keys_at(location):
        return f"{path}.{key}", rest
    return path, text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


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
            text = "is required"
        case "extra_forbidden":
            text = "unknown key"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal" as comparison:
            limit = next(iter(context.values()))
            shown = str(limit) if isinstance(limit, int) else f"{limit:g}"
            text = f"must be {_COMPARISONS[comparison]} {shown}"
        case "literal_error":
            text = f"must be {context['expected']}"
        case "model_type" | "dict_type":
            takes_string = context.get("class_name") in ("ModelRef", "StoreRef")
            text = "must be a string or a map" if takes_string else "must be a map"
        case "string_pattern_mismatch":
            is_uri = context["pattern"] == URI_PATTERN
            text = (
                "must be the URI of a folder or bucket"
                if is_uri
                else f"must match {context['pattern']}"
            )
        case "value_error":
            text = str(context["error"])
        case _:
            text = re.sub(r"^\w+ should ", "must ", error["msg"])
            text = re.sub(r"( after validation|, unable).*", "", text)
            text = text[:1].lower() + text[1:]
    return text


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
