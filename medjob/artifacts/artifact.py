"""Artifacts: what a stage published, how it is named, and how it is trusted.

    <store>/<run>/<stage>/<key12>/LATEST.json              epoch and its owner; compare-and-swap only
                                 /data/<epoch>/...          immutable files
                                 /_SUCCESS.json             marker = manifest; create-only; written last
                                 /checkpoints/...           see checkpoints.py
                                 /parts/...                 finished rows, see rows.py
                                 /attempts/<epoch>.json     how an attempt ended (on its other nodes: <epoch>-node<n>.json)
                                 /progress.json             step, total, loss, speed; overwritten

The key is a hash of everything that decides the content. Two attempts can run at once (a node cut off from its cluster
goes on writing), so each takes an epoch and writes only under paths that bear it.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medjob.errors import InputError, SupersededError
from medjob.runtime.files import Checksums, File, canonical_json, digest_of, fingerprint, safe_path
from medjob.store import Conflict, Store
from medjob.store.transfer import download_files, find_damage, upload_folder

MARKER = "_SUCCESS.json"
LATEST = "LATEST.json"
_EPOCH = re.compile(
    r"^/(?:data|attempts)/(\d+)[/.-]|^/checkpoints/step-\d+-(\d+)/|^/parts/[^/]+/(\d+)-"
)


class Manifest(BaseModel):
    """What a marker holds. `digest` names the content: equal work has equal digests in any store."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    run: str
    stage: str
    key: str
    epoch: int
    digest: str
    params: dict[str, Any]
    inputs: dict[str, str]
    files: list[File]
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    seal: str = ""
    """Fingerprint of all the fields above: a flipped byte anywhere in the marker is found."""

    def sealed(self) -> Manifest:
        """The same, with its seal."""
        return self.model_copy(update={"seal": self._fingerprint()})

    def intact(self) -> bool:
        """Whether the seal and the digest fit what they stand for."""
        return self.seal == self._fingerprint() and self.digest == digest_of(self.files)

    def _fingerprint(self) -> str:
        return fingerprint(json.loads(self.model_dump_json(exclude={"seal"})))


@dataclass(frozen=True, slots=True)
class Artifact:
    """The place of one artifact: `<run>/<stage>/<key12>` in a store."""

    store: Store
    run: str
    stage: str
    key: str
    """The whole key; or the twelve digits of the path, where only a listing is at hand."""

    @property
    def prefix(self) -> str:
        """The artifact's path in the store; twelve hex digits of the key are enough to tell artifacts of a stage apart."""
        return f"{self.run}/{self.stage}/{self.key[:12]}"

    def path(self, *parts: str) -> str:
        """A key below the artifact."""
        return "/".join((self.prefix, *parts))

    def manifest(self) -> Manifest | None:
        """The marker, or None while the artifact is not published.

        Raises:
            InputError: the marker is damaged, or belongs to another key.
        """
        blob = self.store.get(self.path(MARKER))
        if blob is None:
            return None
        manifest = parse_manifest(blob.data, f"{self.store.uri}/{self.path(MARKER)}")
        if not manifest.key.startswith(self.key):
            raise InputError(
                f"{self.store.uri}/{self.path(MARKER)}: is the marker of another key ({manifest.key[:12]})",
                self._mend(),
            )
        return manifest

    def epoch(self) -> int:
        """The epoch of the newest attempt; 0 if there was none."""
        latest = self.store.get(self.path(LATEST))
        held = _parse_latest(latest.data) if latest else None
        return int(held["epoch"]) if held else _epoch_seen(self)

    def fetch(self, manifest: Manifest, folder: Path, below: str = "") -> Path:
        """Place the artifact's files, or those below a folder of it, in `folder`, every byte verified.

        Raises:
            InputError: a file is missing or damaged.
        """
        inside = f"{below}/" if below else ""
        files = [
            file.model_copy(update={"path": file.path.removeprefix(inside)})
            for file in manifest.files
            if file.path.startswith(inside)
        ]
        try:
            download_files(self.store, f"{self._data(manifest)}/{below}".rstrip("/"), files, folder)
        except InputError as error:
            raise InputError(error.message, error.hint or self._mend()) from None
        return folder

    def read(self, manifest: Manifest, path: str) -> bytes:
        """One small file, verified.

        Raises:
            InputError: it is missing or damaged.
        """
        key = f"{self._data(manifest)}/{path}"
        expected, blob = (
            next((file for file in manifest.files if file.path == path), None),
            self.store.get(key),
        )
        if expected is None or blob is None:
            raise InputError(f"{self.store.uri}/{key}: is not there", self._mend())
        sums = Checksums()
        sums.update(blob.data)
        if sums.file(path) != expected:
            raise InputError(f"{self.store.uri}/{key}: is damaged", self._mend())
        return blob.data

    def damage(self, manifest: Manifest) -> list[str]:
        """Read every byte of the artifact; a line for each file that is missing or damaged."""
        return find_damage(self.store, self._data(manifest), manifest.files)

    def verify(self, manifest: Manifest) -> None:
        """Look whether the artifact is whole: every byte on a local disk; names and sizes in a bucket, where reading costs.

        Whoever takes it as an input verifies every byte in any case, and so does `medjob verify`.

        Raises:
            InputError: a file is missing or damaged.
        """
        if self.store.local_path(self.prefix) is not None:
            problems = self.damage(manifest)
        else:
            prefix = f"{self._data(manifest)}/"
            sizes = {
                entry.key.removeprefix(prefix): entry.size for entry in self.store.list(prefix)
            }
            problems = [
                f"{self.store.uri}/{prefix}{file.path}: is not there, or not of its published size"
                for file in manifest.files
                if sizes.get(file.path) != file.size
            ]
        if problems:
            raise InputError(problems[0], self._mend())

    def _data(self, manifest: Manifest) -> str:
        return self.path("data", str(manifest.epoch))

    def _mend(self) -> str:
        return f"restore it, or delete {self.store.uri}/{self.prefix} to have it made again"


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a marker, refusing one that is damaged or whose paths lead out of their folder."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise InputError(
            f"{where}: is damaged ({error.error_count()} errors, first: {error.errors()[0]['msg']})"
        ) from None
    for file in manifest.files:
        safe_path(file.path)
    if not manifest.intact():
        raise InputError(
            f"{where}: is damaged (its seal does not match)",
            "restore it, or delete the artifact to have it made again",
        )
    return manifest


