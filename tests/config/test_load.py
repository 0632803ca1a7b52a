"""How run files and --set become a RunFile, and which keys they accept."""

import re
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from medjob.config.base import ADDED_LATER, Strict, is_bucket_uri, is_hub_id
from medjob.config.load import load_run_file, merge, parse_set, validate
from medjob.errors import ConfigError
from medjob.runtime.files import canonical_json
from medjob.sources.references import key_material

BASE = "run: {name: a, base_model: ./m, prepare: {sources: [{path: x.jsonl}]}, sft: {global_batch_size: 8, learning_rate: 2e-4}}\n"


def test_later_files_and_set_take_precedence(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BASE)
    (tmp_path / "b.yaml").write_text(
        "run: {sft: {global_batch_size: 16, max_length: 64}}\nresources: {sft: {microBatchSize: 2}}\n"
    )
    run_file = load_run_file(
        [tmp_path / "a.yaml", tmp_path / "b.yaml"],
        ["run.sft.max_length=128", "run.lora.target_modules=[a, b]"],
    )
    assert run_file.run.sft.global_batch_size == 16
    assert run_file.run.sft.max_length == 128
    assert run_file.run.lora.target_modules == ["a", "b"]
    assert run_file.run.sft.learning_rate == 2e-4  # PyYAML parses 2e-4 as a string
    assert run_file.resources.sft.micro_batch_size == 2


def test_merge_replaces_lists_and_does_not_change_its_inputs() -> None:
    below: dict[str, Any] = {"a": {"b": [1, 2], "c": 1}}
    assert merge(below, {"a": {"b": [3]}}) == {"a": {"b": [3], "c": 1}}
    assert below == {"a": {"b": [1, 2], "c": 1}}


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a.b=1", {"a": {"b": 1}}),
        ("a=x=y", {"a": "x=y"}),
        ("a=", {"a": None}),
        ("a=[1]", {"a": [1]}),
    ],
)
def test_set_is_parsed_as_yaml(text: str, tree: dict[str, Any]) -> None:
    assert parse_set(text) == tree


@pytest.mark.parametrize(
    ("reference", "is_hub"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", True),
        ("data/rows.jsonl", False),
        ("data/*.json", False),
        ("./a/b", False),
        ("/a/b", False),
        ("~/a", False),
        ("a", False),
        ("package:x/y", False),
        ("s3://b/c", False),
        ("a/b/c", False),
    ],
)
def test_hub_ids(reference: str, is_hub: bool) -> None:
    assert is_hub_id(reference) is is_hub


@pytest.mark.parametrize(
    ("reference", "is_bucket"),
    [
        ("s3://bucket/models/x", True),
        ("gs://my.bucket_1/rows.jsonl", True),
        ("s3://bucket", True),
        ("s3://", False),
        ("s3:/bucket/x", False),
        ("S3://bucket/x", False),
        ("file://x/y", False),
        ("org/name", False),
    ],
)
def test_bucket_uris(reference: str, is_bucket: bool) -> None:
    assert is_bucket_uri(reference) is is_bucket


def _alias_bomb() -> str:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(["a0: &a0 [x]", *levels, "run: {name: *a9}"])


def _nested(depth: int) -> str:
    return "cluster: {profiles: {x: {affinity: " + "{a: " * depth + "1" + "}" * depth + "}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_alias_bomb(), "at most 100,000 values"),
        (_nested(60), "nested at most 50 deep"),
        ('run: {prompt: {system: "\\ud800"}}', "run.prompt.system: contains a NUL character or"),
        ('cluster: {workDir: "a\\0b"}', "cluster.workDir: contains a NUL character or"),
        ('cluster: {podLabels: {"a\\0": b}}', "cluster.podLabels.a\0: contains a NUL"),
    ],
)
def test_values_that_no_run_file_means_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BASE)
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run_file([tmp_path / "a.yaml", tmp_path / "b.yaml"])


def test_endless_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="/dev/zero: a run file has at most 10,000,000 bytes"):
        load_run_file([Path("/dev/zero")])


def test_long_values_are_shortened_in_messages(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BASE)
    with pytest.raises(ConfigError) as caught:
        load_run_file([tmp_path / "a.yaml"], ["run.seed=" + "9" * 4000])
    assert len(str(caught.value)) < 600


class _Recipe(Strict):
    steps: int = 1
    clipped: Annotated[bool, ADDED_LATER] = False
    names: Annotated[dict[str, str], ADDED_LATER] = Field(default_factory=dict)


def test_a_field_that_was_added_later_changes_no_key_until_it_is_set() -> None:
    assert key_material(_Recipe(), {}) == {"steps": 1}
    assert key_material(_Recipe(clipped=False, names={}), {}) == {"steps": 1}
    assert key_material(_Recipe(clipped=True), {}) == {"steps": 1, "clipped": True}
    assert key_material(_Recipe(names={"a": "b"}), {}) == {"steps": 1, "names": {"a": "b"}}


def test_defaults_that_are_written_out_change_no_key(tmp_path: Path) -> None:
    """`medjob show` prints a run file that computes the same artifacts."""
    (tmp_path / "a.yaml").write_text(BASE.replace("sft: {", "lora: {r: 4}, sft: {"))
    run_file = load_run_file([tmp_path / "a.yaml"])
    shown = validate(run_file.model_dump(mode="json", by_alias=True))
    keys = [canonical_json(key_material(each.run, {})) for each in (run_file, shown)]
    assert keys[0] == keys[1]
