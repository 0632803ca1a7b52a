"""Each field has one spelling, which medjob and the chart's schema both accept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from jsonschema import Draft7Validator, ValidationError
from pydantic.alias_generators import to_camel

from medjob.codegen.chart import schema
from medjob.config import RunFile, load_run_file
from medjob.config.base import keys_of, nested_model
from medjob.config.load import store_ref, validate
from medjob.config.run_file import StageResources
from medjob.config.store import StoreRef
from medjob.errors import ConfigError

Tree = dict[str, Any]
Location = tuple[str | int, ...]
MINIMAL: Tree = {
    "run": {
        "name": "a",
        "base_model": {"id": "org/model"},
        "adapter": {"id": "org/adapter"},
        "prepare": {
            "sources": [{"path": "x.jsonl"}],
            "preference_sources": [{"path": "x.jsonl"}],
            "evaluation_sources": [{"path": "x.jsonl"}],
            "safety": {"sources": [{"path": "x.jsonl"}]},
        },
        "judge": {"model": {"id": "org/judge"}},
        "evaluate": {
            "extra_models": [{"id": "org/other"}],
            "human_grades": {"path": "grades.csv"},
        },
    },
    "cluster": {"store": "s3://bucket/prefix", "profiles": {"cpu": {}}},
}
SCHEMA = Draft7Validator(schema())


def full_tree() -> Tree:
    """A run file that contains every field of every model."""
    return validate(MINIMAL).model_dump(mode="json", by_alias=True)


def fields(annotation: Any = RunFile, path: Location = ()) -> Iterator[tuple[Location, str, str]]:
    """Path of the parent, key and snake_case name of every field."""
    model = nested_model(annotation)
    if model is None:
        for position in children(path):
            yield from fields(get_args(annotation)[-1], (*path, position))
        return
    for (key, field), name in zip(keys_of(model).items(), model.model_fields, strict=True):
        yield path, key, name
        yield from fields(field.annotation, (*path, key))


def children(path: Location) -> list[str | int]:
    """Indices of a list of models, or keys of a map of models."""
    value = at(full_tree(), path)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [0]
    return ["cpu"] if path == ("cluster", "profiles") else []


def at(tree: Any, path: Location) -> Any:
    for part in path:
        tree = tree[part]
    return tree


FIELDS = list(fields())
MISSPELLED = [
    (path, key, other)
    for path, key, name in FIELDS
    if (other := name if key != name else to_camel(name)) != key
]


def dotted(path: Location) -> str:
    return ".".join(map(str, path))


def schema_errors(tree: Tree) -> Iterator[ValidationError]:
    pending = list(SCHEMA.iter_errors(tree))
    while pending:
        error = pending.pop()
        yield error
        pending += error.context or []


def test_every_field_is_covered() -> None:
    spelled = {dotted((*path, key)) for path, key, _ in FIELDS}
    assert {
        "run.sft.learning_rate",
        "run.prepare.safety.sources.0.limit",
        "run.evaluate.extra_models.0.revision",
        "resources.judge.batchSize",
        "cluster.store.retrySeconds",
        "cluster.profiles.cpu.nodeSelector",
        "pipeline.onChange",
    } <= spelled
    assert len(MISSPELLED) > 140


def test_both_accept_the_spelling_of_every_field() -> None:
    assert validate(full_tree()) == validate(MINIMAL)
    assert list(schema_errors(full_tree())) == []


@pytest.mark.parametrize(
    ("path", "key", "other"), MISSPELLED, ids=[dotted((*p, o)) for p, _, o in MISSPELLED]
)
def test_both_refuse_the_other_spelling(path: Location, key: str, other: str) -> None:
    tree = full_tree()
    parent = at(tree, path)
    parent[other] = parent.pop(key)
    with pytest.raises(ConfigError) as caught:
        validate(tree)
    assert f"{dotted((*path, other))}: unknown key" in caught.value.message
    assert caught.value.hint == f"did you mean {key}?"
    assert any(
        error.validator == "additionalProperties"
        and tuple(error.absolute_path) == path
        and repr(other) in error.message
        for error in schema_errors(tree)
    )


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("resources.sft.micro_batch_size=2", "microBatchSize"),
        ("resources.sft.micro_batch_siz=2", "microBatchSize"),
        ("cluster.grace_seconds=60", "graceSeconds"),
        ("cluster.store.retry_seconds=1", "retrySeconds"),
        ("cluster.image.pull_policy=Never", "pullPolicy"),
        ("cluster.profiles.cpu.node_selector={}", "nodeSelector"),
        ("cluster.profiles.memory.price_per_gpu_hour=1", "pricePerGpuHour"),
        ("pipeline.ttl_seconds_after_finished=1", "ttlSecondsAfterFinished"),
        ("run.baseModel=./m", "base_model"),
        ("run.sft.learningRate=1", "learning_rate"),
        ("run.prepare.contamination.nGram=1", "ngram"),
        ("run.prepare.sources=[{path: x.jsonl, Limit: 1}]", "limit"),
    ],
)
def test_a_misspelled_set_names_the_right_key(text: str, suggestion: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    key = "run.prepare.sources.0.Limit" if "Limit" in text else text.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        load_run_file([file], [text])
    assert f"{key}: unknown key" in caught.value.message
    assert caught.value.hint == f"did you mean {suggestion}?"


def test_an_unknown_key_without_a_similar_one_lists_the_known_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        validate({**MINIMAL, "pipeline": {"zzz": 1}})
    assert caught.value.hint.startswith("known keys: mode, stage, until, onChange")


def test_the_store_flag_takes_camel_case_only() -> None:
    assert store_ref("s3://bucket", ["cluster.store.retrySeconds=1"]).retry_seconds == 1
    with pytest.raises(ConfigError, match=r"cluster\.store\.retry_seconds: unknown key") as caught:
        store_ref("s3://bucket", ["cluster.store.retry_seconds=1"])
    assert caught.value.hint == "did you mean retrySeconds?"


def test_python_code_uses_snake_case() -> None:
    assert StageResources(micro_batch_size=2).micro_batch_size == 2
    assert StoreRef(uri="s3://bucket", retry_seconds=1).retry_seconds == 1
