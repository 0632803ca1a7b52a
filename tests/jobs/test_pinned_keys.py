"""The keys of the run files in jobs/ are pinned: a key that changes makes every user compute everything anew.

After a change that is meant to alter what is computed, write the file again and look at the difference:

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
from medjob.stage import STAGES
from tests.jobs.test_jobs import PRESETS, ROOT, RUNS

PINNED = Path(__file__).with_name("keys.json")
COMBINATIONS = [(path.stem,) for path in RUNS] + [
    (name, preset) for preset, names in PRESETS.items() for name in names
]


def keys(folder: Path, name: str, preset: str | None = None) -> dict[str, str]:
    """The key of each stage, where the hub's commits and the contents of every artifact are known in advance."""
    files = [
        ROOT / f"jobs/{name}.yaml",
        *([ROOT / f"jobs/presets/{preset}.yaml"] if preset else []),
    ]
    pipeline = Pipeline.open(load_run_file(files, [f"cluster.store=file://{folder}/store"]))
    make_missing_files(pipeline.run_file.run, folder)
    found = {}
    for stage in STAGES:
        artifact = pipeline.artifact(stage)
        found[stage.name] = artifact.key
        output = folder / stage.name
        output.mkdir()
        (output / "stage").write_text(stage.name)
        if stage.name == "fetch":
            hub = {
                s: f"commit of {s}"
                for r in references.references_in(pipeline.run_file.run)
                if references.is_hub(r) and (s := r.key)
            }
            (output / "pins.json").write_text(Pins(hub=hub).dump())
        Attempt.begin(artifact, "test").publish(
            output, params={}, inputs={}, metrics={}, provenance={}
        )
    return found


def make_missing_files(run: Run, folder: Path) -> None:
    """Give the paths of a user's own data a content, below `folder`."""
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
def test_keys_are_those_that_users_have(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert keys(tmp_path, *names) == pinned()["+".join(names)]


def write() -> None:
    """Write the keys as they are now."""
    values: dict[str, Any] = {}
    for names in COMBINATIONS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            values["+".join(names)] = keys(Path(folder), *names)
    PINNED.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    write()
