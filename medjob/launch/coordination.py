"""An attempt that several nodes share: node 0 owns it and publishes, the other nodes join it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.checkpoints import Checkpoints
from medjob.artifacts.progress import Progress
from medjob.config import Run
from medjob.config.cluster import Cluster
from medjob.errors import ConfigError, RetryError
from medjob.launch import nodes
from medjob.launch.nodes import Membership, Node
from medjob.launch.ranks import launch_ranks
from medjob.launch.training import Training
from medjob.stage import Metrics, StageContext

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def leading(node: Node, attempt: Attempt) -> Iterator[Membership | None]:
    """Wait for the other nodes and send them `attempt`. Yields None if this is the only node.

    Raises:
        RetryError: a node did not connect.
    """
    if node.count == 1:
        yield None
        return
    announced = {"key": attempt.artifact.key, "epoch": attempt.epoch, "owner": attempt.owner}
    membership = nodes.accept_followers(node, announced)
    try:
        yield membership
    finally:
        membership.close()


@contextlib.contextmanager
def following(node: Node, is_published: Callable[[], bool]) -> Iterator[Membership | None]:
    """Connect to node 0. Yields None if the artifact was published while this node waited.

    Raises:
        RetryError: node 0 does not answer.
    """
    membership = nodes.connect_to_leader(node, is_published)
    if membership is None:
        yield None
        return
    try:
        yield membership
    finally:
        membership.close()


def join(artifact: Artifact, membership: Membership, node: Node) -> Attempt:
    """Join the attempt that node 0 announced.

    Raises:
        ConfigError: node 0 has a different key.
    """
    announced = membership.attempt
    if artifact.key != announced["key"]:
        raise ConfigError(
            f"node {node.rank} has a different run than node 0",
            "start all nodes with the same run file and the same version of medjob",
        )
    return Attempt.join(artifact, announced["epoch"], announced["owner"], node.rank)


def wait_until_published(artifact: Artifact, membership: Membership) -> None:
    """Wait for node 0 to publish.

    Raises:
        RetryError: node 0 was lost before it published.
    """
    try:
        membership.wait_until_published()
    except RetryError:  # node 0 may have published and left before its message arrived
        if artifact.manifest() is None:
            raise


def train(
    stage: str,
    run: Run,
    context: StageContext[None],
    attempt: Attempt,
    progress: Progress,
    cluster: Cluster,
    node: Node,
    membership: Membership | None,
) -> Metrics:
    """Run a training stage in one process per device, from the newest checkpoint if there is one.

    Raises:
        MedjobError: as `Training.run`.
    """
    folder = context.work / "trainer"
    folder.mkdir()
    uploads = context.work / "uploads"
    checkpoints = Checkpoints(attempt, cluster.checkpoints_to_keep, uploads, node.rank, node.count)
    step = checkpoints.restore(folder)
    if step is not None:
        _log.info("%s: resuming from step %d", stage, step)
    with (
        progress.task("train", total=0) as task,
        launch_ranks(stage, context, run, node, step) as ranks,
    ):
        return Training(ranks, folder, checkpoints, task, membership, cluster.grace_seconds).run()
