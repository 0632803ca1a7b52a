"""Runs a stage: take a snapshot, skip if published, begin an attempt, run it, publish."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medjob.artifacts.artifact import Artifact, Attempt, Manifest
from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.progress import Progress
from medjob.artifacts.provenance import provenance
from medjob.artifacts.shard import WHOLE, Shard, shard_of, unfinished_shards
from medjob.config import RunFile
from medjob.config.base import ModelRef
from medjob.errors import ConfigError, InputError, MedjobError, SupersededError
from medjob.launch.coordination import following, join, leading, train, wait_until_published
from medjob.launch.nodes import ONE_NODE, Membership, Node
from medjob.pipeline.consent import check_consent, with_consent
from medjob.pipeline.context import build_context, resources_of
from medjob.pipeline.outcome import recorded
from medjob.pipeline.shards import run_shards, shard_count
from medjob.pipeline.snapshot import Snapshot
from medjob.pipeline.work_folder import work_folder
from medjob.sources.pins import Pins
from medjob.sources.references import key_material
from medjob.stage import FetchExtras, Kind, Metrics, RowExtras, Stage, StageContext, get_stage
from medjob.store import Store, open_store

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Pipeline:
    """The stages of one run over its store."""

    run_file: RunFile
    store: Store
    consent: bool = False
    """Whether the user has agreed, with `--yes`, that rows are sent to endpoints."""
    _known: dict[str, Pins] = field(default_factory=dict, init=False)

    @classmethod
    def open(cls, run_file: RunFile, consent: bool = False) -> Pipeline:
        """Open the run's store."""
        return cls(run_file, open_store(run_file.cluster.store), consent)

    def snapshot(self) -> Snapshot:
        """Take a snapshot of the store. Share one across lookups so that each marker is read
        once."""
        return Snapshot(self.run_file, self.store, self._known)

    def artifact(self, stage: Stage) -> Artifact:
        """Find where `stage`'s artifact is, or will be.

        Raises:
            InputError: an earlier stage is not published yet, so the key is not known.
        """
        return self.snapshot().artifact(stage)

    def run(self, stage: Stage, node: Node = ONE_NODE) -> Manifest:
        """Publish `stage`'s artifact, unless it is published already.

        Args:
            node: This node, if several train together or an external launcher started processes.

        Raises:
            ConfigError: it would send rows to an endpoint, and nobody has agreed to that.
        """
        if node.rank > 0:
            return self._follow(stage, node)
        snapshot = self.snapshot()
        artifact = snapshot.artifact(stage)
        published = _check_published(artifact)
        if published is not None:
            return published
        check_consent(self, [stage])
        if shard_count(self.run_file, stage) > 1:
            self._run_shards(stage, artifact)
            published = artifact.manifest()  # by the shard that completed the set
            if published is not None:
                return published
        return self._publish(stage, snapshot, artifact, node)

    def run_shard(self, stage: Stage, shard: Shard) -> Manifest | None:
        """Compute one shard of `stage`, unless that is done already. The shard that completes the
        set publishes the stage's artifact.

        Returns:
            The artifact's marker, or None if other shards are not finished.
        """
        snapshot = self.snapshot()
        artifact = snapshot.artifact(stage)
        published = _check_published(artifact)
        if published is not None:
            return published
        check_consent(self, [stage])
        if shard_of(artifact, shard).manifest() is None:
            self._compute_shard(stage, snapshot, artifact, shard)
        missing = unfinished_shards(artifact, shard.count)
        if missing:
            _log.info(
                "%s: shard %s is finished; %d others are not", stage.name, shard, len(missing)
            )
            return None
        try:
            return self._publish(stage, snapshot, artifact, ONE_NODE)
        except SupersededError:  # two shards were the last ones at the same moment
            return artifact.manifest()

    def _run_shards(self, stage: Stage, artifact: Artifact) -> None:
        """Compute the unfinished shards of `stage` in processes on this machine."""
        missing = unfinished_shards(artifact, shard_count(self.run_file, stage))
        if missing:
            # The processes cannot ask, and know of no --yes.
            run_file = with_consent(self.run_file) if self.consent else self.run_file
            run_shards(run_file, stage, missing)

    def _compute_shard(
        self, stage: Stage, snapshot: Snapshot, artifact: Artifact, shard: Shard
    ) -> None:
        """Compute the rows of one shard, and publish that they are finished."""
        owner = shard_of(artifact, shard)
        attempt = Attempt.begin(owner, owner=f"{platform.node()}:{os.getpid()}")
        with recorded(attempt, self._sensitive), work_folder(self._work, attempt) as root:
            started = _now()
            context = build_context(self.run_file, snapshot, stage, root)
            finished, progress = FinishedRows(attempt, artifact), Progress(stage.name, owner)
            rows = self._row_extras(finished, progress, shard)
            stage.share()(context.with_extras(rows))
            attempt.publish(
                context.output,
                params={},
                inputs=snapshot.input_digests(stage),
                metrics={},
                provenance={"started": started, "finished": _now(), **provenance()},
            )

    def _publish(
        self, stage: Stage, snapshot: Snapshot, artifact: Artifact, node: Node
    ) -> Manifest:
        """Begin an attempt at `stage`, run it, and publish its output."""
        _log.info("%s: %s", stage.name, stage.summary)
        attempt = Attempt.begin(artifact, owner=f"{platform.node()}:{os.getpid()}")
        with (
            recorded(attempt, self._sensitive),
            leading(node, attempt) as membership,
            work_folder(self._work, attempt) as root,
        ):
            started = _now()
            context = build_context(self.run_file, snapshot, stage, root)
            metrics = self._execute(stage, snapshot, context, attempt, node, membership)
            manifest = attempt.publish(
                context.output,
                params=key_material(context.run, snapshot.pins(stage)),
                inputs=snapshot.input_digests(stage),
                metrics=metrics,
                provenance={"started": started, "finished": _now(), **provenance()},
            )
            if membership:
                membership.announce_published()
        return manifest

    @property
    def _work(self) -> Path:
        """The folder on this disk for the attempts of all runs."""
        return Path(self.run_file.cluster.work_dir).absolute() / "work"

    @property
    def _sensitive(self) -> bool:
        return self.run_file.run.prepare.sensitive

    def refuse_other_processes(self, stages: Sequence[Stage]) -> None:
        """Raise ConfigError if a stage needs several nodes or an external launcher: `medjob run`
        uses one machine, and starts the processes itself."""
        for stage in stages:
            resources = resources_of(self.run_file, stage)
            if resources.launcher == "external":
                raise ConfigError(
                    f"resources.{stage.name}.launcher is external, but `medjob run` starts the "
                    "processes itself",
                    f"start `medjob {stage.name}` with your launcher, and run the other stages one "
                    f"by one; or use --set resources.{stage.name}.launcher=medjob",
                )
            count = resources.nodes
            if count > 1:
                raise ConfigError(
                    f"resources.{stage.name}.nodes is {count}, but `medjob run` uses one machine",
                    f"run `medjob {stage.name}` on every node, "
                    f"or --set resources.{stage.name}.nodes=1",
                )

    def known_pins(self) -> Mapping[str, str]:
        """Pins of the base model and the data, as far as `fetch` has published them."""
        with contextlib.suppress(MedjobError):
            return self.snapshot().pins(get_stage("sft"))
        return {}

    def copied_config(self, ref: ModelRef) -> dict[str, Any] | None:
        """Read `config.json` from the store's copy of a model; None without a copy."""
        snapshot = self.snapshot()
        with contextlib.suppress(MedjobError, KeyError):
            if snapshot.mirrored(ref):
                artifact, manifest, name = snapshot.copy_of(ref, self.known_pins())
                return dict(json.loads(artifact.read(manifest, f"{name}/config.json")))
        return None

    def _follow(self, stage: Stage, node: Node) -> Manifest:
        """Do this node's share of an attempt that node 0 owns."""
        with following(node, lambda: self._is_published(stage)) as membership:
            snapshot = self.snapshot()
            artifact = snapshot.artifact(stage)
            if membership is not None:
                attempt = join(artifact, membership, node)
                with recorded(attempt, self._sensitive), work_folder(self._work, attempt) as root:
                    context = build_context(self.run_file, snapshot, stage, root)
                    self._execute(stage, snapshot, context, attempt, node, membership)
                    wait_until_published(artifact, membership)
        manifest = _check_published(artifact)
        assert manifest is not None, "node 0 has published it"
        return manifest

    def _is_published(self, stage: Stage) -> bool:
        with contextlib.suppress(InputError):  # its inputs are not published yet
            return self.artifact(stage).manifest() is not None
        return False

    def _execute(
        self,
        stage: Stage,
        snapshot: Snapshot,
        context: StageContext[None],
        attempt: Attempt,
        node: Node,
        membership: Membership | None,
    ) -> Metrics:
        """Run the stage's function: here, or in training processes."""
        progress = Progress(stage.name, None if node.rank else attempt.artifact)
        cluster = self.run_file.cluster
        if stage.kind is Kind.TRAINING:
            run = self.run_file.run
            return train(stage.name, run, context, attempt, progress, cluster, node, membership)
        if stage.kind is Kind.FETCH:
            fetch = FetchExtras(
                pins=snapshot.pins(stage),
                store=cluster.store,
                copies_hub=snapshot.copies_hub,
                copies=snapshot.copies(),
                models=Path(cluster.work_dir).absolute() / "models",
                progress=progress,
            )
            return stage.entry()(context.with_extras(fetch))
        rows = self._row_extras(FinishedRows(attempt), progress)
        return stage.entry()(context.with_extras(rows))

    def _row_extras(
        self, finished: FinishedRows, progress: Progress, shard: Shard = WHOLE
    ) -> RowExtras:
        cluster = self.run_file.cluster
        return RowExtras(finished, progress, shard, cluster.endpoints, cluster.currency)


def _check_published(artifact: Artifact) -> Manifest | None:
    """Return the marker, or None if the artifact is not published. See `Artifact.verify`."""
    manifest = artifact.manifest()
    if manifest is not None:
        checked = artifact.verify(manifest)
        _log.info("%s: skipped, %s is %s", artifact.stage, artifact.prefix, checked)
    return manifest


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
