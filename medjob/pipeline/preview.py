"""`medjob preview`: a sample of every source, as the model will see it. Nothing is published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from medjob.config import RunFile
from medjob.pipeline.context import place
from medjob.pipeline.runner import Pipeline
from medjob.sources.locations import Location
from medjob.sources.references import is_remote, references_in
from medjob.stage import get_stage, select

if TYPE_CHECKING:
    from medjob.data.preview import Preview


def preview(run_file: RunFile, rows: int) -> list[Preview]:
    """Read a sample of every source, and render `rows` rows of each.

    Raises:
        ConfigError: the model's chat template cannot be used.
        DataError: no row of a source can be used.
        InputError: a file or the tokenizer is missing.
    """
    # The image of the orchestrator imports this package without the libraries that read rows.
    from medjob.data.preview import RowViewer, naming, take_samples
    from medjob.data.prompts import RowBuilder
    from medjob.train.model import load_tokenizer

    run = run_file.run
    locations = _locations(run_file)
    samples = take_samples(run, locations)
    with naming("run.base_model", run.base_model):
        tokenizer = load_tokenizer(locations[run.base_model.key], convert=False)
    builder = RowBuilder(tokenizer, run.prompt)
    sft = run.sft
    viewer = RowViewer(tokenizer, builder, sft.max_length, sft.overlong, sft.assistant_turns)
    return [viewer.show(sample, rows) for sample in samples]


def _locations(run_file: RunFile) -> Mapping[str, Location]:
    """Locate the tokenizer and the sources. Only what is on a hub or in a bucket has pins, so the
    store is not asked about anything else."""
    snapshot = Pipeline.open(run_file).snapshot()
    stage = get_stage("prepare")
    remote = any(map(is_remote, references_in(select(run_file.run, stage.fields(run_file.run)))))
    pins = snapshot.earlier_pins() if remote else {}
    return place(snapshot, stage, pins, Path(run_file.cluster.work_dir).absolute() / "models")
