"""Finds the artifact of each stage: its key, and the pins of the models and data behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from medjob.artifacts.artifact import MARKER, Artifact, Manifest
from medjob.config import Run, RunFile
from medjob.config.base import ModelRef
from medjob.errors import InputError
from medjob.runtime.files import fingerprint
from medjob.sources import references
from medjob.sources.buckets import with_run_file_key
from medjob.sources.copies import copies_in, copy_name
from medjob.sources.pins import Pins
from medjob.sources.references import NotInstalledError, Reference
from medjob.stage import Kind, Stage, get_stage, select
from medjob.store import Store

Published = tuple[Artifact, Manifest]


@dataclass(slots=True)
class Snapshot:
    """A cached view of a run's store, which reads each marker once.

    The keys of all stages then cost one request per stage.
    """

    run_file: RunFile
    store: Store
    known: dict[str, Pins] = field(default_factory=dict)
    """Pins of published fetches, by the seal of the marker. They never change, so snapshots share
    them."""
    _markers: dict[str, Manifest | None] = field(default_factory=dict)
    _pins: dict[str, Mapping[str, str]] = field(default_factory=dict)
    _fetches: list[Published] | None = None

    def artifact(self, stage: Stage) -> Artifact:
        """Find where `stage`'s artifact is, or will be.

        Raises:
            InputError: an earlier stage is not published yet, so the key is not known.
        """
        try:
            material = self._key_material(stage)
        except NotInstalledError as error:
            return self._newest_covering_fetch(error)
        parts = {
            "stage": stage.name,
            "version": stage.version,
            "run": material,
            "inputs": self.input_digests(stage),
        }
        return Artifact(self.store, self.run_file.run.name, stage.name, fingerprint(parts))

    def manifest(self, artifact: Artifact) -> Manifest | None:
        """The artifact's marker; None while it is not published."""
        if artifact.prefix not in self._markers:
            self._markers[artifact.prefix] = artifact.manifest()
        return self._markers[artifact.prefix]

    def published(self, name: str) -> Published:
        """A stage's artifact and its marker.

        Raises:
            InputError: it is not published yet.
        """
        artifact = self.artifact(get_stage(name))
        manifest = self.manifest(artifact)
        if manifest is None:
            raise InputError(
                f"{artifact.prefix} is not published yet",
                f"run `medjob {name}` first, or `medjob run` for all stages",
            )
        return artifact, manifest

    def input_digests(self, stage: Stage) -> dict[str, str]:
        """Digests of the stage's inputs, which enter its key."""
        return {name: self.published(name)[1].digest for name in stage.inputs(self.run_file.run)}

    def pins(self, stage: Stage) -> Mapping[str, str]:
        """Pins of everything that `stage` names, by the reference's key.

        Local files are digested here; the rest comes from what `fetch` published. For `fetch`
        itself, the pins of this run's earlier fetches are included, because a branch that has
        moved must not change a run half-way.
        """
        if stage.name not in self._pins:
            self._pins[stage.name] = self._find_pins(stage)
        return self._pins[stage.name]

    @property
    def copies_hub(self) -> bool:
        """Whether `fetch` also copies models from a hub.

        True if the store is a bucket: then stages may run on machines that can reach nothing else.
        """
        return self.store.local_path("") is None

    def mirrored(self, reference: Reference) -> bool:
        """Whether `fetch` copies `reference` into the store.

        It copies everything in a bucket, models of other runs and, if the store is a bucket, models
        from a hub. Data sets stay on the hub: reading them takes the hub's own library, and
        `prepare`, which has it, keeps no GPU waiting.
        """
        if references.is_hub(reference):
            return self.copies_hub and isinstance(reference, ModelRef)
        return references.is_copied(reference)

    def copy_of(
        self, reference: Reference, pins: Mapping[str, str]
    ) -> tuple[Artifact, Manifest, str]:
        """The published `fetch` of this run that holds a copy of `reference`, and the copy's name.

        Raises:
            InputError: no fetch holds one.
        """
        name = copy_name(reference, pins[reference.key])
        for artifact, manifest in self.fetches():
            if name in copies_in(manifest):
                return artifact, manifest, name
        prefix = self.published("fetch")[0].prefix
        raise InputError(
            f"{reference.key}: the store has no copy of it",
            f"delete {self.store.uri}/{prefix}, and `medjob fetch` copies it again",
        )

    def fetches(self) -> list[Published]:
        """Every published `fetch` of this run, newest first."""
        if self._fetches is None:
            run = self.run_file.run.name
            paths = (entry.key.split("/") for entry in self.store.list(f"{run}/fetch/"))
            keys = [path[2] for path in paths if path[3:] == [MARKER]]
            markers = [self.manifest(Artifact(self.store, run, "fetch", key)) for key in keys]
            newest = sorted(
                (manifest for manifest in markers if manifest),
                key=lambda manifest: str(manifest.provenance.get("finished")),
                reverse=True,
            )
            self._fetches = [
                (Artifact(self.store, run, "fetch", manifest.key), manifest) for manifest in newest
            ]
        return self._fetches

    def copies(self) -> frozenset[str]:
        """Names of all copies that this run's fetches hold."""
        return frozenset().union(*(copies_in(manifest) for _, manifest in self.fetches()))

    def _run(self, stage: Stage) -> Run:
        return select(self.run_file.run, stage.fields(self.run_file.run))

    def _key_material(self, stage: Stage) -> object:
        if stage.kind is Kind.FETCH:
            return self._references_key()
        return references.key_material(self._run(stage), self.pins(stage))

    def _references_key(self) -> list[str]:
        """Key material of `fetch`: digests of local references, and the names of remote ones."""
        run = self._run(get_stage("fetch"))
        return sorted(
            self._named_key(path, each) for path, each in references.named_references(run)
        )

    def _named_key(self, path: str, reference: Reference) -> str:
        try:
            return self._reference_key(reference)
        except InputError as error:
            if path != "run.adapter" or isinstance(error, NotInstalledError):
                raise  # the message has the value, which says where it is
            raise with_run_file_key(path, reference, error) from None

    def _reference_key(self, reference: Reference) -> str:
        if not references.is_remote(reference):
            return references.local_pin(reference)
        if references.is_hub(reference) and self.mirrored(reference):
            return f"{reference.key} copied"
        return reference.key

    def _find_pins(self, stage: Stage) -> dict[str, str]:
        here, complete = self._local_pins(stage)
        if stage.kind is Kind.FETCH:
            return self.earlier_pins() | here
        return here if complete else self._pins_of(*self.published("fetch")).by_key() | here

    def _local_pins(self, stage: Stage) -> tuple[dict[str, str], bool]:
        """Digests of what is on this machine, and whether they cover everything `stage` names."""
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

    def earlier_pins(self) -> dict[str, str]:
        """Remote pins of this run's earlier fetches. The first choice wins."""
        pins: dict[str, str] = {}
        for artifact, manifest in self.fetches():  # newest first, so that older ones overwrite
            found = self._pins_of(artifact, manifest)
            pins |= found.hub | found.buckets
        return pins

    def _pins_of(self, artifact: Artifact, manifest: Manifest) -> Pins:
        if manifest.seal not in self.known:
            self.known[manifest.seal] = Pins.of(artifact, manifest)
        return self.known[manifest.seal]

    def _newest_covering_fetch(self, missing: NotInstalledError) -> Artifact:
        """Fallback for a machine that lacks a package and so cannot compute the key of `fetch`."""
        run = self._run(get_stage("fetch"))
        for artifact, manifest in self.fetches():
            pins = self._pins_of(artifact, manifest)
            if all(self._covers(pins, reference) for reference in references.references_in(run)):
                return artifact
        raise InputError(
            f"{self.run_file.run.name}/fetch is not published yet, and cannot run here: "
            f"{missing.message}",
            f"run `medjob fetch` on a machine that has the package, or {missing.hint}",
        )

    def _covers(self, pins: Pins, reference: Reference) -> bool:
        name = reference.key
        if references.is_remote(reference):
            pin = (pins.hub | pins.buckets).get(name)
            if pin is None:
                return False
            return not self.mirrored(reference) or copy_name(reference, pin) in self.copies()
        try:
            pin = references.local_pin(reference)
        except NotInstalledError:
            return name in pins.packages
        return (
            pin == pins.packages.get(name)
            if references.is_package(reference)
            else pin in pins.local
        )
