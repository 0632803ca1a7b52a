"""A package's GGUF file as a folder that transformers can train, save and load."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def unpack_gguf(file: Path, folder: Path) -> Path:
    """Dequantise `file` to bfloat16 in `folder`, unless an earlier call has done it.

    transformers keeps the 4-bit blocks of a GGUF unless told to dequantise, and then marks the model as quantised, which
    it no longer is; both marks are removed so that the folder loads like any other.
    """
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _log.info("unpacking %s (once)", file.name)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar knows no switch
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)  # whole or not at all
    except OSError:
        shutil.rmtree(partial)  # another process was first
    return folder
