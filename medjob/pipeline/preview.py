"""`medjob preview`: a sample of every source, as the model will see it. Nothing is published."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from medjob.config import RunFile
from medjob.config.prepare import DataSource, PrepareParams
from medjob.data.clean import Role, safety_sources
from medjob.data.preview import Preview, RowViewer, Sample, compare_samples, take_sample
from medjob.data.prompts import RowBuilder
from medjob.errors import MedjobError
from medjob.pipeline.context import place
from medjob.pipeline.runner import Pipeline
from medjob.sources.buckets import with_run_file_key
from medjob.sources.locations import Location
from medjob.sources.references import Reference, is_remote, references_in
from medjob.stage import get_stage, select
from medjob.train.model import load_tokenizer


def preview(run_file: RunFile, rows: int) -> list[Preview]:
    """Read a sample of every source, and render `rows` rows of each.

    Raises:
        ConfigError: the model's chat template cannot be used.
        DataError: no row of a source can be used.
        InputError: a file or the tokenizer is missing.
    """
    run = run_file.run
    locations = _locations(run_file)
    samples = [
        _sample(key, source, role, locations, run.seed)
        for key, source, role in _sources(run.prepare)
    ]
    compare_samples(samples, run.prepare)
    with _about("run.base_model", run.base_model):
        tokenizer = load_tokenizer(locations[run.base_model.key], convert=False)
    builder = RowBuilder(tokenizer, run.prompt)
    viewer = RowViewer(tokenizer, builder, run.sft.max_length, run.sft.overlong)
    return [viewer.show(sample, rows) for sample in samples]


def _locations(run_file: RunFile) -> Mapping[str, Location]:
    """Locate the tokenizer and the sources. Only what is on a hub or in a bucket has pins, so the
    store is not asked about anything else."""
    snapshot = Pipeline.open(run_file).snapshot()
    stage = get_stage("prepare")
    remote = any(map(is_remote, references_in(select(run_file.run, stage.reads))))
    pins = snapshot.earlier_pins() if remote else {}
    return place(snapshot, stage, pins, Path(run_file.cluster.work_dir).absolute() / "models")


def _sources(params: PrepareParams) -> Iterator[tuple[str, DataSource, Role]]:
    lists: dict[Role, tuple[str, list[DataSource]]] = {
        "sources": ("sources", params.sources),
        "safety": ("safety.sources", safety_sources(params)),
        "preference": ("preference_sources", params.preference_sources),
        "evaluation": ("evaluation_sources", params.evaluation_sources),
    }
    for role, (name, sources) in lists.items():
        for number, source in enumerate(sources):
            yield f"run.prepare.{name}.{number}", source, role


def _sample(
    key: str, source: DataSource, role: Role, locations: Mapping[str, Location], seed: int
) -> Sample:
    with _about(key, source):
        return take_sample(key, source, role, locations[source.key], seed)


@contextlib.contextmanager
def _about(key: str, reference: Reference) -> Iterator[None]:
    """Name the key and the value of the run file in an error."""
    try:
        yield
    except MedjobError as error:
        raise with_run_file_key(key, reference, error) from None
