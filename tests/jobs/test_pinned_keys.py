"""The keys of the run files in jobs/ do not change: users would have to recompute all stages.

After an intended change of what is computed, write the file again and review the difference:

    python -m tests.jobs.test_pinned_keys
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts.artifact import Attempt
from medjob.config import Run, load_run_file
from medjob.pipeline.runner import Pipeline
from medjob.sources import references
from medjob.sources.pins import Pins
from medjob.stage import stages_of
from tests.jobs.test_jobs import PRESETS, ROOT, RUNS

PINNED = Path(__file__).with_name("keys.json")
COMBINATIONS = [(path.stem,) for path in RUNS] + [
    (name, preset) for preset, names in PRESETS.items() for name in names
]


def keys(folder: Path, name: str, preset: str | None = None) -> dict[str, str]:
    """Compute the key of each stage, with made-up hub commits and artifacts."""
    files = [
        ROOT / f"jobs/{name}.yaml",
        *([ROOT / f"jobs/presets/{preset}.yaml"] if preset else []),
    ]
    pipeline = Pipeline.open(load_run_file(files, [f"cluster.store=file://{folder}/store"]))
    make_missing_files(pipeline.run_file.run, folder)
    found = {}
    for stage in stages_of(pipeline.run_file.run):
        artifact = pipeline.artifact(stage)
        found[stage.name] = artifact.key
        output = folder / stage.name
        output.mkdir()
        (output / "stage").write_text(stage.name)
        if stage.name == "fetch":
            hub = {
                reference.key: f"commit of {reference.key}"
                for reference in references.references_in(pipeline.run_file.run)
                if references.is_hub(reference)
            }
            (output / "pins.json").write_text(Pins(hub=hub).dump())
        Attempt.begin(artifact, "test").publish(
            output, params={}, inputs={}, metrics={}, provenance={}
        )
    return found


def make_missing_files(run: Run, folder: Path) -> None:
    """Create the data files that users bring themselves, below `folder`."""
    for reference in references.references_in(run):
        name = references.name_of(reference)
        if not (
            references.is_hub(reference)
            or references.is_bucket(reference)
            or references.is_package(reference)
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"rows of {name}")


def pinned() -> dict[str, dict[str, str]]:
    values: dict[str, dict[str, str]] = json.loads(PINNED.read_text())
    return values


def test_every_run_file_is_pinned() -> None:
    assert list(pinned()) == ["+".join(names) for names in COMBINATIONS]


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_keys_have_not_changed(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert keys(tmp_path, *names) == pinned()["+".join(names)]


def write() -> None:
    """Write the current keys to keys.json."""
    values: dict[str, Any] = {}
    for names in COMBINATIONS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            values["+".join(names)] = keys(Path(folder), *names)
    PINNED.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    write()
