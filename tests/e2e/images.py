"""Build the images and load them onto the nodes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from tests.e2e.paths import CLUSTER_HOME, LOCAL_CLUSTER, ROOT, is_local

NAMES = {"core": "medjob-core:dev", "full": "medjob:dev", "vllm": "medjob-vllm:dev"}


def load_images(images: Sequence[str]) -> None:
    """Build `images`, which are keys of NAMES, and load them onto the nodes. The image `vllm` has
    vLLM's build for CPUs.

    E2E_LOAD is a command that takes image names, such as `kind load docker-image`. With
    E2E_IMAGES=there nothing is built or loaded, because the nodes already have the images.
    """
    if os.environ.get("E2E_IMAGES") == "there":
        return
    if "E2E_LOAD" in os.environ or not is_local():
        if "E2E_LOAD" not in os.environ:
            sys.exit(
                "error: E2E_LOAD is not set, so images cannot be loaded onto the nodes\n"
                "hint: set it to a command that takes image names, such as 'kind load docker-image'"
            )
        _build(images)
        names = [NAMES[image] for image in images]
        subprocess.run([*os.environ["E2E_LOAD"].split(), *names], check=True)
        return
    subprocess.run([str(LOCAL_CLUSTER), "docker"], check=True)
    _build(images)
    _load_onto_local_nodes(images)


def _build(images: Sequence[str]) -> None:
    # For the local cluster, use the client that was installed with its engine.
    docker = ["DOCKER=/usr/bin/docker"] if is_local() else []
    options = [f"IMAGES={' '.join(images)}", "BUILD_ARGS=--build-arg VLLM=cpu"]
    subprocess.run(["make", "image", "TAG=dev", *options, *docker], cwd=ROOT, check=True)


def _load_onto_local_nodes(images: Sequence[str]) -> None:
    """Import the images on the first node, and share its files with the other nodes by hard links.

    Otherwise each node would need 14 GB for the layers and the unpacked files. Images that are
    saved together are saved with one copy of the layers that they share.
    """
    first, *others = sorted(folder.name for folder in CLUSTER_HOME.glob("node-*"))
    names = [NAMES[image] for image in images]
    save = subprocess.Popen(["docker", "save", *names], stdout=subprocess.PIPE)
    subprocess.run(
        [*_ctr(first), "images", "import", "-"],
        stdin=save.stdout,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    assert save.wait() == 0, f"docker save {names}"
    _remove_packed_layers(first)
    if others:
        _share_image_files(first, others)


def _remove_packed_layers(node: str) -> None:
    """Remove the packed layers. Containers use the unpacked ones, and only a push needs these."""
    listed = subprocess.run(
        [*_ctr(node), "content", "ls"], capture_output=True, text=True, check=True
    ).stdout
    for line in listed.splitlines()[1:]:
        digest, size = line.split()[:2]
        if size.endswith(("MB", "GB", "MiB", "GiB")):
            subprocess.run([*_ctr(node), "content", "rm", digest], check=True, capture_output=True)


def _share_image_files(first: str, others: list[str]) -> None:
    """Replace the image files of `others` by hard links to those of `first`."""
    for node in (first, *others):
        subprocess.run(
            [str(LOCAL_CLUSTER), "stop-node", node.rpartition("-")[2]],
            check=True,
            capture_output=True,
        )
    source = CLUSTER_HOME / first / "containerd" / "root"
    for node in others:
        target = CLUSTER_HOME / node / "containerd" / "root"
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-al", str(source), str(target)], check=True)
        for database in target.rglob("*.db"):  # containerd writes to these, so they are copied
            copy = database.with_suffix(".copy")
            shutil.copy2(database, copy)
            copy.replace(database)
    for node in (first, *others):
        subprocess.run(
            [str(LOCAL_CLUSTER), "start-node", node.rpartition("-")[2]],
            check=True,
            capture_output=True,
        )


def _ctr(node: str) -> list[str]:
    return ["ctr", "-a", str(CLUSTER_HOME / node / "containerd.sock"), "-n", "k8s.io"]
