"""The one way any stage runs: find its key, skip or fetch inputs, run, publish."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from medjob import __version__, preempt, sources
from medjob.artifact import MARKER, Artifact, Attempt, Manifest, parse_manifest
from medjob.checkpoints import Checkpoints
from medjob.config import Job
from medjob.config.job import StageResources
from medjob.errors import InputError, MedjobError, Preempted, told
from medjob.files import fingerprint
from medjob.progress import Progress
from medjob.rows import FinishedRows
from medjob.stage import Stage, StageContext, get_stage, select
from medjob.store import Store, open_store

_log = logging.getLogger(__name__)
_LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "pyarrow",
    "boto3",
    "google-cloud-storage",
)


@dataclass(slots=True)
class Line:
    """A job and its store: finds each stage's artifact, and makes the missing ones."""

    job: Job
    store: Store

    @classmethod
    def open(cls, job: Job) -> Line:
        """Open the job's store."""
        return cls(job, open_store(job.cluster.store))

    def artifact(self, stage: Stage) -> Artifact:
        """Where `stage`'s artifact is, or will be.

        Raises:
            InputError: an earlier stage is not published yet, so the key cannot be known.
        """
        return Artifact(self.store, self.job.run.name, stage.name, fingerprint(self._key_material(stage)))

    def run(self, stage: Stage) -> Manifest:
        """Make `stage`'s artifact, unless it is there and verifies."""
        artifact = self.artifact(stage)
        manifest = artifact.manifest()
        if manifest is not None:
            artifact.verify(manifest)
            _log.info("%s: skipped, %s is published and verified", stage.name, artifact.prefix)
            return manifest
        _log.info("%s: %s", stage.name, stage.summary)
        attempt = Attempt.begin(artifact, owner=f"{platform.node()}:{os.getpid()}")
        began = time.monotonic()
        try:
            with preempt.before_exit(lambda: attempt.record(_outcome(Preempted("stopped by a signal"), time.monotonic() - began))):
                manifest = self._make(stage, attempt)
        except BaseException as error:
            error = told(error)
            with contextlib.suppress(Exception):  # what has gone wrong matters more than a record of it
                attempt.record(_outcome(error, time.monotonic() - began))
            raise error from None if isinstance(error, MedjobError) else error.__cause__
        attempt.record({"exit_code": 0, "seconds": round(time.monotonic() - began, 1)})
        _log.info("%s: published %s in %.0f s", stage.name, artifact.prefix, time.monotonic() - began)
        return manifest

    def _make(self, stage: Stage, attempt: Attempt) -> Manifest:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        context = self._context(stage, attempt)
        metrics = stage.entry()(context)
        manifest = attempt.publish(
            context.output,
            params=sources.key_material(context.run, context.pins),
            inputs=self._input_digests(stage),
            metrics=metrics,
            provenance={"started": started, "finished": datetime.now(UTC).isoformat(timespec="seconds"), **_provenance()},
        )
        shutil.rmtree(context.work.parent, ignore_errors=True)
        return manifest

    def _context(self, stage: Stage, attempt: Attempt) -> StageContext:
        cluster = self.job.cluster
        root = self._work_dir / attempt.artifact.prefix / str(attempt.epoch)
        shutil.rmtree(root.parent, ignore_errors=True)  # what earlier attempts left on this disk
        context = StageContext(
            run=select(self.job.run, stage.reads),
            resources=getattr(self.job.resources, stage.name, None) or StageResources(gpus=0),
            pins=self._pins(stage),
            inputs={name: self._fetch(name, root / "inputs" / name) for name in stage.inputs(self.job.run)},
            output=root / "output",
            work=root / "work",
            cache=Path(cluster.work_dir).absolute() / "models",
            report_to=tuple(cluster.report_to),
            checkpoints=Checkpoints(attempt, cluster.checkpoints_to_keep, root / "uploads"),
            finished=FinishedRows(attempt),
            progress=Progress(stage.name, attempt.artifact),
        )
        context.output.mkdir(parents=True)
        context.work.mkdir()
        return context

    def _fetch(self, name: str, folder: Path) -> Path:
        artifact, manifest = self._published(name)
        return artifact.fetch(manifest, folder)

    def _published(self, name: str) -> tuple[Artifact, Manifest]:
        artifact = self.artifact(get_stage(name))
        manifest = artifact.manifest()
        if manifest is None:
            raise InputError(f"{artifact.prefix}: is not published yet", f"run `medjob {name}` first, or `medjob run` for all stages")
        return artifact, manifest

    def _input_digests(self, stage: Stage) -> dict[str, str]:
        return {name: self._published(name)[1].digest for name in stage.inputs(self.job.run)}

    def _key_material(self, stage: Stage) -> dict[str, Any]:
        run = select(self.job.run, stage.reads)
        if stage.references_only:
            material: Any = sorted(self._local_or_spelled(reference) for reference in sources.references(run))
        else:
            material = sources.key_material(run, self._pins(stage))
        return {
            "stage": stage.name,
            "version": stage.version,
            "run": material,
            "inputs": self._input_digests(stage),
        }

    @staticmethod
    def _local_or_spelled(reference: sources.Reference) -> str:
        return sources.spelling(reference) if sources.is_remote(reference) else sources.local_pin(reference)

    def _pins(self, stage: Stage) -> Mapping[str, str]:
        run = select(self.job.run, stage.reads)
        local = sources.local_pins(run)
        if stage.name == "fetch":
            return self._earlier_pins() | local
        if not any(map(sources.is_remote, sources.references(run))):
            return local
        return self._commits(*self._published("fetch")) | local

    def _earlier_pins(self) -> dict[str, str]:
        """Commits that this run's earlier fetches chose: a branch that has moved on must not change a run half-way."""
        found = []
        for entry in self.store.list(f"{self.job.run.name}/fetch/"):
            blob = self.store.get(entry.key) if entry.key.endswith(f"/{MARKER}") else None
            if blob is not None:
                manifest = parse_manifest(blob.data, entry.key)
                found.append((str(manifest.provenance.get("finished")), manifest))
        pins: dict[str, str] = {}
        for _, manifest in sorted(found, key=lambda pair: pair[0], reverse=True):
            pins |= self._commits(Artifact(self.store, self.job.run.name, "fetch", manifest.key), manifest)
        return pins

    def _commits(self, artifact: Artifact, manifest: Manifest) -> dict[str, str]:
        with self._scratch() as folder:
            artifact.fetch(manifest, folder)
            return dict(json.loads((folder / "pins.json").read_text())["hub"])

    @property
    def _work_dir(self) -> Path:
        return Path(self.job.cluster.work_dir).absolute() / "work"

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder that is gone afterwards."""
        self._work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._work_dir) as folder:
            yield Path(folder)


def _outcome(error: BaseException, seconds: float) -> dict[str, Any]:
    code = error.exit_code if isinstance(error, MedjobError) else 1
    return {"exit_code": code, "reason": f"{type(error).__name__}: {error}", "seconds": round(seconds, 1)}


def _provenance() -> dict[str, Any]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "medjob": __version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "host": platform.node(),
        "libraries": versions,
    }


def _git_revision() -> str | None:
    """The commit of this checkout; None outside of one, or where there is no git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
