"""Provenance of an artifact: versions, git revision, host. Not part of any key or digest."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from medjob import __version__

_LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "pyarrow",
    "boto3",
    "google-cloud-storage",
)


def provenance() -> dict[str, Any]:
    """Collect the versions of medjob and its libraries, the git revision and the host name."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "medjob": __version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "host": platform.node(),
        "libraries": versions,
    }


def _git_revision() -> str | None:
    """Return the commit of this checkout; None without a checkout or without git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
