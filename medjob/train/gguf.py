"""Converts a GGUF file to a directory that transformers can train, save and load."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def convert_gguf(file: Path, folder: Path) -> Path:
    """Convert `file` to a bfloat16 model in `folder`, unless an earlier call has done it.

    transformers can train the 4-bit blocks of a GGUF file only after they are dequantized.
    """
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _log.info("converting %s to safetensors, once", file.name)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
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
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)  # atomic
    except OSError:
        shutil.rmtree(partial)  # another process finished first
    return folder
