"""Local data files: find those that a path, glob or directory names.

Every file is checked before it is opened, because opening a pipe waits for a writer.
"""

from __future__ import annotations

import glob
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

from medjob.config.data_suffixes import SUPPORTED, data_suffix
from medjob.errors import InputError
from medjob.sources.other_types import hint_for

# Descriptions of a data set. datasets writes them beside the rows.
_METADATA = ("dataset_info.json", "dataset_infos.json")
_SPLIT = re.compile(
    r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?=[-_.])", re.IGNORECASE
)
# Directories that Spark and Delta Lake write beside files that are not, or no longer, valid.
_INVALID = {
    "_delta_log": "is a Delta table, whose files also hold deleted rows",
    "_temporary": "is the output of a Spark job that has not ended",
}


def local_files(path: str, split: str | None = None) -> list[Path]:
    """List the data files of a local path, glob or directory, sorted. Each is listed once, even if
    several links lead to it.

    An existing path takes precedence over a glob, so names may contain brackets.

    Args:
        split: Which one to read of a directory with several splits that `save_to_disk` wrote.

    Raises:
        InputError: there are none, or one is not a readable regular file of a known type.
    """
    existing = _existing(path)
    if existing is None:
        found = _without_metadata(_glob(path))
    elif existing.is_dir():
        found = _folder_files(_split_folder(existing, split))[0]
    else:
        found = [existing]
    if not found:
        raise _no_files(path, existing)
    found = _without_second_links(found)
    for file in found:
        check_file(file)
    return found


def files_of_all_splits(path: str) -> list[Path]:
    """List the data files of every split in a directory that `save_to_disk` wrote, or none if the
    path is something else."""
    existing = _existing(path)
    splits = _saved_splits(existing) if existing is not None else []
    return [file for split in splits for file in local_files(str(split))]


def other_files(path: str, split: str | None = None) -> list[Path]:
    """List the files in a directory that are not read, because their type is unknown."""
    existing = _existing(path)
    if existing is None or not existing.is_dir():
        return []
    return _folder_files(_split_folder(existing, split))[1]


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a readable regular file whose ending is known."""
    name = printable(path)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = "is a broken link" if path.is_symlink() else f"cannot be read: {error.strerror}"
        raise InputError(f"{name}: {reason}") from None
    if stat.S_ISDIR(mode):
        raise InputError(
            f"{name}: is a directory", "name it without a glob, or add /*.jsonl to the glob"
        )
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{name}: is not a regular file", "write the rows to a file, and name that file"
        )
    if not is_utf8(path):
        raise InputError(f"{name}: the file's name is not UTF-8", "rename the file")
    if not data_suffix(path.name):
        raise InputError(f"{name}: unknown file type", hint_for([path.name]))
    if not os.access(path, os.R_OK):
        raise InputError(f"{name}: cannot be read: permission denied")


def printable(path: Path) -> str:
    """Return a path for a message, with the bytes that are not UTF-8 escaped."""
    return _escaped(str(path))


def _escaped(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_utf8(path: Path) -> bool:
    """Whether a path can be written to a file or a log."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_hidden(path: PurePath) -> bool:
    """Whether a relative path, or a directory in it, begins with a dot, as `.ipynb_checkpoints`."""
    return any(part.startswith(".") for part in path.parts)


def splits_in(paths: Iterable[Path]) -> list[str]:
    """Return the splits that the names of files say, sorted: `train` of `train-00000.parquet`."""
    return sorted({found[1].lower() for path in paths if (found := _SPLIT.search(path.name))})


def describe_others(names: Iterable[str]) -> str:
    """Count files that are not read, with their endings: `2 files are not data and were not read:
    .md, .xlsx`."""
    names = list(names)
    suffixes = sorted({PurePath(name).suffix.lower() or "no ending" for name in names})
    shown = ", ".join(suffixes[:10]) + (", ..." if len(suffixes) > 10 else "")
    verb = "file is" if len(names) == 1 else "files are"
    were = "was" if len(names) == 1 else "were"
    text = f"{len(names)} {verb} not data and {were} not read: {shown}"
    return _escaped(text)


def _existing(path: str) -> Path | None:
    """Return the path if it exists as it is written, or in another Unicode normal form.

    macOS stores decomposed names, and most editors write composed ones.
    """
    expanded = os.path.expanduser(path)  # noqa: PTH111  # Path raises if there is no home
    for name in (expanded, *(unicodedata.normalize(form, expanded) for form in ("NFC", "NFD"))):
        if os.path.lexists(name):
            return Path(name)
    return None


def _glob(path: str) -> list[Path]:
    """Expand a pattern. Existing directories at its start may have brackets in their names."""
    pattern = Path(os.path.expanduser(path))  # noqa: PTH111
    root = next((each for each in pattern.parents if os.path.isdir(each)), None)  # noqa: PTH112
    if root is None or "\0" in path:
        return []
    rest = str(pattern.relative_to(root))
    for form in ("NFC", "NFD"):
        normal = PurePath(unicodedata.normalize(form, rest))
        if found := _expand(root, normal.parts):
            return found
    return []


