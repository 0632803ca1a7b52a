"""`run.stages`: which stages a run has, and what they need of one another and of the run file.

Imports nothing of the other sections, so that all of them can name stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from medjob.config.run_file import Run

StageName = Literal["fetch", "prepare", "sft", "candidates", "judge", "dpo", "evaluate", "export"]
TrainedModel = Literal["sft", "dpo"]
_ORDER: tuple[StageName, ...] = get_args(StageName)
_WITH_OWN_PAIRS = ", or set run.dpo.pairs=data if the rows have chosen and rejected answers"
_TRAINED: tuple[TrainedModel, ...] = get_args(TrainedModel)


def resolve_stages(run: Run) -> list[StageName]:
    """The stages of a run in their order, without `fetch`: those that are listed, or those that
    the rest of the run file implies."""
    names = set(_implied(run) if run.stages is None else run.stages)
    return [name for name in _ORDER if name in names - {"fetch"}] or ["fetch"]


def _implied(run: Run) -> Iterator[StageName]:
    yield "prepare"
    if run.prepare.has_evaluation_rows:
        yield "evaluate"
    prefers = run.prepare.has_preference_prompts or run.dpo.uses_data
    if run.prepare.sources:
        yield "sft"
    if prefers:
        yield "dpo"
    if prefers and run.dpo.uses_judge:
        yield from ("candidates", "judge")
    if run.prepare.sources or prefers:
        yield "export"


def unused_sections(run: Run) -> Iterator[str]:
    """Describe filled-in sections that no stage of the run reads."""
    missing = {
        "sft": "sources",
        "candidates": "preference_rows or preference_sources",
        "dpo": "preference_rows or preference_sources",
        "evaluate": "evaluation_rows or evaluation_sources",
    }
    for name, key in missing.items():
        implied = "stages" not in run.model_fields_set
        if implied and name in run.model_fields_set and name not in (run.stages or ()):
            yield f"run.{name} is set, but the run has no {name}: run.prepare has no {key}"


def trained_models(stages: list[StageName]) -> list[TrainedModel]:
    """The models that the stages train, in their order."""
    return [name for name in _TRAINED if name in stages]


def check_stages(run: Run, stages: list[StageName]) -> None:
    """Check that each stage has what it needs.

    Raises:
        ValueError: the message names the key, and what would have to be added.
    """
    for name in stages:
        missing = [each for each in _needed_stages(run, name) if each not in stages]
        if missing:
            other = _WITH_OWN_PAIRS if name == "dpo" and "judge" in missing else ""
            raise ValueError(
                f"stages: {name} needs {_listed(missing)}, which this run does not have "
                f"({_shown(stages)}); add {_listed(missing)} to run.stages{other}"
            )
    _check_data(run, stages)
    _check_models(run, stages)


def _needed_stages(run: Run, name: StageName) -> list[StageName]:
    needed: dict[StageName, list[StageName]] = {
        "sft": ["prepare"],
        "candidates": ["prepare"],
        "judge": ["prepare", "candidates"],
        "dpo": ["prepare"],
        "evaluate": ["prepare"],
    }
    if name == "dpo" and run.dpo.uses_judge:
        return ["prepare", "candidates", "judge"]
    return needed.get(name, [])


def _check_data(run: Run, stages: list[StageName]) -> None:
    if "sft" in stages and not run.prepare.sources:
        raise ValueError(
            "prepare.sources: sft trains on these rows, and there are none; name a source, or "
            "leave sft out of run.stages"
        )
    if "dpo" in stages and run.dpo.uses_data and not run.prepare.preference_sources:
        raise ValueError(
            f"prepare.preference_sources: run.dpo.pairs is {run.dpo.pairs}, so its rows are the "
            "pairs, and there are none; name a source with chosen and rejected answers"
        )
    if "evaluate" in stages and not run.prepare.has_evaluation_rows:
        raise ValueError(
            "prepare.evaluation_rows: evaluate compares models on evaluation rows, and there are "
            "none; set it, or run.prepare.evaluation_sources, or leave evaluate out of run.stages"
        )
    if "candidates" in stages and not run.prepare.has_preference_prompts:
        raise ValueError(
            "prepare.preference_rows: candidates answers preference prompts, and there are none; "
            "set it, or run.prepare.preference_sources, or leave candidates, judge and dpo out of "
            "run.stages"
        )


def _check_models(run: Run, stages: list[StageName]) -> None:
    trained = trained_models(stages)
    if "export" in stages and not trained:
        raise ValueError(
            f"stages: export needs a trained model, and this run trains none ({_shown(stages)}); "
            "add sft or dpo to run.stages, or leave export out"
        )
    if "export" in stages and run.export.source not in trained:
        raise ValueError(
            f"export.source: {run.export.source} is not a stage of this run ({_shown(stages)}); "
            f"name {_listed(trained, 'or')}, or add {run.export.source} to run.stages"
        )
    if "evaluate" in stages and run.evaluate.pairwise:
        _check_pairwise(run, stages)
    absent = [name for name in run.evaluate.models if name not in ("base", *trained)]
    if "evaluate" in stages and absent:
        raise ValueError(
            f"evaluate.models: {_listed(absent)} is not trained in this run ({_shown(stages)}); "
            f"name only {_listed(['base', *trained])}, or add {_listed(absent)} to run.stages"
        )


def _check_pairwise(run: Run, stages: list[StageName]) -> None:
    if "judge" not in stages:
        raise ValueError(
            f"evaluate.pairwise: a model judge compares the answers, and this run has no judge "
            f"({_shown(stages)}); add candidates and judge to run.stages, or set it to false"
        )
    if run.judge.kind != "model":
        raise ValueError(
            f"evaluate.pairwise: a model judge compares the answers, and run.judge.kind is "
            f"{run.judge.kind}; set it to model, or evaluate.pairwise to false"
        )


def _shown(stages: list[StageName]) -> str:
    return f"run.stages: {', '.join(stages)}"


def _listed(names: Sequence[str], word: str = "and") -> str:
    *others, last = names
    return f"{', '.join(others)} {word} {last}" if others else last
