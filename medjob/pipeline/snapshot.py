"""Which artifact each stage of a job has: its key, and the pins of the models and data behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from medjob.artifacts.artifact import MARKER, Artifact, Manifest
from medjob.config import Run, RunFile
from medjob.config.base import ModelRef
from medjob.errors import InputError
from medjob.runtime.files import fingerprint
from medjob.sources import references
from medjob.sources.copies import copies_in, copy_name
from medjob.sources.pins import Pins
from medjob.sources.references import NotInstalledError, Reference
from medjob.stage import Stage, get_stage, select
from medjob.store import Store

Published = tuple[Artifact, Manifest]


@dataclass(slots=True)
class Snapshot:
    """One look at a job's store. It reads each marker once: the keys of all stages cost as many requests as there are stages."""

    run_file: RunFile
    store: Store
    known: dict[str, Pins] = field(default_factory=dict)
    """Pins of published fetches by the seals of their markers: they never change, so that looks share them."""
    _markers: dict[str, Manifest | None] = field(default_factory=dict)
    _fetched: list[Published] | None = None

    def artifact(self, stage: Stage) -> Artifact:
        """Where `stage`'s artifact is, or will be.

        Raises:
            InputError: an earlier stage is not published yet, so the key cannot be known.
        """
        try:
            material = (
                self._references()
                if stage.references_only
                else references.key_material(self._run(stage), self.pins(stage))
            )
        except NotInstalledError as error:
            return self._fetched_elsewhere(error)
        whole = {
            "stage": stage.name,
            "version": stage.version,
            "run": material,
            "inputs": self.input_digests(stage),
        }
        return Artifact(self.store, self.run_file.run.name, stage.name, fingerprint(whole))

    def manifest(self, artifact: Artifact) -> Manifest | None:
        """The artifact's marker, or None while it is not published."""
        if artifact.prefix not in self._markers:
            self._markers[artifact.prefix] = artifact.manifest()
        return self._markers[artifact.prefix]

    def published(self, name: str) -> Published:
        """A stage's artifact and its marker. Raises InputError while it is not published."""
        artifact = self.artifact(get_stage(name))
        manifest = self.manifest(artifact)
        if manifest is None:
            raise InputError(
                f"{artifact.prefix}: is not published yet",
                f"run `medjob {name}` first, or `medjob run` for all stages",
            )
        return artifact, manifest

    def input_digests(self, stage: Stage) -> dict[str, str]:
        """What stands for the inputs in the key."""
        return {name: self.published(name)[1].digest for name in stage.inputs(self.run_file.run)}

    def pins(self, stage: Stage) -> Mapping[str, str]:
        """Pins of all that `stage` names, by spelling: digests taken here, or else what `fetch` has published.

        For `fetch` itself: with those of this run's earlier fetches, since a branch that has moved on must not change a run half-way.
        """
        here, complete = self._pins_of_this_machine(stage)
        if stage.references_only:
            return self._earlier_pins() | here
        return here if complete else self._pins_of(*self.published("fetch")).by_key() | here

    @property
    def copies_hub(self) -> bool:
        """Whether `fetch` copies a hub's models too: the store is a bucket, so that stages run on machines that may reach nothing else."""
        return self.store.local_path("") is None

    def mirrored(self, reference: Reference) -> bool:
        """Whether `fetch` copies it into the store: what is in a bucket, always; a hub's model, if the store is a bucket.

        A hub's data sets stay there: it takes the hub's own library to read them, and `prepare`, which does, keeps no GPU waiting.
        """
        if references.is_hub(reference):
            return self.copies_hub and isinstance(reference, ModelRef)
        return references.is_bucket(reference)

    def copy_of(
        self, reference: Reference, pins: Mapping[str, str]
    ) -> tuple[Artifact, Manifest, str]:
        """The published `fetch` of this run that holds a copy of `reference`, and the copy's name in it.

        Raises:
            InputError: none does.
        """
        name = copy_name(reference, pins[reference.key])
        for artifact, manifest in self.fetches():
            if name in copies_in(manifest):
                return artifact, manifest, name
        prefix = self.published("fetch")[0].prefix
        raise InputError(
            f"{reference.key}: the store holds no copy of it",
            f"delete {self.store.uri}/{prefix} to have it made again",
        )

    def fetches(self) -> list[Published]:
        """Every published `fetch` of this run, the newest first."""
        if self._fetched is None:
            run = self.run_file.run.name
            paths = (entry.key.split("/") for entry in self.store.list(f"{run}/fetch/"))
            keys = [path[2] for path in paths if path[3:] == [MARKER]]
            markers = [
                manifest
                for key in keys
                if (manifest := self.manifest(Artifact(self.store, run, "fetch", key)))
            ]
            newest = sorted(
                markers, key=lambda manifest: str(manifest.provenance.get("finished")), reverse=True
            )
            self._fetched = [
                (Artifact(self.store, run, "fetch", manifest.key), manifest) for manifest in newest
            ]
        return self._fetched

    def copies(self) -> frozenset[str]:
        """Names of all copies that this run's fetches hold."""
        return frozenset().union(*(copies_in(manifest) for _, manifest in self.fetches()))

    def _run(self, stage: Stage) -> Run:
        return select(self.run_file.run, stage.reads)

    def _references(self) -> list[str]:
        """What the key of `fetch` covers: digests of what is on this machine, and the names of the rest."""
        return sorted(
            self._named(reference)
            for reference in references.references_in(self._run(get_stage("fetch")))
        )

    def _named(self, reference: Reference) -> str:
        if not references.is_remote(reference):
            return references.local_pin(reference)
        return (
            f"{reference.key} copied"
            if references.is_hub(reference) and self.mirrored(reference)
            else reference.key
        )

    def _pins_of_this_machine(self, stage: Stage) -> tuple[dict[str, str], bool]:
        """Digests of what is here; and whether that is all that the stage names."""
        pins, complete = {}, True
        for reference in references.references_in(self._run(stage)):
            try:
                if references.is_remote(reference):
                    complete = False
                else:
                    pins[reference.key] = references.local_pin(reference)
            except NotInstalledError:
                complete = False
        return pins, complete

    def _earlier_pins(self) -> dict[str, str]:
        """What this run's fetches chose, the first choice above later ones."""
        pins: dict[str, str] = {}
        for artifact, manifest in self.fetches():
            found = self._pins_of(artifact, manifest)
            pins |= found.hub | found.buckets
        return pins

    def _pins_of(self, artifact: Artifact, manifest: Manifest) -> Pins:
        if manifest.seal not in self.known:
            self.known[manifest.seal] = Pins.of(artifact, manifest)
        return self.known[manifest.seal]

    def _fetched_elsewhere(self, missing: NotInstalledError) -> Artifact:
        """The newest `fetch` that covers all that the run names: what stands for the one whose key cannot be told on this machine."""
        for artifact, manifest in self.fetches():
            pins = self._pins_of(artifact, manifest)
            if all(
                self._covered(reference, pins)
                for reference in references.references_in(self._run(get_stage("fetch")))
            ):
                return artifact
        raise InputError(
            f"{self.run_file.run.name}/fetch: is not published yet, and cannot be made here: {missing.message}",
            f"run `medjob fetch` where it is installed, or {missing.hint}",
        )

    def _covered(self, reference: Reference, pins: Pins) -> bool:
        name = reference.key
        if references.is_remote(reference):
            found = pins.hub | pins.buckets
            return name in found and (
                not self.mirrored(reference) or copy_name(reference, found[name]) in self.copies()
            )
        try:
            pin = references.local_pin(reference)
        except NotInstalledError:
            return name in pins.packages
        return (
            pin == pins.packages.get(name)
            if references.is_package(reference)
            else pin in pins.local
        )
