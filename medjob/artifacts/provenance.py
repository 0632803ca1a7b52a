"""What a marker says of where an artifact was made: versions, revision, host. None of it enters a key or a digest."""

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
    """Versions of this package and of the libraries, the git revision, the host."""
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
    """The commit of this checkout; None outside of one, or where there is no git."""
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
