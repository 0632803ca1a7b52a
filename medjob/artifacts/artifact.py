"""Artifacts: the published output of a stage, its paths in the store, and its verification.

    <store>/<run>/<stage>/<key12>/LATEST.json           epoch and owner; compare-and-swap only
                                 /data/<epoch>/...       immutable files
                                 /_SUCCESS.json          the marker; create-only, written last
                                 /checkpoints/...        see checkpoints.py
                                 /parts/...              see finished_rows.py
                                 /attempts/<epoch>.json  outcome of an attempt; on nodes other than
                                                         the first, <epoch>-node<n>.json
                                 /progress.json          step, total, loss, speed; overwritten

The key is a hash of everything that determines the content. Two attempts can run at the same time,
for example when a node that was cut off from its cluster keeps writing. Therefore each attempt
takes an epoch and writes only under paths that contain it.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medjob.artifacts.seal import Sealed, explain
from medjob.errors import InputError, RetryError, SupersededError
from medjob.runtime.files import Checksums, File, canonical_json, digest_of, fingerprint, safe_path
from medjob.store import Conflict, Store
from medjob.store.transfer import download_files, find_damage, upload_folder

MARKER = "_SUCCESS.json"
LATEST = "LATEST.json"
PUBLISHED_AND_VERIFIED = "published and verified"
PUBLISHED_SIZES_MATCH = "published; names and sizes match"
# Bounds the epochs that planted names and a planted LATEST.json can lead to.
_MAX_EPOCH = 999_999_999
_EPOCH = re.compile(
    r"^/(?:data|attempts)/([0-9]{1,9})[/.-]|^/checkpoints/step-[0-9]+-([0-9]{1,9})/"
    r"|^/parts/[^/]+/([0-9]{1,9})-"
)
Epoch = Annotated[int, Field(ge=0, le=_MAX_EPOCH)]
SealedObject = TypeVar("SealedObject", bound=Sealed)


class Manifest(Sealed):
    """Content of a marker. `digest` identifies the files: equal work has equal digests anywhere."""

    schema_version: Literal[1] = 1
    epoch: Epoch
    digest: str
    params: dict[str, Any]
    inputs: dict[str, str]
    files: list[File]
    metrics: dict[str, Any]
    provenance: dict[str, Any]

    def check(self, store: Store, where: str) -> None:
        """Check the seal, the digest, and that every path is inside the artifact.

        Raises:
            InputError: one of them is wrong. `where` names the marker.
        """
        for file in self.files:
            safe_path(file.path)
        super().check(store, where)
        if self.digest != digest_of(self.files):
            raise explain(self.content(), self.seal, store, where)


class _Latest(BaseModel):
    """Content of LATEST.json.

    It only orders attempts, and who can change it could also delete it. Its hash therefore reveals
    accidental damage and copies, and is no seal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    artifact: str
    """Prefix of the artifact."""
    epoch: Epoch
    owner: str
    checkpoint: str | None
    """Name of the newest checkpoint of this attempt."""
    hash: str = ""

    def dump(self) -> bytes:
        """Return the file's content."""
        return canonical_json(self.model_dump() | {"hash": self._expected_hash()}).encode()

    def is_intact(self, artifact: Artifact) -> bool:
        """Whether it was written for `artifact` and has not changed since."""
        return self.artifact == artifact.prefix and self.hash == self._expected_hash()

    def _expected_hash(self) -> str:
        return fingerprint(self.model_dump(exclude={"hash"}))


