"""Which stages a run file implies, and which combinations are refused."""

import re
from typing import Any

import pytest

from medjob.config.load import merge, validate
from medjob.config.stages import unused_sections
from medjob.errors import ConfigError

SOURCE = {"path": "rows.jsonl"}
BASE = {"name": "a", "base_model": "./m"}
ALL = ["prepare", "sft", "candidates", "judge", "dpo", "evaluate", "export"]


def run(prepare: dict[str, Any], **changes: Any) -> Any:
    return validate(merge({"run": {**BASE, "prepare": prepare}}, {"run": changes})).run


@pytest.mark.parametrize(
    ("prepare", "changes", "stages"),
    [
        ({"sources": [SOURCE]}, {}, ["prepare", "sft", "evaluate", "export"]),
        ({"sources": [SOURCE]}, {"judge": {"kind": "overlap"}}, ["prepare", "sft", "evaluate", "export"]),
        ({"sources": [SOURCE], "preference_rows": 5}, {}, ALL),
        (
            {"sources": [SOURCE], "preference_rows": 0},
            {"candidates": {}, "dpo": {"beta": 0.2}},
            ["prepare", "sft", "evaluate", "export"],
        ),
        ({"sources": [SOURCE], "preference_sources": [SOURCE]}, {}, ALL),
        ({"sources": [SOURCE], "preference_sources": [SOURCE]}, {"dpo": {"pairs": "both"}}, ALL),
        (
            {"sources": [SOURCE], "preference_sources": [SOURCE]},
            {"dpo": {"pairs": "data"}},
            ["prepare", "sft", "dpo", "evaluate", "export"],
        ),
        (
            {"preference_sources": [SOURCE]},
            {"dpo": {"pairs": "data"}},
            ["prepare", "dpo", "evaluate", "export"],
        ),
        (
            {"preference_sources": [SOURCE]},
            {},
            ["prepare", "candidates", "judge", "dpo", "evaluate", "export"],
        ),
        ({"evaluation_sources": [SOURCE]}, {}, ["prepare", "evaluate"]),
        ({"sources": [SOURCE], "evaluation_rows": 0}, {}, ["prepare", "sft", "export"]),
        ({"sources": [SOURCE]}, {"stages": ["fetch"]}, ["fetch"]),
        ({"sources": [SOURCE]}, {"stages": ["sft", "fetch", "prepare", "sft"]}, ["prepare", "sft"]),
    ],
)  # fmt: skip
def test_stages_that_a_run_file_implies(
    prepare: dict[str, Any], changes: dict[str, Any], stages: list[str]
) -> None:
    found = run(prepare, **changes)
    assert found.stages == stages
    # What `medjob show` prints is the same run.
    shown = validate({"run": found.model_dump(mode="json", by_alias=True)}).run
    assert shown == found


