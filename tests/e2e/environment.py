"""The environment of the end-to-end tests.

It has a cluster with the images on its nodes, an S3 server that pods can reach, and a namespace
with the Pod Security level `restricted`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.images import load_images
from tests.e2e.model import make_trained_model
from tests.e2e.paths import LOCAL_CLUSTER, ROOT, is_local, local_kubeconfig
from tests.e2e.s3_gateway import S3Gateway, s3_gateway
from tests.support.rows import reasoning_rows, write_jsonl
from tests.support.store_servers import (
    CREDENTIALS,
    USER_KEY,
    USER_SECRET,
    program,
    s3_client,
    seaweedfs,
)

VALUES = ROOT / "charts" / "medjob" / "ci" / "kind-cpu-values.yaml"
BUCKET = "medjob"


class Skipped(Exception):
    """This cluster cannot run the scenario."""


@dataclass(slots=True)
class ClusterEnvironment:
    """A cluster and an S3 server, and the commands that a user would run."""

    kubeconfig: str
    namespace: str
    gateway: S3Gateway
    folder: Path
    local: bool
    """Whether `LOCAL_CLUSTER` controls the cluster, so that nodes can be stopped and cut off."""

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl in the namespace and return its output."""
        done = subprocess.run(
            ["kubectl", "--kubeconfig", self.kubeconfig, "-n", self.namespace, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def get(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        """List the objects of a kind."""
        return list(json.loads(self.kubectl("get", kind, "-l", selector, "-o", "json"))["items"])

    def medjob(
        self, *arguments: str, check: bool = True, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run the command `medjob` as a user would."""
        environment = {**os.environ, **CREDENTIALS, "KUBECONFIG": self.kubeconfig}
        done = subprocess.run(
            [sys.executable, "-m", "medjob", *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(
                f"medjob {' '.join(arguments)} exited with {done.returncode}: "
                f"{done.stderr.strip()[-1500:]}"
            )
        return done

    def helm(self, *arguments: str) -> str:
        """Run helm in the namespace and return its output."""
        command = [
            program("helm"),
            "--kubeconfig",
            self.kubeconfig,
            "-n",
            self.namespace,
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stderr.strip()}"
        return done.stdout

    def evict(self, pod: str) -> None:
        """Evict a pod, as draining its node or a pod of a higher priority would."""
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self.namespace},
        }
        self.kubectl(
            "create",
            "--raw",
            f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction",
            "-f",
            "-",
            stdin=json.dumps(body),
        )

    def require_node_control(self) -> None:
        """Skip the scenario if nodes cannot be stopped or cut off."""
        if not self.local:
            raise Skipped("nodes of this cluster cannot be stopped or cut off from this machine")

    def node(self, command: str, name: str) -> None:
        """Run `stop-node`, `start-node`, `cut-node` or `join-node` of the local cluster."""
        subprocess.run(
            [str(LOCAL_CLUSTER), command, name.rpartition("-")[2]], check=True, capture_output=True
        )

    def wait_for_nodes(self) -> None:
        """Wait until every node of the local cluster is Ready."""
        ready = '{range .items[*]}{.status.conditions[?(@.type=="Ready")].status}{" "}{end}'
        wait(
            "both nodes Ready",
            lambda: (
                self.kubectl("get", "nodes", "-o", f"jsonpath={ready}").split() == ["True", "True"]
            ),
            120,
        )

    def verify(self, run: str) -> str:
        """Run `medjob verify` on the run and return a summary."""
        done = self.medjob(
            "verify",
            "--store",
            f"s3://{BUCKET}/runs",
            "--run",
            run,
            "--set",
            f"cluster.store.endpoint={self.gateway.endpoint}",
            "--set",
            "cluster.store.addressingStyle=path",
        )
        lines = [line for line in done.stdout.splitlines() if "verified" in line]
        return f"{len(lines)} artifacts and checkpoints verified"

    def objects(self, prefix: str) -> list[str]:
        """List the keys in the bucket that start with `prefix`."""
        client: Any = s3_client(self.gateway.endpoint)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def read(self, key: str) -> dict[str, Any]:
        """Read a JSON object from the bucket."""
        client: Any = s3_client(self.gateway.endpoint)
        return dict(json.loads(client.get_object(Bucket=BUCKET, Key=key)["Body"].read()))

    def remove(self, prefix: str) -> None:
        """Delete all objects whose keys start with `prefix`."""
        client: Any = s3_client(self.gateway.endpoint)
        for key in self.objects(prefix):
            client.delete_object(Bucket=BUCKET, Key=key)


def wait(
    description: str, check: Callable[[], Any], seconds: float = 180, every: float = 0.5
) -> Any:
    """Call `check` until its result is true, and return the result.

    Raises:
        AssertionError: the result is still false after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(every)
    raise AssertionError(f"{description}: not within {seconds:.0f} s")


@contextlib.contextmanager
def cluster_environment(nodes: int, images: Sequence[str]) -> Iterator[ClusterEnvironment]:
    """Prepare a cluster with images and data, and clean up afterwards.

    Uses the cluster of KUBECONFIG; if that is not set, starts the local one with `nodes` nodes.
    `images` are those that the scenarios use: core, full, vllm.
    """
    local = is_local()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medjob-e2e-")))
        if "KUBECONFIG" not in os.environ:
            subprocess.run([str(LOCAL_CLUSTER), "up", str(nodes)], check=True)
            if "E2E_KEEP" not in os.environ:
                stack.callback(subprocess.run, [str(LOCAL_CLUSTER), "down"], check=False)
        kubeconfig = os.environ.get("KUBECONFIG") or str(local_kubeconfig())
        _explain(kubeconfig, local)
        load_images(images)
        endpoint = stack.enter_context(seaweedfs(folder / "s3"))
        host = os.environ.get("E2E_HOST", "10.245.0.254")
        gateway = stack.enter_context(s3_gateway(endpoint, host))
        namespace = f"medjob-e2e-{uuid.uuid4().hex[:6]}"
        cluster = ClusterEnvironment(kubeconfig, namespace, gateway, folder, local)
        stack.enter_context(_namespace(cluster))
        _upload_inputs(cluster)
        yield cluster


def _explain(kubeconfig: str, local: bool) -> None:
    """Say which cluster is used, and what follows from that."""
    if "KUBECONFIG" not in os.environ:
        text = "a local cluster, which is stopped at the end unless E2E_KEEP is set"
    elif local:
        text = (
            "the local cluster that KUBECONFIG names; it keeps running. Scenarios stop and cut off "
            "its nodes, so nothing else should use it now"
        )
    else:
        text = "the cluster that KUBECONFIG names; scenarios that stop its nodes are skipped"
    print(f"using {text} ({kubeconfig})", flush=True)


@contextlib.contextmanager
def _namespace(cluster: ClusterEnvironment) -> Iterator[None]:
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": cluster.namespace, "labels": labels},
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "medjob", "namespace": cluster.namespace},
        "stringData": {"aws-credentials": credentials_file(USER_KEY, USER_SECRET)},
    }
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(secret))
    try:
        yield
    finally:
        cluster.kubectl("delete", "namespace", cluster.namespace, "--wait=false", check=False)


def credentials_file(key: str, secret: str) -> str:
    """The content of a shared credentials file."""
    return f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"


def _upload_inputs(cluster: ClusterEnvironment) -> None:
    """Upload the small model and the rows to the bucket, as a user would."""
    client: Any = s3_client(cluster.gateway.endpoint)
    client.create_bucket(Bucket=BUCKET)
    examples = reasoning_rows(64)
    # The other rows are new to the model, so that it can learn and its answers differ.
    model = make_trained_model(cluster.folder / "tiny", examples[:24])
    for file in model.iterdir():
        client.upload_file(str(file), BUCKET, f"models/tiny/{file.name}")
    rows = cluster.folder / "rows.jsonl"
    write_jsonl(rows, examples)
    client.upload_file(str(rows), BUCKET, "data/rows.jsonl")


def write_values(cluster: ClusterEnvironment, name: str, changes: Mapping[str, Any]) -> Path:
    """Write `kind-cpu-values.yaml` for this cluster, with `changes` by dotted keys."""
    tree = yaml.safe_load(VALUES.read_text())
    overrides = {
        "cluster.store.endpoint": cluster.gateway.endpoint,
        "cluster.namespace": cluster.namespace,
        "cluster.image.pullPolicy": "IfNotPresent",
        "run.name": name,
    }
    for key, value in {**overrides, **changes}.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    suffix = abs(hash(json.dumps(changes, sort_keys=True, default=str)))
    file = cluster.folder / f"{name}-{suffix:x}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


__all__ = [
    "BUCKET",
    "LOCAL_CLUSTER",
    "ROOT",
    "ClusterEnvironment",
    "Skipped",
    "cluster_environment",
    "credentials_file",
    "wait",
    "write_values",
]
