"""What all sections of a run file share: strictness, the spelling of keys, names and references."""

from __future__ import annotations

import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

from medjob.config.addresses import refuse_credentials
from medjob.config.data_suffixes import data_suffix

# A run's name is a path segment and the prefix of every Kubernetes object name.
# Those are limited to 63 characters; 40 leaves room for suffixes.
NAME_PATTERN = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=40)]
HUB_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"
HubId = Annotated[str, StringConstraints(pattern=HUB_ID_PATTERN, max_length=96)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# The largest value of a 32-bit integer, which the libraries below store some of the numbers in.
MOST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST)]
Seconds = Annotated[float, Field(ge=0, le=1e7)]
ADAPTER_CONFIG = "adapter_config.json"
"""File that makes a directory a PEFT adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_RUN = re.compile(r"run:[a-z0-9][a-z0-9.-]*/(sft|dpo|export)(/[0-9a-f]{1,12})?")
_ENDPOINT = re.compile(r"endpoint:([a-z0-9]([a-z0-9.-]*[a-z0-9])?)/(\S.*)")
_BUCKET = re.compile(r"(s3|gs)://[a-zA-Z0-9][a-zA-Z0-9._-]+(/.*)?")


def is_bucket_uri(reference: str) -> bool:
    """Whether `reference` has the form `s3://BUCKET/KEY` or `gs://BUCKET/KEY`."""
    return _BUCKET.fullmatch(reference) is not None


def _known_scheme(value: str) -> str:
    refuse_credentials("a model or data source", value)
    if "://" in value and not is_bucket_uri(value):
        raise ValueError(
            f"a URI must have the form s3://BUCKET/KEY or gs://BUCKET/KEY (got {value!r})"
        )
    return value


class AddedLater:
    """Marks a field that did not exist when earlier runs were published: `Annotated[bool,
    ADDED_LATER] = False`. Its default must mean what those runs did. While the field has it, keys
    leave the field out, so that those runs keep theirs."""


ADDED_LATER = AddedLater()


class NotInKey:
    """Marks a field that permits something, and changes nothing of what is computed. It is in no
    key, and stages must not read it."""


NOT_IN_KEY = NotInKey()


ReferenceName = Annotated[str, StringConstraints(min_length=1), AfterValidator(_known_scheme)]


class Strict(BaseModel):
    """Base of every section: unknown keys are errors, numbers are finite, and field docstrings
    become descriptions. A default is the same value as one that is written out (32 and 32.0 have
    different keys)."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_not_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which pydantic accepts as the number 1."""
        if info.field_name is None:
            return value
        annotation = cls.model_fields[info.field_name].annotation
        items: list[Any] = []
        if isinstance(value, list | dict):
            items = list(value.values()) if isinstance(value, dict) else value
            annotation = _item_type(annotation)
        for each in items or [value]:
            types = _scalar_types(annotation)
            if isinstance(each, bool) and types & {int, float} and bool not in types:
                hint = " (YAML reads yes, no, on and off as truth values; quote them)"
                raise ValueError(f"must be a number (got {each})" + (hint if items else ""))
        return value


class Kubernetes(Strict):
    """Base of the sections that are spelled in camelCase, as Kubernetes does.

    Python code uses the snake_case names. Files and `--set` must use camelCase: `load.validate`
    turns `by_name` off, so that medjob and the chart's schema accept the same keys.
    """

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True
    )


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by their keys in a file: camelCase in `Kubernetes` sections."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def fields_in_key(model: BaseModel) -> dict[str, Any]:
    """The fields of a section that are part of a key, in the order of their names: all that are
    there, but those that were added later and have their default, and those that are in no key.
    See `AddedLater` and `NotInKey`."""
    fields = type(model).model_fields
    return {
        name: value
        for name, value in sorted(vars(model).items())
        if NOT_IN_KEY not in fields[name].metadata
        and (
            ADDED_LATER not in fields[name].metadata
            or value != fields[name].get_default(call_default_factory=True)
        )
    }


