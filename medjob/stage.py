"""The stages, in order. A new one is a params class in config/, a file in stages/, and a line in STAGES.

A stage is a function `run(context) -> metrics`. What it is given is all it may read: the fields of the run named in
`reads` (they enter its key, the others are not there), the verified artifacts of its inputs, and a folder to fill.
One that trains is run in processes of its own, one a device, on one node or several; see launch/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.progress import Progress
from medjob.config import Run
from medjob.config.run_file import StageResources
from medjob.config.store import StoreRef
from medjob.runtime.link import Link

Metrics = dict[str, Any]
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class StageContext:
    """What every stage is given: plain data, so that it can be handed to another process."""

    run: Run
    """The fields named in the stage's `reads`; any other raises AttributeError."""
    resources: StageResources
    """Batch sizes and devices; never changes what is computed."""
    pins: Mapping[str, str]
    """Commit or digest of every model and data set named in the run, by its spelling there."""
    inputs: Mapping[str, Path]
    """Folder of each input stage's artifact, verified."""
    output: Path
    """Empty folder; what stands in it when the stage returns is published."""
    work: Path
    """Scratch folder, empty at the start of every attempt."""
    cache: Path
    """Folder for converted models, shared by all runs; safe to delete."""
    report_to: tuple[str, ...]
    """Experiment trackers."""


@dataclass(frozen=True, slots=True)
class RowContext(StageContext):
    """What a stage is given that works through rows in this process."""

    finished: FinishedRows
    """Rows that earlier attempts finished."""
    progress: Progress
    """Where to say how far it is."""


@dataclass(frozen=True, slots=True)
class FetchContext(StageContext):
    """What `fetch` is given."""

    store: StoreRef
    """The job's store: its options hold for buckets of models and data too."""
    copies_hub: bool
    """Whether models of a hub are copied too."""
    copies: frozenset[str]
    """Copies that this run's earlier fetches hold, by name."""
    progress: Progress
    """Where to say how far it is."""


@dataclass(frozen=True, slots=True)
class TrainContext(StageContext):
    """What a stage is given that trains, in each of its processes."""

    link: Link
    """The way to the parent, which stores checkpoints and shows progress."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the line."""

    name: str
    """Verb of the command line, path segment in the store."""
    summary: str
    """One line of help."""
    reads: tuple[str, ...]
    """Fields of the run, dotted, that it reads and that enter its key."""
    inputs: Callable[[Run], tuple[str, ...]]
    """Stages whose artifacts it takes."""
    version: int = 1
    """Raised when the same fields and inputs come to mean another output."""
    references_only: bool = False
    """Whether the key covers the models and data sets named in those fields, and not the fields' other values."""
    loads_weights: bool = True
    """Whether it loads models; else their tokenizers are all it needs on its disk."""
    trains: bool = False
    """Whether it trains: it takes a TrainContext, in one process a device; any other takes a RowContext, and `fetch` a FetchContext."""

    def entry(self) -> Callable[[Any], Metrics]:
        """Import the stage's function: the moment at which the heavy libraries are loaded."""
        from importlib import import_module

        run: Callable[[Any], Metrics] = import_module(f"medjob.stages.{self.name}").run
        return run


def _after(*stages: str) -> Callable[[Run], tuple[str, ...]]:
    return lambda _: stages


def _evaluate_inputs(run: Run) -> tuple[str, ...]:
    trained = tuple(name for name in ("sft", "dpo") if name in run.evaluate.models)
    return ("prepare", *trained, *(("judge",) if "dpo" in trained else ()))


_POLICY = ("seed", "base_model", "method", "dtype")

STAGES: tuple[Stage, ...] = (
    Stage(
        "fetch",
        "pin models and data sets to commits and digests, and copy what is in buckets",
        ("base_model", "judge", "prepare", "evaluate"),
        _after(),
        version=2,
        references_only=True,
    ),
    Stage(
        "prepare",
        "clean, deduplicate, split and render the rows",
        ("seed", "base_model", "prompt", "prepare", "sft.max_length"),
        _after(),
        loads_weights=False,
    ),
    Stage(
        "sft",
        "fine-tune on the prepared answers",
        (*_POLICY, "lora", "sft"),
        _after("prepare"),
        trains=True,
    ),
    Stage(
        "candidates",
        "sample several answers to each preference prompt",
        (*_POLICY, "prompt", "candidates"),
        _after("prepare", "sft"),
    ),
    Stage(
        "judge",
        "score the answers and make preference pairs",
        (*_POLICY, "prompt", "judge"),
        _after("prepare", "candidates"),
    ),
    Stage(
        "dpo",
        "optimize on the preference pairs",
        (*_POLICY, "prompt", "dpo"),
        _after("sft", "judge"),
        trains=True,
    ),
    Stage(
        "evaluate",
        "compare base, sft and dpo on the same rows",
        (*_POLICY, "prompt", "judge", "evaluate"),
        _evaluate_inputs,
    ),
    Stage(
        "export",
        "merge the adapter into a model to serve",
        (*_POLICY, "export"),
        lambda run: (run.export.source,),
    ),
)


def get_stage(name: str) -> Stage:
    """The stage called `name`."""
    return next(stage for stage in STAGES if stage.name == name)


def select(run: Run, reads: tuple[str, ...]) -> Run:
    """A Run with the fields in `reads` and no others, so that nothing outside a stage's key can decide its output."""
    return _select(run, [path.split(".") for path in reads])


def _select(model: M, paths: list[list[str]]) -> M:
    chosen: dict[str, Any] = {}
    for name in dict.fromkeys(path[0] for path in paths):
        below = [path[1:] for path in paths if path[0] == name]
        value = getattr(model, name)
        chosen[name] = value if [] in below else _select(value, below)
    selected = model.model_copy()  # model_construct would make every default anew, to throw it away
    object.__setattr__(selected, "__dict__", chosen)
    return selected
