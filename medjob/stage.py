"""The stage contract, and the list of stages.

A stage is a function `run(context) -> metrics`. It reads only what its context holds: the fields of
the run named in `Stage.reads` (they make up its key), the verified artifacts of its inputs, and the
models and data sets that the run names. It writes its result to `context.output`, which is
published when it returns. `Kind` decides how it runs and which extras its context has.

To add a stage: a params class in config/, a file in stages/, and a line in STAGES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import BaseModel

from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.progress import Progress
from medjob.artifacts.shard import WHOLE, Shard
from medjob.config import Run
from medjob.config.endpoints import Endpoint
from medjob.config.run_file import StageResources
from medjob.config.store import StoreRef
from medjob.runtime.link import Link
from medjob.sources.locations import Location
from medjob.sources.references import Reference

Metrics = dict[str, Any]
Extras = TypeVar("Extras")
OtherExtras = TypeVar("OtherExtras")
Model = TypeVar("Model", bound=BaseModel)


class Kind(StrEnum):
    """How a stage runs, and what it needs on its disk."""

    FETCH = "fetch"
    """Pins the models and data sets themselves. Its key covers their names, and no other values of
    the fields it reads."""
    DATA = "data"
    """Processes rows in this process, with tokenizers and without weights."""
    MODEL = "model"
    """Processes rows in this process, with models."""
    TRAINING = "training"
    """Trains in one process per device, on one node or several."""


@dataclass(frozen=True, slots=True)
class StageContext(Generic[Extras]):
    """Everything a stage may read. All but `extras` is plain data, so that it can be passed to
    another process."""

    run: Run
    """The fields named in the stage's `reads`. Access to any other raises AttributeError."""
    resources: StageResources
    """Batch sizes and devices. They never change what is computed."""
    locations: Mapping[str, Location]
    """Where to read each model and data set, by the reference's key. Empty for `fetch`."""
    inputs: Mapping[str, Path]
    """Directory of each input stage's artifact, verified."""
    output: Path
    """Empty directory. Its contents are published when the stage returns."""
    work: Path
    """Scratch directory, empty at the start of every attempt."""
    report_to: tuple[str, ...]
    """Experiment trackers."""
    tensorboard: Path
    """Directory for TensorBoard's event files, shared by all runs."""
    extras: Extras
    """What only this kind of stage needs."""

    def location(self, reference: Reference) -> Location:
        """Where to read a model or data set that the run names."""
        return self.locations[reference.key]

    def with_extras(self, extras: OtherExtras) -> StageContext[OtherExtras]:
        """Return a copy with other extras."""
        context = cast("StageContext[Any]", self)
        return cast("StageContext[OtherExtras]", replace(context, extras=extras))


@dataclass(frozen=True, slots=True)
class FetchExtras:
    """Extras of `fetch`."""

    pins: Mapping[str, str]
    """Digests of local references, and the pins that earlier fetches of this run chose, by key."""
    store: StoreRef
    """The run's store. Its options apply to buckets of models and data as well."""
    copies_hub: bool
    """Whether models on a hub are copied into the store."""
    copies: frozenset[str]
    """Names of the copies that earlier fetches of this run published."""
    models: Path
    """Directory of copies and converted models on this disk."""
    progress: Progress


@dataclass(frozen=True, slots=True)
class RowExtras:
    """Extras of stages that process rows in this process."""

    finished: FinishedRows
    """Rows that earlier attempts finished."""
    progress: Progress
    shard: Shard = WHOLE
    """Which share of the rows to compute."""
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)
    """`cluster.endpoints`."""
    currency: str = "USD"
    """Of their prices."""


@dataclass(frozen=True, slots=True)
class TrainingExtras:
    """Extras of a training stage, in each of its processes."""

    link: Link
    """Connection to the parent process, which stores checkpoints and shows progress."""


FetchContext = StageContext[FetchExtras]
RowContext = StageContext[RowExtras]
TrainingContext = StageContext[TrainingExtras]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the pipeline."""

    name: str
    """Command of the command line, and path segment in the store."""
    summary: str
    """One line of help."""
    kind: Kind
    reads: tuple[str, ...]
    """Paths of the fields of `Run` that the stage reads, such as `sft.max_length`."""
    inputs: Callable[[Run], tuple[str, ...]]
    """Names of the stages whose artifacts it takes. This can depend on the run."""
    reads_without_sft: tuple[str, ...] = ()
    """What it reads as well if the run has no `sft` whose model it continues."""
    version: int = 1
    """Increased when the same fields and inputs come to mean a different output."""

    def fields(self, run: Run) -> tuple[str, ...]:
        """Paths of the fields that the stage reads in this run."""
        return self.reads if "sft" in _names(run) else (*self.reads, *self.reads_without_sft)

    @property
    def trains(self) -> bool:
        """Whether the stage runs in training processes."""
        return self.kind is Kind.TRAINING

    def entry(self) -> Callable[[Any], Metrics]:
        """Import the stage's function, and with it the libraries that the stage needs."""
        from importlib import import_module

        run: Callable[[Any], Metrics] = import_module(f"medjob.stages.{self.name}").run
        return run

    def share(self) -> Callable[[Any], object]:
        """Import the function that computes one shard's share of the rows and keeps them as
        finished rows. After that, the stage's own function finds nothing left to compute, and
        writes the result."""
        from importlib import import_module

        compute: Callable[[Any], object] = import_module(f"medjob.stages.{self.name}").compute
        return compute