def is_union(annotation: Any) -> bool:
    """Whether a type has alternatives, such as `int | None`."""
    return get_origin(annotation) in (Union, UnionType)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field of type `Model` or `Model | None`; None for all other types."""
    for option in get_args(annotation) if is_union(annotation) else (annotation,):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _scalar_types(annotation: Any) -> set[Any]:
    """The types that a field accepts: of `int | None`, int and NoneType."""
    if get_origin(annotation) is Annotated:
        return _scalar_types(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    if not is_union(annotation):
        return {annotation}
    return set().union(*map(_scalar_types, get_args(annotation)))


def _item_type(annotation: Any) -> Any:
    """The type of the items of a list or of the values of a map: of `list[int] | None`, int."""
    for option in get_args(annotation) if is_union(annotation) else (annotation,):
        if get_origin(option) in (list, dict):
            return get_args(option)[-1]
    return None


def or_string(schema: dict[str, Any]) -> None:
    """Change a JSON schema to accept either the object or a plain string."""
    object_schema = dict(schema)
    description = object_schema.pop("description", "")
    schema.clear()
    schema["description"] = description
    schema["anyOf"] = [{"type": "string", "minLength": 1}, object_schema]


class ModelRef(Strict):
    """A language model: either its `id` as a plain string, or these fields."""

    model_config = ConfigDict(json_schema_extra=or_string)

    id: ReferenceName
    """Where the model is: a hub id (`org/name`), a directory (`./models/x`), a bucket prefix
    (`s3://BUCKET/KEY`, `gs://BUCKET/KEY`), `package:NAME` for an installed package that contains
    one GGUF file, or `run:NAME/STAGE` for what another run published in the same store: the adapter
    or model of `sft` or `dpo`, or the merged model of `export`. `run:NAME/STAGE/KEY` names one of
    several. A judge, or a model that is only compared, may also be `endpoint:NAME/MODEL`: the model
    MODEL of the server `cluster.endpoints.NAME`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. `fetch` pins it to a commit. Default: the main
    branch."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _run_is_named_in_full(self) -> ModelRef:
        if self.id.startswith("run:") and not _RUN.fullmatch(self.id):
            raise ValueError(
                f"must be run:NAME/STAGE or run:NAME/STAGE/KEY, with sft, dpo or export as the "
                f"stage (got {self.id!r})"
            )
        return self

    @model_validator(mode="after")
    def _endpoint_is_named_in_full(self) -> ModelRef:
        if self.is_endpoint and not _ENDPOINT.fullmatch(self.id):
            raise ValueError(
                "must be endpoint:NAME/MODEL, with a name of cluster.endpoints and the name of the "
                f"model there (got {self.id!r})"
            )
        return self

    @model_validator(mode="after")
    def _revision_needs_a_hub(self) -> ModelRef:
        if self.revision and not is_hub_id(self.id):
            raise ValueError(
                "revision is only valid with a hub id "
                f"(got {self.id!r}, revision {self.revision!r})"
            )
        return self

    @property
    def is_endpoint(self) -> bool:
        """Whether it is a model of an endpoint. Such a model has no files and no pin."""
        return self.id.startswith("endpoint:")

    @property
    def endpoint(self) -> str:
        """Name of the endpoint in `cluster.endpoints`."""
        return self.id.removeprefix("endpoint:").partition("/")[0]

    @property
    def served_name(self) -> str:
        """Name of the model at the endpoint."""
        return self.id.partition("/")[2]

    @property
    def key(self) -> str:
        """The model's key in pins.json."""
        return f"{self.id}@{self.revision}" if self.revision else self.id

    def __str__(self) -> str:
        return self.key


def is_hub_id(reference: str) -> bool:
    """Whether `reference` has the form `org/name` and is not a path, glob, data file or URI."""
    return (
        reference.count("/") == 1
        and all(reference.split("/"))
        and not reference.startswith((".", "/", "~"))
        and not data_suffix(reference)
        and not set(":*?[") & set(reference)
    )
