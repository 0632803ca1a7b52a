"""Stores that grant less than everything, or not for ever."""

from __future__ import annotations

import base64
import json
from typing import Any

from botocore.exceptions import ClientError

from tests.e2e.environment import BUCKET, ClusterEnvironment, credentials_file, wait
from tests.e2e.release import Release
from tests.e2e.scenarios import same_adapter, training
from tests.support.store_servers import SECOND_KEY, SECOND_SECRET, USER_KEY, USER_SECRET, s3_client

_SECRETS = "/run/secrets/medjob/aws-credentials"


def rotated_credentials(cluster: ClusterEnvironment) -> str:
    """A training goes on when its key is replaced in the Secret and then withdrawn."""
    release = training(cluster, "rotated")
    pods = [release.wait_for_pod(stage) for stage in ("orchestrator", "sft")]
    release.wait_for_checkpoint()
    # The training must not end before the kubelet has updated the file.
    cluster.gateway.hold(pods[1]["status"]["podIP"], "/checkpoints/")
    _set_credentials(cluster, SECOND_KEY, SECOND_SECRET)
    try:
        for pod in map(_name, pods):
            wait(f"the new key in {pod}", lambda pod=pod: _has_key(cluster, pod, SECOND_KEY), 180)
        assert cluster.gateway.held.is_set(), "no write was held"
        cluster.gateway.refuse(lambda request: request.key == USER_KEY, "InvalidAccessKeyId")
        cluster.gateway.release()
        release.wait_until_done()
        refused = sum(each.status == 403 for each in cluster.gateway.requests)
    finally:
        cluster.gateway.release()
        cluster.gateway.refuse(None)
        _set_credentials(cluster, USER_KEY, USER_SECRET)
    assert refused, "no request was refused"
    assert not release.outcomes("sft"), release.outcomes("sft")
    return f"{refused} requests refused, no attempt lost; {same_adapter(cluster, release)}"


def policy_for_one_prefix(cluster: ClusterEnvironment) -> str:
    """A run needs rights below its own prefix and its inputs, and none for the bucket itself."""
    allowed = (f"/{BUCKET}/runs/prefix/", f"/{BUCKET}/models/tiny", f"/{BUCKET}/data/rows.jsonl")
    changes = {"pipeline.until": "prepare"}
    changes |= {"cluster.store": {"uri": f"s3://{BUCKET}/runs/prefix"}}
    changes["cluster.store"] |= {"endpoint": cluster.gateway.endpoint, "addressingStyle": "path"}
    changes["cluster.store"] |= {"region": "us-east-1"}
    cluster.gateway.refuse(lambda request: not request.target.startswith(allowed), "AccessDenied")
    try:
        _assert_refused(cluster, "head_bucket")
        _assert_refused(cluster, "list_objects_v2", Prefix="runs/other/")
        release = Release(cluster, "prefix", changes)
        release.submit()
        release.wait_until_done(600)
    finally:
        cluster.gateway.refuse(None)
    release.cancel()
    return "HeadBucket and other prefixes are refused, and fetch and prepare are published"


def _name(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def _set_credentials(cluster: ClusterEnvironment, key: str, secret: str) -> None:
    content = base64.b64encode(credentials_file(key, secret).encode()).decode()
    patch = json.dumps({"data": {"aws-credentials": content}})
    cluster.kubectl("patch", "secret", "medjob", "-p", patch)


def _has_key(cluster: ClusterEnvironment, pod: str, key: str) -> bool:
    """Whether the file in the pod has the key. The kubelet updates it after up to two minutes."""
    return key in cluster.kubectl("exec", pod, "-c", "medjob", "--", "cat", _SECRETS, check=False)


def _assert_refused(cluster: ClusterEnvironment, operation: str, **options: str) -> None:
    client: Any = s3_client(cluster.gateway.endpoint)
    status = 200
    try:
        getattr(client, operation)(Bucket=BUCKET, **options)
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    assert status == 403, f"{operation}: {status}"
