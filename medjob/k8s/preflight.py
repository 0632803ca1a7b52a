"""Checks before the first pod starts: store, queue, permissions and a dry run of each Job."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from medjob.config.cluster import Cluster
from medjob.errors import ConfigError
from medjob.k8s.api import AlreadyExists, Api, QuotaExceeded
from medjob.pipeline.consent import check_consent
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from medjob.store import probe

_log = logging.getLogger(__name__)


def check(
    pipeline: Pipeline, api: Api, manifests: Mapping[str, dict[str, Any]], stages: Sequence[str]
) -> None:
    """Run all checks.

    Raises:
        ConfigError: the run cannot work on this cluster, and the message is the server's; or it
            would send rows to an endpoint, and nobody has agreed to that.
        RetryError: the store or the API server is unavailable.
    """
    check_consent(pipeline, [get_stage(name) for name in stages])
    check_store(pipeline)
    check_queues(api, pipeline.run_file.cluster)
    for name in stages:
        check_job(api, name, manifests[name])


def check_store(pipeline: Pipeline) -> None:
    """Check that the store is reachable from here and that several pods can write to it safely."""
    ref = pipeline.run_file.cluster.store
    if ref.uri.startswith("file://"):
        raise ConfigError(
            f"cluster.store: pods cannot share a local folder (got {ref.uri})",
            "use s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
        )
    if ref.single_writer:
        raise ConfigError(
            "cluster.store.singleWriter must be false, because several pods write on a cluster",
            "use a store that supports conditional writes",
        )
    probe(pipeline.store)


def check_queues(api: Api, cluster: Cluster) -> None:
    """Check that the queues of the stages and of the orchestrator exist."""
    check_queue(api, cluster.queue)
    check_queue(api, cluster.orchestrator.queue, "cluster.orchestrator.queue")


def check_queue(api: Api, queue: str | None, key: str = "cluster.queue") -> None:
    """Check that the LocalQueue exists.

    Kueue holds the Job of a missing queue for ever. Without Kueue, nothing reads the Job's label.
    """
    if queue is not None and not api.has_local_queue(queue):
        raise ConfigError(
            f"{key}: namespace {api.namespace} has no LocalQueue {queue!r}",
            f"kubectl -n {api.namespace} get localqueues lists the existing ones",
        )


def check_job(api: Api, stage: str, manifest: Mapping[str, Any]) -> None:
    """Have the server check a Job and a pod of its template, as dry runs.

    The server checks Pod Security, service account and priority class only for pods.
    """
    job = dict(manifest)
    name = job["metadata"]["name"]
    template = job["spec"]["template"]
    meta = {
        **template["metadata"],
        "generateName": f"{name}-",
        "namespace": api.namespace,
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}
    try:
        renamed = {**job["metadata"], "name": f"{name}-check", "namespace": api.namespace}
        api.create_job({**job, "metadata": renamed}, dry_run=True)
        api.check_pod(pod)
    except AlreadyExists:
        return
    except QuotaExceeded as error:  # a stage of this very run may be using the quota
        _log.warning("%s does not fit into the quota now: %s", stage, error.message)
    except ConfigError as error:
        raise ConfigError(
            f"{stage}: {error.message}",
            error.hint or "nothing was started; change the values and submit again",
        ) from None
