"""Copies of models and data sets: `fetch` publishes them, and stages place them on a local disk.

    <fetch's artifact>/mirror/<name>/...    <cluster.workDir>/models/mirror/<name>/...
                                                                     <name>-light/...    no weights

A name depends on the contents and not on the address, so runs on one machine share their copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from medjob.artifacts.artifact import Artifact, Manifest
from medjob.errors import InputError
from medjob.runtime.files import files_below, fingerprint
from medjob.runtime.locks import lock
from medjob.sources.references import Reference, is_bucket, is_remote, name_of

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def copy_name(reference: Reference, pin: str) -> str:
    """Return the path of a copy, relative to the artifact and to the directory for models."""
    # The digest of a bucket's objects identifies them. A hub's commit is only unique with its id.
    contents = [pin] if is_bucket(reference) else [name_of(reference), pin]
    return f"mirror/{fingerprint(contents)[:16]}"


def copies_in(manifest: Manifest) -> frozenset[str]:
    """Return the names of the copies in a published `fetch`."""
    paths = [file.path for file in manifest.files if file.path.startswith("mirror/")]
    return frozenset("/".join(path.split("/")[:2]) for path in paths)


def find_local_copy(
    reference: Reference, pins: Mapping[str, str], cache: Path, weights: bool = True
) -> Path | None:
    """Return the directory of a copy that `place_copy` placed on this disk, if there is one."""
    pin = pins.get(reference.key)
    if pin is None or not is_remote(reference):
        return None
    folder = cache / copy_name(reference, pin)
    if folder.is_dir():
        return folder
    light = _light_folder(folder)
    return light if not weights and light.is_dir() else None


def place_copy(
    artifact: Artifact, manifest: Manifest, name: str, cache: Path, weights: bool = True
) -> None:
    """Download the copy `name` to `cache`, and verify every byte, also of files that are there.

    A lock makes other processes on this machine wait.

    Args:
        weights: Whether to download a model's weights.

    Raises:
        InputError: a file is missing or damaged in the store, or was added to the directory.
    """
    folder = cache / name
    if not weights:
        manifest = _without_weights(manifest)
        folder = folder if folder.is_dir() else _light_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            artifact.fetch(manifest, folder, name)
            _refuse_added_files(manifest, folder, name)
            return
        # An interrupted download resumes from the files in here.
        partial = folder.with_name(f"{folder.name}.partial")
        artifact.fetch(manifest, partial, name)
        partial.rename(folder)


def _refuse_added_files(manifest: Manifest, folder: Path, name: str) -> None:
    """Refuse files that were put beside those of a copy: a stage would read them too."""
    published = {file.path.removeprefix(f"{name}/") for file in manifest.files}
    added = [path for path, _ in files_below(folder) if path not in published]
    if added:
        raise InputError(
            f"{folder}: {len(added)} files do not belong to this copy",
            f"delete {folder}; the next stage downloads the copy again",
        )


def _without_weights(manifest: Manifest) -> Manifest:
    files = [file for file in manifest.files if not file.path.endswith(_WEIGHTS)]
    return manifest.model_copy(update={"files": files})


def _light_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-light")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        lock(file, path.parent)
        yield