def _expand(root: Path, parts: tuple[str, ...]) -> list[Path]:
    """Expand the components of a pattern. `**` visits each directory once, while that of the
    standard library takes time without end if links lead to a parent directory."""
    if "**" not in parts:
        return [root / name for name in glob.glob(str(PurePath(*parts)), root_dir=root)]
    at = parts.index("**")
    rest = parts[at + 1 :]
    found: list[Path] = []
    for base in _expand(root, parts[:at]) if at else [root]:
        for folder, names in _walk(base) if base.is_dir() else ():
            found += _expand(folder, rest) if rest else [folder / name for name in names]
    return found


def _without_metadata(paths: list[Path]) -> list[Path]:
    """Leave out descriptions of a data set. The state of a saved one means that its directory was
    meant."""
    for path in paths:
        if path.name == "state.json" and path.with_name("dataset_info.json").exists():
            raise InputError(
                f"{printable(path)}: is the state of a data set that save_to_disk wrote",
                f"name its directory: {printable(path.parent)}",
            )
    return [path for path in paths if path.name not in _METADATA]


def _folder_files(root: Path) -> tuple[list[Path], list[Path]]:
    """List the data files below a directory, and the other files. Both are sorted."""
    data: list[Path] = []
    others: list[Path] = []
    for folder, names in _walk(root):
        if folder.name in _INVALID:
            raise InputError(
                f"{printable(folder.parent)}: {_INVALID[folder.name]}",
                "write the rows to Parquet files in another directory",
            )
        if "dataset_dict.json" in names:
            raise _several_splits(folder)
        if "dataset_info.json" in names and "state.json" in names:
            data += _saved_files(folder)
            continue
        if "dataset_info.json" in names and any(name.endswith(".arrow") for name in names):
            raise InputError(
                f"{printable(folder)}: is a cache of datasets, which mixes splits and versions",
                "save the data set with save_to_disk, or write it to a JSON lines file",
            )
        for name in names:
            if name not in _METADATA:
                (data if data_suffix(name) else others).append(folder / name)
    return sorted(data), sorted(others)


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every directory below `root` with its files, except hidden ones. Links to directories
    are followed, and each directory is listed once."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{printable(Path(str(error.filename)))}: {error.strerror}")

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def _saved_files(folder: Path) -> list[Path]:
    """List the files of a data set that `save_to_disk` wrote. Its state names them, and other files
    may be left over from an earlier one."""
    path = folder / "state.json"
    if not path.is_file():
        raise InputError(f"{printable(path)}: is not a regular file", "save the data set again")
    try:
        state = json.loads(path.read_bytes())
        names = [Path(each["filename"]).name for each in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{printable(path)}: not the state of a data set that save_to_disk wrote "
            f"({type(error).__name__})",
            "save the data set again",
        ) from None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise InputError(
            f"{printable(folder)}: rows are selected by a file of indices, which is not supported",
            "save the data set with save_to_disk of a current version of datasets",
        )
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise InputError(
            f"{printable(folder)}: {len(missing)} of the {len(names)} files in state.json are "
            f"missing, such as {missing[0]}",
            "copy the whole directory that save_to_disk wrote",
        )
    return [folder / name for name in names]


def _saved_splits(folder: Path) -> list[Path]:
    """List the directories of the splits that `save_to_disk` wrote."""
    if not (folder / "dataset_dict.json").is_file():
        return []
    return sorted(path.parent for path in folder.glob("*/state.json"))


def _split_folder(folder: Path, split: str | None) -> Path:
    """Return the directory of a split, or the directory itself if it has none."""
    splits = {path.name: path for path in _saved_splits(folder)}
    if split is None:
        return next(iter(splits.values())) if len(splits) == 1 else folder
    if not splits:
        raise InputError(
            f"{printable(folder)}: has no splits, but split is {split!r}",
            "remove split; only a directory that save_to_disk wrote, or a hub data set, has splits",
        )
    if split not in splits:
        raise InputError(
            f"{printable(folder)}: no split {split!r} was written by save_to_disk",
            f"set split to one of: {', '.join(splits)}; limit selects the first rows",
        )
    return splits[split]


def _several_splits(folder: Path) -> InputError:
    names = [printable(Path(path.name)) for path in _saved_splits(folder)]
    return InputError(
        f"{printable(folder)}: contains {len(names)} splits that save_to_disk wrote",
        f"name this directory and set split, or name the directory of one split: "
        f"{', '.join(names)}",
    )


def _without_second_links(paths: list[Path]) -> list[Path]:
    """Keep the shortest of all paths that lead to a file. A glob follows a link to a parent
    directory again and again."""
    shortest: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        shortest.setdefault(os.path.realpath(path), path)
    return sorted(shortest.values())


def _no_files(path: str, existing: Path | None) -> InputError:
    others = _folder_files(existing)[1] if existing is not None else []
    if others:
        return InputError(
            f"{path}: no data files, and {describe_others(each.name for each in others)}",
            hint_for([_escaped(each.name) for each in others]),
        )
    if existing is not None:
        return InputError(f"{path}: no data files in this directory", f"supported: {SUPPORTED}")
    return InputError(
        f"{path}: no such data file",
        "name a local path or glob, package:NAME/FILE, or a hub id such as org/name",
    )