def _after(*stages: str) -> Callable[[Run], tuple[str, ...]]:
    return lambda _: stages


def _names(run: Run) -> list[str]:
    return ["fetch", *(run.stages or ())]


def _present(run: Run, *stages: str) -> tuple[str, ...]:
    return tuple(name for name in stages if name in _names(run))


def _dpo_inputs(run: Run) -> tuple[str, ...]:
    pairs = {"judge": ("judge",), "data": ("prepare",), "both": ("judge", "prepare")}
    return (*_present(run, "sft"), *pairs[run.dpo.pairs])


def _evaluate_inputs(run: Run) -> tuple[str, ...]:
    trained = tuple(name for name in ("sft", "dpo") if name in run.evaluate.models)
    judges = "dpo" in trained or run.evaluate.pairwise
    return ("prepare", *trained, *(_present(run, "judge") if judges else ()))


_POLICY = ("seed", "base_model", "adapter", "method", "dtype")

STAGES: tuple[Stage, ...] = (
    Stage(
        "fetch",
        "pin models and data sets to commits and digests, and copy what is in buckets",
        Kind.FETCH,
        ("base_model", "adapter", "judge", "prepare", "evaluate", "prompt"),
        _after(),
        version=3,
    ),
    Stage(
        "prepare",
        "clean, deduplicate, split and render the rows",
        Kind.DATA,
        ("seed", "base_model", "prompt", "prepare", "sft.max_length", "dpo.pairs"),
        _after(),
        version=3,
    ),
    Stage(
        "sft",
        "fine-tune on the prepared answers",
        Kind.TRAINING,
        (*_POLICY, "lora", "sft"),
        _after("prepare"),
        version=3,
    ),
    Stage(
        "candidates",
        "sample several answers to each preference prompt",
        Kind.MODEL,
        (*_POLICY, "prompt", "candidates"),
        lambda run: ("prepare", *_present(run, "sft")),
        version=2,
    ),
    Stage(
        "judge",
        "score the answers and build preference pairs",
        Kind.MODEL,
        (*_POLICY, "prompt", "judge"),
        _after("prepare", "candidates"),
        version=2,
    ),
    Stage(
        "dpo",
        "optimize on the preference pairs",
        Kind.TRAINING,
        (*_POLICY, "prompt", "dpo"),
        _dpo_inputs,
        ("lora",),
        version=2,
    ),
    Stage(
        "evaluate",
        "compare base, sft and dpo on the same rows",
        Kind.MODEL,
        (*_POLICY, "prompt", "judge", "evaluate"),
        _evaluate_inputs,
        version=2,
    ),
    Stage(
        "export",
        "merge the adapter into a model to serve",
        Kind.MODEL,
        (*_POLICY, "prompt", "export"),
        lambda run: (run.export.source,),
        version=2,
    ),
)


ROW_STAGES = ("candidates", "judge", "evaluate")
"""The stages that work through rows with a model, and can be divided into shards."""


def get_stage(name: str) -> Stage:
    """Return the stage called `name`."""
    return next(stage for stage in STAGES if stage.name == name)


def stages_of(run: Run, until: str | None = None) -> tuple[Stage, ...]:
    """The stages of a run in their order.

    Args:
        until: The last one; stages that come after it are left out, whether it is in the run or
            not. Default: all.
    """
    names = [stage.name for stage in STAGES]
    end = len(STAGES) if until is None else names.index(until) + 1
    return tuple(stage for stage in STAGES[:end] if stage.name in _names(run))


def select(run: Run, reads: tuple[str, ...]) -> Run:
    """Return a Run with only the fields in `reads`, so that nothing outside a stage's key can
    affect its output."""
    return _select(run, [path.split(".") for path in reads])


def _select(model: Model, paths: list[list[str]]) -> Model:
    chosen: dict[str, Any] = {}
    for name in dict.fromkeys(path[0] for path in paths):
        below = [path[1:] for path in paths if path[0] == name]
        value = getattr(model, name)
        chosen[name] = value if [] in below else _select(value, below)
    selected = model.model_copy()  # model_construct would build every default, only to discard it
    object.__setattr__(selected, "__dict__", chosen)
    return selected
