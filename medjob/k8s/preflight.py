"""What can be found out before the first GPU second: store, queue, permissions, Pod Security, every Job as a dry run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from medjob.errors import ConfigError
from medjob.k8s.api import AlreadyExists, Api, QuotaExceeded
from medjob.pipeline.runner import Pipeline
from medjob.store import probe

_log = logging.getLogger(__name__)


def check(
    pipeline: Pipeline, api: Api, manifests: Mapping[str, dict[str, Any]], stages: Sequence[str]
) -> None:
    """All of it.

    Raises:
        ConfigError: what would never work, in the words of the server.
        RetryError: the store or the API server is away.
    """
    check_store(pipeline)
    check_queue(api, pipeline.run_file.cluster.queue)
    for name in stages:
        check_job(api, name, manifests[name])


def check_store(pipeline: Pipeline) -> None:
    """A store that several pods can share safely, reachable from here."""
    ref = pipeline.run_file.cluster.store
    if ref.uri.startswith("file://"):
        raise ConfigError(
            f"cluster.store: pods share no folder (got {ref.uri})",
            "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
        )
    if ref.single_writer:
        raise ConfigError(
            "cluster.store.singleWriter: several pods write on a cluster",
            "use a store that keeps conditional writes, and leave it false",
        )
    probe(pipeline.store)


def check_queue(api: Api, queue: str | None) -> None:
    """A Job of a queue that is not there would be held for ever, and without Kueue the label says nothing to anybody."""
    if queue is not None and not api.has_local_queue(queue):
        raise ConfigError(
            f"cluster.queue: namespace {api.namespace} has no LocalQueue {queue!r}",
            f"kubectl -n {api.namespace} get localqueues lists them",
        )


def check_job(api: Api, stage: str, manifest: Mapping[str, Any]) -> None:
    """Have the server check a stage's Job, and a pod made from its template: only there do Pod Security, service account and priority class show."""
    job = dict(manifest)
    template = job["spec"]["template"]
    meta = {
        **template["metadata"],
        "generateName": f"{job['metadata']['name']}-",
        "namespace": api.namespace,
    }
    try:
        api.create_job(
            {**job, "metadata": {**job["metadata"], "name": f"{job['metadata']['name']}-check"}},
            dry_run=True,
        )
        api.check_pod(
            {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}
        )
    except AlreadyExists:
        return
    except QuotaExceeded as error:  # what runs now may be a stage of this very run
        _log.warning("%s: there is no room for it now: %s", stage, error.message)
    except ConfigError as error:
        raise ConfigError(
            f"{stage}: {error.message}",
            error.hint or "nothing was started; change the values and submit again",
        ) from None
