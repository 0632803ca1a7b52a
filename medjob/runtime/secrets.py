"""Make secrets that Kubernetes mounts as files available to the libraries that need them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, MutableMapping
from itertools import chain
from pathlib import Path

from medjob.errors import ConfigError, InputError

_FOLDER = "/run/secrets/medjob"
_MAX_CHARS = 10_000  # Linux starts no process with a variable of more than 128 KiB
# Libraries that can read a file get its path, so that the secret does not enter the environment.
PATHS = {
    "aws-credentials": "AWS_SHARED_CREDENTIALS_FILE",
    "gcs.json": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf-token": "HF_TOKEN_PATH",
}
CONTENTS = {
    "mlflow-tracking-password": "MLFLOW_TRACKING_PASSWORD",
    "mlflow-tracking-token": "MLFLOW_TRACKING_TOKEN",
    "mlflow-tracking-username": "MLFLOW_TRACKING_USERNAME",
    "wandb-api-key": "WANDB_API_KEY",
}

# What the processes of a training do without: their parent does all I/O with the store.
STORE_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
HUB_VARIABLES = ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN")
TRACKER_VARIABLES = {
    "mlflow": tuple(name for name in CONTENTS.values() if name.startswith("MLFLOW_")),
    "wandb": ("WANDB_API_KEY",),
}


def withheld(
    trackers: Collection[str], hub: bool, environment: Mapping[str, str] = os.environ
) -> set[str]:
    """Names of the variables with secrets that a training process does not need.

    Args:
        trackers: Those that it reports to.
        hub: Whether it reads a model from a hub.
    """
    used = set(chain.from_iterable(TRACKER_VARIABLES.get(name, ()) for name in trackers))
    of_trackers = set(chain.from_iterable(TRACKER_VARIABLES.values()))
    of_endpoints = {name for name in environment if name.endswith("_API_KEY")}
    of_hub = () if hub else HUB_VARIABLES
    return {*STORE_VARIABLES, *of_hub, *((of_trackers | of_endpoints) - used)}


def install(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set an environment variable for each known file in `MEDJOB_SECRETS` (/run/secrets/medjob).

    Variables that are already set are kept. Files with other names are ignored.

    Raises:
        ConfigError: `MEDJOB_SECRETS` is not a folder.
        InputError: A file is not readable, or does not fit into a variable.
    """
    folder = Path(environment.get("MEDJOB_SECRETS") or _FOLDER)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"MEDJOB_SECRETS must be a folder (got {folder})")
    for name, variable in {**PATHS, **CONTENTS}.items():
        if variable not in environment and (content := _content(folder / name)) is not None:
            value = str(folder / name) if name in PATHS else content
            if "\0" in value or len(value) > _MAX_CHARS:
                raise InputError(
                    f"{folder / name}: must be text of at most {_MAX_CHARS:,} characters",
                    "check which file is stored under this name",
                )
            environment[variable] = value


def secret(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The text of one file in the secrets folder, or None if there is none.

    Raises:
        InputError: The file is not readable.
    """
    return _content(Path(environment.get("MEDJOB_SECRETS") or _FOLDER) / name)


def api_key(variable: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The API key of an endpoint: the variable's value, or the text of `openai-api-key` in the
    secrets folder for OPENAI_API_KEY. None if there is neither.

    It does not enter the environment, so that no other process inherits it.

    Raises:
        InputError: The file is not readable.
    """
    name = variable.lower().replace("_", "-")
    return environment.get(variable) or secret(name, environment) or None


def _content(path: Path) -> str | None:
    """The content of a file, or None if it does not exist.

    Also called for files of which only the path is needed: it is better to fail now than when a
    library opens the file an hour later.
    """
    try:
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}", f"make the file readable for uid {os.getuid()}"
        ) from error
    except UnicodeDecodeError:  # the text of this exception contains bytes of the secret
        raise InputError(
            f"{path}: is not UTF-8 text", "check which file is stored under this name"
        ) from None
