"""Messages about invalid values name the key and say what is allowed."""

from typing import Any

import pytest

from medjob.config.load import merge, parse_set, validate
from medjob.errors import ConfigError

RUN: dict[str, Any] = {
    "run": {"name": "a", "base_model": "./m", "prepare": {"sources": [{"path": "x.jsonl"}]}}
}


def refusal(change: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        validate(merge(RUN, parse_set(change)))
    return caught.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.base_model={}", "run.base_model.id: is required"),
        ("run.base_model=1", "run.base_model: must be a string or a map (got 1)"),
        ("run.sft=3", "run.sft: must be a map (got 3)"),
        ("run.seed=x", "run.seed: must be a valid integer (got 'x')"),
        ("run.sft.learning_rate=fast", "run.sft.learning_rate: must be a valid number (got 'fast')"),
        ("run.dpo.beta=0", "run.dpo.beta: must be > 0 (got 0)"),
        ("run.prepare.sources=[]", "run.prepare.sources: there are no rows at all; name at least one of sources, preference_sources and evaluation_sources"),
        ("run.prepare.sources=[{path: x, limit: 0}]", "run.prepare.sources.0.limit: must be >= 1 (got 0)"),
        ("run.prepare.safety={sources: [{path: x}], share: 1}", "run.prepare.safety.share: must be < 1 (got 1)"),
        ("run.lora.target_modules=[1]", "run.lora.target_modules.0: must be a valid string (got 1)"),
        ("resources.sft.microBatchSize=0", "resources.sft.microBatchSize: must be 'auto' or >= 1 (got 0)"),
        ("resources.sft.gradientCheckpointing=maybe", "resources.sft.gradientCheckpointing: must be 'auto' or a valid boolean (got 'maybe')"),
        ("resources.sft.deepspeed=zero4", "resources.sft.deepspeed: must be 'auto' or 'none', 'zero1', 'zero2' or 'zero3' (got 'zero4')"),
        ("cluster.profiles.cpu.nodeSelector={a: 1}", "cluster.profiles.cpu.nodeSelector.a: must be a valid string (got 1)"),
    ],
)  # fmt: skip
def test_message_names_key_limit_and_value(change: str, message: str) -> None:
    assert refusal(change).message == message


def test_all_errors_are_reported_at_once() -> None:
    error = refusal("run.sft={packing: 3, overlong: cut}")
    assert error.message == (
        "run.sft.packing: must be a valid boolean (got 3)\n"
        "error: run.sft.overlong: must be 'drop' or 'truncate' (got 'cut')"
    )


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ("cluster.profiles.cpu.memory=lots", "cluster.profiles.cpu.memory: must match", "quantity"),
        ("cluster.image.fullDigest=latest", "cluster.image.fullDigest: must match", "sha256:"),
        ("cluster.profiles.Big_One={}", "cluster.profiles.Big_One: must match", "lower-case"),
        ("run.name=My Run", "run.name: must match", "lower-case"),
    ],
)
def test_a_pattern_has_its_own_hint(change: str, message: str, hint: str) -> None:
    error = refusal(change)
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.prepare.sources=[{path: a.csv, weight: 2}, {path: b.csv}]", "run.prepare.sources.1.weight: is missing; set a weight for all sources, or for none"),
        ("run.prepare.sources=[{path: a.csv, weight: 0}]", "run.prepare.sources.0.weight: must be > 0 (got 0)"),
        ("run.prepare.evaluation_sources=[{path: a.csv, weight: 2}]", "run.prepare.evaluation_sources.0.weight: can only be set in run.prepare.sources"),
        ("run.prepare.preference_sources=[{path: a.csv}, {path: b.csv, weight: 2}]", "run.prepare.preference_sources.1.weight: can only be set"),
        ("run.prepare.safety={sources: [{path: a.csv, weight: 2}]}", "run.prepare.safety.sources.0.weight: can only be set"),
        ("run.judge.calibration={path: a.csv, weight: 2}", "run.judge.calibration.weight: cannot be set"),
    ],
)  # fmt: skip
def test_weights_are_refused_where_they_mean_nothing(change: str, message: str) -> None:
    assert message in refusal(change).message
