"""Copies of models and data sets: `fetch` publishes them, and stages place them on a local disk.

    <fetch's artifact>/mirror/<name>/...    <cluster.workDir>/models/mirror/<name>/...
                                                                     <name>-light/...    no weights

A name depends on the contents and not on the address, so runs on one machine share their copies.
"""

from __future__ import annotations

from pathlib import Path

from medjob.artifacts.artifact import Artifact, Manifest
from medjob.errors import InputError
from medjob.runtime.files import fingerprint
from medjob.runtime.locks import locked
from medjob.sources.references import Reference, is_copied, name_of

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def copy_name(reference: Reference, pin: str) -> str:
    """Return the path of a copy, relative to the artifact and to the directory for models."""
    # The digest of copied objects identifies them. A hub's commit is only unique with its id.
    contents = [pin] if is_copied(reference) else [name_of(reference), pin]
    return f"mirror/{fingerprint(contents)[:16]}"


def copies_in(manifest: Manifest) -> frozenset[str]:
    """Return the names of the copies in a published `fetch`."""
    paths = [file.path for file in manifest.files if file.path.startswith("mirror/")]
    return frozenset("/".join(path.split("/")[:2]) for path in paths)


def place_copy(
    artifact: Artifact, manifest: Manifest, name: str, cache: Path, weights: bool = True
) -> Path:
    """Download the copy `name` to `cache`, and verify every byte, also of files that are there.

    Returns its directory. A lock makes other processes on this machine wait.

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
    with locked(folder.with_name(f"{folder.name}.lock")):
        # An interrupted download resumes from the files in `partial`.
        partial = folder.with_name(f"{folder.name}.partial")
        found = folder if folder.is_dir() else partial
        artifact.fetch(manifest, found, name)
        _refuse_added_files(manifest, found, name)
        return found.rename(folder)  # no change if it was there


def _refuse_added_files(manifest: Manifest, folder: Path, name: str) -> None:
    """Refuse files that were put beside those of a copy, since a stage would read them too; and
    links, whose targets can change during a stage."""
    published = {folder / file.path.removeprefix(f"{name}/") for file in manifest.files}
    added = [
        path
        for path in folder.rglob("*")
        if path.is_symlink() or (path.is_file() and path not in published)
    ]
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
