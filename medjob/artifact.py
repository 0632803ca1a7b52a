"""Artifacts: what a stage published, how it is named, and how it is trusted.

    <store>/<run>/<stage>/<key12>/LATEST.json              epoch and its owner; compare-and-swap only
                                 /data/<epoch>/...          immutable files
                                 /_SUCCESS.json             marker = manifest; create-only; written last
                                 /checkpoints/...           see checkpoints.py
                                 /parts/...                 finished rows, see rows.py
                                 /attempts/<epoch>.json     how an attempt ended
                                 /progress.json             step, total, loss, speed; overwritten

The key is a hash of everything that decides the content. Two attempts can run at once (a node cut off from its cluster
goes on writing), so each takes an epoch and writes only under paths that bear it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import google_crc32c
from pydantic import BaseModel, ConfigDict, ValidationError

from medjob.errors import InputError, SupersededError
from medjob.store import Conflict, Store

MARKER = "_SUCCESS.json"
LATEST = "LATEST.json"


class File(BaseModel):
    """One file of an artifact; `path` is relative to the artifact's data folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    size: int
    sha256: str
    crc32c: str


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


def canonical_json(value: Any) -> str:
    """The one spelling of `value` that hashes are taken over; refuses what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 of `value`'s canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def describe_file(path: Path, name: str) -> File:
    """Size and checksums of a file, in one pass over it."""
    sha256, crc32c, size = hashlib.sha256(), google_crc32c.Checksum(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            crc32c.update(block)
            size += len(block)
    return File(path=name, size=size, sha256=sha256.hexdigest(), crc32c=crc32c.digest().hex())


def describe_folder(folder: Path) -> list[File]:
    """All files below `folder`, sorted by path. Links are refused: what they point at may change."""
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InputError(f"{path}: is a link, and links are not published")
        if path.is_file():
            files.append(describe_file(path, path.relative_to(folder).as_posix()))
    return files


def digest_of(files: Iterable[File]) -> str:
    """Digest of a set of files: paths, sizes and sha256."""
    return fingerprint([[f.path, f.size, f.sha256] for f in sorted(files, key=lambda f: f.path)])


@dataclass(frozen=True, slots=True)
class Artifact:
    """The place of one artifact: `<run>/<stage>/<key12>` in a store."""

    store: Store
    run: str
    stage: str
    key: str

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
        return self._checked(parse_manifest(blob.data, self.path(MARKER)))

    def _checked(self, manifest: Manifest) -> Manifest:
        where = f"{self.store.uri}/{self.path(MARKER)}"
        if manifest.key != self.key:
            raise InputError(f"{where}: is the marker of another key ({manifest.key[:12]})", self._mend())
        if manifest.digest != digest_of(manifest.files):
            raise InputError(f"{where}: its digest does not match its list of files", self._mend())
        return manifest

    def fetch(self, manifest: Manifest, folder: Path) -> Path:
        """Place the artifact's files in `folder`, every byte verified.

        Raises:
            InputError: a file is missing or damaged.
        """
        for file in manifest.files:
            target = folder / safe_path(file.path)
            self.store.download(self.path("data", str(manifest.epoch), file.path), target)
            found = describe_file(target, file.path)
            if found != file:
                target.unlink()
                raise InputError(
                    f"{self.store.uri}/{self.path('data', str(manifest.epoch), file.path)}: is damaged "
                    f"(sha256 {found.sha256[:12]}, {found.size} bytes; published as {file.sha256[:12]}, {file.size} bytes)",
                    self._mend(),
                )
        return folder

    def _mend(self) -> str:
        return f"restore it, or delete {self.store.uri}/{self.prefix} to have it made again"


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a marker or checkpoint manifest, refusing paths that lead out of their folder."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise InputError(f"{where}: is damaged ({error.error_count()} errors, first: {error.errors()[0]['msg']})") from None
    for file in manifest.files:
        safe_path(file.path)
    return manifest


def safe_path(path: str) -> PurePosixPath:
    """`path` if it stays inside the folder that it is joined to. A manifest is data, so its paths are not trusted."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in path or "\0" in path:
        raise InputError(f"{path!r}: leads out of the artifact")
    return pure


@dataclass(slots=True)
class Attempt:
    """One try at making an artifact: the holder of an epoch."""

    artifact: Artifact
    epoch: int
    version: str

    @classmethod
    def begin(cls, artifact: Artifact, owner: str) -> Attempt:
        """Take the next epoch. Whoever held the one before is superseded from here on."""
        store, key = artifact.store, artifact.path(LATEST)
        while True:
            latest = store.get(key)
            epoch = json.loads(latest.data)["epoch"] + 1 if latest else 1
            data = canonical_json({"epoch": epoch, "owner": owner}).encode()
            try:
                version = store.swap(key, data, latest.version) if latest else store.create(key, data)
            except Conflict:
                continue  # another attempt began at the same moment: take the epoch after it
            return cls(artifact, epoch, version)

    def check(self) -> None:
        """Raise SupersededError if a newer attempt has taken over."""
        latest = self.artifact.store.get(self.artifact.path(LATEST))
        if latest is None or latest.version != self.version:
            raise SupersededError(f"{self.artifact.prefix}: a newer attempt owns this artifact (this one is epoch {self.epoch})")

    def publish(
        self, folder: Path, params: Mapping[str, Any], inputs: Mapping[str, str], metrics: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> Manifest:
        """Upload `folder` under this epoch and write the marker last.

        Raises:
            SupersededError: another attempt took over, or published first.
        """
        artifact = self.artifact
        files = describe_folder(folder)
        for file in files:
            artifact.store.upload(folder / file.path, artifact.path("data", str(self.epoch), file.path))
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
        )
        self.check()
        try:
            artifact.store.create(artifact.path(MARKER), manifest.model_dump_json(indent=1).encode())
        except Conflict:
            raise SupersededError(f"{artifact.prefix}: another attempt published it first") from None
        return manifest

    def record(self, outcome: Mapping[str, Any]) -> None:
        """Keep how the attempt ended; a pod's own record vanishes with the pod."""
        key = self.artifact.path("attempts", f"{self.epoch}.json")
        self.artifact.store.put(key, json.dumps(outcome, indent=1).encode())
