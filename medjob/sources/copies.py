"""Copies of models and data that `fetch` put into the store: how they are named, and how they come onto a disk.

    <fetch's artifact>/mirror/<name>/...    <cluster.workDir>/models/mirror/<name>/...
                                                                     <name>-light/...    without the weights

The name is of the content and not of where it came from: what two runs of a machine use is there once.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path

from medjob.artifacts.artifact import Artifact, Manifest
from medjob.runtime.files import fingerprint
from medjob.sources.references import Reference, is_bucket, is_remote, name_of

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def copy_name(reference: Reference, pin: str) -> str:
    """Path of a copy, in the artifact and below the folder for models. (A hub's commit says nothing without the id.)"""
    return (
        f"mirror/{fingerprint([pin] if is_bucket(reference) else [name_of(reference), pin])[:16]}"
    )


def copies_in(manifest: Manifest) -> frozenset[str]:
    """Names of the copies that a published `fetch` holds."""
    return frozenset(
        "/".join(file.path.split("/")[:2])
        for file in manifest.files
        if file.path.startswith("mirror/")
    )


def local_copy(
    reference: Reference, pins: Mapping[str, str], cache: Path, weights: bool = True
) -> Path | None:
    """The folder on this disk that holds a copy of `reference`, if there is one: a stage's parent places those it needs."""
    pin = pins.get(reference.key)
    if pin is None or not is_remote(reference):
        return None
    folder = cache / copy_name(reference, pin)
    return next(
        (each for each in (folder, *([] if weights else [_light(folder)])) if each.is_dir()), None
    )


def place(
    artifact: Artifact, manifest: Manifest, name: str, cache: Path, weights: bool = True
) -> None:
    """Place the copy `name` below `cache`, every byte verified, also of one that is there. Others of this machine wait meanwhile.

    Raises:
        InputError: a file is missing or damaged in the store.
    """
    folder = cache / name
    if not weights:
        manifest = manifest.model_copy(
            update={"files": [file for file in manifest.files if not file.path.endswith(_WEIGHTS)]}
        )
        folder = folder if folder.is_dir() else _light(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            artifact.fetch(manifest, folder, name)
            return
        partial = folder.with_name(
            f"{folder.name}.partial"
        )  # one that was interrupted goes on where it stood
        artifact.fetch(manifest, partial, name)
        partial.rename(folder)


def _light(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-light")


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
