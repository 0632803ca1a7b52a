"""Shards: one row-wise stage computed by several processes.

    <run>/<stage>/<key12>/shards/<index>-of-<count>/...    one shard's attempts and finished rows

Each shard is an artifact of its own below the stage's, with attempts, progress and a marker. Its
result is its finished rows. The shard that completes the set publishes the stage's artifact.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from medjob.artifacts.artifact import Artifact

_FOLDER = re.compile(r"shards/([0-9]+)-of-([0-9]+)/")


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` shares of a stage's rows."""

    index: int = 0
    count: int = 1

    def owns(self, row_id: str) -> bool:
        """Whether a row is in this shard's share: rows are divided by a hash of their ids."""
        digest = hashlib.blake2b(row_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


WHOLE = Shard()


def shard_of(artifact: Artifact, shard: Shard) -> Artifact:
    """Return the artifact of one shard.

    Its stage and its key name the place, so that its marker fits no other.
    """
    stage = f"{artifact.stage}/{artifact.key[:12]}/shards"
    return Artifact(artifact.store, artifact.run, stage, str(shard))


def unfinished_shards(artifact: Artifact, count: int) -> list[int]:
    """Return the numbers of the shards that are not finished."""
    return [
        index
        for index in range(count)
        if shard_of(artifact, Shard(index, count)).manifest() is None
    ]


def known_shards(artifact: Artifact) -> list[Artifact]:
    """Return the artifacts of the shards that have stored anything, of all counts."""
    names = {
        match[0]
        for entry in artifact.store.list(artifact.path("shards", ""))
        if (match := _FOLDER.search(entry.key.removeprefix(artifact.path(""))))
    }
    found = [_FOLDER.fullmatch(name) for name in sorted(names)]
    return [shard_of(artifact, Shard(int(match[1]), int(match[2]))) for match in found if match]
