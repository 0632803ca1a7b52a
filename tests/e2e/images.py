"""The images, built and brought to the nodes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.e2e.place import LOCAL, ROOT

NAMES = ("medjob-core:dev", "medjob:dev")
_HOME = Path(os.environ.get("CLUSTER_HOME", "/var/lib/local-cluster"))


def load_images() -> None:
    """Build both images and put them on the nodes. E2E_LOAD names a command that takes image names, such as `kind load docker-image`.

    E2E_IMAGES=there skips both: the nodes have them already.
    """
    if os.environ.get("E2E_IMAGES") == "there":
        return
    if "E2E_LOAD" in os.environ or "KUBECONFIG" in os.environ:
        if "E2E_LOAD" not in os.environ:
            sys.exit(
                "error: E2E_LOAD is not set: how do images come to this cluster's nodes?\nhint: E2E_LOAD='kind load docker-image'"
            )
        _build()
        subprocess.run([*os.environ["E2E_LOAD"].split(), *NAMES], check=True)
        return
    subprocess.run([str(LOCAL), "docker"], check=True)
    _build()
    _to_local_nodes()


def _build() -> None:
    own = (
        ["DOCKER=/usr/bin/docker"] if "KUBECONFIG" not in os.environ else []
    )  # the client that came with its engine
    subprocess.run(["make", "image", "TAG=dev", *own], cwd=ROOT, check=True)


def _to_local_nodes() -> None:
    """Into the first node, and from there by hard links into the others: a node would keep 11 GB of its own, layers and unpacked."""
    first, *others = sorted(folder.name for folder in _HOME.glob("node-*"))
    for image in NAMES:
        save = subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE)
        subprocess.run(
            [*_ctr(first), "images", "import", "-"],
            stdin=save.stdout,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        assert save.wait() == 0, f"docker save {image}"
        _drop_layers(first)
    if others:
        _share(first, others)


def _drop_layers(node: str) -> None:
    """Remove the packed layers, which only a push would need; containers run from the unpacked ones."""
    listed = subprocess.run(
        [*_ctr(node), "content", "ls"], capture_output=True, text=True, check=True
    ).stdout
    for line in listed.splitlines()[1:]:
        digest, size = line.split()[:2]
        if size.endswith(("MB", "GB", "MiB", "GiB")):
            subprocess.run([*_ctr(node), "content", "rm", digest], check=True, capture_output=True)


def _share(first: str, others: list[str]) -> None:
    for node in (first, *others):
        subprocess.run(
            [str(LOCAL), "stop-node", node.rpartition("-")[2]], check=True, capture_output=True
        )
    source = _HOME / first / "containerd" / "root"
    for node in others:
        target = _HOME / node / "containerd" / "root"
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-al", str(source), str(target)], check=True)
        for database in target.rglob("*.db"):  # these are written to
            own = database.with_suffix(".own")
            shutil.copy2(database, own)
            own.replace(database)
    for node in (first, *others):
        subprocess.run(
            [str(LOCAL), "start-node", node.rpartition("-")[2]], check=True, capture_output=True
        )


def _ctr(node: str) -> list[str]:
    return ["ctr", "-a", str(_HOME / node / "containerd.sock"), "-n", "k8s.io"]
