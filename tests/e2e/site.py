"""The place of the end-to-end tests: a cluster, images on its nodes, an S3 server that its pods reach, a strict namespace."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.gateway import Gateway, gateway
from tests.e2e.images import load_images
from tests.e2e.model import make_speaking_model
from tests.e2e.place import LOCAL, ROOT
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
    """This cluster has not what the row needs."""


@dataclass(slots=True)
class Site:
    """Where everything is."""

    kubeconfig: str
    namespace: str
    door: Gateway
    folder: Path
    local: bool
    """Whether the cluster is the one of `LOCAL`, whose nodes can lose power."""

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl in the namespace; what it prints."""
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
        """Objects of a kind."""
        return list(json.loads(self.kubectl("get", kind, "-l", selector, "-o", "json"))["items"])

    def medjob(
        self, *arguments: str, check: bool = True, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run the client as a user would."""
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
                f"medjob {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-1500:]}"
            )
        return done

    def helm(self, *arguments: str) -> str:
        """Run helm in the namespace; what it prints."""
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
        """What a drain or a more important pod does."""
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

    def needs_power_switches(self) -> None:
        """For rows that stop nodes or cut them off."""
        if not self.local:
            raise Skipped("nodes of this cluster cannot be stopped or cut off from here")

    def node(self, verb: str, name: str) -> None:
        """stop-node, start-node, cut-node, join-node of the local cluster."""
        subprocess.run([str(LOCAL), verb, name.rpartition("-")[2]], check=True, capture_output=True)

    def wait_for_nodes(self) -> None:
        """Until every node of the local cluster is Ready."""
        ready = '{range .items[*]}{.status.conditions[?(@.type=="Ready")].status}{" "}{end}'
        wait(
            "both nodes Ready",
            lambda: (
                self.kubectl("get", "nodes", "-o", f"jsonpath={ready}").split() == ["True", "True"]
            ),
            120,
        )

    def verify(self, run: str) -> str:
        """`medjob verify` on the run, from this machine: every byte."""
        done = self.medjob(
            "verify",
            "--store",
            f"s3://{BUCKET}/runs",
            "--run",
            run,
            "--set",
            f"cluster.store.endpoint={self.door.endpoint}",
            "--set",
            "cluster.store.addressingStyle=path",
        )
        lines = [line for line in done.stdout.splitlines() if "verified" in line]
        return f"{len(lines)} artifacts and checkpoints verified"

    def objects(self, prefix: str) -> list[str]:
        """Keys in the bucket."""
        client: Any = s3_client(self.door.endpoint)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def read(self, key: str) -> dict[str, Any]:
        """A JSON object of the bucket."""
        client: Any = s3_client(self.door.endpoint)
        return dict(json.loads(client.get_object(Bucket=BUCKET, Key=key)["Body"].read()))

    def remove(self, prefix: str) -> None:
        """Delete a prefix."""
        client: Any = s3_client(self.door.endpoint)
        for key in self.objects(prefix):
            client.delete_object(Bucket=BUCKET, Key=key)


def wait(what: str, look: Callable[[], Any], seconds: float = 180, every: float = 0.5) -> Any:
    """Look until there is something to see."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(every)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


@contextlib.contextmanager
def site(nodes: int) -> Iterator[Site]:
    """Take a cluster (KUBECONFIG, or the local one with `nodes`), put the images and the data in place, and clear up afterwards."""
    local = "KUBECONFIG" not in os.environ
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medjob-e2e-")))
        if local:
            subprocess.run([str(LOCAL), "up", str(nodes)], check=True)
            if "E2E_KEEP" not in os.environ:
                stack.callback(subprocess.run, [str(LOCAL), "down"], check=False)
            kubeconfig = (
                subprocess.run([str(LOCAL), "env"], check=True, capture_output=True, text=True)
                .stdout.strip()
                .partition("=")[2]
            )
        else:
            kubeconfig = os.environ["KUBECONFIG"]
        load_images()
        endpoint = stack.enter_context(seaweedfs(folder / "s3"))
        door = stack.enter_context(gateway(endpoint, os.environ.get("E2E_HOST", "10.245.0.254")))
        place = Site(kubeconfig, f"medjob-e2e-{uuid.uuid4().hex[:6]}", door, folder, local)
        stack.enter_context(_namespace(place))
        _seed(place)
        yield place


@contextlib.contextmanager
def _namespace(place: Site) -> Iterator[None]:
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": place.namespace, "labels": labels},
    }
    credentials = (
        f"[default]\naws_access_key_id = {USER_KEY}\naws_secret_access_key = {USER_SECRET}\n"
    )
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "medjob", "namespace": place.namespace},
        "stringData": {"aws-credentials": credentials},
    }
    place.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    place.kubectl("apply", "-f", "-", stdin=json.dumps(secret))
    try:
        yield
    finally:
        place.kubectl("delete", "namespace", place.namespace, "--wait=false", check=False)


def _seed(place: Site) -> None:
    """The small model and the rows, as a user would have put them into the bucket."""
    client: Any = s3_client(place.door.endpoint)
    client.create_bucket(Bucket=BUCKET)
    examples = reasoning_rows(64)
    model = make_speaking_model(
        place.folder / "tiny", examples[:24]
    )  # the others are left to learn, and to disagree about
    for file in model.iterdir():
        client.upload_file(str(file), BUCKET, f"models/tiny/{file.name}")
    rows = place.folder / "rows.jsonl"
    write_jsonl(rows, examples)
    client.upload_file(str(rows), BUCKET, "data/rows.jsonl")


def write_values(place: Site, name: str, changes: Mapping[str, Any]) -> Path:
    """`kind-cpu-values.yaml` for this site, with `changes` by dotted keys."""
    tree = yaml.safe_load(VALUES.read_text())
    own = {
        "cluster.store.endpoint": place.door.endpoint,
        "cluster.namespace": place.namespace,
        "cluster.image.pullPolicy": "IfNotPresent",
        "run.name": name,
    }
    for key, value in {**own, **changes}.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    path = (
        place.folder
        / f"{name}-{abs(hash(json.dumps(changes, sort_keys=True, default=str))):x}.yaml"
    )
    path.write_text(yaml.safe_dump(tree))
    return path


__all__ = ["BUCKET", "LOCAL", "ROOT", "Site", "Skipped", "site", "wait", "write_values"]
