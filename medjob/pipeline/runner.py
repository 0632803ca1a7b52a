"""The one way any stage runs: find its key, skip or fetch inputs, run, publish."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medjob.artifacts.artifact import Artifact, Attempt, Manifest
from medjob.artifacts.checkpoints import Checkpoints
from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.progress import Progress
from medjob.artifacts.provenance import provenance
from medjob.config import RunFile
from medjob.config.base import ModelRef
from medjob.config.run_file import StageResources
from medjob.errors import ConfigError, InputError, MedjobError, Preempted, RetryError, translate
from medjob.launch import nodes
from medjob.launch.nodes import Node, Peers
from medjob.launch.ranks import started
from medjob.launch.training import Training
from medjob.pipeline.snapshot import Published, Snapshot
from medjob.runtime import signals
from medjob.sources import copies, references
from medjob.sources.pins import Pins
from medjob.stage import FetchContext, Metrics, RowContext, Stage, StageContext, get_stage, select
from medjob.store import Store, open_store

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Pipeline:
    """A job and its store: finds each stage's artifact, and makes the missing ones."""

    run_file: RunFile
    store: Store
    _known: dict[str, Pins] = field(default_factory=dict, init=False)

    @classmethod
    def open(cls, run_file: RunFile) -> Pipeline:
        """Open the job's store."""
        return cls(run_file, open_store(run_file.cluster.store))

    def snapshot(self) -> Snapshot:
        """A look at the store as it is now: whoever asks for the artifacts of many stages asks one look for all of them."""
        return Snapshot(self.run_file, self.store, self._known)

    def artifact(self, stage: Stage) -> Artifact:
        """Where `stage`'s artifact is, or will be.

        Raises:
            InputError: an earlier stage is not published yet, so the key cannot be known.
        """
        return self.snapshot().artifact(stage)

    def known_pins(self) -> Mapping[str, str]:
        """Pins of the base model and the rest, as far as `fetch` has made them."""
        with contextlib.suppress(MedjobError):
            return self.snapshot().pins(get_stage("sft"))
        return {}

    def copied_config(self, ref: ModelRef) -> dict[str, Any] | None:
        """What `config.json` says in the store's copy of a model, if `fetch` has made one."""
        snapshot = self.snapshot()
        with contextlib.suppress(MedjobError, KeyError):
            if snapshot.mirrored(ref):
                artifact, manifest, name = snapshot.copy_of(ref, self.known_pins())
                return dict(json.loads(artifact.read(manifest, f"{name}/config.json")))
        return None

    def run(self, stage: Stage) -> Manifest:
        """Make `stage`'s artifact, unless it is there and verifies."""
        node = self.node(stage)
        if node.rank:
            return self._follow(stage, node)
        artifact = self.artifact(stage)
        manifest = self._published_whole(artifact)
        if manifest is not None:
            return manifest
        _log.info("%s: %s", stage.name, stage.summary)
        attempt = Attempt.begin(artifact, owner=f"{platform.node()}:{os.getpid()}")
        with _recorded(attempt):
            return self._lead(stage, attempt, node)

    def node(self, stage: Stage) -> Node:
        """Which of the nodes of `stage` this is."""
        return Node.from_environment(
            stage.name, self._resources(stage).nodes if stage.trains else 1
        )

    def refuse_several_nodes(self, stages: Sequence[Stage]) -> None:
        """Raise ConfigError if a stage wants several nodes: whoever walks the whole line does so on one."""
        for stage in stages:
            count = self._resources(stage).nodes
            if stage.trains and count > 1:
                raise ConfigError(
                    f"resources.{stage.name}.nodes is {count}, and `medjob run` walks the line on one machine",
                    f"run `medjob {stage.name}` on every node, or --set resources.{stage.name}.nodes=1",
                )

    def _published_whole(self, artifact: Artifact) -> Manifest | None:
        manifest = artifact.manifest()
        if manifest is not None:
            artifact.verify(manifest)
            _log.info("%s: skipped, %s is published and verified", artifact.stage, artifact.prefix)
        return manifest

    def _lead(self, stage: Stage, attempt: Attempt, node: Node) -> Manifest:
        """Run the stage and publish; with other nodes, once they are all there."""
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        peers = None
        if node.count > 1:
            peers = nodes.lead(
                node, {"key": attempt.artifact.key, "epoch": attempt.epoch, "owner": attempt.owner}
            )
        try:
            context, metrics = self._compute(stage, attempt, node, peers)
            manifest = attempt.publish(
                context.output,
                params=references.key_material(context.run, context.pins),
                inputs=self.snapshot().input_digests(stage),
                metrics=metrics,
                provenance={
                    "started": started_at,
                    "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                    **provenance(),
                },
            )
            if peers:
                peers.announce_published()
        finally:
            if peers:
                peers.close()
        shutil.rmtree(context.work.parent, ignore_errors=True)
        return manifest

    def _follow(self, stage: Stage, node: Node) -> Manifest:
        """Do this node's share of an attempt that node 0 holds."""
        peers = nodes.follow(node, published=lambda: self._is_published(stage))
        artifact = self.artifact(stage)
        if peers is not None:
            try:
                self._share(stage, node, artifact, peers)
            finally:
                peers.close()
        manifest = self._published_whole(artifact)
        assert manifest is not None, "node 0 said that it is published"
        return manifest

    def _share(self, stage: Stage, node: Node, artifact: Artifact, peers: Peers) -> None:
        if artifact.key != peers.offer["key"]:
            raise ConfigError(
                f"node {node.rank} has another run than node 0",
                "start all nodes with the same run file and version",
            )
        attempt = Attempt.join(artifact, peers.offer["epoch"], peers.offer["owner"], node.rank)
        with _recorded(attempt):
            context, _ = self._compute(stage, attempt, node, peers)
            try:
                peers.wait_until_published()
            except RetryError:  # it may have published, and its word been lost as it left
                if artifact.manifest() is None:
                    raise
        shutil.rmtree(context.work.parent, ignore_errors=True)

    def _is_published(self, stage: Stage) -> bool:
        with contextlib.suppress(InputError):  # its inputs are not published yet
            return self.artifact(stage).manifest() is not None
        return False

    def _compute(
        self, stage: Stage, attempt: Attempt, node: Node, peers: Peers | None
    ) -> tuple[StageContext, Metrics]:
        context = self._context(stage, attempt)
        progress = Progress(stage.name, None if node.rank else attempt.artifact)
        if stage.trains:
            return context, self._train(stage, context, attempt, progress, node, peers)
        plain = {each.name: getattr(context, each.name) for each in fields(context)}
        if not stage.references_only:
            return context, stage.entry()(
                RowContext(**plain, finished=FinishedRows(attempt), progress=progress)
            )
        snapshot, store = self.snapshot(), self.run_file.cluster.store
        fetching = FetchContext(
            **plain,
            store=store,
            copies_hub=snapshot.copies_hub,
            copies=snapshot.copies(),
            progress=progress,
        )
        return context, stage.entry()(fetching)

    def _train(
        self,
        stage: Stage,
        context: StageContext,
        attempt: Attempt,
        progress: Progress,
        node: Node,
        peers: Peers | None,
    ) -> Metrics:
        cluster = self.run_file.cluster
        folder = context.work / "trainer"
        folder.mkdir()
        checkpoints = Checkpoints(
            attempt, cluster.checkpoints_to_keep, context.work / "uploads", node.rank, node.count
        )
        step = checkpoints.restore(folder)
        if step is not None:
            _log.info("%s: going on from step %d", stage.name, step)
        with (
            progress.task("train", total=0) as task,
            started(stage.name, context, self.run_file.run, node, step) as ranks,
        ):
            return Training(ranks, folder, checkpoints, task, peers, cluster.grace_seconds).run()

    def _context(self, stage: Stage, attempt: Attempt) -> StageContext:
        cluster = self.run_file.cluster
        parent = self._work_dir / attempt.artifact.prefix
        for earlier in parent.glob("*"):  # what earlier attempts left on this disk
            if (
                int(earlier.name.partition("-")[0]) < attempt.epoch
            ):  # a folder that two nodes share holds the other's too
                shutil.rmtree(earlier, ignore_errors=True)
        root = parent / (
            f"{attempt.epoch}-node{attempt.node}" if attempt.node else str(attempt.epoch)
        )
        snapshot = self.snapshot()
        context = StageContext(
            run=select(self.run_file.run, stage.reads),
            resources=self._resources(stage),
            pins=snapshot.pins(stage),
            inputs={
                name: _fetched(snapshot.published(name), root / "inputs" / name)
                for name in stage.inputs(self.run_file.run)
            },
            output=root / "output",
            work=root / "work",
            cache=Path(cluster.work_dir).absolute() / "models",
            report_to=tuple(cluster.report_to),
        )
        if not stage.references_only:
            _place_copies(snapshot, context, stage.loads_weights)
        context.output.mkdir(parents=True)
        context.work.mkdir()
        return context

    def _resources(self, stage: Stage) -> StageResources:
        resources: StageResources = getattr(self.run_file.resources, stage.name)
        return resources

    @property
    def _work_dir(self) -> Path:
        return Path(self.run_file.cluster.work_dir).absolute() / "work"