@pytest.mark.parametrize(
    ("prepare", "changes", "message"),
    [
        (
            {"sources": [SOURCE]},
            {"stages": ["prepare", "judge"]},
            (
                "run.stages: judge needs candidates, which this run does not have (run.stages: prepare, "
                "judge); add candidates to run.stages"
            ),
        ),
        (
            {"sources": [SOURCE]},
            {"stages": ["sft"]},
            (
                "run.stages: sft needs prepare, which this run does not have (run.stages: sft); add "
                "prepare to run.stages"
            ),
        ),
        (
            {"preference_sources": [SOURCE]},
            {"stages": ["prepare", "dpo"]},
            (
                "run.stages: dpo needs candidates and judge, which this run does not have (run.stages: "
                "prepare, dpo); add candidates and judge to run.stages, or set run.dpo.pairs=data if "
                "the rows have chosen and rejected answers"
            ),
        ),
        (
            {"preference_sources": [SOURCE]},
            {"stages": ["prepare", "sft"]},
            "run.prepare.sources: sft trains on these rows, and there are none",
        ),
        (
            {"sources": [SOURCE]},
            {"dpo": {"pairs": "data"}},
            (
                "run.prepare.preference_sources: run.dpo.pairs is data, so its rows are the pairs, and "
                "there are none"
            ),
        ),
        (
            {"sources": [SOURCE]},
            {"stages": ["prepare", "candidates"]},
            "run.prepare.preference_rows: candidates answers preference prompts, and there are none",
        ),
        (
            {"sources": [SOURCE]},
            {"stages": ["prepare", "export"]},
            "run.stages: export needs a trained model, and this run trains none",
        ),
        (
            {"sources": [SOURCE]},
            {"export": {"source": "dpo"}},
            (
                "run.export.source: dpo is not a stage of this run (run.stages: prepare, sft, evaluate, "
                "export); name sft, or add dpo to run.stages"
            ),
        ),
        (
            {"sources": [SOURCE]},
            {"evaluate": {"models": ["base", "dpo"]}},
            "run.evaluate.models: dpo is not trained in this run",
        ),
        ({}, {}, "run.prepare.sources: there are no rows at all; name at least one of sources"),
        (
            {"sources": [SOURCE], "evaluation_rows": 0},
            {"stages": ["prepare", "evaluate"]},
            "run.prepare.evaluation_rows: evaluate compares models on evaluation rows",
        ),
        ({"sources": [SOURCE]}, {"stages": []}, "run.stages: must have at least 1 item"),
        ({"sources": [SOURCE]}, {"stages": ["train"]}, "run.stages.0: must be"),
    ],
)
def test_impossible_combinations_name_the_key_and_what_is_missing(
    prepare: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(prepare, **changes)


def test_models_and_the_export_follow_from_the_stages() -> None:
    tuned = run({"sources": [SOURCE]})
    assert tuned.evaluate.models == ["base", "sft"]
    assert tuned.export.source == "sft"
    preferred = run({"preference_sources": [SOURCE]}, dpo={"pairs": "data"})
    assert preferred.evaluate.models == ["base", "dpo"]
    assert preferred.export.source == "dpo"


def test_settings_of_a_stage_that_the_run_lacks_are_not_checked() -> None:
    tree = {"run": {**BASE, "prepare": {"sources": [SOURCE]}}, "resources": {"dpo": {"gpus": 3}}}
    assert validate(tree).run.stages == ["prepare", "sft", "evaluate", "export"]


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing has no effect with loss_type sigmoid"),
        ({"loss_type": "exo_pair"}, "loss_type exo_pair needs label_smoothing above 0"),
        ({"rpo_alpha": 0}, "run.dpo.rpo_alpha: must be"),
        ({"validation_fraction": 1}, "run.dpo.validation_fraction: must be < 1"),
    ],
)
def test_options_of_losses(dpo: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run({"sources": [SOURCE], "preference_rows": 4}, dpo=dpo)


def test_a_section_that_no_stage_reads_is_named() -> None:
    tuned = run({"sources": [SOURCE]}, dpo={"beta": 0.2}, sft={"max_steps": 3})
    assert list(unused_sections(tuned)) == [
        (
            "run.dpo is set, but the run has no dpo: run.prepare has no preference_rows or "
            "preference_sources"
        )
    ]
    assert not list(unused_sections(run({"sources": [SOURCE]}, stages=["prepare"], dpo={})))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"trainable_token_indices": [True]}, "run.lora.trainable_token_indices: must be a number"),
        ({"rank_pattern": {"q_proj": True}}, "run.lora.rank_pattern: must be a number (got True)"),
        ({"init_lora_weights": [1]}, "run.lora.init_lora_weights: must be"),
        ({"target_modules": []}, "run.lora.target_modules is an empty list"),
    ],
)
def test_values_of_lora_that_yaml_makes_something_else_of(
    lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run({"sources": [SOURCE]}, lora=lora)
    assert (
        message.replace("run.lora.target_modules is", "target_modules is") in caught.value.message
    )
