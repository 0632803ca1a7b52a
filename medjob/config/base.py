"""What every part of the tree shares: strictness, and the names that become paths and Kubernetes names."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic.alias_generators import to_camel

# A run's name is a path segment and the stem of every Kubernetes object: 40 leaves room for suffixes within 63.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=40)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
_BUCKET = re.compile(r"(s3|gs)://[a-zA-Z0-9][a-zA-Z0-9._-]+(/.*)?")


def is_bucket_uri(reference: str) -> bool:
    """Whether `reference` has the form `s3://BUCKET/KEY` or `gs://BUCKET/KEY`."""
    return _BUCKET.fullmatch(reference) is not None


def _known_scheme(value: str) -> str:
    if "://" in value and not is_bucket_uri(value):
        raise ValueError(
            f"a URI must have the form s3://BUCKET/KEY or gs://BUCKET/KEY (got {value!r})"
        )
    return value


ReferenceName = Annotated[str, StringConstraints(min_length=1), AfterValidator(_known_scheme)]


class Strict(BaseModel):
    """Unknown keys are errors, values do not change, a field's docstring is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Kubernetes(Strict):
    """A part spelled as in Kubernetes: camelCase in files, snake_case in Python."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True
    )


def or_string(schema: dict[str, Any]) -> None:
    """Say in a JSON schema that a plain string may stand for the object."""
    shape = dict(schema)
    schema.clear()
    schema.update(
        {
            "description": shape.pop("description", ""),
            "anyOf": [{"type": "string", "minLength": 1}, shape],
        }
    )


class ModelRef(Strict):
    """A language model; a plain string stands for its `id`."""

    model_config = ConfigDict(json_schema_extra=or_string)

    id: ReferenceName
    """Hub id (`org/name`), folder (`./models/x`), bucket folder (`s3://BUCKET/KEY`, `gs://BUCKET/KEY`), or `package:NAME` for an
    installed package that carries a GGUF."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; `fetch` pins it to a commit. Default: the hub's main branch."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _revision_needs_a_hub(self) -> ModelRef:
        if self.revision and not is_hub_id(self.id):
            raise ValueError(
                f"only a hub id takes a revision (got {self.id!r} with {self.revision!r})"
            )
        return self

    @property
    def key(self) -> str:
        """How pins.json names the model."""
        return f"{self.id}@{self.revision}" if self.revision else self.id

    def __str__(self) -> str:
        return self.key


def is_hub_id(reference: str) -> bool:
    """Whether `reference` has the form `org/name` and none of a path, a glob, a data file or a URI."""
    return (
        reference.count("/") == 1
        and all(reference.split("/"))
        and not reference.startswith((".", "/", "~"))
        and not reference.endswith((".jsonl", ".json", ".csv", ".parquet"))
        and not set(":*?[") & set(reference)
    )