def _fetched(published: Published, folder: Path) -> Path:
    artifact, manifest = published
    return artifact.fetch(manifest, folder)


def _place_copies(snapshot: Snapshot, context: StageContext, weights: bool) -> None:
    """Place what the stage names and the store holds copies of on this disk, so that neither it nor its processes ask a hub or a bucket."""
    for reference in references.references_in(context.run):
        if snapshot.mirrored(reference):
            copies.place(
                *snapshot.copy_of(reference, context.pins),
                context.cache,
                weights or not isinstance(reference, ModelRef),
            )


@contextlib.contextmanager
def _recorded(attempt: Attempt) -> Iterator[None]:
    """Keep how the attempt ends, whatever ends it; every error leaves as one of ours where we know what it means."""
    began = time.monotonic()
    artifact = attempt.artifact
    try:
        with signals.before_exit(
            lambda: attempt.record(
                _outcome(Preempted("stopped by a signal"), time.monotonic() - began)
            )
        ):
            yield
    except BaseException as error:
        error = translate(error)
        with contextlib.suppress(Exception):  # what has gone wrong matters more than a record of it
            attempt.record(_outcome(error, time.monotonic() - began))
        raise error from None if isinstance(error, MedjobError) else error.__cause__
    attempt.record(
        {"exit_code": 0, "seconds": round(time.monotonic() - began, 1), "host": platform.node()}
    )
    _log.info(
        "%s: published %s in %.0f s", artifact.stage, artifact.prefix, time.monotonic() - began
    )


def _outcome(error: BaseException, seconds: float) -> dict[str, Any]:
    code = error.exit_code if isinstance(error, MedjobError) else 1
    return {
        "exit_code": code,
        "reason": f"{type(error).__name__}: {error}",
        "seconds": round(seconds, 1),
        "host": platform.node(),
    }
