"""How the generated files present the fields of a run file."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


def default_of(field: FieldInfo) -> Any:
    """The default of a field, or None if it has none."""
    if field.default_factory is not None:
        return field.default_factory()  # type: ignore[call-arg]
    return None if field.default is PydanticUndefined else field.default


def description_of(field: FieldInfo) -> str:
    """The description of a field on one line."""
    return " ".join((field.description or "").split())


def first_paragraph(model: type[BaseModel]) -> str:
    """The first paragraph of a model's docstring on one line."""
    return " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split())