@dataclass(frozen=True, slots=True)
class Artifact:
    """One artifact at `<run>/<stage>/<key12>` in a store, whether or not it is published yet."""

    store: Store
    run: str
    stage: str
    key: str
    """The whole key, or only the 12 hex digits of the path if it comes from a listing."""

    @property
    def prefix(self) -> str:
        """The artifact's path in the store. 12 hex digits distinguish the artifacts of a stage."""
        return f"{self.run}/{self.stage}/{self.key[:12]}"

    def path(self, *parts: str) -> str:
        """Return a store key below the artifact."""
        return "/".join((self.prefix, *parts))

    def manifest(self) -> Manifest | None:
        """Read the marker. Return None if the artifact is not published.

        Raises:
            InputError: the marker is damaged, or belongs to another artifact.
        """
        return self.read_sealed(Manifest, MARKER)

    def read_sealed(self, kind: type[SealedObject], *parts: str) -> SealedObject | None:
        """Read and verify one of the artifact's sealed objects. Return None if it does not exist.

        Raises:
            InputError: it is damaged, or belongs to another artifact.
        """
        blob = self.store.get(self.path(*parts))
        if blob is None:
            return None
        where = f"{self.store.uri}/{self.path(*parts)}"
        found = _parse_sealed(kind, blob.data, where)
        found.check(self.store, where)
        owner = Artifact(self.store, found.run, found.stage, found.key)
        # A key that comes from a listing has only 12 digits.
        if owner.prefix != self.prefix or not found.key.startswith(self.key):
            raise InputError(
                f"{where} belongs to another artifact: {owner.prefix}", self._restore_hint()
            )
        return found

    def epoch(self) -> int:
        """Return the epoch of the newest attempt, or 0 if there was none."""
        blob = self.store.get(self.path(LATEST))
        latest = _parse_latest(blob.data, self) if blob else None
        return latest.epoch if latest else _highest_epoch(self)

    def fetch(self, manifest: Manifest, folder: Path, below: str = "") -> Path:
        """Download the artifact's files to `folder` and verify every byte.

        `below` limits the download to one folder of the artifact.

        Raises:
            InputError: a file is missing or damaged.
        """
        prefix = f"{below}/" if below else ""
        files = [
            file.model_copy(update={"path": file.path.removeprefix(prefix)})
            for file in manifest.files
            if file.path.startswith(prefix)
        ]
        source = f"{self._data_path(manifest)}/{below}".rstrip("/")
        try:
            download_files(self.store, source, files, folder)
        except InputError as error:
            raise InputError(error.message, error.hint or self._restore_hint()) from None
        return folder

    def read(self, manifest: Manifest, path: str) -> bytes:
        """Read and verify one small file.

        Raises:
            InputError: the file is missing or damaged.
        """
        key = f"{self._data_path(manifest)}/{path}"
        expected = next((file for file in manifest.files if file.path == path), None)
        blob = self.store.get(key)
        if expected is None or blob is None:
            raise InputError(f"{self.store.uri}/{key} does not exist", self._restore_hint())
        checksums = Checksums()
        checksums.update(blob.data)
        if checksums.file(path) != expected:
            raise InputError(f"{self.store.uri}/{key} is damaged", self._restore_hint())
        return blob.data

    def damage(self, manifest: Manifest) -> list[str]:
        """Read every byte of the artifact. Return one message per missing or damaged file."""
        return find_damage(self.store, self._data_path(manifest), manifest.files)

    def verify(self, manifest: Manifest) -> str:
        """Verify the artifact. Returns PUBLISHED_AND_VERIFIED or PUBLISHED_SIZES_MATCH, for logs.

        In a folder, every byte is read. In a bucket, where reading takes time and money, only names
        and sizes are compared. A stage that takes the artifact as an input verifies every byte in
        both cases, and so does `medjob verify`.

        Raises:
            InputError: a file is missing or damaged.
        """
        if self.store.local_path(self.prefix) is not None:
            problems = self.damage(manifest)
            result = PUBLISHED_AND_VERIFIED
        else:
            problems = self._compare_listing(manifest)
            result = PUBLISHED_SIZES_MATCH
        if problems:
            raise InputError(problems[0], self._restore_hint())
        return result

    def _compare_listing(self, manifest: Manifest) -> list[str]:
        """Return one message per file that the store does not list with its published size."""
        prefix = f"{self._data_path(manifest)}/"
        sizes = {entry.key.removeprefix(prefix): entry.size for entry in self.store.list(prefix)}
        problems = []
        for file in manifest.files:
            where = f"{self.store.uri}/{prefix}{file.path}"
            if file.path not in sizes:
                problems.append(f"{where} does not exist")
            elif sizes[file.path] != file.size:
                problems.append(
                    f"{where} has {sizes[file.path]} bytes, but was published with {file.size}"
                )
        return problems

    def _data_path(self, manifest: Manifest) -> str:
        return self.path("data", str(manifest.epoch))

    def _restore_hint(self) -> str:
        return f"restore it, or delete {self.store.uri}/{self.prefix} to compute the artifact again"


def _parse_sealed(kind: type[SealedObject], data: bytes, where: str) -> SealedObject:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise InputError(
            f"{where} is damaged ({error.error_count()} errors, first: {error.errors()[0]['msg']})"
        ) from None


class AttemptLost(RetryError):
    """The record of the attempt is gone: the store was deleted, emptied or replaced."""


