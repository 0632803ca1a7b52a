"""Converts a GGUF file to a directory that transformers can train, save and load.

    <cluster.workDir>/models/gguf-<digest>/...     the converted model
                             gguf-<digest>.seal    seal of its files; see seal.py
                             gguf-<digest>.lock

A conversion is used by later runs, and others may be able to write to the work folder. It is
therefore verified before it is used, like an artifact.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from pathlib import Path
from typing import Any

from medjob.artifacts.seal import is_sealed, seal
from medjob.errors import InputError
from medjob.runtime.locks import locked
from medjob.sources.references import digest_of_path
from medjob.store import LocalStore

_log = logging.getLogger(__name__)


def convert_gguf(file: Path, folder: Path) -> Path:
    """Convert `file` to a bfloat16 model in `folder`, unless an earlier call has done it.

    A conversion whose files are not those that were sealed is made again.
    """
    if _is_intact(folder):  # without the lock, so that the processes of a training do not queue
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not _is_intact(folder):  # another process may have converted it meanwhile
            _convert_again(file, folder)
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether a conversion exists, and its files are exactly those that were sealed."""
    try:
        found = _seal_file(folder).read_text(encoding="ascii")
        intact = is_sealed(_sealed_content(folder), found, _store(folder))
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, InputError):
        return False  # not finished, deleted by another process, not a seal, or there is a link
    return intact and not folder.is_symlink()


def _sealed_content(folder: Path) -> dict[str, str]:
    """What the seal is computed from. The name keeps it from fitting another file's conversion."""
    return {"name": folder.name, "digest": digest_of_path(folder)}


def _seal_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.seal")


def _store(folder: Path) -> LocalStore:
    """The store whose key seals a conversion: the one for folders of this machine."""
    return LocalStore(folder.parent)


def _convert_again(file: Path, folder: Path) -> None:
    """Convert `file`, and replace what is at `folder`."""
    if folder.exists():
        _log.warning(
            "%s: is not what medjob converted, or is of an earlier version; it is made again "
            "from %s",
            folder,
            file,
        )
    partial = folder.with_name(f"{folder.name}.partial")
    for path in (folder, partial, _seal_file(folder)):
        _delete(path)
    partial.mkdir()
    _convert(file, partial)
    partial.rename(folder)
    _seal_file(folder).write_text(seal(_sealed_content(folder), _store(folder)), encoding="ascii")


def _delete(path: Path) -> None:
    """Delete a directory, a file, or a link but not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _convert(file: Path, folder: Path) -> None:
    """Write the model in `file` to `folder`.

    transformers can train the 4-bit blocks of a GGUF file only after they are dequantized.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _log.info("converting %s to safetensors, once", file.name)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be disabled
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