@dataclass(slots=True)
class Attempt:
    """One try at making an artifact: the holder of an epoch."""

    artifact: Artifact
    epoch: int
    version: str
    owner: str
    node: int = 0

    @classmethod
    def begin(cls, artifact: Artifact, owner: str) -> Attempt:
        """Take the next epoch. Whoever held the one before is superseded from here on."""
        store, key = artifact.store, artifact.path(LATEST)
        owner = f"{owner}:{uuid.uuid4().hex[:12]}"  # two containers may have one name and one process id
        while True:
            latest = store.get(key)
            epoch = artifact.epoch() + 1
            data = _latest(epoch, owner)
            try:
                version = (
                    store.swap(key, data, latest.version) if latest else store.create(key, data)
                )
            except Conflict:
                continue  # another attempt began at the same moment: take the epoch after it
            return cls(artifact, epoch, version, owner)

    @classmethod
    def join(cls, artifact: Artifact, epoch: int, owner: str, node: int) -> Attempt:
        """The same attempt on another of its nodes. Only the node that began it moves LATEST.json and publishes."""
        attempt = cls(artifact, epoch, "", owner, node)
        attempt.check()
        return attempt

    def check(self) -> None:
        """Raise SupersededError if a newer attempt has taken over."""
        latest = self.artifact.store.get(self.artifact.path(LATEST))
        held = _parse_latest(latest.data) if latest else None
        if held is None or (held["epoch"], held["owner"]) != (self.epoch, self.owner):
            raise self._superseded()
        self.version = (
            latest.version if latest else self.version
        )  # a move of ours may have arrived without our knowing

    def point_to(self, checkpoint: str) -> None:
        """Name the newest checkpoint in LATEST.json. Raises SupersededError if a newer attempt has taken over."""
        try:
            data = _latest(self.epoch, self.owner, checkpoint)
            self.version = self.artifact.store.swap(self.artifact.path(LATEST), data, self.version)
        except Conflict:
            raise self._superseded() from None

    def _superseded(self) -> SupersededError:
        return SupersededError(
            f"{self.artifact.prefix}: a newer attempt owns this artifact (this one is epoch {self.epoch})"
        )

    def publish(
        self,
        folder: Path,
        params: Mapping[str, Any],
        inputs: Mapping[str, str],
        metrics: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> Manifest:
        """Upload `folder` under this epoch and write the marker last.

        Raises:
            SupersededError: another attempt took over, or published first.
        """
        artifact = self.artifact
        files = upload_folder(artifact.store, folder, artifact.path("data", str(self.epoch)))
        manifest = Manifest(
            run=artifact.run,
            stage=artifact.stage,
            key=artifact.key,
            epoch=self.epoch,
            digest=digest_of(files),
            params=dict(params),
            inputs=dict(inputs),
            files=files,
            metrics=dict(metrics),
            provenance=dict(provenance),
        ).sealed()
        self.check()
        try:
            artifact.store.create(
                artifact.path(MARKER), manifest.model_dump_json(indent=1).encode()
            )
        except Conflict:
            raise SupersededError(
                f"{artifact.prefix}: another attempt published it first"
            ) from None
        return manifest

    def record(self, outcome: Mapping[str, Any]) -> None:
        """Keep how the attempt ended; a pod's own record vanishes with the pod."""
        name = f"{self.epoch}-node{self.node}.json" if self.node else f"{self.epoch}.json"
        key = self.artifact.path("attempts", name)
        self.artifact.store.put(key, json.dumps(outcome, indent=1).encode())


def _latest(epoch: int, owner: str, checkpoint: str | None = None) -> bytes:
    fields = {"epoch": epoch, "owner": owner, "checkpoint": checkpoint}
    return canonical_json(fields | {"seal": fingerprint(fields)}).encode()


def _parse_latest(data: bytes) -> dict[str, Any] | None:
    """What LATEST.json says, or None if it is damaged."""
    try:
        fields: dict[str, Any] = json.loads(data)
        return fields if fields.pop("seal") == fingerprint(fields) else None
    except (ValueError, KeyError, AttributeError):
        return None


def _epoch_seen(artifact: Artifact) -> int:
    """The highest epoch that left anything: what is used once LATEST.json is lost or damaged; 0 for a new artifact."""
    found = (
        _EPOCH.search(entry.key.removeprefix(artifact.prefix))
        for entry in artifact.store.list(artifact.path(""))
    )
    return max((int(next(filter(None, match.groups()))) for match in found if match), default=0)