@dataclass(slots=True)
class Attempt:
    """One attempt to compute an artifact. It owns an epoch."""

    artifact: Artifact
    epoch: int
    version: str
    owner: str
    node: int = 0

    @classmethod
    def begin(cls, artifact: Artifact, owner: str) -> Attempt:
        """Take the next epoch. This supersedes any earlier attempt.

        Raises:
            InputError: the store names an epoch so high that only a damaged store can.
        """
        store, key = artifact.store, artifact.path(LATEST)
        # Two containers can have the same name and process id.
        owner = f"{owner}:{uuid.uuid4().hex[:12]}"
        while True:
            latest = store.get(key)
            epoch = artifact.epoch() + 1
            if epoch > _MAX_EPOCH:
                raise InputError(
                    f"{store.uri}/{artifact.prefix} has had {epoch - 1} attempts, which is "
                    "impossible",
                    f"delete {store.uri}/{artifact.prefix} to compute the artifact again",
                )
            data = _Latest(
                artifact=artifact.prefix, epoch=epoch, owner=owner, checkpoint=None
            ).dump()
            try:
                version = (
                    store.swap(key, data, latest.version) if latest else store.create(key, data)
                )
            except Conflict:
                continue  # another attempt started at the same moment and took this epoch
            return cls(artifact, epoch, version, owner)

    @classmethod
    def join(cls, artifact: Artifact, epoch: int, owner: str, node: int) -> Attempt:
        """Join another node's attempt. Only its first node updates LATEST.json and publishes."""
        attempt = cls(artifact, epoch, "", owner, node)
        attempt.check()
        return attempt

    def check(self) -> None:
        """Check that this is still the newest attempt.

        Raises:
            SupersededError: a newer attempt has taken over.
            AttemptLost: the store was deleted, emptied or replaced.
        """
        key = self.artifact.path(LATEST)
        blob = self.artifact.store.get(key)
        latest = _parse_latest(blob.data, self.artifact) if blob else None
        if blob is None or latest is None:
            raise AttemptLost(
                f"{self.artifact.store.uri}/{key} was {'damaged' if blob else 'deleted'} while "
                "this attempt was running, so it can no longer store anything safely",
                "restore the store, or run the same command again to start from what is in it now",
            )
        if (latest.epoch, latest.owner) != (self.epoch, self.owner):
            raise self._superseded()
        # An earlier update may have reached the store although its response was lost.
        self.version = blob.version

    def point_to(self, checkpoint: str) -> None:
        """Name the newest checkpoint in LATEST.json.

        Raises:
            SupersededError: a newer attempt has taken over.
        """
        latest = _Latest(
            artifact=self.artifact.prefix,
            epoch=self.epoch,
            owner=self.owner,
            checkpoint=checkpoint,
        )
        try:
            self.version = self.artifact.store.swap(
                self.artifact.path(LATEST), latest.dump(), self.version
            )
        except Conflict:
            self.check()  # tells a newer attempt from a deleted store
            raise self._superseded() from None

    def _superseded(self) -> SupersededError:
        return SupersededError(
            f"{self.artifact.prefix}: a newer attempt owns this artifact "
            f"(this attempt has epoch {self.epoch})"
        )

    def publish(
        self,
        folder: Path,
        params: Mapping[str, Any],
        inputs: Mapping[str, str],
        metrics: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> Manifest:
        """Upload `folder` under this epoch, then write the marker.

        Raises:
            SupersededError: a newer attempt has taken over, or another one published first.
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
        ).sealed(artifact.store)
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
        """Store the outcome of the attempt. A pod's own record is deleted with the pod."""
        name = f"{self.epoch}-node{self.node}.json" if self.node else f"{self.epoch}.json"
        key = self.artifact.path("attempts", name)
        self.artifact.store.put(key, json.dumps(outcome, indent=1).encode())


def _parse_latest(data: bytes, artifact: Artifact) -> _Latest | None:
    """Parse LATEST.json. Return None if it is damaged, or was written for another artifact."""
    try:
        latest = _Latest.model_validate_json(data)
    except ValidationError:
        return None
    return latest if latest.is_intact(artifact) else None


def _highest_epoch(artifact: Artifact) -> int:
    """Return the highest epoch in any path of the artifact, or 0 if there is none.

    This replaces LATEST.json when it is lost or damaged.
    """
    epochs = [0]
    for entry in artifact.store.list(artifact.path("")):
        match = _EPOCH.search(entry.key.removeprefix(artifact.prefix))
        if match:
            epochs += [int(group) for group in match.groups() if group]
    return max(epochs)
