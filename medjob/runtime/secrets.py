"""Secret files of a cluster become what the libraries read: a folder of files, one a secret, as Kubernetes mounts it."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from medjob.errors import InputError

_FOLDER = "/run/secrets/medjob"
# Where a library reads a file itself, it gets the path, and the content never enters the environment.
PATHS = {
    "aws-credentials": "AWS_SHARED_CREDENTIALS_FILE",
    "gcs.json": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf-token": "HF_TOKEN_PATH",
}
CONTENTS = {
    "mlflow-tracking-password": "MLFLOW_TRACKING_PASSWORD",
    "mlflow-tracking-token": "MLFLOW_TRACKING_TOKEN",
    "mlflow-tracking-username": "MLFLOW_TRACKING_USERNAME",
    "openai-api-key": "OPENAI_API_KEY",
    "wandb-api-key": "WANDB_API_KEY",
}


def install(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that the files in `MEDJOB_SECRETS` (default: /run/secrets/medjob) stand for.

    A variable that is set already stays as it is; files of other names are left alone.

    Raises:
        InputError: a file cannot be read.
    """
    folder = Path(environment.get("MEDJOB_SECRETS") or _FOLDER)
    for name, variable in {**PATHS, **CONTENTS}.items():
        if variable not in environment and (content := _content(folder / name)) is not None:
            environment[variable] = str(folder / name) if name in PATHS else content


def _content(path: Path) -> str | None:
    """What a file holds; None where there is none. (Read even if only its path is wanted: an unreadable one is told now, not by a library in an hour.)"""
    try:
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}", f"a secret has to be readable by uid {os.getuid()}"
        ) from error
    except UnicodeDecodeError:  # its own text would hold the secret's bytes
        raise InputError(
            f"{path}: is not UTF-8", "was another file stored under this name?"
        ) from None
