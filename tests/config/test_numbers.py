"""Numbers of a run file are finite and have limits, and every key is there once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from medjob.config.base import is_union, keys_of, nested_model
from medjob.config.load import load_run_file, parse_set, read_yaml
from medjob.config.run_file import RunFile
from medjob.errors import ConfigError

RUN = "run: {name: a, base_model: a/b, prepare: {sources: [{path: rows.jsonl}]}}\n"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def number_keys(model: Any = RunFile, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of all numbers in a run file, and what is between them and lists or maps."""
    for key, field in keys_of(model).items():
        below = nested_model(field.annotation)
        if below is not None:
            yield from number_keys(below, f"{prefix}{key}.")
            continue
        types = get_args(field.annotation) if is_union(field.annotation) else (field.annotation,)
        if {int, float} & {get_args(each)[0] if get_args(each) else each for each in types}:
            yield f"{prefix}{key}", field


NUMBERS = dict(number_keys())


def test_the_walk_finds_the_numbers() -> None:
    assert {"run.sft.learning_rate", "run.lora.r", "resources.dpo.batchSize"} <= set(NUMBERS)
    assert {"cluster.store.retrySeconds", "pipeline.retries", "run.sft.max_steps"} <= set(NUMBERS)


@pytest.mark.parametrize("key", NUMBERS)
def test_number_is_finite_and_has_limits(run_file: Path, key: str) -> None:
    for value in (".inf", "-.inf", ".nan", "1e400", "9" * 30, "-1", "yes", "true"):
        with pytest.raises(ConfigError) as caught:
            load_run_file([run_file], [f"{key}={value}"])
        assert caught.value.exit_code == 64
        assert f"{key}: " in caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("run.sft.learning_rate", "2", "<= 1"),
        ("run.sft.weight_decay", "11", "<= 10"),
        ("run.dpo.max_grad_norm", "1e30", "<= 1e+06"),
        ("run.dpo.num_train_epochs", "1e9", "<= 1e+06"),
        ("run.lora.r", "10000", "<= 8192"),
        ("run.sft.max_steps", "99999999999999999999999999", "<= 2147483647"),
        ("pipeline.preemptions", "-1", ">= 0"),
        ("cluster.graceSeconds", ".inf", "must be a finite number"),
    ],
)
def test_message_names_the_limit(run_file: Path, key: str, value: str, limit: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_file([run_file], [f"{key}={value}"])
    assert limit in caught.value.message
    assert "(got " in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:\n  seed: 1\n  seed: 2\n", "the key run.seed is set twice, in lines 2 and 3"),
        ("run: {}\nrun: {}\n", "the key run is set twice, in lines 1 and 2"),
        ("run: {sft: {beta: 1, beta: 1}}\n", "the key run.sft.beta is set twice, in lines 1 and 1"),
        ('{"run": {"seed": 1, "seed": 1}}', "the key run.seed is set twice"),
        ("run:\n  seed: 1\n  'seed': 2\n", "the key run.seed is set twice"),
        ("a: [{b: 1}, {c: 1, c: 2}]\n", "the key a.1.c is set twice"),
        ("a: &x {b: 1, b: 2}\nc: *x\n", "the key a.b is set twice"),
        ("run: {date: 2026-13-45}\n", "month"),
        ("[" * 1000, "invalid YAML"),
        ("a: !!python/object:os.system {}\n", "invalid YAML"),
    ],
)
def test_yaml_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml: ") as caught:
        read_yaml(path)
    assert message in caught.value.message
    assert caught.value.exit_code == 64


def test_keys_may_be_repeated_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: &x {b: 1, c: 2}\nd: &y {<<: *x, b: 3}\ne: {<<: *y, b: 4}\nf: *x\n1: 1\n")
    tree = read_yaml(path)
    assert tree["d"] == {"b": 3, "c": 2}
    assert tree["e"] == {"b": 4, "c": 2}


def test_set_refuses_a_repeated_key() -> None:
    with pytest.raises(ConfigError, match="the key seed is set twice"):
        parse_set("run={seed: 1, seed: 2}")
    with pytest.raises(ConfigError, match="invalid YAML"):
        parse_set("run.seed=2026-13-45")
