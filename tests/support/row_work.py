"""The extras of a row-wise stage, over a store in a folder."""

from pathlib import Path

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.progress import Progress
from medjob.artifacts.shard import WHOLE, Shard, shard_of
from medjob.stage import RowExtras
from medjob.store import LocalStore


def row_extras(folder: Path, shard: Shard = WHOLE) -> RowExtras:
    """Begin an attempt at an artifact in `folder`, or at one of its shards."""
    artifact = Artifact(LocalStore(folder), "run", "candidates", "0123456789ab")
    owner = artifact if shard == WHOLE else shard_of(artifact, shard)
    finished = FinishedRows(Attempt.begin(owner, "test"), artifact)
    return RowExtras(finished, Progress("candidates", owner), shard)
